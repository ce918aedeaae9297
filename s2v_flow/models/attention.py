"""Attention of the DiT: rotary position embeddings, its backends, and the two layers around it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from s2v_flow.errors import UsageError
from s2v_flow.models.float32 import RMSNorm

HEAD_WIDTH = 128
AXIS_WIDTHS = (44, 42, 42)  # how the head's 128 channels are split over time, rows and columns
THETA = 10000.0

Positions = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Grid:
    """Where the tokens of one segment sit, by axis; tokens run over columns first, then rows, then time."""

    time: Positions
    rows: Positions
    columns: Positions

    @property
    def num_tokens(self) -> int:
        """How many tokens the segment has."""
        return len(self.time) * len(self.rows) * len(self.columns)

    @staticmethod
    def dense(num_frames: int, num_rows: int, num_columns: int, *, start_time: int = 0) -> Grid:
        """Place one token on every integer position, the first frame at `start_time`."""
        time, rows, columns = (np.arange(count, dtype=np.float64) for count in (num_frames, num_rows, num_columns))
        return Grid(time + start_time, rows, columns)


def rotation_table(grids: Sequence[Grid], device: torch.device | str = "cpu") -> Tensor:
    """Compute the rotations of a sequence of segments; `grids`: the segments, in the order of their tokens.

    Returns:
        Cosines and sines, float32 [L, 1, K / 2, 2], to be broadcast over heads.

    Source: J. Su et al., 2021, section 3.4; Wan2.2, wan/modules/model.py, rope_params.
    """
    angles = np.concatenate([_angles(grid) for grid in grids])  # [L, K/2]
    rotations = np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)
    return torch.from_numpy(rotations).unsqueeze(1).to(device)  # [L, 1, K/2, 2]


def rotate_(x: Tensor, rotations: Tensor) -> Tensor:
    """Rotate each pair of neighbouring channels (0 and 1, 2 and 3, ...) in place; return x.

    `x`: queries or keys, float32 [B, L, N, K], contiguous; `rotations`: float32 [L, 1, K / 2, 2]: see `rotation_table`.
    """
    pairs = x.view(*x.shape[:-1], -1, 2)
    if torch.compiler.is_compiling():  # complex numbers break what is compiled into pieces
        cosines, sines = rotations.unbind(-1)
        even, odd = pairs.unbind(-1)
        return torch.stack([even * cosines - odd * sines, even * sines + odd * cosines], dim=-1).flatten(-2)
    torch.view_as_complex(pairs).mul_(torch.view_as_complex(rotations))
    return x


def _angles(grid: Grid) -> Positions:
    shape = (len(grid.time), len(grid.rows), len(grid.columns))
    parts = []
    for axis, (positions, width) in enumerate(zip((grid.time, grid.rows, grid.columns), AXIS_WIDTHS, strict=True)):
        frequencies = THETA ** (-np.arange(0, width, 2, dtype=np.float64) / width)
        angles = np.expand_dims(np.outer(positions, frequencies), [other for other in range(3) if other != axis])
        parts.append(np.broadcast_to(angles, (*shape, width // 2)))
    return np.concatenate(parts, axis=-1).reshape(-1, HEAD_WIDTH // 2)


class KeysValues(NamedTuple):
    """Keys and values of one attention layer, each [B or 1, N, S, K], in the dtype that attention computes in.

    bias: What is added to every query's scores, [1, S], of that dtype; None: nothing.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor | None = None


Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]  # of queries, keys and values, as `attention` takes them
_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def attention(q: Tensor, k: Tensor, v: Tensor, kernel: Kernel | None = None) -> Tensor:
    """Compute softmax(q k^T / sqrt(K)) v, by `kernel` if given, else by torch: heads joined, [B, L, N K], of q's dtype.

    `q`: floating point [B, N, L, K]; `k`, `v`: [B, N, S, K], of q's dtype.
    """
    attended = (kernel or F.scaled_dot_product_attention)(q, k, v)  # [B, N, L, K]
    return attended.transpose(1, 2).flatten(2)  # [B, L, D]


def repetition_biases(count: int) -> list[float]:
    """Return biases of scores with which that few equal keys count as `count`: their exponentials add up to it.

    They are multiples of 1/32: where they weigh, every dtype holds them exactly. The sum is right to a millionth.
    """
    biases: list[float] = []
    left = float(count)
    while left > 1e-6 * count:
        biases.append(math.floor(math.log(left) * 32) / 32)
        left -= math.exp(biases[-1])
    return biases


def kernel_of(backend: str) -> Kernel | None:
    """Return what computes self-attention with a backend; None: torch does, see `preferring`."""
    if backend != "sage":
        return None
    from sageattention import sageattn  # type: ignore[import-not-found]  # not among the requirements

    return partial(sageattn, tensor_layout="HND", is_causal=False)


def preferring(backend: str) -> AbstractContextManager[None]:
    """Return a block in which torch takes a backend wherever it can compute a shape, else its next best."""
    first = _BACKENDS.get(backend)
    if first is None:
        return nullcontext()
    others = (each for each in (*_BACKENDS.values(), SDPBackend.MATH) if each != first)
    return sdpa_kernel([first, *others], set_priority=True)


