"""Model handles: what a loader gives to the nodes that use the model. Nothing is loaded before the first use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2v_flow.graph.context import RunContext
from s2v_flow.models.footprint import read_weights, step_bytes
from s2v_flow.wording import size_text

RESERVE_BYTES = 3 * 2**29  # beside weights and activations: prepared prompts and sound, expanded weights, workspaces

# how many tokens, for how many branches of guidance, are computed at once, and whether the model is live already
ShouldStream = Callable[[int, int, bool], bool]


@dataclass(eq=False)
class ModelHandle:
    """One user's claim on a model in the registry.

    `facts` say how it was loaded, once it is; `precision` is "fp32", "bf16" or "fp16". `runs_in_turn` is what sampling
    has learnt of the memory: the branches of guidance do not fit side by side.
    """

    _registry: Any
    _key: Any
    _load: Callable[[bool], Any]
    _expected_bytes: int
    facts: dict[str, Any]
    precision: str
    _should_stream: ShouldStream
    _device: str
    runs_in_turn: bool = False
    _must_stream: bool = False
    _model: Any = None

    @property
    def is_on_device(self) -> bool:
        """Whether the model computes in another memory than the host's."""
        return not self._device.startswith("cpu")

    def get(self, num_tokens: int = 0, num_branches: int = 1) -> Any:
        """Return the live model, loading it on the first call.

        `num_tokens`: for a diffusion model, how many tokens are computed at once: what has to fit beside the weights.
        """
        if self._model is None:
            is_live = self._registry.is_live(self._key)  # then there was room for it
            streams = self._must_stream or self._should_stream(num_tokens, num_branches, is_live)
            expected = 0 if streams else self._expected_bytes
            self._model = self._registry.acquire(self._key, lambda: self._load(streams), expected_bytes=expected)
            self.facts.update(self._registry.facts.setdefault(self._key, dict(self.facts)))
            if streams:  # it may be live already, and resident
                self._model.stream_weights(self._device)
            if hasattr(self._model, "is_streamed"):
                self.facts["placement"] = "streamed" if self._model.is_streamed else "resident"
        return self._model

    def stream(self) -> bool:
        """Offload a diffusion model's weights to host memory from here on; tell whether that gives any memory back."""
        is_compiled = getattr(self._model, "is_compiled", False)
        if not self.is_on_device or is_compiled or self.facts.get("placement") == "streamed":
            return False
        self._must_stream = True
        self.facts["placement"] = "streamed"
        if self._model is not None:
            self._model.stream_weights(self._device)
        return True

    def weights_text(self) -> str:
        """Say how large the weights are and where they rest: ", weights of 15.3 GiB (streamed)"; "" before loading."""
        if self._model is None:
            return ""
        from s2v_flow.models.registry import weight_bytes

        size = size_text(weight_bytes(self._model), is_memory=True)
        return f", weights of {size} ({self.facts.get('placement', 'resident')})"

    def close(self) -> None:
        """Give the claim back; the registry frees the model when its budget says so."""
        if self._model is not None:
            self._model = None
            self._registry.release(self._key)


def never_stream(num_tokens: int, num_branches: int, is_live: bool) -> bool:
    """Keep weights on the device: what all models but the diffusion model do."""
    return False


def open_handle(
    context: RunContext,
    kind: str,
    asked: str,
    load: Callable[..., Any],
    *,
    loras: tuple[tuple[str, float], ...] = (),
    lora_bytes: int = 0,
    facts: dict[str, Any] | None = None,
    should_stream: ShouldStream = never_stream,
) -> ModelHandle:
    """Make the handle of a loader node.

    Args:
        context: The loader's context; its field `checkpoint` names the file.
        kind: What sort of model it is, for the registry.
        load: Called with path, dtype, device and quantized; with streamed=True where the weights are to be streamed.
        loras: Digest and strength of each LoRA, in order.
        lora_bytes: How much larger they may make the model.
        facts: What `load` fills with how it was loaded.
        should_stream: Asked before loading whether the weights are to be streamed.
    """
    from s2v_flow.models.registry import ModelKey
    from s2v_flow.nodes.tensors import torch_dtype

    path: Path = context.files["checkpoint",]
    precision = context.numerics.precision(context.kind, asked)
    options = {"dtype": torch_dtype(precision), "device": context.device, "quantized": keeps_fp8(context)}
    key = ModelKey(
        kind, (context.digests["checkpoint",],), str(options["dtype"]), context.device, keeps_fp8(context), loras
    )

    def load_now(streams: bool) -> Any:
        with context.stage(f"loading {path.name}"):
            return load(path, **options, **({"streamed": True} if streams else {}))

    return ModelHandle(
        context.models(),
        key,
        load_now,
        path.stat().st_size + lora_bytes,
        {} if facts is None else facts,
        precision,
        should_stream,
        context.device,
    )


def keeps_fp8(context: RunContext) -> bool:
    """Return whether fp8 weights stay in fp8 on the run's device; on a CPU they are expanded at loading."""
    return context.numerics.device_class != "cpu"


def lacks_room(context: RunContext, asked: str, lora_bytes: int, num_tokens: int, num_branches: int) -> bool:
    """Return whether a diffusion model's weights and activations are too much for what is free on a GPU."""
    limit = context.models().device_limit
    free, beyond = free_device_bytes(context.device, limit), free_device_bytes(context.device)
    if free is None or beyond is None or free < beyond:  # a budget that is there: the plan has chosen for it
        return False
    precision = context.numerics.precision(context.kind, asked)
    dit = read_weights(context.files["checkpoint",], context.kind, precision, on_cpu=not keeps_fp8(context))
    needed = dit.num_bytes + lora_bytes + step_bytes(dit, num_tokens, num_branches) + RESERVE_BYTES
    if needed > free and context.models().free_unused():  # what earlier runs of a session have left
        free = free_device_bytes(context.device, limit) or 0
    return needed > free


def free_device_bytes(device: str, limit: int | None = None) -> int | None:
    """Return how much a device could still give to torch, `limit` in all; None where it does not say."""
    import torch

    if not device.startswith("cuda"):
        return None
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return (free if limit is None else min(free, limit)) - torch.cuda.memory_allocated(device)
