"""Which weights of a model file are quantised, and how; from its header and a few short texts, without torch.

A safetensors file says so in one of three ways: a tensor `scaled_fp8` and per layer X `X.scale_weight` (2025); the
format of each layer in the metadata `_quantization_metadata`, or in a tensor of JSON bytes `X.comfy_quant` (both with
`X.weight_scale`); or by the dtype alone (fp8 without a scale). In a GGUF file each tensor has its own type. Input
scales serve products in fp8, which are not used here: weights are expanded, see models/packed.py.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from s2v_flow.errors import CheckpointError
from s2v_flow.weights.gguf import BLOCK_SIZES
from s2v_flow.weights.reader import Checkpoint

MARKER = "scaled_fp8"
FP8_FORMATS: Mapping[str, str] = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
GGUF_FORMATS = frozenset(BLOCK_SIZES) - {"F32", "F16", "BF16"}
_SCALES = (".scale_weight", ".weight_scale")
BOOKKEEPING = (*_SCALES, ".weight_scale_2", ".scale_input", ".input_scale", ".pre_quant_scale", ".comfy_quant")
_MAX_TAG_BYTES = 4096
_WEIGHT_DTYPES: Mapping[str, tuple[str, ...]] = {  # by format: what its weights are stored as
    "float8_e4m3fn": ("F8_E4M3",),
    "float8_e5m2": ("F8_E5M2",),
    "int8_tensorwise": ("I8",),
    "nvfp4": ("U8",),
    "mxfp8": ("F8_E4M3",),
}
_PLAIN = frozenset({"F64", "F32", "F16", "BF16", "BOOL"})
_COMMON_NAMES = {"F8_E8M0": "mxfp8", "I8": "int8"}
_OTHER_METHODS: Mapping[str, str] = {  # by what stands behind a layer's name
    ".weight_scale_inv": "fp8 with a scale for each block",
    ".wscales": "SVDQuant",
    ".qweight": "GPTQ, AWQ or SVDQuant",
    ".weight._data": "optimum-quanto's",
    ".weight:qdata": "torchao's",
    "._weight_qdata": "torchao's",
    "_quantizer._amax": "ModelOpt's",
    ".weight_packed": "compressed-tensors'",
    ".absmax": "bitsandbytes'",
    ".SCB": "bitsandbytes'",
}
_SCALE_LIKE = re.compile(r"scale|scalar|zero|amax|quant|qdata|smooth", re.IGNORECASE)


@dataclass(frozen=True)
class Packing:
    """How one weight is stored."""

    format: str  # "float8_e4m3fn", "float8_e5m2", "int8_tensorwise", "nvfp4", "mxfp8", or a GGUF block type ("Q4_K")
    shape: tuple[int, ...]  # the weight's own; of nvfp4 and mxfp8 padded to whole blocks
    scale: str | None = None  # the key of its scales; None where the format has none, or all are 1
    scale_2: str | None = None  # the key of nvfp4's second scale
    group: int = 0  # the columns that are rotated together (ConvRot); 0: none are

    def holds(self, shape: tuple[int, ...]) -> bool:
        """Tell whether a weight of `shape` fits: of formats that pad, up to whole blocks."""
        block = {"nvfp4": 16, "mxfp8": 32}.get(self.format, 1)
        return self.shape == tuple(-(-size // block) * block for size in shape)


@dataclass(frozen=True)
class Quantization:
    """What is quantised in a file: each such weight's packing by its key; and the keys that are no weights."""

    packings: Mapping[str, Packing] = field(default_factory=dict)
    bookkeeping: frozenset[str] = frozenset()

    def shape(self, checkpoint: Checkpoint, key: str) -> tuple[int, ...]:
        """Return a weight's shape once it is expanded."""
        packing = self.packings.get(key)
        return checkpoint.shapes[key] if packing is None else packing.shape

    def num_bytes(self, checkpoint: Checkpoint, key: str) -> int:
        """Return what a weight takes while it stays packed, its scales included."""
        packing = self.packings[key]
        keys = [key, *(name for name in (packing.scale, packing.scale_2) if name is not None)]
        return sum(checkpoint.entries[name].end - checkpoint.entries[name].begin for name in keys)


