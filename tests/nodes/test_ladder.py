"""Decoding where memory runs out: smaller groups, the same frames, and a message with figures when nothing helps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from s2v_flow.errors import ExitCode, S2VFlowError
from s2v_flow.nodes.chunk import decoded


class SmallVae:
    """Decodes at most `room` latent frames at once; the state is how many came before, and stands in the pixels."""

    def __init__(self, room: int, error: type[BaseException] = torch.OutOfMemoryError, fails_from: int = 0) -> None:
        self.room, self.error, self.fails_from, self.sizes = room, error, fails_from, list[int]()

    def decode_next(self, latent: Tensor, state: int | None) -> tuple[Tensor, int]:
        count = latent.shape[2]
        if (state or 0) >= self.fails_from and count > self.room:
            raise self.error("tried to allocate 20 GiB")
        self.sizes.append(count)
        frames = latent[:, :3].repeat_interleave(4, dim=2) + torch.arange(4 * count).view(1, 1, -1, 1, 1) // 4
        return frames + (state or 0), (state or 0) + count


def decode(vae: Any, group: int) -> tuple[Tensor, list[int]]:
    told: list[int] = []
    latents = [torch.zeros(1, 16, 5, 2, 2), torch.ones(1, 16, 4, 2, 2)]
    return torch.cat(list(decoded(vae, latents, told.append, before=torch.zeros(1, 16, 3, 2, 2), group=group)), 2), told


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
@pytest.mark.parametrize("fails_from", [0, 3, 8])
def test_a_group_that_does_not_fit_is_decoded_in_smaller_ones(error: type[BaseException], fails_from: int) -> None:
    """From the state before it: no frame is lost, doubled or out of place, wherever memory runs out."""
    whole, nothing = decode(SmallVae(99), 8)
    vae = SmallVae(1, error, fails_from)
    found, told = decode(vae, 8)
    assert torch.equal(found, whole)
    assert (nothing, told) == ([], [4, 2, 1])
    assert vae.sizes[-1] == 1, "it stays small"


def test_when_one_frame_does_not_fit_the_message_says_what_to_change() -> None:
    """Exit code 7, the size, what is kept."""
    with pytest.raises(S2VFlowError, match="one latent frame of 16x16 at once: tried to allocate 20 GiB") as caught:
        decode(SmallVae(0), 4)
    assert caught.value.exit_code == ExitCode.OUT_OF_MEMORY
    assert "smaller width and height" in (caught.value.fix or "")
    assert "every sampled chunk" in (caught.value.kept or "")


def test_other_errors_pass() -> None:
    with pytest.raises(KeyError):
        decode(SmallVae(0, KeyError), 4)
