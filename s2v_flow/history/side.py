"""One side of a comparison: a run, a video or a recipe, brought into one shape."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2v_flow import api
from s2v_flow.api import Planned
from s2v_flow.files.atomic import TakenError
from s2v_flow.graph.run import RunResult
from s2v_flow.history.find import find
from s2v_flow.recipe.matrix import Cell
from s2v_flow.runs.manifest import Essence, FileRecord, Manifest
from s2v_flow.runs.record import runs_root
from s2v_flow.runs.values import values_of

if TYPE_CHECKING:
    from s2v_flow.media.sheet import Tile


RECIPE_SUFFIXES = (".yaml", ".yml")
_CHUNK_KINDS = ("sample", "extend")
_MAX_TILES = 24  # of a page
_MAX_COLUMNS = 8
_MAX_IN_ROW = 6  # of a film of one axis


def summarise(planned: Planned, result: RunResult) -> list[Path]:
    """Write a matrix's contact sheets and side-by-side videos beside its first video; none for fewer than two videos.

    They are named after what was swept, talk.cells.seed-cfg.png; a file of that name that shows something else stays,
    and the new ones are numbered, unless the plan overwrites. The sound is the first video's.
    """
    sinks: dict[str, dict[str, Path]] = {}
    for name, paths in result.outputs.items():
        label, _, node = name.rpartition("/")
        if label in planned.labels and paths and paths[0].suffix == ".mp4":
            sinks.setdefault(node, {})[label] = paths[0]
    cells, written = [variant.cell for variant in planned.variants], []
    for node, videos in sinks.items():
        stem = planned.recipe.path.stem + (f".{node}" if len(sinks) > 1 else "")
        written += _summarise(cells, videos, stem, planned.overwrites) if len(videos) > 1 else []
    return written


def _summarise(cells: Sequence[Cell], videos: Mapping[str, Path], stem: str, overwrites: bool) -> list[Path]:
    from s2v_flow.media.audio import open_audio
    from s2v_flow.media.sheet import contact_sheet, mark_of, page_identity, side_by_side
    from s2v_flow.media.video import probe_video

    sheets = laid_out(cells, videos)
    films = [_turned(page) for page in sheets]
    swept = "-".join(dict.fromkeys(part.partition("=")[0] for cell in cells for part in cell.parts.values()))
    first = next(iter(videos.values()))
    identities = [page_identity(page) for page in (*sheets, *films)]
    info, number = probe_video(first), 1
    while True:
        base = re.sub(r"[^\w.-]", "_", f"{stem}.cells.{swept}" + (f".{number}" if number > 1 else ""))
        names = [f"{base}.page{index}" if len(sheets) > 1 else base for index in range(1, len(sheets) + 1)]
        targets = [first.with_name(f"{name}{suffix}") for suffix in (".png", ".mp4") for name in names]
        named = zip(targets, identities, strict=True)
        if overwrites or all(not os.path.lexists(target) or mark_of(target) == identity for target, identity in named):
            with suppress(TakenError):  # by another run, just now: it is looked at, too
                for page, target in zip(sheets, targets, strict=False):
                    contact_sheet(page, target, replaces=overwrites)
                for page, target in zip(films, targets[len(sheets) :], strict=True):
                    audio = open_audio(first) if info.has_audio else None
                    side_by_side(page, target, audio, Fraction(info.fps), replaces=overwrites)
                return targets
        else:
            number += 1


def laid_out(cells: Sequence[Cell], videos: Mapping[str, Path]) -> list[list[list[Tile | None]]]:
    """Return a matrix's videos on pages of 24 at most: rows of the first axis' values, columns of the second's.

    `videos` are by the cells' labels; a cell without one leaves a hole. Every combination of further axes' values has
    pages of its own.
    """
    from s2v_flow.media.sheet import Tile

    keys = list(dict.fromkeys(key for cell in cells for key in cell.values))

    def at(cell: Cell, some: Sequence[str]) -> tuple[int, ...]:
        return tuple(cell.ranks.get(key, -1) for key in some)

    def tile(cell: Cell | None) -> Tile | None:
        if cell is None or cell.label not in videos:
            return None
        head, *rest = (cell.parts[key] for key in keys if key in cell.parts)
        return Tile((head, ", ".join(rest)) if rest else (head,), videos[cell.label])

    pages = []
    for others in sorted({at(cell, keys[2:]) for cell in cells}):
        grid = {(at(cell, keys[:1]), at(cell, keys[1:2])): cell for cell in cells if at(cell, keys[2:]) == others}
        rows, columns = sorted({row for row, _ in grid}), sorted({column for _, column in grid})
        for left in range(0, len(columns), _MAX_COLUMNS):
            wide = columns[left : left + _MAX_COLUMNS]
            tall = _MAX_TILES // len(wide)
            for top in range(0, len(rows), tall):
                lines = [[tile(grid.get((row, column))) for column in wide] for row in rows[top : top + tall]]
                pages.append([line for line in lines if any(line)])
    return [page for page in pages if page]


def _turned(page: list[list[Tile | None]]) -> list[list[Tile | None]]:
    """Return a page of one column as a row or, where there are more than six tiles, as several."""
    if len(page[0]) > 1:
        return page
    tiles = [row[0] for row in page]
    wide = len(tiles) if len(tiles) <= _MAX_IN_ROW else ceil(sqrt(len(tiles)))
    return [(tiles + [None] * wide)[left : left + wide] for left in range(0, len(tiles), wide)]


@dataclass(frozen=True)
class Video:
    """A video that can be looked at: a file, or an object of the store by its sha256; and its frames' sha256."""

    frames_sha256: str | None
    file: Path | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Side:
    """What is known of one side; a recipe alone knows its values only."""

    name: str
    values: Mapping[str, Any]
    files: Mapping[str, FileRecord] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    latents: Mapping[str, str] = field(default_factory=dict)
    videos: Mapping[str, Video] = field(default_factory=dict)


