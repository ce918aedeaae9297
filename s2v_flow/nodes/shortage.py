"""Out of memory: retries with less at once, each reported; when none helps, the error gives the figures."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from s2v_flow.errors import ExitCode, S2VFlowError
from s2v_flow.graph.context import RunContext
from s2v_flow.machine import free_memory_bytes
from s2v_flow.nodes.handle import free_device_bytes
from s2v_flow.wording import size_text

if TYPE_CHECKING:
    from torch import Tensor


Result = TypeVar("Result")
_SIGNS = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "status_alloc_failed",  # cuBLAS and cuDNN
)
FREED = "frees what is unused and tries again"


@dataclass(frozen=True)
class Fallback:
    """One fallback: its name in the facts, the warning's text, and what it changes about the result's bytes."""

    name: str
    text: str
    degraded: dict[str, int] = field(default_factory=dict)


class Fallbacks:
    """A node's fallbacks, in order, for when memory runs out; each is reported and recorded with the result.

    A node's class has its own `fallbacks` and `explain`. It holds neither: an object in a cycle would keep its tensors
    until Python looks for such cycles.

    `context`: the node's context. Its facts get "retreats", and "degraded" where the result's bytes may be others.
    """

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._left: Iterator[Fallback] | None = None
        self._has_freed = False

    def fallbacks(self) -> Iterator[Fallback]:
        """Yield the fallbacks; each takes effect as it is yielded. Before the first, unused memory is freed."""
        raise NotImplementedError

    def explain(self, failure: str) -> S2VFlowError:
        """Make the error for when there is no fallback left, from what the allocator said."""
        raise NotImplementedError

    def run(self, work: Callable[[], Result]) -> Result:
        """Return what `work` returns, calling it again after each fallback.

        Raises:
            S2VFlowError: Memory runs out and there is no fallback left.
        """
        while True:
            try:
                return work()
            except (MemoryError, RuntimeError) as error:
                failure = memory_failure(error)
                if failure is None:
                    raise
            self.fall_back(failure)  # outside of the handler, whose traceback holds the tensors that are to go

    def fall_back(self, failure: str) -> None:
        """Take the next fallback.

        Raises:
            S2VFlowError: There is none.
        """
        fallback: Fallback | None = Fallback("free", FREED)
        if self._has_freed:
            try:
                self._left = self._left or self.fallbacks()
                fallback = next(self._left, None)
            except (MemoryError, RuntimeError) as error:  # no memory for the fallback itself
                if memory_failure(error) is None:
                    raise
                fallback = None
        self._has_freed = True
        free_unused(self._context)
        if fallback is None:
            raise self.explain(failure)
        facts = self._context.facts
        self._context.record(retreats=[*facts.get("retreats", ()), fallback.name])
        if fallback.degraded:
            self._context.record(degraded={**facts.get("degraded", {}), **fallback.degraded})
        self._context.note(f"memory ran out in {self._context.name}: {fallback.text}", is_warning=True)


class StreamDecoder(Fallbacks):
    """A VAE's decoder and its state; where memory runs out it takes fewer frames at once, then tiles.

    The state is an argument and a result: a group that failed is decoded again from the state before it. Another number
    of frames at once may round float32 differently, in the last bit, and tiles are blended: results made so are marked.

    `group`: how many latent frames are decoded at once, `tiles`: into how many tiles a side they are cut, at first.
    """

    def __init__(self, vae: Any, group: int, tiles: int, context: RunContext) -> None:
        super().__init__(context)
        self._vae = vae
        self._group = group
        self._tiles = tiles
        self._state: Any = None
        self._size = (0, 0)

    def decode(self, latent: Tensor) -> Iterator[Tensor]:
        """Decode the next latent, [1, 16, F, H, W], to groups of pixels [1, 3, n, 8H, 8W].

        Raises:
            S2VFlowError: There is no memory for the smallest tile of one latent frame.
        """
        position = 0
        self._size = (latent.shape[3], latent.shape[4])
        while position < latent.shape[2]:
            count, pixels = self.run(partial(self._next, latent[:, :, position:]))
            position += count
            yield pixels

    def _next(self, latent: Tensor) -> tuple[int, Tensor]:
        """Decode a group; return how many latent frames it has, too."""
        from s2v_flow.models.vae_tiles import decode_next_tiled

        part = latent[:, :, : self._group]
        if self._tiles == 1:
            pixels, state = self._vae.decode_next(part, self._state)
        else:
            pixels, state = decode_next_tiled(self._vae, part, self._state, self._tiles)
        self._state = state
        return part.shape[2], pixels

    def fallbacks(self) -> Iterator[Fallback]:
        """Fewer latent frames at once, then tiles."""
        from s2v_flow.models.vae import StreamState
        from s2v_flow.models.vae_tiles import most_tiles, moved

        while self._group > 1:
            self._group //= 2
            text = f"retries with {self._group} latent frame{'s' if self._group > 1 else ''} at once"
            yield Fallback("group", text, {"frames_per_call": self._group})
        if isinstance(self._state, StreamState):
            self._state = moved(self._state, "cpu")
        for tiles in range(self._tiles + 1, most_tiles(*self._size) + 1):
            self._tiles = tiles
            yield Fallback("tiles", f"retries with {tiles}x{tiles} tiles", {"tiles": tiles})

    def explain(self, failure: str) -> S2VFlowError:
        """Name the size that did not fit."""
        what = f"decode, with one latent frame of {_size_text(*self._size, self._tiles)} at once"
        kept = "every sampled chunk: the same command goes on from there"
        return no_memory(self._context, what, failure, kept=kept)


def encoded(vae: Any, pixels: Tensor, context: RunContext) -> Tensor:
    """Encode a clip, in tiles where memory runs out.

    `pixels`: [1, 3, T, 8H, 8W] in [-1, 1], T = 4k + 1, on any device. Returns the raw latent, float32
    [1, 16, k + 1, H, W], on the node's device.

    Raises:
        S2VFlowError: There is no memory for the smallest tile.
    """
    encoder = _Encoder(vae, pixels, context)
    return encoder.run(encoder.encode)


class _Encoder(Fallbacks):
    def __init__(self, vae: Any, pixels: Tensor, context: RunContext) -> None:
        super().__init__(context)
        self._vae = vae
        self._pixels = pixels
        self._tiles = 1
        self._size = (pixels.shape[3] // 8, pixels.shape[4] // 8)

    def encode(self) -> Tensor:
        from s2v_flow.models.vae_tiles import encode_tiled

        given = self._pixels.to(self._context.device)
        latent: Tensor = self._vae.encode(given) if self._tiles == 1 else encode_tiled(self._vae, given, self._tiles)
        return latent.float()

    def fallbacks(self) -> Iterator[Fallback]:
        from s2v_flow.models.vae_tiles import most_tiles

        for tiles in range(2, most_tiles(*self._size) + 1):
            self._tiles = tiles
            yield Fallback("tiles", f"encodes in {tiles}x{tiles} tiles", {"encode_tiles": tiles})

    def explain(self, failure: str) -> S2VFlowError:
        what = f"encode, with four frames of {_size_text(*self._size, self._tiles)} at once"
        return no_memory(self._context, what, failure, kept="everything that was stored before")


def memory_failure(error: BaseException) -> str | None:
    """Return what an error says if it says that memory has run out, else None."""
    import torch

    text = str(error) or type(error).__name__
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return text
    return text if isinstance(error, RuntimeError) and any(sign in text.lower() for sign in _SIGNS) else None


def free_unused(context: RunContext) -> None:
    """Give back memory that nothing uses any more: models that no node needs, and what torch keeps for later."""
    import torch

    gc.collect()
    context.models().free_unused()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def no_memory(context: RunContext, what: str, failure: str, *, kept: str, fix: str = "") -> S2VFlowError:
    """Return the error for memory that ran out for good, with figures: exit code 7."""
    advice = "a smaller width and height" + (f", {fix}" if fix else "")
    return S2VFlowError(
        f"out of memory in {what}{memory_text(context)}: {failure.splitlines()[0]}",
        fix=f"{advice}; or end other programs that use this memory",
        kept=kept,
        exit_code=ExitCode.OUT_OF_MEMORY,
    )


def memory_text(context: RunContext) -> str:
    """Say how much memory is free: "; 1.2 GiB of 24.0 GiB are free on cuda:0"; nothing where it is unknown.

    With `--vram` that is the budget's.
    """
    device = context.device
    if device.startswith("cuda"):
        import torch

        limit = context.models().device_limit
        free = free_device_bytes(device, limit) or 0
        total = torch.cuda.mem_get_info(device)[1] if limit is None else limit
        text = f"; {size_text(free, is_memory=True)} of {size_text(total, is_memory=True)} are free on {device}"
        return text if limit is None else f"{text} (vram)"
    available = free_memory_bytes("cpu")
    return "" if available is None else f"; {size_text(available, is_memory=True)} of memory are free"


def _size_text(height: int, width: int, tiles: int) -> str:
    return f"{8 * width}x{8 * height}{f' in {tiles}x{tiles} tiles' if tiles > 1 else ''}"
