"""A sampler's run that survives being stopped, and memory that runs out: resume points, and no numbers but finite ones.

Imports torch: used inside run().
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from s2v_flow.errors import BadNumbersError, S2VFlowError
from s2v_flow.nodes.shortage import Fallbacks, memory_failure
from s2v_flow.nodes.tensors import pack
from s2v_flow.sampling.state import Denoise, Memory, SolverState, StepCache

if TYPE_CHECKING:
    from s2v_flow.graph.context import ResumePoint, RunContext
    from s2v_flow.sampling.sampler import Sampler

INTERVAL_SECONDS = 60.0


class FiniteWatch:
    """Watches a tensor per step: one reduction each, whose result is looked at once it has arrived.

    Reading a flag from a GPU at once would wait for everything that was queued before it. The flag is copied to pinned
    memory instead, behind the step's own kernels, and read when the copy is over: usually one step later.
    """

    def __init__(self) -> None:
        self._pending: deque[tuple[int, Tensor, torch.Event | None]] = deque()

    def add(self, step: int, x: Tensor) -> None:
        """Watch the tensor that step `step` ended on; any shape and floating dtype."""
        lowest, highest = torch.aminmax(x.detach())  # one pass that makes no copy; NaN comes through
        flag = torch.isfinite(lowest) & torch.isfinite(highest)
        if not flag.is_cuda:
            self._pending.append((step, flag, None))
            return
        host = torch.empty((), dtype=torch.bool, pin_memory=True)
        host.copy_(flag, non_blocking=True)
        event = torch.Event(flag.device)
        event.record(torch.cuda.current_stream(flag.device))
        self._pending.append((step, host, event))

    def first_bad(self, *, waits: bool = False) -> int | None:
        """Return the first step whose tensor was not finite, as far as is known; `waits`: until all is known."""
        while self._pending:
            step, flag, event = self._pending[0]
            if event is not None and not event.query():
                if not waits:
                    return None
                event.synchronize()
            self._pending.popleft()
            if not bool(flag):
                return step
        return None


@dataclass
class ResumableSampling:
    """One run of a sampler inside a node.

    Attributes:
        context: The node's context.
        sampler: The sampler.
        precision: What the model computes in, for messages.
        attention: What computes its attention, for messages.
        retry: What is given up where memory runs out.
        cache: The step cache that `denoise` asks; its memory is the state's.
    """

    context: RunContext
    sampler: Sampler
    precision: str
    attention: str
    retry: Fallbacks
    cache: StepCache | None = None
    _saved_at: float = 0.0
    _stepped_at: float = 0.0
    _watch: FiniteWatch = field(default_factory=FiniteWatch)

    def sample(self, denoise: Denoise, noise: Callable[[], Tensor]) -> Tensor:
        """Take all steps that are left, from the resume point if there is one, and return the sampler's result.

        Raises:
            BadNumbersError: The latent is not finite; it is not stored, nor is a resume point of it.
            StoppedError: The run is to stop; a resume point is written.
            S2VFlowError: Memory ran out for good; a resume point of the steps that are done is written.
        """
        total, resume_point = self.sampler.num_steps, self.context.resume_point
        begun = self.sampler.start(noise())
        begun = (self._resumed(resume_point, begun) if resume_point else None) or begun
        state = begun
        started = self._saved_at = self._stepped_at = time.monotonic()
        for state in self._states(denoise, begun):
            self.context.step(state.step, total)
            self._watch.add(state.step, state.x)
            self._check(self._watch.first_bad())
            if resume_point is not None and state.step < total:
                self._between_steps(resume_point, state)
        self._check(self._watch.first_bad(waits=True))
        self.context.record(sampling_seconds=round(time.monotonic() - started, 3), steps_taken=total - begun.step)
        if state.cache is not None:
            self.context.record(step_cache={"reused": state.cache.reused, "steps": total})
        return self.sampler.result(state)

    def _states(self, denoise: Denoise, state: SolverState) -> Iterator[SolverState]:
        """Yield the state after each step; where memory runs out in one, take it again from the state before."""
        while state.step < self.sampler.num_steps:
            failure = None
            if self.cache is not None:
                self.cache.memory = (state.cache or Memory()).to(self.sampler.device)
            try:
                try:
                    for state in self.sampler.iterate(denoise, state):  # noqa: B020 (goes on from the last state)
                        state = replace(state, cache=None if self.cache is None else self.cache.memory)
                        yield state
                except (MemoryError, RuntimeError) as error:
                    failure = memory_failure(error)
                    if failure is None:
                        raise
                if failure is not None:
                    self.retry.fall_back(failure)
            except S2VFlowError as error:  # there is no fallback left, or a process that shares the work is lost
                self._keep(error, state)
                raise

    def _keep(self, error: S2VFlowError, state: SolverState) -> None:
        """Write a resume point of the steps that are done before an error ends the node, and say so."""
        resume_point = self.context.resume_point
        if resume_point is not None and state.step > 0:
            self._check(self._watch.first_bad(waits=True))
            if resume_point.save(self._facts(state.step), pack(state.to_tensors())):
                steps = f"{state.step} of {self.sampler.num_steps} steps of this chunk"
                kept = error.kept or "what was stored before"
                error.kept = f"{kept}, and {steps}: the same command goes on from there"

    def _between_steps(self, resume_point: ResumePoint, state: SolverState) -> None:
        now, must_stop = time.monotonic(), resume_point.should_stop()
        is_due = now - self._saved_at + (now - self._stepped_at) > INTERVAL_SECONDS  # it would be after another step
        self._stepped_at = now
        if not (is_due or must_stop):
            return
        self._check(self._watch.first_bad(waits=True))
        is_saved = resume_point.save(self._facts(state.step), pack(state.to_tensors()))
        self._saved_at = self._stepped_at = time.monotonic()
        if must_stop:
            written = "resume point written" if is_saved else "without a resume point"
            raise resume_point.stop(f"after step {state.step} of {self.sampler.num_steps}, {written}")

    def _resumed(self, resume_point: ResumePoint, begun: SolverState) -> SolverState | None:
        found = resume_point.load()
        if found is None:
            return None
        facts, payload = found
        step = next((step for step in range(1, self.sampler.num_steps) if str(step) == facts.get("step")), 0)
        wrong = [name for name, value in self._facts(step).items() if facts.get(name) != value]
        if wrong or not step:
            resume_point.refuse(f"it is of another run: {', '.join(wrong) or 'step'} differs")
            return None
        blind = self.sampler.iterate(lambda x, sigma: x, self.sampler.start(torch.zeros_like(begun.x)))
        (like,) = deque(islice(blind, step), maxlen=1)  # it has the same tensors as the state that is looked for
        try:
            state = self._checked(load(payload), like)
        except (ValueError, RuntimeError, SafetensorError) as error:
            resume_point.refuse(f"it holds no solver's state: {error}")
            return None
        self.context.note(f"goes on from the resume point after step {state.step} of {self.sampler.num_steps}")
        return state

    def _checked(self, tensors: Mapping[str, Tensor], like: SolverState) -> SolverState:
        """Return a state of as many steps as `like`, of tensors that are as its are, and of a step cache's.

        Raises:
            ValueError, RuntimeError: One is missing, too many, of another form, or not finite.
        """
        expected = {name: (tensor.dtype, tensor.shape) for name, tensor in like.to_tensors().items()}
        if self.cache is not None:
            small = {"cache.numbers": (torch.float64, torch.Size([3])), "cache.rate": (torch.float32, torch.Size([]))}
            of_cache = (name for name in tensors if name.startswith("cache."))
            expected |= {name: small.get(name, (torch.float32, like.x.shape)) for name in of_cache}
        found = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
        odd = [name for name, form in (expected | found).items() if form != expected.get(name) or name not in found]
        odd += [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
        if odd or tensors["step"] != like.step:
            raise ValueError(f"{', '.join(sorted(odd)) or 'step'} is not as it should be")
        state = SolverState.from_tensors(tensors)
        if self.cache is not None and (state.cache is None or state.cache.step != like.step):
            raise ValueError("its step cache is of another step")
        if state.rng is not None:
            torch.Generator(self.sampler.device).set_state(state.rng)
        return state

    def _facts(self, step: int) -> dict[str, str]:
        sigmas = "\n".join(sigma.hex() for sigma in self.sampler.sigmas)
        cache = {} if self.cache is None else {"step_cache": f"{self.cache.kind} {self.cache.threshold.hex()}"}
        return {
            **cache,
            "sampler": self.sampler.name,
            "sigmas": hashlib.sha256(sigmas.encode()).hexdigest(),
            "seed": str(self.sampler.seed),
            "step": str(step),
            "steps": str(self.sampler.num_steps),
        }

    def _check(self, bad_step: int | None) -> None:
        if bad_step is not None:
            raise BadNumbersError(
                f"{self.context.name}: NaN or infinity in the latent after step {bad_step} of "
                f"{self.sampler.num_steps} (sampler {self.sampler.name}, precision {self.precision}, attention "
                f"{self.attention}, device {self.context.device})",
                fix="try precision: fp32 in the model's node, or another sampler; check the checkpoint and the LoRAs",
                kept="everything that was stored before; nothing of this node",
            )