def side(text: str, options: api.Options) -> Side:
    """Return what is known of a run, a manifest, a video or a recipe.

    Raises:
        S2VFlowError: There is no such thing.
        RecipeError: The recipe is wrong.
    """
    if text.endswith(RECIPE_SUFFIXES):
        return Side(text, values_of(api.check(text)))
    found = find(runs_root(options.cache_root), text)
    return of_run(found) if isinstance(found, Manifest) else _of_video(text, found)


def of_run(manifest: Manifest) -> Side:
    """Return what is known of a run."""
    known = manifest.environment.model_dump(exclude={"host", "user"})
    if manifest.git is not None and manifest.git.commit is not None:
        known["commit"] = manifest.git.commit + (" and changes" if manifest.git.is_dirty else "")
    results = {node.name: node for node in manifest.nodes}
    seconds = {node.name: node.seconds for node in manifest.nodes if node.seconds is not None}
    return Side(
        name=manifest.id,
        values=manifest.recipe.values,
        files={item.at: item for item in manifest.files},
        environment={key: str(value) for key, value in known.items() if value is not None},
        seconds=seconds if manifest.seconds is None else {"the whole run": manifest.seconds, **seconds},
        latents={node.name: node.outputs["latent"] for node in manifest.nodes if _is_chunk(node.kind, node.outputs)},
        videos={
            item.node: Video(item.frames_sha256, sha256=results[item.node].outputs.get("file"))
            for item in manifest.outputs
            if item.name.endswith(".mp4")
        },
    )


def _of_video(text: str, essence: Essence) -> Side:
    versions = {name: ", ".join(found) for name, found in essence.software.items()}
    return Side(
        name=text,
        values=values_of(api.check(Path(text))),
        files={item.at: item for item in essence.files},
        environment={**versions, "device": essence.device},
        latents={
            name: node.outputs["latent"] for name, node in essence.nodes.items() if _is_chunk(node.kind, node.outputs)
        },
        videos={essence.node: Video(essence.frames_sha256, file=Path(text))},
    )


def _is_chunk(kind: str, outputs: Mapping[str, str]) -> bool:
    return kind in _CHUNK_KINDS and "latent" in outputs
