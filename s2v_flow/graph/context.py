"""What a node is handed while it runs, and what it hands on: artifacts, resume points, kept frames, numerics."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sized
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from s2v_flow.cache.budget import Budget
from s2v_flow.cache.resume_point import ResumePoints
from s2v_flow.cache.store import DamagedObjectError, Entry, Store
from s2v_flow.errors import S2VFlowError
from s2v_flow.files.atomic import CannotWriteError, writing
from s2v_flow.graph.events import Listener, NodeCached, Noted, StageStarted, StepDone
from s2v_flow.graph.fingerprint import as_made
from s2v_flow.graph.interrupt import ShouldStop, StoppedError, exit_code_of, patience
from s2v_flow.wording import size_text


@dataclass(frozen=True)
class Numerics:
    """The class of device ("cpu", "cuda"; never its index) and the attention backend of a run."""

    device_class: str
    attention: str = "sdpa"

    def precision(self, kind: str, asked: str) -> str:
        """Resolve a loader's precision, "auto", "fp32", "bf16", "fp16" or "fp8_fast": what is asked for.

        For auto, "fp32" on CPU and for the (small) audio encoder, else "bf16".
        """
        if asked != "auto":
            return asked
        return "fp32" if self.device_class == "cpu" or kind == "load_audio_encoder" else "bf16"

    def identity(self) -> dict[str, str]:
        """Return the part of a fingerprint's pre-image that stands for this policy."""
        return {"device": self.device_class, "attention": self.attention}


@runtime_checkable
class Closable(Protocol):
    """A live value that holds a resource: closed when no node needs it any more."""

    def close(self) -> None:
        """Release it."""


# told, as a plan node samples: its name, its inputs, and the latent that the model expects the video to become
Watch = Callable[[str, Mapping[str, Any], Any], None]


Way = Mapping[str, Any]  # what a node does otherwise for lack of memory: see `nodes.memory.needs`


@dataclass(frozen=True)
class Artifact:
    """A stored output. Its bytes are read, and verified, each time they are asked for, and not kept."""

    digest: str
    read: Callable[[], bytes]
    copy_to: Callable[..., bool]  # of a target, and a trailer: see `Store.copy_to`


@dataclass(frozen=True)
class RunContext:
    """What a node may use while it runs.

    `device` is torch's name ("cpu", "cuda:0"); `models` gives the model registry, made on the first call (graph knows
    no tensors, so it is untyped here); `files` and `digests` are the node's files by field path; `make_scratch` makes
    the folder that `scratch` gives; `resume_point` keeps half-done work (stored nodes only); `keep` keeps what a live
    value gives out (of kinds that are kept); `watch` looks on as it samples; `way` is how the plan has it save memory.
    """

    name: str
    kind: str
    planned: Mapping[str, Any]
    device: str
    numerics: Numerics
    models: Callable[[], Any]
    files: Mapping[tuple[str | int, ...], Path]
    digests: Mapping[tuple[str | int, ...], str]
    make_scratch: Callable[[], Path]
    emit: Listener
    facts: dict[str, Any] = field(default_factory=dict)
    resume_point: ResumePoint | None = None
    keep: Keep | None = None
    watch: Watch | None = None
    way: Way = field(default_factory=dict)

    @property
    def scratch(self) -> Path:
        """A private folder for files in the making, made on first use: the only place where a node may write."""
        return self.make_scratch()

    def record(self, **facts: Any) -> None:
        """Keep small JSON values with the node's result, for people; they are no part of its identity."""
        self.facts.update(facts)

    def stepwise(self) -> AbstractContextManager[None]:
        """Return a block in which a request to stop waits for the end of a step."""
        return nullcontext() if self.resume_point is None else patience(self.resume_point.should_stop)

    def step(self, step: int, total: int, unit: str = "step") -> None:
        """Report that `step` of `total` is done."""
        self.emit(StepDone(self.name, step, total, unit))

    @contextmanager
    def stage(self, text: str) -> Iterator[None]:
        """Report that something long without steps goes on: "loading x.safetensors"."""
        self.emit(StageStarted(self.name, text))
        yield
        self.emit(StageStarted(self.name, ""))

    def note(self, text: str, *, is_warning: bool = False, is_detail: bool = False) -> None:
        """Report something a person should know, or a detail for those who ask for details."""
        self.emit(Noted(self.name, text, is_warning, is_detail))