def read_quantization(checkpoint: Checkpoint) -> Quantization:
    """Find a file's quantised weights, in any of the supported layouts: none in a file in full precision.

    Raises:
        CheckpointError: The file uses another format (it is named), or scales are missing or of the wrong shape.
    """
    bookkeeping = frozenset(key for key in checkpoint.entries if key == MARKER or key.endswith(BOOKKEEPING))
    options = _options(checkpoint)
    for ending, method in _OTHER_METHODS.items():
        key = next((key for key in checkpoint.entries if key.endswith(ending)), None)
        if key is not None:
            raise _refused(checkpoint, f"{method} ({key!r})")
    packings: dict[str, Packing] = {}
    for key, entry in checkpoint.entries.items():
        if key in bookkeeping:
            continue
        layer = key.removesuffix(".weight")
        named = options.get(layer) if key.endswith(".weight") else None
        if named is not None:
            packings[key] = _packing(checkpoint, layer, key, named)
        elif entry.dtype in FP8_FORMATS:
            packings[key] = _fp8(checkpoint, layer, key, bool(bookkeeping))
        elif entry.dtype in GGUF_FORMATS:
            packings[key] = Packing(entry.dtype, entry.shape)
        elif entry.dtype not in _PLAIN and key.endswith(".weight"):
            name = _COMMON_NAMES.get(entry.dtype, entry.dtype)
            raise _refused(checkpoint, f"{name} without its format ({key!r})")
    for layer in sorted(options.keys() - {key.removesuffix(".weight") for key in packings}):
        if f"{layer}.comfy_quant" in checkpoint.entries:
            raise _faulty(checkpoint, f"{layer!r} is said to be quantised, but has no weight")
    used = {name for packing in packings.values() for name in (packing.scale, packing.scale_2)}
    for key in sorted(bookkeeping - used):
        if key.endswith((*_SCALES, ".weight_scale_2")):
            weight = key.rpartition(".")[0] + ".weight"
            found = checkpoint.dtypes.get(weight, "missing")
            why = "has another scale already" if weight in packings else f"is not quantised (it is {found})"
            raise _faulty(checkpoint, f"{key!r} scales {weight!r}, which {why}")
    for key in checkpoint.entries.keys() - bookkeeping:
        layer, _, end = key.rpartition(".")
        if _SCALE_LIKE.search(end) and not {layer, f"{layer}.weight"}.isdisjoint(checkpoint.entries):
            raise _faulty(checkpoint, f"has {key!r} beside a weight, a form of quantisation that is not supported")
    return Quantization(packings, bookkeeping)


