"""Tensors <-> an artifact's bytes, pixels <-> frames. Imports torch: only used inside run()."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from safetensors.torch import load, save
from torch import Tensor

from s2v_flow.errors import BadNumbersError
from s2v_flow.graph.context import Artifact


def pack(tensors: Mapping[str, Tensor]) -> bytes:
    """Return tensors as a safetensors file's bytes; nothing run-specific is in them: equal tensors, equal bytes."""
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def pack_finite(tensors: Mapping[str, Tensor]) -> bytes:
    """Pack what a model has made.

    Raises:
        BadNumbersError: NaN or infinity is in it.
    """
    for name, tensor in tensors.items():
        require(bool(tensor.isfinite().all()), name)
    return pack(tensors)


def require(is_finite: bool, name: str) -> None:
    """Refuse a model's result.

    Raises:
        BadNumbersError: It is not finite.
    """
    if not is_finite:
        fix = "set precision: fp32 in the node that loads the model, or download the model's file again"
        raise BadNumbersError(f"NaN or infinity in what the model has made ({name})", fix)


def unpack(artifact: Artifact) -> dict[str, Tensor]:
    """Return an artifact's tensors, on the CPU."""
    return load(artifact.read())


def torch_dtype(precision: str) -> torch.dtype:
    """Return torch's dtype for "fp32", "bf16" or "fp16"; what fp8_fast does not multiply is in bfloat16."""
    return {"fp32": torch.float32, "fp16": torch.float16}.get(precision, torch.bfloat16)


def to_frames(pixels: Tensor) -> Tensor:
    """Turn decoded pixels [1, 3, T, 8H, 8W], about [-1, 1], into frames for people: uint8 [T, 8H, 8W, 3] on the CPU.

    (x + 1) / 2 is clamped to [0, 1], and 255 times that rounded.

    Raises:
        BadNumbersError: A pixel is NaN.
    """
    (frames,) = each_to_frames([pixels])
    return frames


def each_to_frames(groups: Iterable[Tensor]) -> Iterator[Tensor]:
    """Turn groups of decoded pixels into frames, one by one; see `to_frames`.

    On a GPU the next group is launched before one is waited for: the copy to pinned memory and what is done with the
    frames run beside its decoding. One group more is held for that, as bytes.
    """
    before: tuple[Tensor, Tensor, torch.cuda.Event] | None = None
    for pixels in groups:
        scaled = ((pixels[0].float() + 1) / 2).clamp(0, 1) * 255
        is_bad = scaled.isnan().any()
        frames = scaled.round().to(torch.uint8).permute(1, 2, 3, 0).contiguous()  # [T, 8H, 8W, 3]
        if not frames.is_cuda:
            require(not is_bad, "frames")
            yield frames.cpu()
            continue
        copies = frames.to("cpu", non_blocking=True), is_bad.to("cpu", non_blocking=True)
        copied = torch.cuda.current_stream(frames.device).record_event()
        del pixels, scaled, frames
        if before is not None:
            yield _arrived(*before)
        before = *copies, copied
    if before is not None:
        yield _arrived(*before)


def _arrived(frames: Tensor, is_bad: Tensor, copied: torch.cuda.Event) -> Tensor:
    copied.synchronize()
    require(not is_bad, "frames")
    return frames


def to_pixels(images: Tensor) -> Tensor:
    """Turn images, float [T, 8H, 8W, 3] in [0, 1], into the VAE's pixels [1, 3, T, 8H, 8W] in [-1, 1]."""
    return (images.float() * 2 - 1).permute(3, 0, 1, 2)[None]