def backends_for(capability: tuple[int, int] | None, dtype: torch.dtype) -> tuple[str, ...]:
    """Return what `attention: auto` tries, best first, by a GPU's compute capability (None: no NVIDIA GPU).

    Source: measurements of others: huggingface/transformers, pull request 48163; sgl-project/sglang, 33655.
    """
    if capability is None or dtype == torch.float32:
        return ("sdpa",)
    if capability in ((9, 0), (10, 0)):
        return "cudnn", "flash", "sdpa"
    return ("flash", "sdpa") if capability[0] == 8 else ("sdpa",)


def try_backend(backend: str, device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Compute small tensors with a backend alone, and a bias of scores, as the text has it, with the backend first.

    Returns why it cannot be used on a device, None if it can.
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 64, HEAD_WIDTH, generator=generator).to(device, dtype) for _ in range(3))
    bias = torch.arange(-4.0, 5).to(device, dtype)[None]
    short = q, k[:, :, :9], v[:, :, :9]
    with sdpa_kernel(SDPBackend.MATH):
        expected = attention(q, k, v), F.scaled_dot_product_attention(*short, attn_mask=bias)
    try:
        with sdpa_kernel(_BACKENDS[backend]) if backend in _BACKENDS else nullcontext():
            alone = attention(q, k, v, kernel_of(backend))
        with preferring(backend):
            biased = F.scaled_dot_product_attention(*short, attn_mask=bias)
        pairs = zip((alone, biased), expected, strict=True)
        is_right = all(torch.allclose(*pair, rtol=0.05, atol=0.05) for pair in pairs)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0] or 'no text'}"
    return None if is_right else "it gives wrong numbers"


def usable_backend(asked: str, candidates: Sequence[str], device: str, dtype: torch.dtype) -> tuple[str, str]:
    """Return the backend to compute with, and a warning's text if it is not the first choice, else "".

    `asked`: "auto", or the one backend that will do; `candidates`: what auto tries, in order; the last needs no trial.

    Raises:
        S2VFlowError: The one that is asked for cannot be used.
    """
    if asked != "auto":
        failure = None if asked == "sdpa" else try_backend(asked, device, dtype)
        if failure is not None:
            text = f"attention: {asked} does not work on {device}: {failure}"
            raise UsageError(text, "use attention: auto, or another backend")
        return asked, ""
    failures: list[str] = []
    for backend in candidates[:-1]:
        failure = try_backend(backend, device, dtype)
        if failure is None:
            return backend, _told(failures, backend)
        failures.append(f"{backend} does not work on {device} ({failure})")
    return candidates[-1], _told(failures, candidates[-1])


def _told(failures: Sequence[str], backend: str) -> str:
    return f"attention: {'; '.join(failures)}: {backend} is used" if failures else ""


def split_heads(x: Tensor) -> Tensor:
    """Split the width into heads: [B, L, N K] becomes [B, L, N, K]."""
    return x.view(*x.shape[:-1], -1, HEAD_WIDTH)


class Projections(nn.Module):
    """The linear layers of attention; queries and keys are normalised over the full width, before heads are split."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim)
        self.norm_k = RMSNorm(dim)


class SelfAttention(Projections):
    """Attention of all tokens to all tokens, with rotary positions."""

    def forward(self, x: Tensor, rotations: Tensor, num_queries: int, kernel: Kernel | None = None) -> Tensor:
        """Let the first `num_queries` tokens, 1 to L, attend to all: [B, num_queries, D], of x's dtype.

        `x`: [B, L, D], in the dtype to compute in; `rotations`: float32 [L, 1, K / 2, 2]; `kernel`: see `attention`.
        """
        q = rotate_(split_heads(self.norm_q(self.q(x[:, :num_queries]))), rotations[:num_queries]).to(x.dtype)
        k = rotate_(split_heads(self.norm_k(self.k(x))), rotations).to(x.dtype)
        v = split_heads(self.v(x))
        out: Tensor = self.o(attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), kernel))
        return out


class CrossAttention(Projections):
    """Attention of tokens to a context whose keys and values are prepared beforehand."""

    def context_layers(self) -> list[nn.Module]:
        """Return the layers that `keys_values` uses, and nothing else does."""
        return [self.k, self.v, self.norm_k]

    def keys_values(self, context: Tensor) -> KeysValues:
        """Project a context [B, S, D], in the dtype to compute in, to keys and values [B, N, S, K] of that dtype."""
        keys = split_heads(self.norm_k(self.k(context))).to(context.dtype)
        return KeysValues(keys.transpose(1, 2), split_heads(self.v(context)).transpose(1, 2))

    def forward(self, x: Tensor, context: KeysValues) -> Tensor:
        """Let every token of x [B, L, D], in the dtype to compute in, attend to the context: [B, L, D], of x's dtype.

        `context`: from `keys_values`; a batch of one serves every sample of x.
        """
        q = split_heads(self.norm_q(self.q(x))).to(x.dtype).transpose(1, 2)  # [B, N, L, K]
        keys, values = (part.expand(len(x), -1, -1, -1) for part in context[:2])
        kernel = None if context.bias is None else partial(F.scaled_dot_product_attention, attn_mask=context.bias)
        out: Tensor = self.o(attention(q, keys, values, kernel))
        return out