@dataclass(frozen=True)
class ResumePoint:
    """One node's resume point and the run's wish to stop.

    `is_fresh`: the node starts anew, whatever resume point there is. `reported`: warnings that the run has given.
    """

    folder: ResumePoints
    fingerprint: str
    node: str
    emit: Listener
    should_stop: ShouldStop
    is_fresh: bool = False
    reported: set[str] = field(default_factory=set)

    def load(self) -> tuple[dict[str, str], bytes] | None:
        """Return the facts and bytes that an earlier run left, or None; a damaged one is reported and quarantined."""
        if self.is_fresh:
            return None
        try:
            return self.folder.read(self.fingerprint)
        except ValueError as error:
            self.refuse(str(error))
            return None

    def refuse(self, reason: str) -> None:
        """Say that the resume point that is there is not used, and why."""
        text = f"the resume point is not used, {reason}; the node begins anew"
        self.emit(Noted(self.node, text, is_warning=True))

    def save(self, facts: Mapping[str, str], payload: bytes) -> bool:
        """Keep the state of the work; tell whether that worked. A full disk costs the resume point, not the run."""
        try:
            self.folder.write(self.fingerprint, facts, payload)
        except S2VFlowError as error:
            text = f"the resume point cannot be written: {error.message}; the run goes on without one"
            if text not in self.reported:
                self.reported.add(text)
                self.emit(Noted(self.node, text, is_warning=True))
            return False
        return True

    def stop(self, where: str) -> StoppedError:
        """Return the error that ends the run, to be raised at a step's end."""
        return StoppedError(f"{self.node} {where}", exit_code_of(self.should_stop))


GroupT = TypeVar("GroupT", bound=Sized)


@dataclass
class Keep:
    """Where one live value of a run is kept: in the store, within the budget; `tell` hears what cannot be written.

    `key` is the plan node's identity, `image` what that was made from, `facts` what the node records while it runs,
    `about` goes with them; `is_fresh`: what other runs have kept is not to be used.
    """

    store: Store
    budget: Budget
    tell: Callable[[str, str | None], None]
    emit: Listener
    node: str
    key: str
    image: Mapping[str, Any]
    facts: Mapping[str, Any]
    about: Mapping[str, Any]
    is_fresh: bool
    _known: Entry | None = None  # found or made in this run
    _is_tried: bool = False  # a second time would cost as much, and fail as well

    def find(self) -> Path | None:
        """Return the file in which the value is kept, verified; None where there is none."""
        if self._known is None and not self.is_fresh:
            self._known = self.store.lookup(self.key)
            if self._known is not None:
                self.store.touch(self.key)
                self.emit(NodeCached(self.node))
        if self._known is None:
            return None
        (item,) = self._known.outputs.values()
        try:
            self.store.check(item)
        except DamagedObjectError:
            self.store.quarantine(item)
            text = "what was kept of it is damaged or gone: it is made again"
            self.emit(Noted(self.node, text, is_warning=True))
            self._known = None
            return None
        return self.store.object_path(item)

    def passing(
        self, groups: Iterator[GroupT], total: int, expected: int, make: Callable[[Path], Any]
    ) -> Iterator[GroupT]:
        """Pass a value's groups through and keep them, if all of them are asked for.

        Args:
            groups: The value, made as it is asked for.
            total: How long all groups are together.
            expected: How many bytes the file may take, at a guess.
            make: Begins a file: an object with `write(group)`, `finish()` and `close()`. Their failures are OSErrors.
        """
        seconds = 0.0
        with closing(self._draft(total, expected, make)) as draft:
            next(draft, None)
            while True:
                started = time.monotonic()
                group = next(groups, None)
                seconds += time.monotonic() - started
                if group is None:
                    return
                with suppress(StopIteration):
                    draft.send((group, seconds))
                yield group

    def _draft(
        self, total: int, expected: int, make: Callable[[Path], Any]
    ) -> Generator[None, tuple[Sized, float], None]:
        """Write what is sent, each group with the seconds so far, as long as there is room; publish the whole."""
        if self._is_tried:
            return
        self._is_tried, room, count = True, self.budget.room(expected), 0
        try:
            with self.store.scratch() as folder, writing(folder), closing(make(folder / "kept.mkv")) as writer:
                while count < total:
                    group, seconds = yield
                    writer.write(group)
                    count += len(group)
                    if count >= total:
                        writer.finish()
                    if (folder / "kept.mkv").stat().st_size > room:
                        left = f"the cache has room for {size_text(max(room, 0))}; --cache-limit sets it"
                        self.emit(Noted(self.node, f"not kept ({left}): what needs it again makes it again"))
                        return
                key, image = as_made(self.key, self.image, self.facts)
                facts = {**self.facts, **self.about, "node": self.node, "seconds": round(seconds, 3), "is_spare": True}
                kept = {"kept": folder / "kept.mkv"}
                self._known = self.store.publish(key, image, kept, facts, replaces=self.is_fresh)
        except CannotWriteError as error:
            self.tell(error.reason, error.fix)
        else:
            self.budget.added(sum(item.size for item in self._known.outputs.values()))
