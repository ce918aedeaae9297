"""Where models and sampling meet: one chunk, from its inputs to its latent, by way of resume points.

Imports torch: used inside run().
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from s2v_flow.errors import BadNumbersError, S2VFlowError
from s2v_flow.graph.context import ResumePoint, RunContext
from s2v_flow.models.conditioning import Branch, PreparedChunk, PreparedText
from s2v_flow.models.dit import WanS2V
from s2v_flow.models.footprint import LATENT_CHANNELS, MOTION_LATENT_FRAMES, num_tokens
from s2v_flow.models.speech import SpeechTable, chunk_embed, joined
from s2v_flow.models.vae import denormalise, normalise
from s2v_flow.nodes.fields import SamplingSettings
from s2v_flow.nodes.handle import ModelHandle
from s2v_flow.nodes.shortage import Fallback, Fallbacks, memory_failure, no_memory
from s2v_flow.nodes.tensors import pack, unpack
from s2v_flow.sampling.sampler import Sampler, denoised_from_velocity, guide, initial_noise, make_sampler
from s2v_flow.sampling.state import Denoise, Memory, SolverState, StepCache
from s2v_flow.weights.tokenizer import MAX_TOKENS

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


class Denoiser(Fallbacks):
    """One chunk's model calls: what is the same in every step is prepared once, here.

    Where memory runs out, it retries with less: what nobody uses is freed; the model's weights are offloaded to host
    memory; the branches of guidance run one after the other. None of these changes a bit of the result.
    """

    def __init__(self, settings: SamplingSettings, context: RunContext, inputs: Mapping[str, Any]) -> None:
        super().__init__(context)
        self._settings = settings
        self._inputs = inputs
        self._handle: ModelHandle = inputs["model"]
        self._handle.runs_in_turn |= bool(context.way.get("in_turn"))
        sizes = self._num_tokens(), 2 if "negative" in inputs else 1
        started = time.monotonic()
        self._model: WanS2V = self.run(lambda: self._handle.get(*sizes))
        context.record(load_seconds=round(time.monotonic() - started, 3))
        self._prepared = self.run(self._prepare_chunk)
        self._branches = self.run(self._prepare_branches)

    def sample(self) -> Tensor:
        """Sample the chunk: its raw latent, float32 [1, 16, F, H, W], on the CPU."""
        of = self._settings
        device = self._context.device
        sampler = make_sampler(of.sampler, of.scheduler, of.steps, of.shift, of.seed, device=device)

        kind, threshold = of.step_cache, of.step_cache_threshold
        self._cache = None if kind == "off" else StepCache(kind, threshold, sampler.num_steps)

        stages = []
        if getattr(self._model, "is_compiled", False) and "compile" not in self._handle.facts:
            self._handle.facts["compile"] = "blocks"
            stages = [self._context.stage("compiling the transformer's blocks")]

        def denoise(x: Tensor, sigma: float) -> Tensor:
            timestep = torch.full((1,), sampler.timestep(sigma), device=x.device)  # filled there: nothing is copied
            with stages.pop() if stages else nullcontext():
                velocity = self.velocity(x, timestep)
            denoised = denoised_from_velocity(x, velocity, sigma)
            if self._context.watch is not None:
                self._context.watch(self._context.name, self._inputs, denoised)
            return denoised

        def noise() -> Tensor:
            return initial_noise(self._prepared.latent_shape, of.seed)

        attention = self._handle.facts.get("attention", "sdpa")
        sampling = ResumableSampling(self._context, sampler, self._handle.precision, attention, self, self._cache)
        try:
            with self._context.stepwise():
                return denormalise(sampling.sample(denoise, noise)).cpu()
        finally:  # what is prepared goes now: an error's traceback would hold it
            self._branches.clear()
            del self._prepared

    def velocity(self, x: Tensor, timestep: Tensor) -> Tensor:
        """Return the guided velocity: of both branches, or of the one branch with cfg 1."""

        def compute() -> list[Tensor]:
            parts = [[branch] for branch in self._branches] if self._handle.runs_in_turn else [self._branches]
            return [found for part in parts for found in self._model(x, timestep, self._prepared, part)]

        velocities = compute() if self._cache is None else self._cache.velocities(x, compute)
        return velocities[0] if len(velocities) == 1 else guide(velocities[0], velocities[1], self._settings.cfg)

    def fallbacks(self) -> Iterator[Fallback]:
        """Stream the weights, then run the branches in turn."""
        if self._handle.stream():
            yield Fallback("stream", "the model's weights are offloaded to host memory and prefetched block by block")
        if "negative" in self._inputs and not self._handle.runs_in_turn:
            self._handle.runs_in_turn = True
            yield Fallback("turns", "the branches of guidance run one after the other")

    def explain(self, failure: str) -> S2VFlowError:
        """Name the size that did not fit."""
        settings = self._settings
        latent = f"a latent of 16x{settings.num_latent_frames}x{settings.height // 8}x{settings.width // 8}"
        what = f"{self._context.name}, with {latent}, {self._num_tokens()} tokens{self._handle.weights_text()}"
        fix = "fewer frames (length), an fp8 checkpoint, or another --device"
        return no_memory(self._context, what, failure, kept="every chunk that was finished", fix=fix)

    def _num_tokens(self) -> int:
        settings = self._settings
        return num_tokens(settings.width, settings.height, settings.num_latent_frames, self._inputs.keys())[1]

    def _prepare_chunk(self) -> PreparedChunk:
        settings = self._settings
        reference, control = self._latent("reference", "latent"), self._latent("control", "samples")
        return self._model.prepare_chunk(
            num_latent_frames=settings.num_latent_frames,
            height=settings.height // 8,
            width=settings.width // 8,
            reference_latent=reference,
            motion_latent=self._motion(),
            control_latent=torch.zeros(1, LATENT_CHANNELS, 1, 2, 2) if control is None else control,
            conditioning=settings.conditioning,
            device=self._context.device,
        )

    def _motion(self) -> Tensor | None:
        """Return the last 19 latent frames of the video so far, normalised, or None before the first chunk."""
        if "motion" in self._inputs:
            return self._latent("motion", "samples")
        if "history" not in self._inputs:
            return None
        parts = [unpack(part)["samples"] for part in self._inputs["history"]]
        return normalise(torch.cat(parts, dim=2)[:, :, -MOTION_LATENT_FRAMES:])

    def _latent(self, name: str, tensor: str) -> Tensor | None:
        return normalise(unpack(self._inputs[name])[tensor]) if name in self._inputs else None

    def _prepare_branches(self) -> list[Branch]:
        num_latent_frames, conditioning = self._settings.num_latent_frames, self._settings.conditioning
        embed = self._audio_embed()
        branches = []
        for name, factor in (("positive", 1.0), ("negative", 0.0)):
            if name in self._inputs:
                audio = None if embed is None else embed * factor
                prepared = self._model.prepare_audio(
                    audio, num_latent_frames=num_latent_frames, conditioning=conditioning
                )
                branches.append(Branch(self._prepare_text(name), prepared))
        return branches

    def _audio_embed(self) -> Tensor | None:
        if "speech" not in self._inputs:
            return None
        table = joined([SpeechTable.from_tensors(unpack(part)) for part in self._inputs["speech"]])
        embed = chunk_embed(table, self._settings.audio_offset, self._settings.num_latent_frames)
        return None if embed is None else embed.to(self._context.device)

    def _prepare_text(self, name: str) -> PreparedText:
        """Prepare a prompt, for this chunk alone: at most 420 MB at 14B, and less than a hundredth of a step's work."""
        context = unpack(self._inputs[name])["context"].to(self._context.device)  # [1, S, E]
        return self._model.prepare_text(context, padding=MAX_TOKENS - context.shape[1])
