"""Model handles: what a loader gives to the nodes that use the model. Nothing is loaded before the first use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from s2v_flow.graph.run import RunContext


class ModelHandle:
    """One user's claim on a model in the registry.

    `facts` say how it was loaded, once it is; `precision` is "fp32", "bf16" or "fp16". `memo` belongs to the handle:
    results that depend on the model and are wanted again, such as prepared prompts.
    """

    def __init__(
        self,
        registry: Any,
        key: Any,
        load: Callable[[], Any],
        expected_bytes: int,
        facts: Mapping[str, Any],
        precision: str,
    ) -> None:
        self.facts = facts
        self.precision = precision
        self.memo: dict[tuple[str, ...], Any] = {}
        self._registry = registry
        self._key = key
        self._load = load
        self._expected_bytes = expected_bytes
        self._model: Any = None

    def get(self) -> Any:
        """Return the live model, loading it on the first call."""
        if self._model is None:
            self._model = self._registry.acquire(self._key, self._load, expected_bytes=self._expected_bytes)
        return self._model

    def close(self) -> None:
        """Give the claim back; the registry frees the model when its budget says so."""
        self.memo.clear()
        if self._model is not None:
            self._model = None
            self._registry.release(self._key)


def open_handle(
    context: RunContext,
    kind: str,
    asked: str,
    load: Callable[..., Any],
    *,
    loras: tuple[tuple[str, float], ...] = (),
    lora_bytes: int = 0,
    facts: Mapping[str, Any] | None = None,
) -> ModelHandle:
    """Make the handle of a loader node.

    Args:
        context: The loader's context; its field `checkpoint` names the file.
        kind: What sort of model it is, for the registry.
        asked: The recipe's precision.
        load: Called with path, dtype, device and quantized.
        loras: Digest and strength of each LoRA, in order.
        lora_bytes: How much larger they may make the model.
        facts: What `load` fills with how it was loaded.
    """
    from s2v_flow.models.registry import ModelKey
    from s2v_flow.nodes.tensors import torch_dtype

    path: Path = context.files["checkpoint",]
    precision = context.numerics.precision(context.node.kind, asked)
    dtype = torch_dtype(precision)
    quantized = context.numerics.device_class != "cpu"
    key = ModelKey(kind, (context.digests["checkpoint",],), str(dtype), context.device, quantized, loras)

    def load_now() -> Any:
        return load(path, dtype=dtype, device=context.device, quantized=quantized)

    return ModelHandle(
        context.models(), key, load_now, path.stat().st_size + lora_bytes, {} if facts is None else facts, precision
    )
