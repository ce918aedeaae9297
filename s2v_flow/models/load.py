"""From a model file to a live module: built on the meta device, checked key by key, filled without a second copy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from s2v_flow.errors import CheckpointError, broken_package
from s2v_flow.models.encoders import AudioEncoder, TextEncoder, build_umt5, build_wav2vec2, merge_weight_norm
from s2v_flow.models.lora import LoraReport, LoraSpec, LoraStack, open_loras
from s2v_flow.models.packed import (
    PackedEmbedding,
    PackedLinear,
    PackedWeight,
    multiplied,
    multiply_in_fp8,
    read_packed,
)
from s2v_flow.weights.family import describe_mismatch
from s2v_flow.weights.layout import EMBEDDING_COPY_KEY, EMBEDDING_KEY, compare, own_keys
from s2v_flow.weights.quantization import GGUF_FORMATS, Packing, Quantization, read_quantization
from s2v_flow.weights.reader import Checkpoint, Shapes
from s2v_flow.weights.tokenizer import find_tokenizer, read_tokenizer

if TYPE_CHECKING:
    from s2v_flow.models.dit import WanS2V
    from s2v_flow.models.vae import WanVAE

_FIX_FILE = "download the file again, or use another"
_STORED_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16}  # all others are expanded to float32
_Module = TypeVar("_Module")


@dataclass(frozen=True)
class LoadedDit:
    """A diffusion model and how it was loaded: how many layers stay packed, and one report for each LoRA."""

    module: WanS2V
    num_tensors: int
    num_packed_layers: int
    loras: tuple[LoraReport, ...]


@dataclass(frozen=True)
class _Target:
    """Where weights go, in which dtype, and whether quantised ones stay packed (those of a GGUF file do where False).

    Parameters named in `wide` are never made narrower than the file has them: the module computes with them in float32.
    Those named in `rounded` lose what fp8 cannot hold, unless the file has them in fp8 with a scale. Those whose names
    begin like one of `streamed` are offloaded to host memory; what has to be computed of them the device does, one at a
    time. Linear layers named in `fast` become `Fp8Linear`s, one at a time.
    """

    dtype: torch.dtype
    device: torch.device
    quantized: bool | None = None
    wide: frozenset[str] = frozenset()
    rounded: frozenset[str] = frozenset()
    streamed: tuple[str, ...] = ()
    fast: tuple[str, ...] = ()

    def keeps(self, packing: Packing | None) -> bool:
        if packing is None or self.quantized is None:
            return False
        return self.quantized or packing.format in GGUF_FORMATS

    def home_of(self, key: str) -> torch.device:
        return torch.device("cpu") if key.startswith(self.streamed) else self.device

    def dtype_of(self, key: str, stored: str) -> torch.dtype:
        if key not in self.wide:
            return self.dtype
        return torch.promote_types(self.dtype, _STORED_DTYPES.get(stored, torch.float32))


@dataclass(frozen=True)
class _Source:
    """A checkpoint as a module sees it: the module's key to the file's."""

    checkpoint: Checkpoint
    quantization: Quantization
    keys: Mapping[str, str]
    loras: LoraStack = field(default_factory=LoraStack)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: self.quantization.shape(self.checkpoint, stored) for key, stored in self.keys.items()}

    def packing(self, key: str) -> Packing | None:
        return self.quantization.packings.get(self.keys[key])

    def read_packed(self, key: str, shape: tuple[int, ...], device: torch.device) -> PackedWeight:
        return read_packed(self.checkpoint, self.quantization, self.keys[key], shape, device)


def load_dit(
    path: str | Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    quantized: bool,
    loras: Sequence[LoraSpec] = (),
    rounds_linears: bool = False,
    streamed: bool = False,
    fp8_fast: bool = False,
) -> LoadedDit:
    """Load a Wan2.2-S2V diffusion model, in eval mode.

    Args:
        path: A safetensors or GGUF file, in full precision or quantised.
        dtype: What is computed in; parameters outside linear layers are never made narrower
            than the file has them.
        quantized: Keep quantised weights packed and expand them for each use; otherwise they are expanded now. Those of
            a GGUF file stay packed in any case.
        loras: LoRAs, applied in this order: merged in float32, or beside weights that stay packed.
        rounds_linears: If the file is fp8-scaled, round the biases and the linear weights that it keeps in 16 or 32
            bit to fp8 too, without a scale, as ComfyUI (October 2025) does when it loads such a file.
        streamed: Offload the weights of blocks and injectors to host memory; they are never all on the device. The
            same bits come out.
        fp8_fast: Let the blocks' linear layers multiply in fp8; `dtype` is bfloat16. Approximate.

    Raises:
        MissingError, RefusedError, CheckpointError: A file is missing, a pickle, damaged, or not of this family.
    """
    from s2v_flow.models.dit import STREAMED, S2VConfig, WanS2V

    def build(shapes: Shapes) -> WanS2V:
        return WanS2V(S2VConfig.from_shapes(shapes), compute_dtype=dtype)

    source, module = _built("wan s2v", path, build)
    stack = open_loras(loras, shapes_of(module))
    source = replace(source, loras=stack)
    linear = {name for name, layer in module.named_modules() if type(layer) is nn.Linear}
    wide = frozenset(key for key in module.state_dict() if key.rpartition(".")[0] not in linear)
    is_fp8 = any(packing.format == "float8_e4m3fn" for packing in source.quantization.packings.values())
    rounded = frozenset(module.state_dict()) - wide if rounds_linears and is_fp8 else frozenset()
    fast = tuple(f"blocks.{name}" for name in multiplied(module.blocks)) if fp8_fast else ()
    offloaded = STREAMED if streamed else ()
    target = _Target(dtype, torch.device(device), quantized, wide, rounded, offloaded, fast)
    num_packed = _fill("wan s2v", module, source, target)
    if streamed:
        module.stream_weights(device)
    return LoadedDit(module, len(source.keys), num_packed, tuple(stack.reports))


def load_vae(path: str | Path, dtype: torch.dtype, device: torch.device | str) -> WanVAE:
    """Load the Wan 2.1 VAE, in eval mode.

    Raises:
        MissingError, RefusedError, CheckpointError: The file is missing, a pickle, damaged, or of another family.
    """
    from s2v_flow.models.vae import VAEConfig, WanVAE

    source, module = _built("wan vae", path, lambda shapes: WanVAE(VAEConfig.from_shapes(shapes)))
    _fill("wan vae", module, source, _Target(dtype, torch.device(device)))
    return module


def load_text_encoder(
    path: str | Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    quantized: bool,
    tokenizer: str | Path | None = None,
) -> TextEncoder:
    """Load a UMT5 encoder and its tokenizer; see `load_dit`.

    `tokenizer`: a SentencePiece model; unless given, the one inside the file counts.

    Raises:
        MissingError, RefusedError, CheckpointError: A file is missing, a pickle, damaged, not of this family, or
            there is no tokenizer.
    """
    source, module = _built("umt5 encoder", path, build_umt5)
    checkpoint = source.checkpoint
    pieces = read_tokenizer(find_tokenizer(checkpoint, tokenizer), str(tokenizer or checkpoint.path))
    _fill("umt5 encoder", module, source, _Target(dtype, torch.device(device), quantized))
    return TextEncoder(module, pieces)


def load_audio_encoder(path: str | Path, *, dtype: torch.dtype, device: torch.device | str) -> AudioEncoder:
    """Load a Wav2Vec2 encoder; its weight norm is read in both spellings, and merged.

    Raises:
        MissingError, RefusedError, CheckpointError: The file is missing, a pickle, damaged, or of another family.
    """
    source, module = _built("wav2vec2", path, build_wav2vec2)
    _fill("wav2vec2", module, source, _Target(dtype, torch.device(device)))
    merge_weight_norm(module)
    return AudioEncoder(module)


class _Undrawn(TorchFunctionMode):
    """Neither draws nor fills weights of layers that are made inside: on the meta device, the most of their time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.normal_):
            return kwargs["tensor"]
        return (torch.empty if func in (torch.ones, torch.zeros) else func)(*args, **kwargs)


