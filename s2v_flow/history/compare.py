"""What differs between two runs, two videos or two recipes: what went in, what it ran on, and what came out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from math import log10
from pathlib import Path
from typing import Any, Literal

from s2v_flow.api import Options
from s2v_flow.cache.store import DamagedObjectError, Store, StoredObject
from s2v_flow.history.side import Side, Video, side
from s2v_flow.runs.manifest import FileRecord
from s2v_flow.wording import duration_text, listed, shown

_CHUNK = re.compile(r"\[\d+\]$")
_SHORT = 12  # digits of a digest that people are shown


@dataclass(frozen=True)
class Measure:
    """How two results of one node compare.

    `max_abs` is the largest difference of two values (of a video: of 0 to 255); `psnr_db` is missing where nothing
    differs; `relative`, of latents, is the difference's root mean square over that of the first one's values; `note`
    says why nothing could be measured.
    """

    node: str
    what: Literal["latent", "video"]
    is_identical: bool
    max_abs: float | None = None
    psnr_db: float | None = None
    relative: float | None = None
    note: str | None = None


def compare_latents(store: Store, node: str, a: str, b: str) -> Measure:
    """Compare two chunks' latents by their digests, or, where these differ, by their values if both are stored."""
    if a == b:
        return Measure(node, "latent", True, 0.0)
    from safetensors.numpy import load

    try:
        both = [store.read(StoredObject(sha256, 0, ".safetensors")) for sha256 in (a, b)]
    except DamagedObjectError:
        return Measure(node, "latent", False, note="not both are in the cache any more")
    one, other = (load(stored)["samples"] for stored in both)
    if one.shape != other.shape:
        sizes = ["x".join(map(str, latent.shape)) for latent in (one, other)]
        return Measure(node, "latent", False, note=f"{sizes[0]} cannot be compared with {sizes[1]}")
    gap = one - other
    scale = float((one**2).mean()) ** 0.5
    relative = float(f"{float((gap**2).mean()) ** 0.5 / scale:.4g}") if scale else None
    return Measure(node, "latent", False, float(abs(gap).max()), relative=relative)


def compare_videos(store: Store, node: str, a: Video, b: Video) -> Measure:
    """Compare two videos by their frames' digests, or, where these differ, as a player shows them."""
    if a.frames_sha256 is not None and a.frames_sha256 == b.frames_sha256:
        return Measure(node, "video", True, 0.0)
    try:
        return _compare_files(node, _file(store, a), _file(store, b))
    except DamagedObjectError:
        return Measure(node, "video", False, note="not both are in the cache any more")


def _compare_files(node: str, a: Path, b: Path) -> Measure:
    import numpy as np

    from s2v_flow.media.video import VideoReader

    with VideoReader(a) as one, VideoReader(b) as other:
        sizes = [f"{len(video)} frames of {video.info.width}x{video.info.height}" for video in (one, other)]
        if sizes[0] != sizes[1]:
            return Measure(node, "video", False, note=f"{sizes[0]} cannot be compared with {sizes[1]}")
        largest, squares, count = 0, 0, 0
        for left, right in zip_longest(one, other):
            if left is None or right is None:
                return Measure(node, "video", False, note="one of them ends before its length")
            difference = left.astype(np.int32) - right.astype(np.int32)
            largest = max(largest, int(abs(difference).max()))
            squares += int((difference * difference).sum(dtype=np.int64))
            count += difference.size
    if largest == 0:
        return Measure(node, "video", True, 0.0)
    return Measure(node, "video", False, float(largest), round(10 * log10(255**2 * count / squares), 2))


def _file(store: Store, video: Video) -> Path:
    """Return a video's file, one of the store after a check."""
    if video.file is not None:
        return video.file
    item = StoredObject(video.sha256 or "", 0, ".mp4")
    store.check(item)
    return store.object_path(item)


