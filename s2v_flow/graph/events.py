"""What happens during a run, as data, for the callback of `run`; nothing here prints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

RunStatus = Literal["finished", "failed", "interrupted"]


@dataclass(frozen=True)
class RunStarted:
    """A run begins; `nodes` are the plan nodes that will be computed, in order."""

    nodes: tuple[str, ...]
    total: int


@dataclass(frozen=True)
class NodeStarted:
    """A plan node begins to compute."""

    node: str
    kind: str


@dataclass(frozen=True)
class StageStarted:
    """Something long begins that has no steps: "loading x.safetensors". An empty `stage`: it is over."""

    node: str
    stage: str


@dataclass(frozen=True)
class StepDone:
    """Step `step` of `total` is done (a denoising step, a decoded group of frames); `unit` says which."""

    node: str
    step: int
    total: int
    unit: str


@dataclass(frozen=True)
class Preview:
    """A small picture of what a plan node is sampling, as it looks after `step` of `total`, stands at `path` (JPEG)."""

    node: str
    step: int
    total: int
    path: str


@dataclass(frozen=True)
class NodeFinished:
    """A plan node is done, after `seconds` of wall time.

    `peak_bytes` is the most memory that the process took while the node was computed, `peak_device_bytes` the most that
    torch had allocated on one GPU (null where it used none). Where the system cannot forget a peak: so far.
    """

    node: str
    seconds: float
    peak_bytes: int
    peak_device_bytes: int | None = None


@dataclass(frozen=True)
class NodeCached:
    """A plan node turned out to be stored already."""

    node: str


@dataclass(frozen=True)
class Noted:
    """Something a person should know: LoRA coverage, a damaged artifact that is computed again, sound that is cut.

    `is_detail`: shown only at the level of details.
    """

    node: str
    text: str
    is_warning: bool = False
    is_detail: bool = False


@dataclass(frozen=True)
class Delivered:
    """A result stands under its final name; `changed` tells whether the file had to be written."""

    node: str
    path: str
    changed: bool


@dataclass(frozen=True)
class RunFinished:
    """A run is over; `run` is the id under which its manifest is kept, `error` says why it failed."""

    run: str
    status: RunStatus
    error: str | None = None


Event = (
    RunStarted
    | NodeStarted
    | StageStarted
    | StepDone
    | Preview
    | NodeFinished
    | NodeCached
    | Noted
    | Delivered
    | RunFinished
)
Listener = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Listen to nothing."""
