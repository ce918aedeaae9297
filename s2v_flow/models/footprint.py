"""How much memory and arithmetic work takes, without torch: for the plan's figures and for what a run decides by.

What models compute with is counted from their code, largest moment by largest moment; each formula says what it counts.
In them c is the bytes of a number in the dtype that is computed in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from s2v_flow.files.facts import per_file
from s2v_flow.weights.layout import num_layers, own_keys
from s2v_flow.weights.quantization import GGUF_FORMATS, Packing, read_quantization
from s2v_flow.weights.reader import Checkpoint
from s2v_flow.weights.tokenizer import MAX_TOKENS

_WIDE_BYTES = {"BF16": 2, "F16": 2}  # what is not a matrix keeps its dtype, or becomes float32
_STORED = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}  # what needs no copy on a CPU
LATENT_CHANNELS = 16
MOTION_LATENT_FRAMES = 19
INJECTION_BLOCKS = (0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39)  # audio enters after these
_PARTS = ("blocks.", "audio_injector.injector.", "audio_injector.injector_adain_layers.")
_STREAMED = re.compile(
    r"(?:blocks|audio_injector\.injector(?:_adain_layers)?)\.[0-9]+\.|"
    r"(?:text_embedding|casual_audio_encoder|frame_packer)\."
)


@dataclass(frozen=True, eq=False)
class Weights:
    """A loader's model as its header tells: shapes by key, what the weights take once loaded, c. Not to be changed."""

    shapes: Mapping[str, tuple[int, ...]]
    num_bytes: int
    item_bytes: int
    is_packed: bool
    on_cpu: bool

    @cached_property
    def num_blocks(self) -> int:
        """A transformer's depth."""
        return len({key.split(".")[1] for key in self.shapes if key.startswith("blocks.")})


@per_file
def read_weights(path: Path, kind: str, precision: str, *, on_cpu: bool, is_streamed: bool = False) -> Weights:
    """Count a model's weights as its loader will have them, from the file's header.

    `kind`: the loader's; only diffusion models and text encoders keep quantised weights packed. `precision`: "fp32",
    "bf16", "fp16" or "fp8_fast", which has the blocks' matrices in one byte.

    Raises:
        MissingError, RefusedError, CheckpointError: The file is missing, a pickle or damaged.
    """
    checkpoint, item_bytes = Checkpoint.open(path), 4 if precision == "fp32" else 2
    quantization = read_quantization(checkpoint)
    can_pack, keeps_wide = kind in ("load_diffusion_model", "load_text_encoder"), kind == "load_diffusion_model"

    def is_kept(packing: Packing | None) -> bool:
        return packing is not None and can_pack and (not on_cpu or packing.format in GGUF_FORMATS)

    def size(key: str) -> int:
        entry = checkpoint.entries[key]
        weight = checkpoint.entries.get(f"{key.removesuffix('.bias')}.weight") if key.endswith(".bias") else entry
        is_linear = weight is not None and len(weight.shape) == 2 and key.endswith((".weight", ".bias"))
        is_matrix = is_linear and weight is entry
        injector = re.match(r"audio_injector\.injector(?:_adain_layers)?\.([0-9]+)\.", key)
        block = dict(enumerate(INJECTION_BLOCKS)).get(int(injector[1]) if injector else -1, -1)
        if block >= num_blocks and on_cpu and entry.dtype == _STORED.get(precision):
            return 0  # mapped from the file, and never read
        if is_matrix and is_kept(quantization.packings.get(key)):
            return quantization.num_bytes(checkpoint, key)
        if is_matrix and precision == "fp8_fast" and re.search(r"blocks\.(?!\d+\.cross_attn\.[kv]\.)", key):
            return math.prod(quantization.shape(checkpoint, key))
        kept = max(item_bytes, _WIDE_BYTES.get(entry.dtype, 4)) if keeps_wide and not is_linear else item_bytes
        return math.prod(quantization.shape(checkpoint, key)) * kept

    keys = own_keys(checkpoint.entries.keys())
    num_blocks = num_layers(checkpoint.shapes, "blocks")
    sizes = {key: size(stored) for key, stored in keys.items()}
    shapes = {key: quantization.shape(checkpoint, stored) for key, stored in keys.items()}
    num_bytes = streamed_bytes(sizes) if is_streamed else sum(sizes.values())
    return Weights(shapes, num_bytes, item_bytes, any(map(is_kept, quantization.packings.values())), on_cpu)


