"""The demo's trained models: what was learned lies in `learned/`, in half precision; the rest follows from rules.

Untrained weights are a pure function of (seed, key, shape): the same on every machine, nothing to download. The tests'
models are filled by this one rule, too, which is also the rule behind the golden files.

How they were trained: the folder `training/` of the repository. Most of this is the DiT's plan: which channels carry
what, and every weight that need not be learned. Learning to copy a portrait through attention takes a small model
longer than anything else, so that is built in. Attention is positional: queries and keys are constants, plus flags that
tell the reference and the newest motion frame from the video, and RoPE makes them meet at chosen distances.

- Block 0 copies the reference's patch, and the newest motion frame's where there is one, to the same place in every
  video frame; its cross-attention brings the expression that the text asks for, the first injector what the mouth does.
- Block 1 tells a token its latent frame's number, block 2 its row and column: as the share of attention that the
  reference gets, which RoPE makes a function of the place.
- Blocks 3 and 4 look at the neighbours to the left and right, above and below.
- The feed-forwards of blocks 1 to 4, and what blocks 3 and 4 take from neighbours, are learned.

Tokens other than the video's stay as they are embedded: their gates are zero, by way of the timestep 0 that they get.
A large constant in every token makes layer norm all but linear. D width, 256; P patch values, 64.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from s2v_flow.models.dit import S2VConfig, WanS2V
from s2v_flow.models.encoders import build_wav2vec2
from s2v_flow.models.load import shapes_of
from s2v_flow.models.vae import VAEConfig, WanVAE

_UNIT = np.float32(2.0 / (1 << 24))
FOLDER = Path(__file__).with_name("learned")
WAV2VEC2_SEED = 11
QUIET = ("attention.out_proj.", "feed_forward.output_dense.")  # what a layer adds to its input
QUIET_SCALE = 0.03

CONFIG = S2VConfig(dim=256, ffn_dim=768, num_layers=5, text_dim=64, audio_dim=64)
D = CONFIG.dim
PATCH_VALUES = 64
NOISY, PORTRAIT, BEFORE = slice(0, 72), slice(72, 144), slice(144, 216)  # each holds a patch in 72 channels
CONSTANT = slice(216, 232)
REFERENCE_FLAG, MOTION_FLAG = (232, 233), (250, 251)  # a flag is read as a difference: layer norm takes the mean away
MOUTH = slice(234, 242)  # opening of the latent frame's four frames, then roundness
EXPRESSION = slice(242, 246)
TIME, PLACE = (246, 247), (248, 249)
CONSTANT_SIZE = 16.0
FLAG = 4.0
CONTENT_NORM = 128.0 + 16 * CONSTANT_SIZE**2  # of an embedded token, squared
GAIN = math.sqrt(CONTENT_NORM / D)  # undoes layer norm
MOUTH_SIZE, MOUTH_MIDDLE = 6.0, 0.3
EXPRESSION_SIZE = 4.0
LEARNED_FFN = (1, 2, 3, 4)
LEARNED_ATTENTION = (3, 4)
_ROWS, _COLUMNS = 44, 86  # where a head's channels for rows and columns begin; time begins at 0
_SLOW = 42  # the time pair that hardly turns: flags meet here
_IGNORED = 84


def uniform(seed: int, key: str, shape: Sequence[int]) -> Tensor:
    """Draw float32 values in [-1, 1) of `shape`, () for a scalar, from a Philox stream keyed by sha256("seed:key")."""
    count = math.prod(shape)
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    stream = np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8").copy())
    words = stream.random_raw((count + 1) // 2).astype("<u8").view("<u4")[:count]
    values = (words >> 8).astype(np.float32) * _UNIT - np.float32(1.0)
    return torch.from_numpy(values.reshape(tuple(shape)).copy())


def fill(key: str, shape: Sequence[int], seed: int = 0) -> Tensor:
    """Make the weight named `key`, float32 of `shape`: matrices scaled by fan-in, gains near 1, biases small."""
    draw = uniform(seed, key, shape)
    leaf = key.rpartition(".")[2]
    if key.endswith("padding_tokens") or "modulation" in leaf:
        return draw * 0.5
    if key.endswith("casual_audio_encoder.weights"):
        return 0.5 + 0.4 * draw
    if leaf in ("gamma", "original0", "weight_g"):
        return 1.0 + 0.2 * draw
    if len(shape) <= 1:
        return 0.1 * draw if leaf == "bias" else 1.0 + 0.2 * draw
    if key.endswith("relative_attention_bias.weight") or "shared.weight" in key or "trainable_cond_mask" in key:
        return draw
    return draw * math.sqrt(3.0 / math.prod(shape[1:]))


def fill_all(shapes: Mapping[str, Sequence[int]], seed: int = 0) -> dict[str, Tensor]:
    """Make every weight of a model, float32, from its keys and shapes; `seed`: which set of weights."""
    return {key: fill(key, tuple(shape), seed) for key, shape in shapes.items()}


def trained_files() -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Make each trained file's path below the models folder and its float32 weights."""
    dit = built_in() | _stored("dit") | _stored("text") | _stored("hearing")
    yield "diffusion_models/demo_s2v.safetensors", dit
    yield "vae/demo_vae.safetensors", vae_with_time(_stored("vae"))
    yield "audio_encoders/demo_wav2vec2.safetensors", generated_wav2vec2() | _stored("wav2vec2")


