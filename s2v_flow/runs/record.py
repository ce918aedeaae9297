"""Keeping a run's manifest: listens to the run and writes what happened, however it ends."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from s2v_flow.cache.store import Entry
from s2v_flow.errors import MissingError
from s2v_flow.files.atomic import make_root, write_whole
from s2v_flow.files.facts import file_digest
from s2v_flow.graph.context import Numerics
from s2v_flow.graph.events import (
    Delivered,
    Event,
    Listener,
    NodeCached,
    NodeFinished,
    NodeStarted,
    Noted,
    RunFinished,
    RunStatus,
)
from s2v_flow.graph.fingerprint import fingerprint
from s2v_flow.graph.node import Plan, PlanNode
from s2v_flow.graph.status import NodeStatus, preimage
from s2v_flow.machine import device_class
from s2v_flow.quality import of_videos
from s2v_flow.recipe.argument import Changes
from s2v_flow.recipe.load import Recipe
from s2v_flow.runs.environment import environment, git_state, packages_of
from s2v_flow.runs.manifest import (
    GitRecord,
    GivenRecord,
    LoraRecord,
    Manifest,
    NamedDigest,
    NodeRecord,
    NodeState,
    OutputRecord,
    RecipeRecord,
    to_text,
)
from s2v_flow.runs.values import file_records, home_hidden, values_of, without_home, written

RUN_ID = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{4}")


def runs_root(cache_root: Path) -> Path:
    """Return the folder in which every run has one of its own."""
    return cache_root / "runs"


@dataclass
class Recorder:
    """Listens to a run inside a `with` statement; `<folder>/<id>/manifest.json` is there from its start to stay.

    `changes` and `axes` were laid over the recipe, `output` is where its only output goes instead, if anywhere.
    `digest` tells the sha256 of a file if that takes no time, else None; `entries` are to be set to the run's results,
    which grow as it goes on, `not_kept` to those that could not be stored, and `failures` to what failed where others
    went on; `goes_on`: its folder is there already.
    """

    recipe: Recipe
    plan: Plan
    statuses: Mapping[str, NodeStatus]
    device: str
    folder: Path
    changes: Changes
    axes: Sequence[str]
    output: Path | None
    digest: Callable[[Path], str | None]
    emit: Listener
    has_host: bool = False
    cells: tuple[str, ...] = ()
    entries: Mapping[str, Entry] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)
    not_kept: Container[str] = ()
    id: str = ""
    goes_on: bool = False
    _started: datetime = field(default_factory=lambda: datetime.now(timezone.utc))
    _clock: float = field(default_factory=time.monotonic)
    _unfinished: set[str] = field(default_factory=set)
    _cached: set[str] = field(default_factory=set)
    _finished: dict[str, NodeFinished] = field(default_factory=dict)
    _delivered: list[Delivered] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.numerics = Numerics(device_class(self.device))
        with suppress(OSError):  # the manifest will say why
            make_root(self.folder.parent)
            for _ in range(3):
                self.id = self.id or new_run_id(self.folder)
                try:
                    (self.folder / self.id).mkdir(parents=True, exist_ok=self.goes_on)
                    break
                except FileExistsError:  # another run of the same second and digits
                    self.id = ""
        self.id = self.id or new_run_id(self.folder)
        with suppress(ValueError):  # it began when it got its id
            named = datetime.strptime(f"{self.id[:15]}.999+0000", "%Y%m%d-%H%M%S.%f%z")
            self._started = min(self._started, named)

    def __call__(self, event: Event) -> None:
        """Take note of an event and pass it on."""
        if isinstance(event, NodeStarted):
            self._unfinished.add(event.node)
        elif isinstance(event, NodeFinished):
            self._unfinished.discard(event.node)
            self._finished[event.node] = event
        elif isinstance(event, NodeCached):
            self._cached.add(event.node)
        elif isinstance(event, Delivered):
            self._delivered.append(event)
        self.emit(event)

    def __enter__(self) -> Recorder:
        """Write that it is running; where that fails, the end will tell."""
        with suppress(OSError, MissingError):
            self._write(self._manifest("running", None))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Write the manifest; that it cannot be written is a warning, for the results are there."""
        status: RunStatus = "finished" if kind is None else "failed" if issubclass(kind, Exception) else "interrupted"
        message = str(error) or type(error).__name__ if status == "failed" else None
        if kind is None and self.failures:
            status, message = "failed", "; ".join(f"{name}: {why}" for name, why in self.failures.items())
        try:
            self._write(self._manifest(status, message))
        except (OSError, MissingError) as failure:
            self.emit(Noted("", f"the run's manifest cannot be written: {failure}", is_warning=True))
        self.emit(RunFinished(self.id, status, message))

    def _manifest(self, status: RunStatus | Literal["running"], error: str | None) -> Manifest:
        (text, origins), overrides = written(self.recipe), map(str, self.changes.overrides)
        return Manifest(
            manifest=1,
            id=self.id,
            status=status,
            error=None if error is None else home_hidden(error),
            started=self._started.isoformat(timespec="milliseconds"),
            ended=datetime.now(timezone.utc).isoformat(timespec="milliseconds") if status != "running" else None,
            seconds=round(time.monotonic() - self._clock, 3) if status != "running" else None,
            recipe=RecipeRecord(
                path=without_home(str(self.recipe.path)),
                files=[self._named(file) for file in self.recipe.files],
                text=text,
                values=values_of(self.recipe),
                origins=origins,
            ),
            given=GivenRecord(
                profiles=list(self.changes.profiles),
                files=[self._named(file) for file in self.changes.files],
                overrides=[home_hidden(text) for text in (*(f"-m {axis}" for axis in self.axes), *overrides)],
            ),
            git=self._git,
            cells=list(self.cells),
            seeds={node.name: node.facts["seed"] for node in self.plan.nodes if "seed" in node.facts},
            files=file_records(self.plan.nodes, self.digest),
            loras=self._loras(),
            environment=environment(self.device, has_host=self.has_host),
            packages=packages_of(self.recipe, self.plan),
            nodes=[self._node(node, status) for node in self.plan.nodes],
            outputs=[record for node in self.plan.nodes for record in self._outputs(node)],
            quality=self._quality(),
        )

    def _quality(self) -> dict[str, Any] | None:
        names = [node.name for node in self.plan.nodes if "quality" in self._facts(node.name)]
        return of_videos({name: self._facts(name)["quality"] for name in names}) if names else None

    def _facts(self, name: str) -> Mapping[str, Any]:
        return self.entries[name].facts if name in self.entries else {}

    @cached_property
    def _git(self) -> GitRecord | None:
        return git_state(self.recipe.files)

    def _named(self, file: Path) -> NamedDigest:
        return NamedDigest(name=without_home(str(file)), sha256=self.digest(file))

    def _loras(self) -> list[LoraRecord]:
        return [
            LoraRecord(node=name, **lora)
            for name, entry in self.entries.items()
            for lora in entry.facts.get("loras", [])
        ]

    def _node(self, node: PlanNode, status: str) -> NodeRecord:
        entry, done, facts = self.entries.get(node.name), self._finished.get(node.name), self._facts(node.name)
        return NodeRecord(
            name=node.name,
            kind=node.kind,
            status=self._state(node, status),
            fingerprint=self._fingerprint(node),
            seconds=None if done is None else round(done.seconds, 3),
            peak_bytes=None if done is None else done.peak_bytes,
            peak_device_bytes=None if done is None else facts.get("peak_device_bytes"),
            outputs={} if entry is None else entry.output_digests(),
            kept=node.name not in self.not_kept,
            step_cache=facts.get("step_cache"),
            degraded=facts.get("degraded") or None,
        )

    def _state(self, node: PlanNode, status: str) -> NodeState:
        if node.name in self._finished:
            return "computed"
        if node.name in self._unfinished:
            return "interrupted" if status == "interrupted" else "failed"
        if node.name in self.entries or node.name in self._cached or self.statuses[node.name].entry is not None:
            return "stored"
        if self.statuses[node.name].status in ("SKIP", "HIT"):
            return "skipped"
        return "not_reached" if node.node.is_stored else "live"

    def _fingerprint(self, node: PlanNode) -> str | None:
        """Return a plan node's identity; a file too large to be hashed for the plan has been hashed since."""
        if node.name in self.entries:
            return self.entries[node.name].fingerprint
        known = self.statuses[node.name].fingerprint
        if known is not None or node.inputs:
            return known
        image = preimage(node, self.numerics, self.digest, lambda source: None)
        return None if isinstance(image, str) else fingerprint(image)

    def _outputs(self, node: PlanNode) -> list[OutputRecord]:
        delivered = [event for event in self._delivered if event.node == node.name]
        if not delivered:
            return []
        entry = self.entries[node.name]
        text = next(text for _, mark, text in node.node.files() if mark.role == "output")
        records = []
        for event, item in zip(delivered, entry.outputs.values(), strict=True):
            path, size, sha256 = Path(event.path), None, item.sha256
            with suppress(OSError, MissingError):  # it has been moved already
                size = path.stat().st_size
                # what was delivered holds the object, and perhaps a note behind it
                sha256 = item.sha256 if size == item.size else file_digest(path)
            place = Path(text).with_name(path.name)
            name = without_home(str(place if self.output is None else path))
            facts = {key: entry.facts.get(key) for key in ("frames", "frames_sha256")}
            record = OutputRecord(node=node.name, name=name, sha256=sha256, size=size, changed=event.changed, **facts)
            records.append(record)
        return records

    def _write(self, manifest: Manifest) -> None:
        """Write the manifest whole or not at all, into a folder of its own."""
        (self.folder / self.id).mkdir(parents=True, exist_ok=True)
        tmp = self.folder.parent / "tmp"  # where a killed run's is removed
        write_whole(self.folder / self.id / "manifest.json", to_text(manifest).encode(), tmp)


def new_run_id(folder: Path) -> str:
    """Return an id for a run that begins now: UTC time, and the part of the second in four hexadecimal digits.

    Where `folder` has a later one, for the clock was set back, it is the next after that: ids sort as runs began.
    """
    now = datetime.now(timezone.utc)
    with suppress(OSError, ValueError, OverflowError):  # no folder, or no such time
        newest = max(filter(RUN_ID.fullmatch, os.listdir(folder)))
        second = datetime.strptime(f"{newest[:15]}+0000", "%Y%m%d-%H%M%S%z")
        now = max(now, second + timedelta(seconds=(int(newest[16:], 16) + 1.5) / 0x10000))
    return f"{now:%Y%m%d-%H%M%S}-{now.microsecond * 0x10000 // 1_000_000:04x}"