def _built(family: str, path: str | Path, build: Callable[[Shapes], _Module]) -> tuple[_Source, _Module]:
    """Build a module from a file's shapes, on the meta device; if that fails, say what the file is instead."""
    checkpoint = Checkpoint.open(path)
    source = _Source(checkpoint, read_quantization(checkpoint), own_keys(checkpoint.entries.keys()))
    mismatch = describe_mismatch(family, checkpoint.shapes)
    if mismatch:
        raise CheckpointError(f"{checkpoint.path}: {mismatch}", fix=f"use a {family} file")
    try:
        with torch.device("meta"), _Undrawn():
            return source, build(source.shapes)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}", fix=error.fix) from error
    except (KeyError, IndexError, ValueError, ArithmeticError, RuntimeError) as error:
        if broken := broken_package(error):
            raise broken from error
        detail = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{checkpoint.path}: is no complete {family} file: {detail}", fix=_FIX_FILE) from error


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the keys and shapes that a checkpoint of a module has; a UMT5 encoder's embedding is there once."""
    return {key: tuple(value.shape) for key, value in module.state_dict().items() if key != EMBEDDING_COPY_KEY}


def _fill(family: str, module: nn.Module, source: _Source, target: _Target) -> int:
    """Put a file's tensors into a module on the meta device; return how many layers stay packed."""
    expected = shapes_of(module)
    quantised = {key: packing for key in source.keys if (packing := source.packing(key)) is not None}
    padded = {key: expected[key] for key, packing in quantised.items() if packing.holds(expected.get(key, ()))}
    compare(source.checkpoint.path, family, {**source.shapes, **padded}, expected)
    if target.device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # else it rounds float32 convolutions to 10 bits
    module.eval().requires_grad_(False)
    packed = _packed_layers(module, source, target)
    left_out = {f"{name}.weight" for name in [*packed, *target.fast]}
    weights = {key: _weight(key, expected[key], source, target) for key in expected if key not in left_out}
    if EMBEDDING_COPY_KEY in module.state_dict():
        if EMBEDDING_KEY in left_out:
            left_out.add(EMBEDDING_COPY_KEY)
        else:
            weights[EMBEDDING_COPY_KEY] = weights[EMBEDDING_KEY]
    outcome = module.load_state_dict(weights, strict=False, assign=True)
    assert set(outcome.missing_keys) == left_out
    assert not outcome.unexpected_keys
    for name, layer in packed.items():
        _pack(module, name, layer, source, target)
    for name in target.fast:
        if name not in packed:
            weight = _weight(f"{name}.weight", expected[f"{name}.weight"], source, target)
            module.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
        multiply_in_fp8(module, name)
    left = [name for name, value in [*module.named_parameters(), *module.named_buffers()] if value.is_meta]
    assert not left, f"not loaded: {left}"
    return len(packed)


