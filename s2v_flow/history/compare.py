"""What differs between two runs, two videos or two recipes: what went in, what it ran on, and what came out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from s2v_flow.api import Options
from s2v_flow.cache.store import Store
from s2v_flow.history.measure import Measure, compare_latents, compare_videos
from s2v_flow.history.side import Side, side
from s2v_flow.manifest import FileRecord
from s2v_flow.wording import shown

_SHORT = 12  # digits of a digest that people are shown


@dataclass(frozen=True)
class Difference:
    """A value that differs; None where one side has none. `section` is params, nodes, models, inputs or environment."""

    section: str
    name: str
    a: Any
    b: Any


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
        return {"same": self.is_same, **asdict(self)}

    def to_text(self) -> str:
        """Return the lines that `s2vflow diff` prints."""
        lines = [f"a: {self.a}", f"b: {self.b}"]
        for item in self.differences:
            lines.append(f"{item.section}: {item.name}: {_short(item.a)} -> {_short(item.b)}")
        lines += [f"time: {item.name}: {item.a:.1f} s -> {item.b:.1f} s" for item in self.times]
        lines += [f"{measure.what}: {measure.node}: {_measured(measure)}" for measure in self.measures]
        return "\n".join([*lines, "the same" if self.is_same else "not the same"])


def compare(a: str, b: str, options: Options) -> Comparison:
    """Compare two runs, manifests, videos or recipes; recipes are not run.

    Args:
        a: A run's id or the beginning of one, "last", the path of a manifest, an mp4 or a recipe.
        b: The same.
        options: Tells the cache folder.

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
    found = (*_values(one, other), *_files(one, other), *_environment(one, other))
    return Comparison(one.name, other.name, found, times, tuple(measures))


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
            yield Difference(f"{role}s", at, _file(a), _file(b))


def _environment(one: Side, other: Side) -> Iterator[Difference]:
    for name in _names(one.environment, other.environment):
        if name in one.environment and name in other.environment and one.environment[name] != other.environment[name]:
            yield Difference("environment", name, one.environment[name], other.environment[name])


def _names(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys([*a, *b]))


def _file(record: FileRecord | None) -> dict[str, Any] | None:
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
    return f"differs by at most {measure.max_abs:.6g}{psnr}"
