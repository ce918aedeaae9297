"""Lines for a terminal: coloured by ANSI codes and wrapped at words; as they are everywhere else."""

from __future__ import annotations

import os
import re
from shutil import get_terminal_size
from typing import TextIO

_CODES = {"bold red": "1;31", "red": "31", "green": "32", "yellow": "33", "cyan": "36", "dim": "2"}
_GROUPS = (  # what is coloured in a line: group 1
    ("green", r"^ *(HIT|ok|found|identical)(?=  )"),
    ("yellow", r"^ *(RUN|RESUME|warning)(?=  )"),
    ("cyan", r"^ *(LOAD)(?=  )"),
    ("dim", r"^( *SKIP  .*)$"),
    ("red", r"^ *(problem|missing)(?=  )"),
    ("bold red", r"^(?:.*?:\d+:\d+: )?(error(?:\[\w+\])?:|missing:)"),
    ("yellow", r"^ *(warning(?:\[\w+\])?:)"),
    ("cyan", r"^ *(note:|changed:)"),
    ("green", r"^  (fix:|kept:)"),
    ("red", r"^ +\| +(\^+)$"),
    ("green", r"(?:  |, )(finished|no mistakes)(?=  |$)"),
    ("red", r"  (failed|killed|interrupted)(?=  |$)"),
    ("yellow", r"(?<= )(->)(?= )"),
)
_UNWRAPPED = re.compile(r" *\d* \| |again: ")  # excerpts, and a command that is to be copied


def has_colour(stream: TextIO) -> bool:
    """Whether a stream shows colours: a terminal that is not dumb; NO_COLOR and FORCE_COLOR say otherwise."""
    if os.environ.get("NO_COLOR"):
        return False
    forced = os.environ.get("FORCE_COLOR")
    return forced != "0" if forced else is_terminal(stream)


def is_terminal(stream: TextIO) -> bool:
    """Whether a stream is a terminal that obeys escape sequences."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def for_people(text: str, stream: TextIO) -> str:
    """Return lines as a stream shows them best: a terminal's are wrapped at words, indented below their last column."""
    lines = text.split("\n")
    if stream.isatty():
        lines = [part for line in lines for part in _wrapped(line, get_terminal_size().columns)]
    return "\n".join(map(_coloured, lines) if has_colour(stream) else lines)


def _wrapped(line: str, width: int) -> list[str]:
    if len(line) <= width or _UNWRAPPED.match(line):
        return [line]
    import textwrap

    indent = len(line) - len(line.lstrip())
    columns = [found.end() for found in re.finditer(r"(?<=\S)  +(?=\S)", line) if found.end() <= 0.65 * width]
    hang = " " * (columns[-1] if columns else indent + 2)
    return textwrap.wrap(line, width, subsequent_indent=hang, break_long_words=False, break_on_hyphens=False)


def _coloured(line: str) -> str:
    for style, pattern in _GROUPS:
        found = re.search(pattern, line)
        if found:
            line = f"{line[: found.start(1)]}\x1b[{_CODES[style]}m{found[1]}\x1b[0m{line[found.end(1) :]}"
    return line