def wav2vec2_sizes(channels: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes from which a tiny Wav2Vec2 is built; `channels`: the width of its convolutions."""
    convolutions = [(1, 10), *[(channels, 3)] * 4, *[(channels, 2)] * 2]
    return {
        **{f"feature_extractor.conv_layers.{i}.conv.weight": (channels, *of) for i, of in enumerate(convolutions)},
        "encoder.pos_conv_embed.conv.parametrizations.weight.original1": (64, 4, 128),
        "encoder.layers.0.feed_forward.intermediate_dense.weight": (256, 64),
        **{f"encoder.layers.{i}.layer_norm.weight": (64,) for i in range(24)},
    }


WAV2VEC2_SIZES = wav2vec2_sizes(32)


def generated_wav2vec2() -> dict[str, Tensor]:
    """Return an untrained Wav2Vec2 whose layers hardly change what goes through them."""
    weights = fill_all(shapes_of(build_wav2vec2(WAV2VEC2_SIZES)), WAV2VEC2_SEED)
    return {key: value * QUIET_SCALE if any(part in key for part in QUIET) else value for key, value in weights.items()}


def vae_with_time(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put zeros where kernels see earlier frames; stored is what sees the newest."""
    with torch.device("meta"):
        shapes = shapes_of(WanVAE(VAEConfig(width=16)))
    full = {}
    for key, value in weights.items():
        full[key] = value
        if len(shapes[key]) == 5 and value.ndim == 4:
            full[key] = value.new_zeros(shapes[key])
            full[key][:, :, -1] = value
    return full


def _stored(name: str) -> dict[str, Tensor]:
    """Read one file of learned weights, as float32."""
    return {key: value.float() for key, value in load_file(FOLDER / f"{name}.safetensors").items()}


def basis() -> Tensor:
    """Return [64, 72]: orthonormal rows without a mean, by which a patch lies in 72 channels."""
    place = torch.arange(72, dtype=torch.float64) + 0.5
    wave = torch.arange(1, PATCH_VALUES + 1, dtype=torch.float64)
    return (torch.cos(math.pi / 72 * wave[:, None] * place) * math.sqrt(2 / 72)).float()


def head_order() -> Tensor:
    """Return the index, in the order (channel, row, column) of an embedded patch, of each value in the head's order."""
    return torch.arange(PATCH_VALUES).view(16, 2, 2).permute(1, 2, 0).flatten()


def built_in() -> dict[str, Tensor]:
    """Return every weight of the model; learned ones where learning begins."""
    with torch.device("meta"):
        shapes = shapes_of(WanS2V(CONFIG))
    weights = {key: torch.zeros(shape) for key, shape in shapes.items()}
    for key, value in weights.items():
        if key.endswith(("norm_q.weight", "norm_k.weight", "norm3.weight")):
            value.fill_(1)
    _embeddings(weights)
    _time(weights)
    _copy(weights)
    _time_code(weights)
    _place_code(weights)
    _neighbours(weights, 3, _COLUMNS)
    _neighbours(weights, 4, _ROWS)
    for index in range(CONFIG.num_layers):
        modulation = weights[f"blocks.{index}.modulation"]
        for scale in (1, 4):
            modulation[0, scale] = GAIN - 1
            modulation[0, scale, CONSTANT] = -1
        modulation[0, 2] = modulation[0, 5] = 1
    for index in LEARNED_FFN:
        first = torch.randn(CONFIG.ffn_dim, D, generator=torch.Generator().manual_seed(index)) * math.sqrt(1 / 190)
        first[:, NOISY] = 0
        first[:, CONSTANT] = 0
        weights[f"blocks.{index}.ffn.0.weight"] = first
    _words_and_sounds(weights)
    return weights


def _embeddings(weights: dict[str, Tensor]) -> None:
    """Embed video, reference and the newest motion frame alike; older motion is nobody's. Read the portrait out."""
    embed = torch.zeros(D, PATCH_VALUES)
    embed[NOISY] = basis().T
    for name in ("patch_embedding", "frame_packer.proj"):
        weights[f"{name}.weight"] = embed.view(D, 16, 1, 2, 2).clone()
    mask = weights["trainable_cond_mask.weight"]
    mask[:, CONSTANT] = CONSTANT_SIZE * torch.tensor([1.0, -1.0]).repeat(8)
    pair = torch.tensor([FLAG, -FLAG])
    mask[1, list(REFERENCE_FLAG)] = mask[2, list(MOTION_FLAG)] = pair
    for name in ("proj_2x", "proj_4x"):
        weights[f"frame_packer.{name}.bias"][list(MOTION_FLAG)] = -pair
    read = torch.zeros(PATCH_VALUES, D)
    read[:, NOISY], read[:, PORTRAIT] = basis(), -basis()
    weights["head.head.weight"] = read[head_order()]
    weights["head.modulation"][0, 1] = GAIN - 1


def _time(weights: dict[str, Tensor]) -> None:
    """Scale the head's output by 1 / sigma, and close the gates at timestep 0."""
    weights["time_embedding.0.weight"][:, 128 + 96] = 40.0  # sin(t / 1000)
    knots = torch.linspace(-0.02, 0.84, D, dtype=torch.float64)
    weights["time_embedding.0.bias"] = (-40.0 * knots).float()
    sigma = torch.cat([torch.linspace(0.3, 1, 701, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    hidden = torch.nn.functional.silu(40.0 * (torch.sin(sigma)[:, None] - knots))
    hidden = torch.cat([hidden, torch.ones(len(sigma), 1, dtype=torch.float64)], 1)
    is_zero = (sigma == 0).double()
    wanted = torch.stack([GAIN * (1 / sigma.clamp(min=0.3) - 1) * (1 - is_zero), 10 * is_zero], 1)
    weight = torch.tensor([*[1.0] * 701, 300.0], dtype=torch.float64)[:, None]
    left, right = hidden * weight, wanted * weight
    solved = torch.linalg.solve(left.T @ left + 1e-6 * torch.eye(D + 1, dtype=torch.float64), left.T @ right).T
    stripes = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(D // 2)
    full = torch.outer(torch.ones(D, dtype=torch.float64), solved[0]) + torch.outer(stripes, solved[1])
    weights["time_embedding.2.weight"], weights["time_embedding.2.bias"] = full[:, :D].float(), full[:, D].float()
    close = -stripes.float() / (10 * D / 2)
    gates = weights["time_projection.1.weight"].view(6, D, D)
    gates[2], gates[5] = close, close


def _kernel(vector: Tensor, start: int, pairs: tuple[int, ...], logit: float, width: int, shift: float = 0.0) -> None:
    """Make queries or keys [128] meet at a distance: one step away from `shift` they lose `logit`. In place."""
    turns = torch.tensor([10000.0 ** (-2 * pair / width) for pair in pairs], dtype=torch.float64)
    size = math.sqrt(logit * math.sqrt(128) / (1 - turns.cos()).sum().item())
    for pair, turn in zip(pairs, turns.tolist(), strict=True):
        vector[start + 2 * pair] += size * math.cos(turn * shift)
        vector[start + 2 * pair + 1] += size * math.sin(turn * shift)


@dataclass
class _Meeting:
    """A block's constant queries and keys, [2 heads, 128], and what the flags of reference and motion add to keys."""

    queries: Tensor = field(default_factory=lambda: torch.zeros(2, 128, dtype=torch.float64))
    keys: Tensor = field(default_factory=lambda: torch.zeros(2, 128, dtype=torch.float64))
    reference: Tensor = field(default_factory=lambda: torch.zeros(2, 128, dtype=torch.float64))
    motion: Tensor = field(default_factory=lambda: torch.zeros(2, 128, dtype=torch.float64))

    def write(self, weights: dict[str, Tensor], index: int) -> None:
        """Set a block's layers; a channel that queries ignore gives all keys one length: RMS norm divides by it."""
        kinds = [self.keys, self.keys + self.reference, self.keys + self.motion]
        lengths = torch.stack([kind.square().sum() for kind in kinds])
        rest = (lengths.max() - lengths).sqrt()
        self.keys[0, _IGNORED] = rest[0]
        self.reference[0, _IGNORED], self.motion[0, _IGNORED] = rest[1] - rest[0], rest[2] - rest[0]
        prefix = f"blocks.{index}.self_attn"
        for name, value in (("q", self.queries), ("k", self.keys)):
            norm = value.square().mean().sqrt()
            weights[f"{prefix}.{name}.bias"] = (value / norm).flatten().float()
            weights[f"{prefix}.norm_{name}.weight"].fill_(norm)
        for (plus, minus), change in ((REFERENCE_FLAG, self.reference), (MOTION_FLAG, self.motion)):
            column = (change / norm / FLAG / 2).flatten().float()
            weights[f"{prefix}.k.weight"][:, plus], weights[f"{prefix}.k.weight"][:, minus] = column, -column

    def flag(self, head: int, *, reference: float = 0.0, motion: float = 0.0) -> None:
        """Add to the logits of reference and newest motion frame."""
        self.queries[head, _SLOW] = 12.0
        self.reference[head, _SLOW] += reference * math.sqrt(128) / 12
        self.motion[head, _SLOW] += motion * math.sqrt(128) / 12


def _copy(weights: dict[str, Tensor]) -> None:
    """Let head 0 fetch the reference's patch, head 1 the newest motion frame's, or else the reference's again."""
    meeting = _Meeting()
    for vector in (*meeting.queries, *meeting.keys):
        _kernel(vector, _ROWS, (0, 1, 2, 3), 7.0, 42)
        _kernel(vector, _COLUMNS, (0, 1, 2, 3), 7.0, 42)
    meeting.flag(0, reference=18.0)
    meeting.flag(1, reference=14.0, motion=26.0)
    meeting.write(weights, 0)
    value, out = weights["blocks.0.self_attn.v.weight"], weights["blocks.0.self_attn.o.weight"]
    value[:64, NOISY], value[128:192, NOISY] = basis(), basis()
    out[PORTRAIT, :64], out[BEFORE, 128:192] = basis().T, basis().T


def _own(meeting: _Meeting, head: int, time_pairs: tuple[int, ...]) -> None:
    """Let video tokens attend to themselves; the reference, all of it together, has as much from its flag."""
    for vector in (meeting.queries[head], meeting.keys[head]):
        _kernel(vector, 0, time_pairs, 12.0, 44)
        _kernel(vector, _ROWS, (0, 1, 2, 3), 8.0, 42)
        _kernel(vector, _COLUMNS, (0, 1, 2, 3), 8.0, 42)
    meeting.reference[head] -= meeting.keys[head]
    own = float(meeting.queries[head] @ meeting.keys[head]) / math.sqrt(128)
    meeting.flag(head, reference=own - math.log(64), motion=-40.0)


def _time_code(weights: dict[str, Tensor]) -> None:
    """Write cosine and sine of the latent frame's number, about one turn in ten frames."""
    meeting = _Meeting()
    turn, size, strength = 10000.0 ** (-2 / 44), 6.0, 1.6
    for head, phase in enumerate((0.0, math.pi / 2)):
        _own(meeting, head, (0, 2, 3, 4))
        angle = phase - 30 * turn  # the reference stands at time 30
        meeting.queries[head, 2] = size
        meeting.reference[head, 2] = strength * math.sqrt(128) / size * math.cos(angle)
        meeting.reference[head, 3] = strength * math.sqrt(128) / size * math.sin(angle)
    meeting.write(weights, 1)
    _write_shares(weights, 1, TIME)


def _place_code(weights: dict[str, Tensor]) -> None:
    """Write the row and the column: the reference's tokens above, or to the left, count for more."""
    meeting = _Meeting()
    for head, start in enumerate((_ROWS, _COLUMNS)):
        _own(meeting, head, (0, 1, 2, 3))
        meeting.queries[head, start + 10] = 6.0
        meeting.reference[head, start + 11] = 5.0 * math.sqrt(128) / 6.0  # the logit is sin(0.11 (own - other))
    meeting.write(weights, 2)
    _write_shares(weights, 2, PLACE)


def _write_shares(weights: dict[str, Tensor], index: int, channels: tuple[int, int]) -> None:
    """Write into a channel per head the share of attention that the reference gets, as -3 to 3."""
    prefix = f"blocks.{index}.self_attn"
    for head, channel in enumerate(channels):
        weights[f"{prefix}.v.weight"][128 * head, list(REFERENCE_FLAG)] = torch.tensor([0.5, -0.5]) / FLAG
        weights[f"{prefix}.o.weight"][channel, 128 * head] = 6.0
        weights[f"{prefix}.o.bias"][channel] = -3.0


def _neighbours(weights: dict[str, Tensor], index: int, start: int) -> None:
    """Let the heads look at the neighbour on either side in the same frame; at the edge, at the token itself."""
    meeting = _Meeting()
    other = _ROWS + _COLUMNS - start
    for head, shift in enumerate((-1.0, 1.0)):
        for vector, offset in ((meeting.queries[head], shift), (meeting.keys[head], 0.0)):
            _kernel(vector, 0, (0, 1, 2, 3), 12.0, 44)
            _kernel(vector, other, (0, 1, 2, 3), 7.0, 42)
            _kernel(vector, start, (0, 1, 2, 3), 7.0, 42, offset)
        meeting.flag(head, reference=-80.0, motion=-80.0)
    meeting.write(weights, index)
    prefix = f"blocks.{index}.self_attn"
    generator = torch.Generator().manual_seed(100 + index)
    value = torch.randn(D, D, generator=generator) * math.sqrt(1 / 190)
    value[:, NOISY] = 0
    value[:, CONSTANT] = 0
    weights[f"{prefix}.v.weight"] = value
    weights[f"{prefix}.o.weight"] = torch.randn(D, D, generator=generator) * 0.01


def _words_and_sounds(weights: dict[str, Tensor]) -> None:
    """Let block 0's cross-attention and the first injector add a vector; what it is, is learned elsewhere."""
    prefix = "blocks.0.cross_attn"
    weights[f"{prefix}.q.bias"].fill_(1)
    weights["text_embedding.2.weight"] = torch.eye(D)
    weights[f"{prefix}.v.weight"] = torch.eye(D)
    weights["audio_injector.injector.0.v.weight"] = torch.eye(D)
    weights["casual_audio_encoder.weights"].fill_(1)
