"""How often a job is tried, by how it ended: on an engine whose workers end as they are told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from s2v_flow.batch.dispatch import BatchRun, Policy, Told
from s2v_flow.batch.record import Batch, Job
from s2v_flow.batch.worker import Outcome, Setup
from s2v_flow.cli.progress import Progress
from s2v_flow.options import Options


@dataclass
class Ending:
    """A worker whose jobs end with the next of some exit codes."""

    codes: list[int]
    pid: int = 1
    ended: list[Outcome] = field(default_factory=list)

    def send(self, job: Job, log: Path) -> None:
        self.ended.append(Outcome(self.codes.pop(0)))

    def answer(self) -> Outcome | None:
        return self.ended.pop() if self.ended else None

    def gone(self) -> Outcome | None:
        return None

    def signal(self, number: int) -> None:
        """Nothing runs."""

    def kill(self) -> None:
        """Nothing runs."""

    def close(self, *, at_once: bool = False) -> None:
        """Nothing runs."""

    def join(self) -> None:
        """Nothing runs."""


@dataclass
class Endings:
    """One such worker."""

    setups: Sequence[Setup]
    worker: Ending

    def start(self, index: int) -> Ending:
        return self.worker

    def wait(self, workers: Sequence[Ending], seconds: float) -> None:
        """They have ended already."""

    def close(self) -> None:
        """Nothing is left."""


@pytest.mark.parametrize(
    ("codes", "retries", "state", "begun"),
    [
        ([2], 5, "failed", 1),
        ([3], 5, "failed", 1),
        ([4], 5, "failed", 1),
        ([5], 5, "failed", 1),
        ([6], 5, "failed", 1),
        ([8], 5, "failed", 1),
        ([7, 7], 5, "failed", 2),
        ([7, 0], 5, "done", 2),
        ([7], 0, "failed", 1),
        ([1, 1, 9, 0], 3, "done", 4),
        ([1, 1], 1, "failed", 2),
        ([75, 75, 75, 0], 0, "done", 4),
        ([75, 1, 75, 0], 1, "done", 4),
    ],
)
def test_a_job_is_tried_again_by_its_exit_code(
    tmp_path: Path, codes: list[int], retries: int, state: str, begun: int
) -> None:
    """3 and 4 never, 7 once, 75 as often as it comes, uncounted."""
    options = Options(cache_dir=tmp_path / "cache")
    batch = Batch(tmp_path / "batch.json", (Job(1, "talk.yaml"),), options, tmp_path)
    batch.logs.mkdir()
    told: list[Told] = []
    engine = Endings([Setup(options, tmp_path, 1, Progress)], Ending(list(codes)))
    assert BatchRun(batch, engine, Policy(retries), told.append).run() == {1: state}
    assert [item.state for item in told].count("begins") == begun
    assert batch.states()[1]["state"] == state
