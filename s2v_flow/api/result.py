"""For Python: what a run would do, and what it gave: files, frames, latents; tables and players in a notebook."""

from __future__ import annotations

import base64
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from s2v_flow.cache.store import Store
from s2v_flow.errors import MissingError
from s2v_flow.graph.estimate import Estimate, Needs
from s2v_flow.graph.node import Plan
from s2v_flow.graph.run import RunResult
from s2v_flow.graph.status import TO_COMPUTE, NodeStatus, placing
from s2v_flow.nodes.chunk import Chunk
from s2v_flow.nodes.chunk_plan import FRAME_RATE_HZ
from s2v_flow.nodes.memory import ways_text
from s2v_flow.recipe.load import Recipe, Variant
from s2v_flow.wording import did_you_mean, size_text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True)
class Planned:
    """A plan with its statuses: what a run would do."""

    recipe: Recipe
    plan: Plan
    statuses: Mapping[str, NodeStatus]
    device: str
    estimate: Estimate
    cells: Mapping[str, Recipe] = field(default_factory=dict)
    variants: tuple[Variant, ...] = ()  # a matrix's cells
    free_bytes: int | None = None  # memory where the models will run; None: not known
    overwrites: bool = False  # a run takes the place of other files
    needs: Mapping[str, Needs] = field(default_factory=dict)  # of what must run
    vram: int | None = None  # the budget, in bytes; None: what is free

    def __repr__(self) -> str:
        facts = [f"{self.num_chunks} chunks", f"{self.num_frames} frames"] if self.num_frames else []
        facts += [f"{len(self.variants)} cells"] if self.variants else []
        counts = Counter(status.status for status in self.statuses.values())
        facts += [f"{count} {status}" for status, count in counts.items()]
        facts += [f"{len(self.plan.missing)} missing"] if self.plan.missing else []
        return f"<Planned {self.recipe.path} on {self.device}: {', '.join(facts)}>"

    def _repr_html_(self) -> str:
        found = [(self.statuses[node.name], node) for node in self.plan.nodes]
        rows = [(status.status, node.name, node.kind, status.reason) for status, node in found]
        missing = [f"missing: {item.file} ({item.kind})" for item in self.plan.missing]
        return table(repr(self)[1:-1], ("status", "node", "kind", "why"), rows, [*missing, *self.notes])

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of a matrix's cells."""
        return tuple(variant.cell.label for variant in self.variants)

    def recipe_of(self, node: str) -> Recipe:
        """Return the recipe that a plan node belongs to: its cell's in a matrix."""
        return self.cells.get(node, self.recipe)

    @property
    def num_chunks(self) -> int | None:
        """How many chunks are sampled; None where the voice's file is missing."""
        if self._lengths("chunks") == [None]:
            return None
        return sum(isinstance(node.node, Chunk) for node in self.plan.nodes)

    @property
    def num_frames(self) -> int | None:
        """How many frames the longest video has; None where there is none or its length is not known."""
        return max((length for length in self._lengths("frames") if length is not None), default=None)

    @property
    def seconds(self) -> float | None:
        """How long the longest video lasts; None where there is none or its length is not known."""
        return max((length for length in self._lengths("seconds") if length is not None), default=None)

    @property
    def silent_seconds(self) -> float | None:
        """How much of the last chunk lies past the voice's end and is cut; None where that is not known."""
        return max((frames / FRAME_RATE_HZ for frames in self._lengths("silent_frames") if frames), default=None)

    @property
    def has_work(self) -> bool:
        """Whether a run would compute anything."""
        return any(status.status in TO_COMPUTE for status in self.statuses.values())

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know before running."""
        notes = [*self.plan.notes, *placing(self.plan, self.statuses, overwrites=self.overwrites)]
        if not any(node.node.is_sink for node in self.plan.nodes):
            notes.append("the recipe writes no file: results stay in the cache (add a save_video node)")
        ways = ways_text(self.needs)
        if ways:
            size = min(size for size in (self.free_bytes, self.vram) if size is not None)
            notes.append(f"to fit into {size_text(size, is_memory=True)} of memory, with the same result: {ways}")
        largest = self.estimate.largest
        if largest is not None and self.free_bytes is not None and (largest[1].peak_bytes or 0) > self.free_bytes:
            needed, free = (size_text(size, is_memory=True) for size in (largest[1].peak_bytes or 0, self.free_bytes))
            notes.append(
                f"{largest[0]} will need about {needed} of memory, {free} are free: take a "
                "smaller size, a shorter length or bf16, or end other programs"
            )
        return tuple(notes)

    @property
    def loras(self) -> list[dict[str, Any]]:
        """How much of each LoRA has a home in its model: {id, file, matched, total, unmatched}, counted in tensors.

        The last three are None where one of the files is missing.
        """
        return [lora for node in self.plan.nodes for lora in node.facts.get("loras", ())]

    def _lengths(self, fact: str) -> list[Any]:
        return list(dict.fromkeys(node.facts[fact] for node in self.plan.nodes if fact in node.facts))

    def to_json(self) -> dict[str, Any]:
        """Return the object that `s2vflow plan --json` prints."""
        nodes = []
        for node in self.plan.nodes:
            status = self.statuses[node.name]
            entry: dict[str, Any] = {
                "name": node.name,
                "kind": node.kind,
                "version": node.node.version,
                "status": status.status,
                "reason": status.reason,
            }
            cost = self.estimate.nodes.get(node.name)
            entry |= {"estimate": vars(cost)} if cost else {}
            memory = self.estimate.memory.get(node.name)
            entry |= {"memory": vars(memory)} if memory else {}
            need = self.needs.get(node.name)
            entry |= {"way": dict(need.way)} if need is not None and need.way else {}
            facts = {key: fact for key, fact in node.facts.items() if key != "loras"}
            nodes.append({**entry, "fingerprint": status.fingerprint, "facts": facts})
        return {
            "recipe": str(self.recipe.path),
            "device": self.device,
            "chunks": self.num_chunks,
            "frames": self.num_frames,
            "seconds": self.seconds,
            "silent_seconds": self.silent_seconds,
            "nodes": nodes,
            "estimate": {
                "seconds": self.estimate.seconds,
                "disk_bytes": self.estimate.disk_bytes,
                "known_disk_bytes": self.estimate.known_disk_bytes,
                "peak_bytes": self.estimate.peak_bytes,
                "free_bytes": self.free_bytes,
                "vram": self.vram,
                "never_ran": list(self.estimate.unknown),
                "source": self.estimate.basis.source if self.estimate.basis and not self.estimate.unknown else None,
                "files_to_read": self.estimate.num_files,
                "bytes_to_read": self.estimate.bytes_to_read,
            },
            "missing": [
                {"file": item.file, "kind": item.kind, "homes": list(item.homes), "looked_in": list(item.looked_in)}
                for item in self.plan.missing
            ],
            "loras": self.loras,
            "cells": list(self.labels),
            "notes": list(self.notes),
        }


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
        """Return the sampled raw latents that the cache holds, float32 [1, 16, F, H, W] on the CPU.

        They are by plan node ("first", "talk[1]").

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
