"""Decoding that takes less memory at once where memory runs out, step by step, and says so."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from s2v_flow.errors import ExitCode, S2VFlowError

if TYPE_CHECKING:
    from torch import Tensor

    from s2v_flow.graph.run import RunContext

OnRetreat = Callable[[int], None]


class StreamDecoder:
    """A VAE's decoder and its state; where memory runs out it frees what is unused and goes on with half the frames.

    The state is an argument and a result: a group that failed is decoded again from the state before it.

    Args:
        vae: The VAE.
        group: How many latent frames are decoded at once, at first.
        on_retreat: Told each time how many are decoded at once from here on.
    """

    def __init__(self, vae: Any, group: int, on_retreat: OnRetreat) -> None:
        self._vae = vae
        self._group = group
        self._on_retreat = on_retreat
        self._state: Any = None

    def decode(self, latent: Tensor) -> Iterator[Tensor]:
        """Decode the next latent, [1, 16, F, H, W], to groups of pixels [1, 3, n, 8H, 8W].

        Raises:
            S2VFlowError: There is no memory for one latent frame.
        """
        import torch

        position = 0
        while position < latent.shape[2]:
            part, failure = latent[:, :, position : position + self._group], ""
            try:
                pixels, self._state = self._vae.decode_next(part, self._state)
            except (torch.OutOfMemoryError, MemoryError) as error:
                failure = str(error) or type(error).__name__
            if failure:  # outside of the handler, whose traceback holds the tensors that are to go
                free_unused()
                if self._group == 1:
                    raise _no_memory(latent, failure)
                self._group //= 2
                self._on_retreat(self._group)
                continue
            position += part.shape[2]
            yield pixels


def retreat_teller(context: RunContext, facts: dict[str, Any]) -> OnRetreat:
    """Return what says that memory has run out, and keeps it in `facts` for whatever is stored.

    Another number of frames at once may round float32 differently, in the last bit: a result made so is marked.
    """

    def tell(group: int) -> None:
        facts["degraded"] = {"frames_per_call": group}
        context.note(f"memory ran out in decode: goes on with {group} latent frames at once", is_warning=True)

    return tell


def free_unused() -> None:
    """Give back memory that nothing uses any more."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _no_memory(latent: Tensor, failure: str) -> S2VFlowError:
    height, width = 8 * latent.shape[3], 8 * latent.shape[4]
    gigabytes = ""
    if latent.is_cuda:
        import torch

        free, total = (count / 2**30 for count in torch.cuda.mem_get_info(latent.device))
        gigabytes = f"; {free:.1f} of {total:.1f} GiB are free on {latent.device}"
    return S2VFlowError(
        f"out of memory in decode, with one latent frame of {width}x{height} at once{gigabytes}: {failure}",
        fix="end other programs that use this memory, or take a smaller width and height",
        kept="every sampled chunk: the same command goes on from there",
        exit_code=ExitCode.OUT_OF_MEMORY,
    )
