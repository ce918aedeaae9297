"""What a node that works in steps may ask of the run: keep this, give it back, must I stop? Bytes only, no tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from s2v_flow.cache.checkpoint import Checkpoints
from s2v_flow.errors import S2VFlowError
from s2v_flow.graph.events import Listener, Noted
from s2v_flow.graph.interrupt import ShouldStop, StoppedError, StopRequest, exit_code_of


@dataclass(frozen=True)
class Checkpoint:
    """One node's resume point and the run's wish to stop.

    `is_fresh`: the node is to be computed anew, so that what is there is not gone on from. `told` is what the run has
    said already.
    """

    folder: Checkpoints
    fingerprint: str
    node: str
    emit: Listener
    should_stop: ShouldStop
    is_fresh: bool = False
    told: set[str] = field(default_factory=set)

    def load(self) -> tuple[dict[str, str], bytes] | None:
        """Return the facts and bytes that an earlier run left, or None; a damaged checkpoint is told and put aside."""
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
            if text not in self.told:
                self.told.add(text)
                self.emit(Noted(self.node, text, is_warning=True))
            return False
        return True

    def stop(self, where: str) -> StoppedError:
        """Return the error that ends the run, to be raised at a step's end."""
        return StoppedError(f"{self.node} {where}", exit_code_of(self.should_stop))

    @contextmanager
    def stepwise(self) -> Iterator[None]:
        """Inside this block, a first signal waits for the node to ask `should_stop`."""
        if isinstance(self.should_stop, StopRequest):
            with self.should_stop.patiently():
                yield
        else:
            yield


def progress_text(facts: Mapping[str, str]) -> str:
    """Say how far a resume point is: "resume point at step 3 of 20"."""
    return f"resume point at step {facts.get('step', '?')} of {facts.get('steps', '?')}"
