"""Weights that are a pure function of (seed, key, shape): the same on every machine, nothing to download.

The demo's models and the tests' models are filled by this one rule, which is also the rule behind the golden files.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

_UNIT = np.float32(2.0 / (1 << 24))


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
