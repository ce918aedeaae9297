"""Wan2.2-S2V's diffusion transformer, in two phases: prepare what a prompt and a chunk fix, then run it once per step.

Attribute names are the checkpoint's keys. The residual stream, norms, modulation and convolutions are computed in
float32, matrices and attention in `compute_dtype`.

Source: Wan2.2, wan/modules/s2v/model_s2v.py, WanModel_S2V.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2v_flow.models.attention import (
    HEAD_WIDTH,
    CrossAttention,
    Grid,
    kernel_of,
    preferring,
    repetition_biases,
    rotation_table,
)
from s2v_flow.models.conditioning import (
    BUCKETS,
    Branch,
    Conditioning,
    MotionPacker,
    PreparedAudio,
    PreparedChunk,
    PreparedText,
    motion_grids,
    require_conditioning,
    require_shape,
)
from s2v_flow.models.dit_block import (
    AUDIO_FRAMES_PER_LATENT,
    AUDIO_LAYERS,
    FREQUENCY_WIDTH,
    AudioInjector,
    Block,
    CausalAudioEncoder,
    Head,
    Step,
    timestep_embedding,
)
from s2v_flow.models.float32 import PatchEmbedding
from s2v_flow.models.footprint import INJECTION_BLOCKS, LATENT_CHANNELS
from s2v_flow.models.registry import weight_bytes
from s2v_flow.models.streaming import WeightStream, can_pin

PATCH = (1, 2, 2)
PATCH_VALUES = 64
VIDEO, REFERENCE, MOTION = range(3)  # rows of the condition mask, and the order of the tokens
Use = Literal["embedding", "text", "encoder", "audio", "motion", "step"]  # what streamed weights are for
_PREPARING = ("text_embedding", "casual_audio_encoder", "frame_packer")  # what steps do not need, beside the blocks'
STREAMED = ("blocks.", "audio_injector.", *(f"{name}." for name in _PREPARING))  # parameters that can be offloaded


@dataclass(frozen=True)
class S2VConfig:
    """The sizes that differ between S2V models; all others are fixed by the architecture."""

    dim: int
    ffn_dim: int
    num_layers: int
    text_dim: int
    audio_dim: int

    @property
    def num_heads(self) -> int:
        """How many attention heads there are."""
        return self.dim // HEAD_WIDTH

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> S2VConfig:
        """Read the sizes off a checkpoint's tensors.

        `shapes`: key, without prefix, to shape. Keys that are not the model's, such as scales, are ignored.

        Raises:
            ValueError: It is not an S2V model, or the sizes contradict each other. Loading checks every key.
        """
        if "casual_audio_encoder.encoder.final_linear.weight" not in shapes:  # sic: "casual"
            raise ValueError("not a Wan2.2-S2V model: casual_audio_encoder.encoder.final_linear.weight is missing")
        config = cls(
            dim=_size(shapes, "head.modulation", ndim=3, axis=2),
            ffn_dim=_size(shapes, "blocks.0.ffn.0.weight", ndim=2, axis=0),
            num_layers=_count(shapes, "blocks"),
            text_dim=_size(shapes, "text_embedding.0.weight", ndim=2, axis=1),
            audio_dim=_size(shapes, "casual_audio_encoder.encoder.conv1_local.conv.weight", ndim=3, axis=1),
        )
        if config.dim % HEAD_WIDTH:
            raise ValueError(f"head.modulation: expected a width that {HEAD_WIDTH} divides, got {config.dim}")
        injectors = _count(shapes, "audio_injector.injector")
        if injectors != len(INJECTION_BLOCKS):
            raise ValueError(f"audio_injector.injector: expected {len(INJECTION_BLOCKS)} layers, got {injectors}")
        return config


class WanS2V(nn.Module):
    """The S2V diffusion transformer: predicts the velocity of a noisy latent.

    Latents that enter and leave are normalised per channel. No gradients are kept.

    `compute_dtype`: what matrices and attention compute in: float32, bfloat16 or float16. Linear layers must take and
    give this dtype; every other parameter may be stored in any floating dtype.

    Attributes:
        attention: The backend of attention: "sdpa" (torch's choice), "cudnn", "flash", "efficient" or "sage".
    """

    def __init__(self, config: S2VConfig, *, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.attention = "sdpa"
        dim = config.dim
        self.patch_embedding = PatchEmbedding(LATENT_CHANNELS, dim, PATCH)
        self.cond_encoder = PatchEmbedding(LATENT_CHANNELS, dim, PATCH)
        # its own weight, else the layer draws one: on the meta device that imports torch's compiler, two seconds
        self.trainable_cond_mask = nn.Embedding(3, dim, _weight=torch.empty(3, dim))
        self.frame_packer = MotionPacker(LATENT_CHANNELS, dim)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(FREQUENCY_WIDTH, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(dim, config.ffn_dim) for _ in range(config.num_layers))
        self.casual_audio_encoder = CausalAudioEncoder(config.audio_dim, dim)  # sic: the checkpoint's spelling
        self.audio_injector = AudioInjector(dim)
        self.head = Head(dim, PATCH_VALUES)
        self._streams: dict[Use, WeightStream] = {}

    @property
    def is_streamed(self) -> bool:
        """Whether the blocks' weights are offloaded to host memory."""
        return bool(self._streams)

    def stream_weights(self, device: torch.device | str) -> None:
        """Move the weights of blocks, injectors and preparation to host memory, unless they are there, until their use.

        What is computed stays the same, bit for bit.

        `device`: where the model computes; what is not streamed must be there already.
        """
        if self.is_streamed:
            return
        blocks = cast("Sequence[Block]", self.blocks)
        injectors = cast("Sequence[CrossAttention]", self.audio_injector.injector)
        text = [block.cross_attn.context_layers() for block in blocks]
        sound = [injector.context_layers() for injector in injectors]
        audio = [[*layers, norm] for layers, norm in zip(sound, self.audio_injector.injector_adain_layers, strict=True)]
        steps: list[list[nn.Module]] = [[block] for block in blocks]
        for index, injector in zip(INJECTION_BLOCKS, injectors, strict=True):
            if index < len(steps):
                steps[index].append(injector)
        besides = [layer for layers in (*text, *sound) for layer in layers]
        alone = [self.get_submodule(name) for name in _PREPARING]
        num_bytes = sum(map(weight_bytes, (self.blocks, self.audio_injector, *alone)))
        is_pinned = can_pin(num_bytes, torch.device(device))
        embedding, encoder, motion = (WeightStream([[module]], device, is_pinned=is_pinned) for module in alone)
        self._streams = {
            "embedding": embedding,
            "encoder": encoder,
            "motion": motion,
            "text": WeightStream(text, device, is_pinned=is_pinned),
            "audio": WeightStream(audio, device, is_pinned=is_pinned),
            "step": WeightStream(steps, device, besides=besides, is_pinned=is_pinned),
        }

    @property
    def is_compiled(self) -> bool:
        """Whether the blocks are compiled, or will be by the next call."""
        return self.blocks[0]._compiled_call_impl is not None

    def compile_blocks(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Let torch.compile make the blocks' code, once for all, on the first call: seconds to minutes.

        The last of several blocks stays as it is: it computes fewer tokens, for which everything would be compiled
        again. The weights have to stay on the device.

        Args:
            backend: What torch.compile takes: a name, or a function of a graph and its inputs.
        """
        for block in self.blocks[: max(1, len(self.blocks) - 1)]:
            block.compile(backend=backend)

    def _passing(self, use: Use, count: int) -> AbstractContextManager[Iterable[int]]:
        """Return the numbers of `count` layers, in order, each with its weights where it computes."""
        stream = self._streams.get(use)
        return nullcontext(range(count)) if stream is None else closing(iter(stream))

    @torch.no_grad()
    def prepare_text(self, context: Tensor, *, padding: int = 0) -> PreparedText:
        """Prepare a prompt, once per prompt: the keys and values of every block's cross-attention.

        `context`: the text encoder's output, [B or 1, S, text width]; `padding`: how many rows of zeros follow it,
        whose keys and values are equal: a few stand for all.

        Raises:
            ValueError: The shape is wrong.
        """
        require_shape("context", context, None, None, self.config.text_dim)
        bias = None
        if padding:
            biases = repetition_biases(padding)
            bias = F.pad(torch.tensor([biases]), (context.shape[1], 0)).to(context.device, self.compute_dtype)
            context = F.pad(context, (0, 0, 0, len(biases)))
        with self._passing("embedding", 1) as once:
            (projected,) = [self.text_embedding(context.to(self.compute_dtype)) for _ in once]  # [B, S, D]
        blocks = cast("Sequence[Block]", self.blocks)
        with self._passing("text", len(blocks)) as indices:
            layers = (blocks[index].cross_attn.keys_values(projected) for index in indices)
            return PreparedText(tuple(layer._replace(bias=bias) for layer in layers))

    @torch.no_grad()
    def prepare_audio(
        self, audio_embed: Tensor | None, *, num_latent_frames: int, conditioning: Conditioning
    ) -> PreparedAudio | None:
        """Prepare a chunk's audio, once per chunk and branch: what the injectors need, or None without audio.

        Args:
            audio_embed: Audio features at 16 frames a second, floating point [B or 1, A, E, 4 F]; zeros for the
                unconditional branch; None where the audio is over.
            num_latent_frames: F.
            conditioning: "official": latent frame t sees the audio up to frame 4t + 3; "comfyui": up to 4t.

        Raises:
            ValueError: The shape or the conditioning is wrong.
        """
        require_conditioning(conditioning)
        if audio_embed is None:
            return None
        num_audio_frames = AUDIO_FRAMES_PER_LATENT * num_latent_frames
        require_shape("audio_embed", audio_embed, None, AUDIO_LAYERS, self.config.audio_dim, num_audio_frames)
        with self._passing("encoder", 1) as once:
            given = audio_embed, conditioning, self.compute_dtype
            ((global_token, local),) = [self.casual_audio_encoder(*given) for _ in once]
        with self._passing("audio", len(INJECTION_BLOCKS)) as indices:
            return PreparedAudio(self.audio_injector.prepare(global_token, local, self.config.num_layers, indices))

    @torch.no_grad()
    def prepare_chunk(
        self,
        *,
        num_latent_frames: int,
        height: int,
        width: int,
        reference_latent: Tensor | None = None,
        motion_latent: Tensor | None = None,
        control_latent: Tensor | None = None,
        conditioning: Conditioning,
        batch_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> PreparedChunk:
        """Prepare a chunk's geometry, reference, motion and control, once for any number of `forward` calls.

        Latents are normalised, of any floating dtype; a batch of one serves every sample.

        Args:
            num_latent_frames: F, of the chunk.
            height: H, latent rows; even.
            width: W, latent columns; even.
            reference_latent: [B or 1, C, 1, H, W]; None: no reference tokens.
            motion_latent: The video so far, [B or 1, C, any F, H, W], oldest frame first; its last 19 frames count,
                missing ones are zero. None: no motion tokens.
            control_latent: [B or 1, C, F, H, W], or one patch [B or 1, C, 1, 2, 2] that stands for all of them: a zero
                one says that there is no pose video. None: the control embedding is left out, bias included.
            conditioning: Whose positions and timesteps of the still tokens.
            batch_size: B.

        Raises:
            ValueError: A shape or the conditioning is wrong.
        """
        require_conditioning(conditioning)
        shape = (batch_size, LATENT_CHANNELS, num_latent_frames, height, width)
        if min(shape) < 1 or height % 2 or width % 2:
            raise ValueError(f"latent: expected positive sizes [B, C, F, H, W], H and W even, got {list(shape)}")
        grids = [Grid.dense(num_latent_frames, height // 2, width // 2)]
        if reference_latent is not None:
            require_shape("reference_latent", reference_latent, (1, batch_size), LATENT_CHANNELS, 1, height, width)
            time = 30 if conditioning == "official" else max(30, num_latent_frames + 9)
            grids.append(Grid.dense(1, height // 2, width // 2, start_time=time))
        if motion_latent is not None:
            _require_motion(motion_latent, batch_size, height, width)
            grids += motion_grids(height, width, conditioning)
        num_noisy_tokens = grids[0].num_tokens
        if conditioning == "comfyui" and motion_latent is not None:
            num_reference_frames = 0 if reference_latent is None else 1
            num_tokens = sum(grid.num_tokens for grid in grids)
            num_noisy_tokens = comfyui_noisy_tokens(num_latent_frames, num_reference_frames, num_tokens)
        return PreparedChunk(
            latent_shape=shape,
            conditioning=conditioning,
            num_video_tokens=grids[0].num_tokens,
            num_noisy_tokens=num_noisy_tokens,
            video_offset=self._video_offset(control_latent, shape, device),
            still_tokens=self._still_tokens(reference_latent, motion_latent, batch_size, device),
            rotations=rotation_table(grids, device),
        )

    @torch.no_grad()
    def forward(self, x: Tensor, timestep: Tensor, chunk: PreparedChunk, branches: Sequence[Branch]) -> list[Tensor]:
        """Predict the velocity of a noisy latent, for each branch of guidance: float32 [B, C, F, H, W].

        Args:
            x: The noisy latent, normalised, floating point [B, C, F, H, W].
            timestep: sigma * 1000, floating point [B]; on the device of x, or the device waits for the copy.
            branches: One for cfg 1, two for guidance; what they have in common is computed once.

        Raises:
            ValueError: A shape differs from the prepared chunk's, or there is no branch.
        """
        self._require_inputs(x, timestep, chunk, branches)
        time_rows = torch.cat([timestep, timestep.new_zeros(1)])  # [B+1]
        embedding = timestep_embedding(time_rows, chunk.conditioning).to(x.device, self.compute_dtype)
        time = self.time_embedding(embedding)  # [B+1, D]
        projected = self.time_projection(time).float().unflatten(1, (6, -1))  # [B+1, 6, D]
        kernel, shard = kernel_of(self.attention), chunk.shard
        if shard is not None:
            kernel = partial(shard.attend, kernel or F.scaled_dot_product_attention)
        step = Step(projected, chunk.num_noisy_tokens, chunk.rotations, self.compute_dtype, kernel)

        hidden = [torch.cat([self.patch_embedding(x) + chunk.video_offset, chunk.still_tokens], dim=1)]  # [B, L, D]
        hidden = hidden if shard is None else [shard.own(hidden[0])]
        with preferring(self.attention), self._passing("step", self.config.num_layers) as indices:
            for index in indices:
                hidden = self._run_block(index, hidden, chunk, branches, step)
        patches = (self.head(stream, time.float(), chunk.num_noisy_tokens, self.compute_dtype) for stream in hidden)
        return [unpatchify(part if shard is None else shard.join(part), chunk.latent_shape) for part in patches]

    def _run_block(
        self, index: int, hidden: list[Tensor], chunk: PreparedChunk, branches: Sequence[Branch], step: Step
    ) -> list[Tensor]:
        """Run a block, and the audio's injector after it, for every branch: see `Block.forward`."""
        is_last = index == self.config.num_layers - 1 and chunk.shard is None
        inject = self.audio_injector if chunk.shard is None else partial(chunk.shard.inject, self.audio_injector)
        num_kept = chunk.num_video_tokens if is_last else hidden[0].shape[1]
        texts = [branch.text.blocks[index] for branch in branches]
        streams: list[Tensor] = self.blocks[index](hidden, texts, step, num_kept=num_kept)
        for stream, branch in zip(streams, branches, strict=True):
            if branch.audio is not None and index in branch.audio.blocks:
                tokens = stream[:, : chunk.num_video_tokens]
                tokens += inject(tokens, branch.audio.blocks[index], index, self.compute_dtype)
        return streams

    def _video_offset(self, control_latent: Tensor | None, shape: Sequence[int], device: torch.device | str) -> Tensor:
        """Return what is added to the embedded video: [B or 1, L video or 1, D]."""
        offset = self.trainable_cond_mask.weight[VIDEO].float()[None, None]  # [1, 1, D]
        if control_latent is None:
            return offset
        batch_size, channels, *size = shape
        if tuple(control_latent.shape[2:]) == PATCH:
            size = list(PATCH)
        require_shape("control_latent", control_latent, (1, batch_size), channels, *size)
        tokens: Tensor = self.cond_encoder(control_latent.to(device))
        return tokens + offset

    def _still_tokens(
        self, reference_latent: Tensor | None, motion_latent: Tensor | None, batch_size: int, device: torch.device | str
    ) -> Tensor:
        """Embed reference and motion, in this order: [B, L still, D]."""
        mask = self.trainable_cond_mask.weight.float()
        parts = [mask.new_empty(1, 0, self.config.dim)]
        if reference_latent is not None:
            parts.append(self.patch_embedding(reference_latent.to(device)) + mask[REFERENCE])
        if motion_latent is not None:
            with self._passing("motion", 1) as once:
                parts += [self.frame_packer(motion_latent.to(device)) + mask[MOTION] for _ in once]
        return torch.cat([part.expand(batch_size, -1, -1) for part in parts], dim=1)

    def _require_inputs(self, x: Tensor, timestep: Tensor, chunk: PreparedChunk, branches: Sequence[Branch]) -> None:
        require_shape("x", x, *chunk.latent_shape)
        batch_size, _, num_latent_frames, _, _ = chunk.latent_shape
        require_shape("timestep", timestep, batch_size)
        if not branches:
            raise ValueError("branches: expected at least one, got none")
        for branch in branches:
            keys = branch.text.blocks[0].keys
            require_shape("text keys", keys, (1, batch_size), self.config.num_heads, None, HEAD_WIDTH)
            if branch.audio is not None:
                keys = branch.audio.blocks[0].keys
                require_shape("audio keys", keys, (1, batch_size), num_latent_frames, None, None, HEAD_WIDTH)


def comfyui_noisy_tokens(num_latent_frames: int, num_reference_frames: int, num_tokens: int) -> int:
    """Count the tokens, from the first, that see the timestep in ComfyUI when there is motion.

    It spreads rows of modulation evenly over the tokens, though frames have unequal numbers of tokens; the border meets
    the end of the video only at some sizes, such as where 64 divides both sides of the picture. `num_reference_frames`:
    0 or 1; `num_tokens`: all of them.
    """
    rows = 2 * (num_latent_frames + num_reference_frames) + 3
    tokens_per_row = -(-num_tokens // rows)
    return min(2 * num_latent_frames * tokens_per_row, num_tokens)


def unpatchify(patches: Tensor, latent_shape: Sequence[int]) -> Tensor:
    """Put patches [B, L, 64], values in the order (frame, row, column, channel), back into a latent [B, C, F, H, W]."""
    batch_size, channels, frames, height, width = latent_shape
    x = patches.reshape(batch_size, frames, height // 2, width // 2, 2, 2, channels)
    x = x.permute(0, 6, 1, 2, 4, 3, 5)  # [B, C, F, H/2, 2, W/2, 2]
    return x.reshape(batch_size, channels, frames, height, width)


def _require_motion(motion_latent: Tensor, batch_size: int, height: int, width: int) -> None:
    require_shape("motion_latent", motion_latent, (1, batch_size), LATENT_CHANNELS, None, height, width)
    smallest = max(bucket.patch[-1] for bucket in BUCKETS)
    if min(height, width) < smallest:
        raise ValueError(f"motion_latent: expected at least {smallest} rows and columns, got {height} and {width}")


def _size(shapes: Mapping[str, Sequence[int]], key: str, *, ndim: int, axis: int) -> int:
    """Return one size of a tensor, or raise ValueError."""
    if key not in shapes:
        raise ValueError(f"{key} is missing")
    if len(shapes[key]) != ndim or min(shapes[key]) < 1:
        raise ValueError(f"{key}: expected {ndim} sizes of at least 1, got {list(shapes[key])}")
    return shapes[key][axis]


def _count(shapes: Mapping[str, Sequence[int]], prefix: str) -> int:
    """Count the layers `prefix`.0, `prefix`.1, ..., or raise ValueError if one is missing."""
    pattern = re.compile(rf"{re.escape(prefix)}\.(\d+)\.")
    indices = {int(match[1]) for match in map(pattern.match, shapes) if match}
    if indices != set(range(len(indices))):
        raise ValueError(f"{prefix}: expected layers numbered from 0 without gaps, got {sorted(indices)}")
    return len(indices)