def _packed_layers(module: nn.Module, source: _Source, target: _Target) -> dict[str, nn.Linear | nn.Embedding]:
    """Return the layers whose weights stay packed; a weight that a LoRA changes in full is expanded instead."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if (type(layer) is nn.Linear or (isinstance(layer, nn.Embedding) and f"{name}.weight" == EMBEDDING_KEY))
        and target.keeps(source.packing(f"{name}.weight"))
        and source.loras.is_low_rank(f"{name}.weight")
    }


def _pack(module: nn.Module, name: str, layer: nn.Linear | nn.Embedding, source: _Source, target: _Target) -> None:
    """Put a layer that keeps its weight packed in the place of a plain one."""
    key, home = f"{name}.weight", target.home_of(f"{name}.weight")
    packed = source.read_packed(key, tuple(layer.weight.shape), home)
    if isinstance(layer, nn.Embedding):
        embedding = PackedEmbedding(packed, target.dtype)
        _replace(module, name, embedding)
        _replace(module, EMBEDDING_COPY_KEY.removesuffix(".weight"), embedding)
        return
    linear = PackedLinear(packed, layer.bias)
    branch = source.loras.side_branch(key, target.device, target.dtype)
    if branch is not None:
        down, up = branch
        linear.set_low_rank(down.to(home), up.to(home))
    _replace(module, name, linear)


def _weight(key: str, shape: tuple[int, ...], source: _Source, target: _Target) -> Tensor:
    """Read one tensor, expanded where it is quantised, with its LoRA updates merged in float32, rounded once."""
    stored = source.keys[key]
    dtype = target.dtype_of(key, source.checkpoint.dtypes[stored])
    is_changed, home = key in source.loras.updates, target.home_of(key)
    mapped = source.checkpoint.tensor(stored)
    # what is only rounded comes out the same everywhere; products are the device's
    if source.packing(key) is not None:
        value = source.read_packed(key, shape, target.device).expand(torch.float32 if is_changed else dtype)
    else:
        value = mapped.to(target.device if is_changed else home)
        if key in target.rounded:
            value = value.to(torch.float8_e4m3fn).to(value.dtype)
    if is_changed:
        value = source.loras.merge(key, value.float())
    value = value.to(home, dtype)
    if value.data_ptr() != mapped.data_ptr():
        source.checkpoint.let_go(stored)
    return value


def _replace(module: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, new)
