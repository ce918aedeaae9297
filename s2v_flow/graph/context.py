"""What a node is handed while it runs, and what it hands on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from s2v_flow.graph.checkpoint import Checkpoint
from s2v_flow.graph.events import (
    Listener,
    Noted,
    StageStarted,
    StepDone,
)
from s2v_flow.graph.keep import Keep
from s2v_flow.graph.numerics import Numerics


@runtime_checkable
class Closable(Protocol):
    """A live value that holds something: told when nobody needs it any more."""

    def close(self) -> None:
        """Release it."""


class CopyTo(Protocol):
    """Puts a stored output's bytes, and a trailer behind them, at a path; tells whether the file had to change."""

    def __call__(self, target: Path, trailer: bytes = b"") -> bool:
        """See `Store.copy_to`."""


@dataclass(frozen=True)
class Artifact:
    """A stored output. Its bytes are read, and verified, each time they are asked for, and not kept."""

    digest: str
    read: Callable[[], bytes]
    copy_to: CopyTo


@dataclass(frozen=True)
class RunContext:
    """What a node may use while it runs.

    `device` is torch's name ("cpu", "cuda:0"); `models` gives the model registry, made on the first call (graph knows
    no tensors, so it is untyped here); `files` and `digests` are the node's files by field path; `input_digests` are
    its inputs' digests; `make_scratch` makes the folder that `scratch` gives; `checkpoint` keeps half-done work (stored
    nodes only); `keep` keeps what a live value gives out (of kinds that are kept).
    """

    name: str
    kind: str
    planned: Mapping[str, Any]
    device: str
    numerics: Numerics
    models: Callable[[], Any]
    files: Mapping[tuple[str | int, ...], Path]
    digests: Mapping[tuple[str | int, ...], str]
    input_digests: Mapping[str, tuple[str, ...]]
    make_scratch: Callable[[], Path]
    emit: Listener
    facts: dict[str, Any] = field(default_factory=dict)
    checkpoint: Checkpoint | None = None
    keep: Keep | None = None

    @property
    def scratch(self) -> Path:
        """A private folder for files in the making, made on first use: the only place where a node may write."""
        return self.make_scratch()

    def record(self, **facts: Any) -> None:
        """Keep small JSON values with the node's result, for people; they are no part of its identity."""
        self.facts.update(facts)

    def stepwise(self) -> AbstractContextManager[None]:
        """Return a block in which a request to stop waits for the end of a step."""
        return nullcontext() if self.checkpoint is None else self.checkpoint.stepwise()

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