@dataclass(frozen=True)
class Difference:
    """A value that differs; None where one side has none. `section` is params, nodes, models, inputs or environment.

    `also` are other values that differ in the same way: those that a parameter is put into.
    """

    section: str
    name: str
    a: Any
    b: Any
    also: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return it as an object; without `also` where that says nothing."""
        return {name: value for name, value in asdict(self).items() if name != "also" or value}

    def to_text(self) -> str:
        """Return "seed 20 -> 21"."""
        return f"{self.name.partition('.')[2]} {_short(self.a)} -> {_short(self.b)}"


@dataclass(frozen=True)
class Comparison:
    """Everything that differs between two sides; times are told, but make no difference."""

    a: str
    b: str
    differences: tuple[Difference, ...]
    times: tuple[Difference, ...]
    measures: tuple[Measure, ...]

    @property
    def is_same(self) -> bool:
        """Whether nothing differs but times."""
        return not self.differences and all(measure.is_identical for measure in self.measures)

    def to_json(self) -> dict[str, Any]:
        """Return the object that `s2vflow diff --json` prints."""
        found = {name: [item.to_json() for item in getattr(self, name)] for name in ("differences", "times")}
        return {"same": self.is_same, **asdict(self), **found}

    def to_text(self) -> str:
        """Return the lines that `s2vflow diff` prints."""
        lines = [f"a: {self.a}", f"b: {self.b}"]
        for item in self.differences:
            also = f" (and {listed(item.also)})" if item.also else ""
            lines.append(f"{item.section}: {item.name}: {_short(item.a)} -> {_short(item.b)}{also}")
        times: dict[str, list[float]] = {}
        for item in self.times:  # of all chunks of a node together
            told = times.setdefault(_CHUNK.sub("", item.name), [0.0, 0.0])
            told[:] = [told[0] + item.a, told[1] + item.b]
        lines += [f"time: {name}: {duration_text(a)} -> {duration_text(b)}" for name, (a, b) in times.items()]
        alike: dict[tuple[str, str], list[str]] = {}
        for measure in self.measures:
            alike.setdefault((measure.what, _measured(measure)), []).append(measure.node)
        lines += [f"{what}: {listed(names)}: {text}" for (what, text), names in alike.items()]
        return "\n".join([*lines, "the same" if self.is_same else "not the same"])


def compare(a: str, b: str, options: Options) -> Comparison:
    """Compare two runs, manifests, videos or recipes; recipes are not run.

    `a`: A run's id or the beginning of one, "last", the path of a manifest, an mp4 or a recipe.

    Raises:
        S2VFlowError: There is no such thing, or it cannot be read.
    """
    one, other = side(a, options), side(b, options)
    store = Store(options.cache_root)
    times = tuple(
        Difference("times", name, seconds, other.seconds[name])
        for name, seconds in one.seconds.items()
        if name in other.seconds
    )
    measures = [
        compare_latents(store, name, sha256, other.latents[name])
        for name, sha256 in one.latents.items()
        if name in other.latents
    ]
    measures += [
        compare_videos(store, name, video, other.videos[name])
        for name, video in one.videos.items()
        if name in other.videos
    ]
    here, there = one.environment, other.environment
    names = [name for name in here if name in there and here[name] != there[name]]
    changes = (Difference("environment", name, here[name], there[name]) for name in names)
    found = (*inputs_that_differ(one, other), *changes)
    return Comparison(one.name, other.name, found, times, tuple(measures))


def inputs_that_differ(one: Side, other: Side) -> list[Difference]:
    """Return the values, models and inputs that differ, each change once: a file's content says more than its name."""
    files = list(_files(one, other))
    named = {item.name for item in files}
    found: dict[str, Difference] = {}
    renamed = []
    for item in _values(one, other):
        change = repr((item.a, item.b))
        if item.name in named:
            renamed.append(change)
        elif item.section == "nodes" and change in found and found[change].section == "params":
            found[change] = replace(found[change], also=(*found[change].also, item.name))
        else:
            found[change if item.section == "params" else item.name] = item
    return [*(item for key, item in found.items() if key not in renamed or item.also), *files]


def _values(one: Side, other: Side) -> Iterator[Difference]:
    for name in _names(one.values, other.values):
        a, b = one.values.get(name), other.values.get(name)
        if a != b or type(a) is not type(b):
            yield Difference(name.partition(".")[0], name, a, b)


def _files(one: Side, other: Side) -> Iterator[Difference]:
    """Yield the models and inputs whose content differs; other names are differences of values."""
    if one.files is None or other.files is None:
        return
    for at in _names(one.files, other.files):
        a, b = one.files.get(at), other.files.get(at)
        if (a and a.sha256) != (b and b.sha256):
            role = next(record.role for record in (a, b) if record is not None)
            yield Difference(f"{role}s", at, _named(a), _named(b))


def _names(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys([*a, *b]))


def _named(record: FileRecord | None) -> dict[str, Any] | None:
    return None if record is None else {"name": record.name, "sha256": record.sha256}


def _short(value: Any) -> str:
    if isinstance(value, dict) and "sha256" in value:
        return f"{value['name']} ({(value['sha256'] or 'unknown')[:_SHORT]})"
    if isinstance(value, list) and not any(isinstance(item, (list, dict)) for item in value):
        return "[" + ", ".join(shown(item) for item in value) + "]"
    return "nothing" if value is None else shown(value)


def _measured(measure: Measure) -> str:
    if measure.note is not None:
        return f"differs; {measure.note}"
    if measure.is_identical:
        return "identical"
    psnr = "" if measure.psnr_db is None else f", PSNR {measure.psnr_db:.2f} dB"
    relative = "" if measure.relative is None else f"{100 * measure.relative:.3g} % of its root mean square, "
    return f"differs by {relative}at most {measure.max_abs:.6g}{psnr}"
