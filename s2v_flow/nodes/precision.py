"""Do models and device fit, and models each other? Found at planning, from the headers of their files."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from s2v_flow.errors import CheckpointError, S2VFlowError, UsageError
from s2v_flow.files.facts import per_file
from s2v_flow.graph.context import Numerics
from s2v_flow.graph.node import Plan, PlanNode
from s2v_flow.graph.ports import Source
from s2v_flow.machine import compute_capability, cpu_bf16_units, device_class
from s2v_flow.nodes.chunk import Chunk
from s2v_flow.weights.layout import EMBEDDING_COPY_KEY, EMBEDDING_KEY, num_layers
from s2v_flow.weights.reader import Checkpoint, Shapes
from s2v_flow.wording import listed

_LARGE_BYTES = 10**9  # of a file: below, nobody waits
_SLOW = "no units for it; measured on a CPU with AVX2, one thread: linear layers 6 to 7 times as slow as fp32, "
_SLOW += "3-D convolutions 37 times"


@dataclass(frozen=True)
class Verdict:
    """What becomes of a precision on a kind of device, and why. `auto` is what `precision: auto` takes there."""

    device: str
    precision: str
    verdict: Literal["auto", "works", "slow", "refused"]
    why: str = ""


_PACKED = "packed, expanded for each use"
_MPS = "nobody has run the models on Apple GPUs, which need float64 and fp8"
_NO_BF16 = "bfloat16 arithmetic begins with compute capability 8.0"
COMPUTED = (
    Verdict("cpu", "fp32", "auto"),
    Verdict("cpu", "bf16", "slow", _SLOW),
    Verdict("cpu", "fp16", "slow", _SLOW),
    Verdict("cpu with amx_bf16 or avx512_bf16", "fp32", "auto"),
    Verdict("cpu with amx_bf16 or avx512_bf16", "bf16", "works", "half the weights; doctor --precision measures it"),
    Verdict("cpu with amx_bf16 or avx512_bf16", "fp16", "slow", "as on other CPUs"),
    Verdict("cuda, 8.0 and up", "fp32", "works"),
    Verdict("cuda, 8.0 and up", "bf16", "auto", "the audio encoder: fp32"),
    Verdict("cuda, 8.0 and up", "fp16", "works"),
    Verdict("cuda, below 8.0", "fp32", "works"),
    Verdict("cuda, below 8.0", "bf16", "refused", _NO_BF16),
    Verdict("cuda, below 8.0", "fp16", "works"),
    *(Verdict("mps", name, "refused", _MPS) for name in ("fp32", "bf16", "fp16")),
)
# How weights are stored in the file; how they are held on a CPU, and on a GPU. All are computed with in the precision.
STORED = (
    ("fp32, fp16, bf16", "in the precision", "in the precision"),
    ("fp8 e4m3fn and e5m2, int8, nvfp4, mxfp8", "expanded at loading", _PACKED),
    ("the same, of a VAE or an audio encoder", "expanded at loading", "expanded at loading"),
    ("GGUF: F32, F16, BF16, Q2_K to Q6_K, Q4_0 to Q8_0, IQ4_NL, IQ4_XS", _PACKED, _PACKED),
    ("a diffusion model's parameters outside linear layers", *["never narrower than the file"] * 2),
    ("all other formats", "refused by name", "refused by name"),
)


def kind_of_device(device: str) -> str:
    """Return the row of `COMPUTED` that a device is in. A GPU of unknown capability (ROCm) counts as 8.0."""
    if device_class(device) == "cpu":
        return "cpu with amx_bf16 or avx512_bf16" if cpu_bf16_units() else "cpu"
    capability = compute_capability(device)
    return "cuda, below 8.0" if capability is not None and capability < (8, 0) else "cuda, 8.0 and up"


def attention_refusal(asked: str, device: str, precision: str) -> tuple[str, str] | None:
    """Return why a backend of attention cannot be had on a device, and the fix; None: it may work, or is auto or sdpa.

    `precision`: "fp32", "bf16" or "fp16". Whether a kernel runs on a GPU is tried when the model is loaded.
    """
    fix = "set attention: auto"
    if asked in ("auto", "sdpa"):
        return None
    if device_class(device) == "cpu":
        return None if asked == "flash" else (f"{asked} needs a GPU, and the device is the CPU", fix)
    capability = compute_capability(device)
    if asked == "cudnn" and capability is None:
        return f"cudnn needs an NVIDIA GPU, and {device} is none", fix
    if asked != "efficient" and capability is not None and capability < (8, 0):
        return f"{asked} needs compute capability 8.0, and {device} has {capability[0]}.{capability[1]}", fix
    if asked != "efficient" and precision == "fp32":
        return f"{asked} computes in 16 bits only, and the precision is fp32", "set precision: bf16 or attention: sdpa"
    if asked == "sage" and importlib.util.find_spec("sageattention") is None:
        return "the package sageattention is not installed", "pip install sageattention, or set attention: auto"
    return None


def _require_compiler(node: PlanNode, device: str) -> None:
    """Refuse compile: blocks beside streamed weights, and where torch's compiler lacks what it needs."""
    compiler = os.environ.get("CXX", "g++")
    if getattr(node.node, "placement", "auto") == "streamed":
        reason, fix = "compiled blocks need their weights on the device", "leave out placement: streamed or compile"
    elif shutil.which(compiler) is None:
        reason = f"there is no C++ compiler {compiler} on this machine"
        fix = "install one, name it in the environment variable CXX, or set compile: off"
    elif device_class(device) != "cpu" and importlib.util.find_spec("triton") is None:
        reason, fix = "the package triton is not installed", "install it (pip install triton), or set compile: off"
    else:
        return
    raise _refused(node, f"compile: blocks is refused: {reason}", fix)


