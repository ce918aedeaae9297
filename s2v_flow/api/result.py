"""What a run gave, for Python: the files, their frames, the latents, and players in a notebook."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from s2v_flow.cache.store import Store
from s2v_flow.errors import MissingError
from s2v_flow.graph.run import RunResult
from s2v_flow.wording import did_you_mean

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True, repr=False)
class Result(RunResult):
    """A `RunResult` that can be looked into; see there for its fields. `cache_root` is the cache folder of the run."""

    cache_root: Path = Path()

    @property
    def videos(self) -> dict[str, Path]:
        """The mp4 files by plan node ("video"; "seed=1/video" in a sweep)."""
        return {name: path for name, paths in self.outputs.items() for path in paths if path.suffix == ".mp4"}

    def frames(self, name: str | None = None) -> Iterator[NDArray[np.uint8]]:
        """Iterate over a delivered video's frames, decoded one by one: memory does not grow with its length.

        `name`: which of `videos`, where there are several.

        Returns:
            An iterator of uint8 arrays [H, W, 3], RGB, as they are after H.264.

        Raises:
            MissingError: There is no such video, or it is not there any more.
        """
        videos = self.videos
        if name is None and len(videos) == 1:
            name = next(iter(videos))
        if name not in videos:
            what = "the run wrote no video" if not videos else f"frames({name or ''}): which video is meant?"
            raise MissingError(what, fix=did_you_mean(name or "", videos, "videos"))
        from s2v_flow.media.video import VideoReader, probe_video

        return iter(VideoReader(videos[name], probe_video(videos[name]).fps))

    def latents(self) -> dict[str, Tensor]:
        """Return the sampled latents that the cache holds, by plan node ("first", "talk[1]").

        Returns:
            Raw latents, float32 [1, 16, F, H, W], on the CPU.

        Raises:
            S2VFlowError: One of them has been evicted since.
        """
        from safetensors.torch import load

        store, found = Store(self.cache_root), {}
        for name, entry in self.entries.items():
            if "latent" in entry.outputs:
                found[name] = load(store.read(entry.outputs["latent"]))["samples"]
        return found

    def _repr_html_(self) -> str:
        others = [f"{name}: {paths[0]}" for name, paths in self.outputs.items() if paths and name not in self.videos]
        failures = [f"{name} failed: {why}" for name, why in self.failures.items()]
        labelled = [(name.rpartition("/")[0] or name, path) for name, path in self.videos.items()]
        return players(repr(self)[1:-1], labelled, [*others, *failures])


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
