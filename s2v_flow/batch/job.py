"""What a batch is: jobs, each a recipe with what is laid over it, and what is known of them before they run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from s2v_flow.options import Options
from s2v_flow.recipe.argument import Override

NEVER_AGAIN = frozenset({2, 3, 4, 5, 6, 8})  # exit codes that the same job would give again


@dataclass(frozen=True)
class Job:
    """One recipe, the changes that are this job's own, and what its plan says.

    `axes` are those of its cell ("seed=1"), `origin` says where the job was written ("jobs.csv:4"). `group` is equal
    for jobs that need the same model and LoRA files. `seconds` is the estimate, `frames` the length of the video.
    """

    number: int
    recipe: str
    overrides: tuple[Override, ...] = ()
    axes: tuple[str, ...] = ()
    origin: str = ""
    group: str = ""
    seconds: float | None = None
    frames: int | None = None
    disk_bytes: int = 0  # that the cache will hold of it, at least
    fingerprints: Mapping[str, str] = field(default_factory=dict)  # of plan nodes, as far as they are known
    outputs: tuple[str, ...] = ()
    is_done: bool = False  # stored and delivered before the batch began
    asked: str = ""  # a digest of the plan's nodes and their fields: what is to be computed, on whatever device

    @property
    def key(self) -> str:
        """What the job is among processes that run the batch: its number, and what is asked."""
        return f"{self.number} {self.asked}"

    @property
    def name(self) -> str:
        """The job for people: "job 3 (talk.yaml, seed=1, jobs.csv:4)"."""
        return f"job {self.number} ({', '.join(part for part in (self.recipe, *self.axes, self.origin) if part)})"

    def options(self, given: Options) -> Options:
        """Return a batch's options with the job's own changes."""
        axes = self.axes or given.axes
        return replace(given, overrides=(*given.overrides, *self.overrides), axes=axes)

    def to_json(self) -> dict[str, Any]:
        """Return the job's entry in batch.json."""
        return {**vars(self), "overrides": [[item.kind, item.text] for item in self.overrides]}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Job:
        """Return the job of such an entry.

        Raises:
            KeyError, TypeError, ValueError: It is none.
        """
        tuples = {name: tuple(map(str, entry[name])) for name in ("axes", "outputs")}
        overrides = tuple(Override(kind, str(text)) for kind, text in entry["overrides"])
        return cls(**{**entry, **tuples, "overrides": overrides})
