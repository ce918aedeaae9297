"""Plans and results as HTML, for notebooks. Everything that comes from a recipe or a file's name is escaped."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

EMBEDDED_BYTES = 8 << 20  # of all videos of a result: with more, the notebook links to the files
MAX_ROWS = 200
_COLOURS = {"HIT": "#1a7f37", "RUN": "#9a6700", "RESUME": "#9a6700", "MISSING": "#cf222e"}


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], notes: Iterable[str] = ()) -> str:
    """Return a table whose first column are statuses, and notes below it."""
    lines = [f"<b>{escape(title)}</b><table><tr>{''.join(f'<th>{escape(name)}</th>' for name in header)}</tr>"]
    for status, *others in rows[:MAX_ROWS]:
        style = f' style="color:{_COLOURS[status]};font-weight:bold"' if status in _COLOURS else ""
        cells = "".join(f'<td style="text-align:left">{escape(text)}</td>' for text in others)
        lines.append(f"<tr><td{style}>{escape(status)}</td>{cells}</tr>")
    lines.append("</table>")
    more = [f"and {len(rows) - MAX_ROWS} more"] if len(rows) > MAX_ROWS else []
    return "\n".join([*lines, *(f"<div>{escape(note)}</div>" for note in [*more, *notes])])


def players(title: str, videos: Sequence[tuple[str, Path]], notes: Iterable[str] = ()) -> str:
    """Return players for labelled videos, side by side: with the videos inside where they are small, else linked."""
    size = sum(path.stat().st_size for _, path in videos if path.is_file())
    shown = [_player(label, path, embeds=size <= EMBEDDED_BYTES) for label, path in videos[:MAX_ROWS]]
    grid = f'<div style="display:flex;flex-wrap:wrap;gap:8px">{"".join(shown)}</div>'
    return "\n".join([f"<b>{escape(title)}</b>{grid}", *(f"<div>{escape(note)}</div>" for note in notes)])


def _player(label: str, path: Path, *, embeds: bool) -> str:
    link = quote(os.path.relpath(path).replace(os.sep, "/"))
    caption = f'<figcaption>{escape(label)}: <a href="{link}">{escape(str(path))}</a></figcaption>'
    if not path.is_file():
        return f'<figure style="margin:0">{caption}this file is not there any more</figure>'
    source = f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}" if embeds else link
    video = f'<video controls preload="metadata" style="max-width:320px" src="{source}"></video>'
    return f'<figure style="margin:0">{video}{caption}</figure>'