def _packing(checkpoint: Checkpoint, layer: str, key: str, options: Mapping[str, Any]) -> Packing:
    name, entry = str(options["format"]), checkpoint.entries[key]
    name = name.removesuffix("_rowwise") if name.startswith("float8") else name  # a scale of either shape is read
    if name not in _WEIGHT_DTYPES:
        raise _refused(checkpoint, f"{name} (layer {layer!r})")
    if f"{layer}.pre_quant_scale" in checkpoint.entries:
        raise _refused(checkpoint, f"{name} with a pre_quant_scale (layer {layer!r})")
    is_fp8 = name.startswith("float8")
    if entry.dtype not in _WEIGHT_DTYPES[name] or (len(entry.shape) != 2 and not is_fp8):
        wanted = f"{_WEIGHT_DTYPES[name][0]} [out, in]"
        what = f"{checkpoint.path}: {key!r} is {entry.dtype} {list(entry.shape)}, {name} has {wanted}"
        raise CheckpointError(what, "use a file whose quantised weights are linear layers'")
    if is_fp8:
        return _fp8(checkpoint, layer, key, True)
    rows, columns = entry.shape
    scale = f"{layer}.weight_scale"
    if name == "int8_tensorwise":
        _check_scale(checkpoint, scale, ("F32",), _one_or_rows(rows))
        return Packing(name, entry.shape, scale, group=_group(checkpoint, layer, options, columns))
    if name == "mxfp8":
        _check_scale(checkpoint, scale, ("F8_E8M0", "U8"), [_tiled(rows, columns // 32)])
        return Packing(name, entry.shape, scale)
    scale_2 = f"{layer}.weight_scale_2"
    _check_scale(checkpoint, scale, ("F8_E4M3", "U8"), [_tiled(rows, columns // 8)])
    _check_scale(checkpoint, scale_2, ("F32",), [(), (1,)])
    return Packing(name, (rows, columns * 2), scale, scale_2)


def _fp8(checkpoint: Checkpoint, layer: str, key: str, needs_scale: bool) -> Packing:
    entry = checkpoint.entries[key]
    scale = next((layer + suffix for suffix in _SCALES if layer + suffix in checkpoint.entries), None)
    if scale is not None:
        _check_scale(checkpoint, scale, ("F32", "F16", "BF16"), _one_or_rows(entry.shape[0] if entry.shape else 1))
    elif needs_scale:
        lacking = layer + _SCALES[0]
        raise _faulty(checkpoint, f"{key!r} is in fp8, but its scale {lacking!r} is missing")
    return Packing(FP8_FORMATS[entry.dtype], entry.shape, scale)


def _one_or_rows(rows: int) -> list[tuple[int, ...]]:
    return [(), (1,), (1, 1), (rows,), (rows, 1)]


def _tiled(rows: int, columns: int) -> tuple[int, ...]:
    """Return the shape of block scales, padded to tiles of 128 x 4."""
    return -(-rows // 128) * 128, -(-columns // 4) * 4


def _check_scale(checkpoint: Checkpoint, key: str, dtypes: tuple[str, ...], shapes: list[tuple[int, ...]]) -> None:
    entry = checkpoint.entries.get(key)
    if entry is None:
        raise _faulty(checkpoint, f"{key!r} is missing: without it the weight means nothing")
    if entry.dtype not in dtypes:
        raise _faulty(checkpoint, f"{key!r} is {entry.dtype}, expected {dtypes[0]}")
    if entry.shape not in shapes:
        raise _refused(checkpoint, f"a format with scales of the shape {list(entry.shape)} ({key!r})")


def _group(checkpoint: Checkpoint, layer: str, options: Mapping[str, Any], columns: int) -> int:
    """Read ConvRot's options: how many columns are rotated together, a power of 4."""
    if not options.get("convrot", False):
        return 0
    group = options.get("convrot_groupsize", 256)
    if type(group) is not int or group < 4 or group & (group - 1) or not group & 0x5555_5555 or columns % group:
        raise _faulty(checkpoint, f"{layer!r} rotates groups of {group} of its {columns} columns")
    return group


def _options(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Return each layer's format and options, by layer."""
    found: dict[str, dict[str, Any]] = {}
    text, where = checkpoint.metadata.get("_quantization_metadata"), "its _quantization_metadata"
    try:
        if text is not None:
            known = {stored: key for key, stored in checkpoint.file_keys.items()}
            layers = json.loads(text)["layers"].items()
            found = {_layer(checkpoint, known, name): _flat(layer) for name, layer in layers}
        for key in (key for key in checkpoint.entries if key.endswith(".comfy_quant")):
            entry, where = checkpoint.entries[key], repr(key)
            if entry.dtype != "U8" or math.prod(entry.shape) > _MAX_TAG_BYTES:
                raise ValueError("it is no short text")
            found[key.removesuffix(".comfy_quant")] = _flat(json.loads(checkpoint.read_bytes(key)))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _faulty(checkpoint, f"{where} is damaged") from error
    return found


def _layer(checkpoint: Checkpoint, known: Mapping[str, str], name: str) -> str:
    """Return a layer of the metadata as its weight is called here; its prefix may be one that the file has no more."""
    key = known.get(f"{name}.weight", f"{name}.weight")
    ends = (key[place + 1 :] for place, letter in enumerate(key) if letter == ".")
    return next((end for end in (key, *ends) if end in checkpoint.entries), key).removesuffix(".weight")


def _flat(layer: Any) -> dict[str, Any]:
    """Bring options that stand under `params` beside the format."""
    return {**layer.get("params", {}), **layer, "format": layer["format"]}


def _refused(checkpoint: Checkpoint, what: str) -> CheckpointError:
    return _faulty(checkpoint, f"is quantised as {what}, which is not supported")


def _faulty(checkpoint: Checkpoint, what: str) -> CheckpointError:
    fix = f"use a file in {', '.join(_WEIGHT_DTYPES)}, bf16, fp16 or GGUF"
    return CheckpointError(f"{checkpoint.path}: {what}", fix=fix)
