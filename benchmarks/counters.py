"""Work counted at real sizes on the meta device: no weights, no clock, the same figures on every machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.models import FULL, Size, preparation, random_dit, random_weights
from s2v_flow.models.vae import VAEConfig, WanVAE

PRODUCTS = ("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm", "aten.convolution", "aten._scaled_dot_product")


class Counts(TorchDispatchMode):
    """Count operations that are no views, and the bytes that those beside products read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.bytes = 0
        self.is_inside_attention = False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation and count it."""
        result = func(*args, **(kwargs or {}))
        is_view = any(value.alias_info and not value.alias_info.is_write for value in func._schema.returns)
        if not is_view and "empty" not in str(func) and not self.is_inside_attention:
            self.operations += 1
            if not str(func).startswith(PRODUCTS):
                tensors = {id(t): t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)}
                self.bytes += sum(t.nbytes for t in tensors.values())
        return result


class WholeAttention(TorchFunctionMode):
    """Let attention count as one operation, a product: on the meta device torch takes it apart."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run a function, and count what attention is made of as one."""
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.counts.operations += 1
        self.counts.is_inside_attention = True
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.counts.is_inside_attention = False


def counted(work: Callable[[], object]) -> tuple[int, int, int]:
    """Return the FLOPs, operations, and bytes outside of products of a piece of work on the meta device."""
    with torch.no_grad(), FlopCounterMode(display=False) as flops, Counts() as counts, WholeAttention(counts):
        work()
    return int(flops.get_total_flops()), counts.operations, counts.bytes


def figures() -> dict[str, float]:
    """Return every counted figure by its name."""
    found: dict[str, float] = {}
    size = Size(width=80, height=80, frames=20)
    models = [random_dit(replace(FULL, num_layers=layers), torch.bfloat16, "meta") for layers in (2, 3)]
    shallow, deep = (counted(preparation(model, size, "meta")()) for model in models)
    found["DiT block 640x640, 77 frames: TFLOP"] = round((deep[0] - shallow[0]) / 1e12, 2)
    found["DiT block 640x640, 77 frames: operations"] = deep[1] - shallow[1]
    found["DiT block 640x640, 77 frames: GB outside products"] = round((deep[2] - shallow[2]) / 1e9, 2)
    weights, more = (sum(value.numel() for value in model.parameters()) for model in models)
    found["DiT: weight GB in bf16"] = round((weights + (FULL.num_layers - 2) * (more - weights)) * 2 / 1e9, 2)

    with torch.device("meta"):
        vae = WanVAE(VAEConfig())
    random_weights(vae, "meta")
    found["VAE: weight GB in float32"] = round(sum(p.numel() for p in vae.parameters()) * 4 / 1e9, 3)
    latent, pixels = torch.empty(1, 16, 2, 80, 80, device="meta"), torch.empty(1, 3, 4, 640, 640, device="meta")
    _, decoded = vae.decode_next(latent[:, :, :1], None)
    _, encoded = vae.encode_next(pixels[:, :, :1], None)
    for name, work in (
        ("decode, 4 frames", lambda: vae.decode_next(latent[:, :, :1], decoded)),
        ("decode, 8 frames", lambda: vae.decode_next(latent, decoded)),
        ("encode, 4 frames", lambda: vae.encode_next(pixels, encoded)),
    ):
        flops, operations, num_bytes = counted(work)
        found[f"VAE {name} of 640x640: TFLOP"] = round(flops / 1e12, 3)
        found[f"VAE {name} of 640x640: operations"] = operations
        found[f"VAE {name} of 640x640: GB outside products"] = round(num_bytes / 1e9, 2)
    return found
