"""GGUF's block types in torch: packed rows to float32, equal bit for bit to `gguf.quants.dequantize`.

Source: ggml, ggml-quants.c, dequantize_row_*; layouts in ggml-common.h. d and m are float16; elements in their order.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from s2v_flow.weights.gguf import BLOCK_SIZES


def dequantize_blocks(rows: Tensor, block_type: str) -> Tensor:
    """Expand packed rows, uint8 [..., bytes of a row] of "Q8_0", "Q4_K", ...: float32 [..., elements of a row]."""
    elements, block_bytes = BLOCK_SIZES[block_type]
    blocks = rows.reshape(-1, block_bytes)  # [blocks, bytes]
    values = _TYPES[block_type](blocks)  # [blocks, elements]
    return values.reshape(*rows.shape[:-1], rows.shape[-1] // block_bytes * elements)


def _halves(part: Tensor) -> Tensor:
    """Read float16 numbers: uint8 [n, 2k] to float32 [n, k]."""
    return part.contiguous().view(torch.float16).float()


def _signed(part: Tensor) -> Tensor:
    return part.contiguous().view(torch.int8).float()


def _nibbles(part: Tensor) -> Tensor:
    """Read 4-bit numbers, all low ones first: uint8 [n, k] to uint8 [n, 2k]."""
    return torch.cat([part & 15, part >> 4], dim=-1)


def _shifts(step: int, part: Tensor) -> Tensor:
    """Return 0, step, ..., below 8: uint8 [n, 1]; made on the device, where a list would be waited for."""
    return torch.arange(0, 8, step, dtype=torch.uint8, device=part.device)[:, None]


def _bits(part: Tensor) -> Tensor:
    """Read single bits, the lowest of each byte first: uint8 [n, k] to uint8 [n, 8k]."""
    return ((part[..., None] >> _shifts(1, part)[:, 0]) & 1).flatten(-2)


def _q8_0(b: Tensor) -> Tensor:
    return _halves(b[:, :2]) * _signed(b[:, 2:])


def _q4_0(b: Tensor) -> Tensor:
    return _halves(b[:, :2]) * (_nibbles(b[:, 2:]).float() - 8)


def _q4_1(b: Tensor) -> Tensor:
    return _halves(b[:, :2]) * _nibbles(b[:, 4:]).float() + _halves(b[:, 2:4])


def _q5_0(b: Tensor) -> Tensor:
    q = _nibbles(b[:, 6:]) | (_bits(b[:, 2:6]) << 4)
    return _halves(b[:, :2]) * (q.float() - 16)


def _q5_1(b: Tensor) -> Tensor:
    q = _nibbles(b[:, 8:]) | (_bits(b[:, 4:8]) << 4)
    return _halves(b[:, :2]) * q.float() + _halves(b[:, 2:4])


def _two_bits(part: Tensor) -> Tensor:
    """Read 2-bit numbers: in each 32 bytes, the lowest pairs of all, then the next ones; uint8 [n, k] to [n, 4k]."""
    shifts = _shifts(2, part)
    return ((part.reshape(len(part), -1, 1, 32) >> shifts) & 3).flatten(1)  # [n, k/32, 4, 32]


def _grouped(scale: Tensor, q: Tensor) -> Tensor:
    """Multiply groups of elements by a scale each: [n, g] and [n, e] to [n, g, e/g]."""
    return scale[..., None] * q.reshape(*scale.shape, -1)


def _q2_k(b: Tensor) -> Tensor:
    d, low = _halves(b[:, 80:82]), _halves(b[:, 82:84])
    scales, minima = d * (b[:, :16] & 15).float(), low * (b[:, :16] >> 4).float()
    return (_grouped(scales, _two_bits(b[:, 16:80]).float()) - minima[..., None]).flatten(1)


def _q3_k(b: Tensor) -> Tensor:
    low, high = b[:, 96:104], b[:, 104:108]
    shifts = _shifts(2, b)
    tops = ((high[:, None] >> shifts) & 3).flatten(1)  # [n, 16]
    scales = (_nibbles(low) | (tops << 4)).float() - 32
    mask = _bits_by_plane(b[:, :32])  # [n, 256]
    q = _two_bits(b[:, 32:96]).float() - 4 * (1 - mask.float())
    return _grouped(_halves(b[:, 108:110]) * scales, q).flatten(1)


def _bits_by_plane(part: Tensor) -> Tensor:
    """Read single bits, the lowest of all bytes first: uint8 [n, 32] to uint8 [n, 256]."""
    shifts = _shifts(1, part)
    return ((part[:, None] >> shifts) & 1).flatten(1)


def _six_bit_pairs(part: Tensor) -> tuple[Tensor, Tensor]:
    """Read 8 scales and 8 minima of six bits each from 12 bytes: uint8 [n, 12] to two float32 [n, 8]."""
    d, m, dm = part[:, :4], part[:, 4:8], part[:, 8:]
    scales = torch.cat([d & 63, (dm & 15) | ((d >> 2) & 48)], dim=1)
    minima = torch.cat([m & 63, (dm >> 4) | ((m >> 2) & 48)], dim=1)
    return scales.float(), minima.float()


def _nibbles_by_32(part: Tensor) -> Tensor:
    """Read 4-bit numbers: of each 32 bytes, the low ones, then the high ones; uint8 [n, k] to [n, 2k]."""
    shifts = _shifts(4, part)
    return ((part.reshape(len(part), -1, 1, 32) >> shifts) & 15).flatten(1)


def _q4_k(b: Tensor) -> Tensor:
    return _with_minima(b, _nibbles_by_32(b[:, 16:]))


def _q5_k(b: Tensor) -> Tensor:
    return _with_minima(b, _nibbles_by_32(b[:, 48:]) | (_bits_by_plane(b[:, 16:48]) << 4))


def _with_minima(b: Tensor, q: Tensor) -> Tensor:
    scales, minima = _six_bit_pairs(b[:, 4:16])
    d, low = _halves(b[:, :2]) * scales, _halves(b[:, 2:4]) * minima
    return (_grouped(d, q.float()) - low[..., None]).flatten(1)


def _q6_k(b: Tensor) -> Tensor:
    low = b[:, :128].reshape(-1, 2, 1, 64)
    shifts = _shifts(4, b)
    low = ((low >> shifts) & 15).flatten(1)  # of each 64 bytes, the low ones, then the high ones
    q = (low | (_two_bits(b[:, 128:192]) << 4)).float() - 32
    return _grouped(_halves(b[:, 208:210]) * _signed(b[:, 192:208]), q).flatten(1)


def _iq4(q: Tensor) -> Tensor:
    """Look 4-bit numbers up in the table of IQ4_NL and IQ4_XS."""
    places = torch.arange(0, 64, 8, device=q.device)
    table = torch.cat([packed >> places for packed in _IQ4]).to(torch.int8).float()  # made there, not copied
    return table[q.int()]


def _iq4_nl(b: Tensor) -> Tensor:
    return _halves(b[:, :2]) * _iq4(_nibbles(b[:, 2:]))


def _iq4_xs(b: Tensor) -> Tensor:
    low = ((b[:, 4:8, None] >> _shifts(4, b)[:, 0]) & 15).flatten(1)  # [n, 8]
    high = ((b[:, 2:4, None] >> _shifts(2, b)[:, 0]) & 3).flatten(1)
    scales = _halves(b[:, :2]) * ((low | (high << 4)).float() - 32)
    return _grouped(scales, _iq4(_nibbles(b[:, 8:].reshape(-1, 16)))).flatten(1)


_IQ4 = [  # the table's first eight and its last, a byte each
    int.from_bytes(struct.pack("8b", *values), "little", signed=True)
    for values in ((-127, -104, -83, -65, -49, -35, -22, -10), (1, 13, 25, 38, 53, 69, 89, 113))
]
_TYPES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1,
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs,
}  # fmt: skip