def streamed_bytes(sizes: Mapping[str, int]) -> int:
    """Count what of streamed weights is on the device: what steps need beside blocks, and two of the largest of these.

    An injector comes with its block. What only preparation needs is smaller than two blocks.
    """
    layers: dict[str, int] = {}
    resting = 0
    for key, size in sizes.items():
        match = _STREAMED.match(key)
        if match is None:
            resting += size
        else:
            layers[match[0]] = layers.get(match[0], 0) + size
    largest = (max((size for name, size in layers.items() if name.startswith(part)), default=0) for part in _PARTS)
    return resting + 2 * sum(largest)


def latent_bytes(width: int, height: int, num_latent_frames: int) -> int:
    """Count a latent's bytes, float32."""
    return 16 * num_latent_frames * (height // 8) * (width // 8) * 4


def num_tokens(width: int, height: int, num_latent_frames: int, inputs: Collection[str]) -> tuple[int, int]:
    """Count a chunk's tokens: those of the video, and all (with the reference's and the motion's).

    `width`: the video's width in pixels.
    """
    rows, columns = height // 8, width // 8
    frame = (rows // 2) * (columns // 2)
    still = frame if "reference" in inputs else 0
    if "motion" in inputs or "history" in inputs:  # buckets of 1, 2 and 16 latent frames
        still += frame + (rows // 4) * (columns // 4) + 4 * (rows // 8) * (columns // 8)
    return num_latent_frames * frame, num_latent_frames * frame + still


def step_bytes(dit: Weights, num_tokens: int, num_branches: int) -> int:
    """Count what one denoising step's blocks compute with, see `activation_bytes`."""
    dim, ffn_dim = dit.shapes["head.modulation"][2], dit.shapes["blocks.0.ffn.0.weight"][0]
    return activation_bytes(dim, ffn_dim, num_tokens, num_branches, dit.item_bytes)


def activation_bytes(dim: int, ffn_dim: int, num_tokens: int, num_branches: int, item_bytes: int) -> int:
    """Count what a block's computation holds at its fullest, without weights; attention never holds its scores.

    One float32 stream per branch; beside it, while keys are normalised, two float32 arrays (three where the dtype has
    fewer bits) and input, queries and keys in the dtype; in the feed-forward the input and two hidden layers.

    `item_bytes`: the size of a number in the dtype that is computed in.
    """
    widened = 4 if item_bytes < 4 else 0  # a float32 copy where the dtype has fewer bits
    attention = dim * (8 + widened + 3 * item_bytes)
    feed_forward = dim * item_bytes + 2 * ffn_dim * item_bytes
    return num_tokens * (4 * dim * num_branches + max(attention, feed_forward))


def chunk_bytes(
    dit: Weights, width: int, height: int, num_latent_frames: int, inputs: Collection[str], *, in_turn: bool = False
) -> int:
    """Count what one denoising step takes: the transformer's own computation, see `activation_bytes`.

    Beside this, from the chunk's start: rotations, still tokens, each prompt's keys and values, the audio's, and the
    solver's latents; with fp8 weights the largest matrix, expanded. `in_turn`: guidance's branches run one by one.
    """
    dim, c = dit.shapes["head.modulation"][2], dit.item_bytes
    ffn = dit.shapes["blocks.0.ffn.0.weight"][0]
    layers = dit.num_blocks
    branches = 2 if "negative" in inputs else 1
    video, tokens = num_tokens(width, height, num_latent_frames, inputs)
    step = step_bytes(dit, tokens, 1 if in_turn else branches)
    injected = sum(block < layers for block in INJECTION_BLOCKS) if "speech" in inputs else 0
    texts = branches * layers * 2 * MAX_TOKENS * dim * c
    audio = branches * injected * num_latent_frames * (10 * c + 8) * dim
    control = 4 * video * dim if "control" in inputs else 0
    prepared = texts + audio + control + 4 * (tokens - video) * dim + 512 * tokens
    latents = 6 * latent_bytes(width, height, num_latent_frames)
    return step + prepared + latents + (ffn * dim * c if dit.is_packed else 0)


def tile_side(side: int, tiles: int) -> int:
    """Return how many pixels a tile has along a side that is cut into so many; neighbours share 64."""
    return side if tiles == 1 else min(8 * -(-(side // 8 + 8 * (tiles - 1)) // tiles), side)


def decoding_bytes(vae: Weights, width: int, height: int, frames_per_call: int) -> int:
    """Count what decoding takes, in arrays of one frame at full size with the narrowest layer's channels.

    The state from one call to the next is 24.7 of them, twice while it is replaced. At the widest moment, in the last
    stage (four frames for a latent frame), 16 more for each latent frame: the layer's input and its shortcut, the
    convolution's window and its result, and upsampled ones of twice the channels. What convolutions need besides makes
    52 and 17; on the CPU they turn 16 bits into float32, which makes 55 and 54.
    """
    state, per_call = (55.0, 54.0) if vae.on_cpu and vae.item_bytes == 2 else (52.0, 17.0)
    return round(_frame_bytes(vae, width, height) * (state + per_call * frames_per_call))


def encoding_bytes(vae: Weights, width: int, height: int, num_frames: int) -> int:
    """Count what encoding takes, as `decoding_bytes` does: one frame alone takes 18 arrays, a clip, four at a time, 46.

    A GPU takes 16 and 40. The clip itself, float32, stands beside it, twice.
    """
    clip = 3 * num_frames * width * height * 4
    one, several = (18, 46) if vae.on_cpu else (16, 40)
    return (one if num_frames == 1 else several) * _frame_bytes(vae, width, height) + 2 * clip


def chunk_flops(
    dit: Weights, width: int, height: int, num_latent_frames: int, inputs: Collection[str]
) -> tuple[float, float, float]:
    """Count one call of the model, for every branch of guidance: in matrix products, in attention, in convolutions.

    At 640x640 and 20 latent frames, with motion, they are 1,973 TFLOP at 14B.
    """
    dim, ffn = dit.shapes["head.modulation"][2], dit.shapes["blocks.0.ffn.0.weight"][0]
    layers = dit.num_blocks
    video, tokens = num_tokens(width, height, num_latent_frames, inputs)
    injected = sum(block < layers for block in INJECTION_BLOCKS) if "speech" in inputs else 0
    matrices = layers * tokens * (12 * dim**2 + 4 * dim * ffn) + injected * video * 4 * dim**2
    branches = 2 if "negative" in inputs else 1
    return branches * matrices, branches * layers * 4 * dim * tokens * (tokens + MAX_TOKENS), 0


@lru_cache(16)
def encoder_flops(encoder: Weights, num_positions: int) -> tuple[float, float, float]:
    """Count what a text or audio encoder's matrices compute for so many positions; the rest is small beside it."""
    names = ("shared.", "embed_tokens.", "relative_attention_bias.")
    sizes = [math.prod(s) for k, s in encoder.shapes.items() if len(s) == 2 and not any(name in k for name in names)]
    return 2.0 * num_positions * sum(sizes), 0, 0


@lru_cache(16)
def vae_flops(vae: Weights, part: str, width: int, height: int, num_frames: int) -> tuple[float, float, float]:
    """Count the convolutions of the VAE's "encoder" or "decoder" for so many pixel frames.

    Level 0 is the latent's resolution, level 3 the picture's; time grows fourfold in between.
    """
    per_cell = 0
    for key, shape in vae.shapes.items():
        if key.startswith(part) and key.endswith(".weight") and len(shape) > 3:
            found = re.search(r"samples\.(\d+)\.(resample)?", key)
            if found is None:
                level = 3 * (key.startswith(("decoder.head", "encoder.conv1")))
            elif part == "decoder":
                level = int(found[1]) // 4 + bool(found[2])
            else:
                level = 3 - int(found[1]) // 3 - bool(found[2])
            per_cell += math.prod(shape) * 4**level * (1, 2, 4, 4)[level]
    return 0, 0, 2.0 * per_cell * (width // 8) * (height // 8) * num_frames / 4


def _frame_bytes(vae: Weights, width: int, height: int) -> int:
    return vae.shapes["decoder.head.0.gamma"][0] * width * height * vae.item_bytes
