"""What is stored and what is computed in, by device: decided at planning, before any weight is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from s2v_flow.errors import ExitCode, S2VFlowError
from s2v_flow.graph.numerics import Numerics
from s2v_flow.graph.plan import Plan
from s2v_flow.machine import compute_capability, cpu_bf16_units, device_class

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
    ("GGUF: F32, F16, BF16, Q2_K to Q6_K, Q4_0 to Q8_0", _PACKED, _PACKED),
    ("a diffusion model's parameters outside linear layers", *["never narrower than the file"] * 2),
    ("all other formats", "refused by name", "refused by name"),
)


def kind_of_device(device: str) -> str:
    """Return the row of `COMPUTED` that a device is in. A GPU of unknown capability (ROCm) counts as 8.0."""
    if device_class(device) == "cpu":
        return "cpu with amx_bf16 or avx512_bf16" if cpu_bf16_units() else "cpu"
    capability = compute_capability(device)
    return "cuda, below 8.0" if capability is not None and capability < (8, 0) else "cuda, 8.0 and up"


def precision_notes(plan: Plan, device: str) -> Iterator[str]:
    """Compare what the plan's models are computed in with the device.

    Yields:
        What a person should know: that a precision is slow here, or that bf16 is worth a try.

    Raises:
        S2VFlowError: A precision is refused on this device.
    """
    kind, numerics = kind_of_device(device), Numerics(device_class(device))
    for node in plan.nodes:
        asked = getattr(node.node, "precision", None)
        path = node.files.get(("checkpoint",))
        if asked is None or path is None:
            continue
        precision = numerics.precision(node.kind, asked)
        row = next(row for row in COMPUTED if (row.device, row.precision) == (kind, precision))
        if row.verdict == "refused":
            fix = f"set precision: fp32 or fp16 in node {node.name}, or use another device"
            text = f"{node.name} is to compute in {precision} on {device}, which is refused: {row.why}"
            raise S2VFlowError(text, fix, exit_code=ExitCode.USAGE)
        is_large = path.is_file() and path.stat().st_size > _LARGE_BYTES
        if row.verdict == "slow" and is_large:
            yield f"precision: {node.name} computes in {precision}, which is slow here: {row.why}"
        elif asked == "auto" and kind.startswith("cpu with") and node.kind == "load_diffusion_model" and is_large:
            units = " and ".join(cpu_bf16_units())
            yield f"precision: this CPU has {units}: bf16 in node {node.name} takes half the memory and may be faster"