def _refused(node: PlanNode, message: str, fix: str) -> S2VFlowError:
    return UsageError(f"{node.name}: {message}", f"{fix} in node {node.name}")


def precision_notes(plan: Plan, device: str) -> Iterator[str]:
    """Compare what the plan's models are computed in with the device.

    Yields:
        What a person should know: that a precision is slow here, or that bf16 is worth a try.

    Raises:
        S2VFlowError: A precision is refused on this device.
    """
    kind, numerics = kind_of_device(device), Numerics(device_class(device))
    refused: dict[str, Verdict] = {}
    for node in plan.nodes:
        asked = getattr(node.node, "precision", None)
        path = node.files.get(("checkpoint",))
        if asked is None or path is None:
            continue
        precision = numerics.precision(node.kind, asked)
        capability = compute_capability(device)
        if precision == "fp8_fast" and (capability is None or capability < (8, 9)):
            has = "no compute capability" if capability is None else f"{capability[0]}.{capability[1]}"
            text = "precision: fp8_fast is refused: it needs a GPU of compute capability 8.9, and"
            raise _refused(node, f"{text} {device} has {has}", "set precision: auto")
        computed = "bf16" if precision == "fp8_fast" else precision  # all but the blocks' products
        row = next(row for row in COMPUTED if (row.device, row.precision) == (kind, computed))
        if row.verdict == "refused":
            refused[node.name] = row
            continue
        attention = getattr(node.node, "attention", "auto")
        refusal = attention_refusal(attention, device, precision)
        if refusal is not None:
            raise _refused(node, f"attention: {attention} is refused: {refusal[0]}", refusal[1])
        if getattr(node.node, "compile", "off") == "blocks":
            _require_compiler(node, device)
        is_large = path.is_file() and path.stat().st_size > _LARGE_BYTES
        if row.verdict == "slow" and is_large:
            yield f"precision: {node.name} computes in {precision}, which is slow here: {row.why}"
        elif asked == "auto" and kind.startswith("cpu with") and node.kind == "load_diffusion_model" and is_large:
            units = " and ".join(cpu_bf16_units())
            yield f"precision: this CPU has {units}: bf16 in node {node.name} takes half the memory and may be faster"
    if refused:
        names, row = listed(refused), next(iter(refused.values()))
        text = f"{names}: to compute in {row.precision} on {device} is refused: {row.why}"
        raise UsageError(text, f"set precision: fp32 or fp16 in {names}, or use another device")


_Size = Callable[[Shapes], int]


def _text_width(shapes: Shapes) -> int:
    return shapes[EMBEDDING_KEY if EMBEDDING_KEY in shapes else EMBEDDING_COPY_KEY][1]


# By the encoder's loader: what has to be equal, in the encoder's file and in the diffusion model's.
_FITS: Mapping[str, Sequence[tuple[str, _Size, _Size]]] = {
    "load_text_encoder": (
        ("features of width {}", _text_width, lambda dit: dit["text_embedding.0.weight"][1]),
    ),
    "load_audio_encoder": (
        (
            "{} layers",
            lambda encoder: num_layers(encoder, "encoder.layers"),
            lambda dit: dit["casual_audio_encoder.weights"][1] - 1,  # and what goes into the first
        ),
        (
            "features of width {}",
            lambda encoder: encoder["encoder.layer_norm.weight"][0],
            lambda dit: dit["casual_audio_encoder.encoder.conv1_local.conv.weight"][1],
        ),
    ),
    "load_vae": (
        (
            "{} latent channels",
            lambda vae: vae["conv2.weight"][0],
            lambda dit: dit["patch_embedding.weight"][1],
        ),
    ),
}  # fmt: skip


def check_fit(plan: Plan) -> None:
    """Compare the diffusion model of every chunk with the encoders of what it is conditioned on.

    Raises:
        CheckpointError: They are of different depth or width.
    """
    pairs = {}
    for chunk in plan.nodes:
        model = chunk.inputs.get("model")
        if isinstance(chunk.node, Chunk) and isinstance(model, Source):
            makers = (plan.node(source.node) for source in chunk.sources())
            encoders = (plan.node(source.node) for maker in makers for source in maker.sources())
            pairs.update({(model.node, encoder.name): encoder for encoder in encoders if encoder.kind in _FITS})
    for (name, _), encoder in pairs.items():
        dit = plan.node(name)
        if not all(node.files.get(("checkpoint",), Path()).is_file() for node in (dit, encoder)):
            continue
        files = encoder.files["checkpoint",], dit.files["checkpoint",]
        for index, (words, _, _) in enumerate(_FITS[encoder.kind]):
            found, needed = (_size(file, encoder.kind, index, side) for side, file in enumerate(files))
            if found != needed:
                raise CheckpointError(
                    f"{encoder.files['checkpoint',]}: has {words.format(found)}, the model needs {needed}",
                    fix=f"name another file in node {encoder.name}, or another model in node {name}",
                )


@per_file
def _size(path: Path, kind: str, index: int, side: int) -> int:
    """Return what a row of `_FITS` says of its encoder's file (side 0) or of the diffusion model's (1)."""
    _, of_encoder, of_model = _FITS[kind][index]
    return (of_model if side else of_encoder)(Checkpoint.open(path).shapes)
