"""A small picture inline in a terminal: by kitty's or iTerm2's protocol, else in half blocks."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console

ROWS = 12  # of the terminal, that a picture takes
_CHUNK = 4096  # bytes of a picture that one of kitty's escape sequences may carry

Protocol = Literal["kitty", "iterm2", "blocks"]


def protocol_of(environ: dict[str, str]) -> Protocol:
    """Return how the terminal takes pictures, by what it says of itself; what tmux and screen pass on are characters.

    Source: the Kitty graphics protocol; iTerm2's inline images protocol.
    """
    term, program = environ.get("TERM", ""), environ.get("TERM_PROGRAM", "")
    if "TMUX" in environ or term.startswith(("screen", "tmux")):
        return "blocks"
    if "KITTY_WINDOW_ID" in environ or term in ("xterm-kitty", "xterm-ghostty"):
        return "kitty"
    return "iterm2" if program in ("iTerm.app", "WezTerm") or environ.get("LC_TERMINAL") == "iTerm2" else "blocks"


def show_picture(path: Path, console: Console) -> None:
    """Show a picture in the lines that follow; nothing where a terminal has neither pictures nor colours, or no room.

    Raises:
        OSError: The picture cannot be read.
    """
    protocol = protocol_of(dict(os.environ))
    if console.height < 2 * ROWS or (protocol == "blocks" and console.color_system is None):
        return
    from PIL import Image

    with Image.open(path) as picture:
        picture.load()
    if protocol == "blocks":
        console.print(_blocks(picture))
        return
    from rich.segment import ControlType, Segment, Segments

    content = io.BytesIO()
    picture.save(content, format="PNG")
    text = "".join(kitty(content.getvalue()) if protocol == "kitty" else iterm2(content.getvalue()))
    room = "\n" * ROWS + f"\x1b[{ROWS}A"  # scrolled free before it is drawn
    control = Segment(f"{room}\x1b7{text}\x1b8\x1b[{ROWS}B", None, [(ControlType.CURSOR_DOWN, ROWS)])
    console.print(Segments([control]), end="\r")


def kitty(png: bytes) -> Iterator[str]:
    """Yield kitty's escape sequences for a picture of `ROWS` lines."""
    text = base64.b64encode(png).decode()
    parts = [text[start : start + _CHUNK] for start in range(0, len(text), _CHUNK)]
    for index, part in enumerate(parts):
        head = f"a=T,f=100,q=2,C=1,r={ROWS}," if index == 0 else ""
        yield f"\x1b_G{head}m={int(index < len(parts) - 1)};{part}\x1b\\"


def iterm2(png: bytes) -> Iterator[str]:
    """Yield iTerm2's escape sequence for a picture of `ROWS` lines."""
    text = base64.b64encode(png).decode()
    yield f"\x1b]1337;File=inline=1;size={len(png)};height={ROWS};preserveAspectRatio=1:{text}\x07"


def _blocks(picture: Any) -> Any:
    """Return a picture as text: a character's upper half is its colour, its lower half the background's."""
    from rich.text import Text

    columns = max(1, round(2 * ROWS * picture.width / picture.height))
    small = picture.convert("RGB").resize((columns, 2 * ROWS))
    text = Text(no_wrap=True)
    for row in range(0, 2 * ROWS, 2):
        for column in range(columns):
            upper, lower = ("#{:02x}{:02x}{:02x}".format(*small.getpixel((column, row + half))) for half in (0, 1))
            text.append("▀", f"{upper} on {lower}")
        text.append("\n" if row < 2 * ROWS - 2 else "")
    return text
