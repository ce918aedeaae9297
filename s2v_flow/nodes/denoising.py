"""Where models and sampling meet: one chunk, from its inputs to its latent. Imports torch: used inside run()."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from s2v_flow.models.conditioning import Branch, PreparedChunk, PreparedText
from s2v_flow.models.footprint import LATENT_CHANNELS, MOTION_LATENT_FRAMES, num_tokens
from s2v_flow.models.speech import SpeechTable, chunk_embed, joined
from s2v_flow.models.vae import denormalise, normalise
from s2v_flow.nodes.resuming import ResumableSampling
from s2v_flow.nodes.shortage import Fallback, Fallbacks, no_memory
from s2v_flow.nodes.tensors import unpack
from s2v_flow.sampling.sampler import denoised_from_velocity, guide, initial_noise, make_sampler
from s2v_flow.sampling.state import StepCache
from s2v_flow.weights.tokenizer import MAX_TOKENS

if TYPE_CHECKING:
    from s2v_flow.errors import S2VFlowError
    from s2v_flow.graph.context import Artifact, RunContext
    from s2v_flow.models.dit import WanS2V
    from s2v_flow.nodes.handle import ModelHandle
    from s2v_flow.nodes.settings import SamplingSettings


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
        table = joined([_speech(part) for part in self._inputs["speech"]])
        embed = chunk_embed(table, self._settings.audio_offset, self._settings.num_latent_frames)
        return None if embed is None else embed.to(self._context.device)

    def _prepare_text(self, name: str) -> PreparedText:
        """Prepare a prompt, for this chunk alone: at most 420 MB at 14B, and less than a hundredth of a step's work."""
        context = unpack(self._inputs[name])["context"].to(self._context.device)  # [1, S, E]
        return self._model.prepare_text(context, padding=MAX_TOKENS - context.shape[1])


def _speech(segment: Artifact) -> SpeechTable:
    tensors = unpack(segment)
    end = tensors.get("num_features_30hz")
    return SpeechTable(tensors["rows"], None if end is None else int(end), int(tensors["first_row"]))
