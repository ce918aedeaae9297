"""Decoding and encoding where memory runs out: smaller groups, then tiles, and a message with figures at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from reference import fill_module
from torch import Tensor

from s2v_flow.errors import ExitCode, S2VFlowError
from s2v_flow.graph.context import Numerics, RunContext
from s2v_flow.models.registry import ModelRegistry
from s2v_flow.models.vae import StreamState, VAEConfig, WanVAE
from s2v_flow.models.vae_tiles import decode_next_tiled, encode_tiled
from s2v_flow.nodes.shortage import StreamDecoder, encoded


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


class CrampedVae(WanVAE):
    """A VAE that has no memory for pictures of more than `room` latent pixels, nor, at `group`, for many at once."""

    def __init__(self, room: int, group: int = 99) -> None:
        super().__init__(VAEConfig(1))
        self.room, self.group = room, group
        self.states: list[str] = []

    def decode_next(self, latent: Tensor, state: StreamState | None) -> tuple[Tensor, StreamState]:
        self._ask(latent.shape[-2] * latent.shape[-1], latent.shape[2])
        return super().decode_next(latent, state)

    def encode(self, pixels: Tensor) -> Tensor:
        self._ask(pixels.shape[-2] * pixels.shape[-1] // 64, 1)
        return super().encode(pixels)

    def _ask(self, area: int, count: int) -> None:
        if area > self.room or count > self.group:
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")


class Place:
    """A node's context that remembers what is told."""

    def __init__(self) -> None:
        self.told: list[str] = []
        registry = ModelRegistry()
        self.context = RunContext(
            *("frames", "decode", {}, "cpu", Numerics("cpu"), lambda: registry, {}, {}, Path()),
            lambda event: self.told.append(event.text),  # type: ignore[union-attr]
        )

    @property
    def facts(self) -> dict[str, Any]:
        return self.context.facts


def decode(vae: Any, group: int) -> tuple[Tensor, Place]:
    place = Place()
    latents = [torch.zeros(1, 16, 5, 2, 2), torch.ones(1, 16, 4, 2, 2)]
    decoder = StreamDecoder(vae, group, 1, place.context)
    list(decoder.decode(torch.zeros(1, 16, 3, 2, 2)))
    return torch.cat([pixels.float() for latent in latents for pixels in decoder.decode(latent)], 2), place


def cramped(room: int, group: int = 99) -> CrampedVae:
    return fill_module(CrampedVae(room, group))


def some_latent(frames: int, rows: int, columns: int) -> Tensor:
    return torch.randn(1, 16, frames, rows, columns, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
@pytest.mark.parametrize("fails_from", [3, *(pytest.param(it, marks=pytest.mark.slow) for it in (0, 8))])
def test_a_group_that_does_not_fit_is_decoded_in_smaller_ones(error: type[BaseException], fails_from: int) -> None:
    """From the state before it: no frame is lost, doubled or out of place, wherever memory runs out."""
    whole, plenty = decode(SmallVae(99), 8)
    vae = SmallVae(1, error, fails_from)
    found, place = decode(vae, 8)
    assert torch.equal(found, whole)
    assert (plenty.told, plenty.facts) == ([], {})
    assert place.told == [
        "memory ran out in frames: frees what is unused and tries again",
        "memory ran out in frames: retries with 4 latent frames at once",
        "memory ran out in frames: retries with 2 latent frames at once",
        "memory ran out in frames: retries with 1 latent frame at once",
    ]
    assert place.facts == {"retreats": ["free", "group", "group", "group"], "degraded": {"frames_per_call": 1}}
    assert vae.sizes[-1] == 1, "it stays small"


def test_what_fits_once_the_unused_is_freed_is_not_marked() -> None:
    """The same frames at once: the same bytes."""

    class OnceVae(SmallVae):
        def decode_next(self, latent: Tensor, state: int | None) -> tuple[Tensor, int]:
            if state == 3 and self.room == 99:
                self.room = 98
                raise torch.OutOfMemoryError
            return super().decode_next(latent, state)

    found, place = decode(OnceVae(99), 8)
    assert torch.equal(found, decode(SmallVae(99), 8)[0])
    assert place.facts == {"retreats": ["free"]}


def test_when_the_smallest_does_not_fit_the_message_says_what_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 7, the size, what is free, what is kept."""
    monkeypatch.setattr("s2v_flow.nodes.shortage.free_memory_bytes", lambda device: 3 * 2**29)
    words = r"decode, with one latent frame of 16x16 at once; 1\.5 GiB of memory are free: tried to allocate 20 GiB"
    with pytest.raises(S2VFlowError, match=words) as caught:
        decode(SmallVae(0), 4)
    assert caught.value.exit_code == ExitCode.OUT_OF_MEMORY
    assert "smaller width and height" in (caught.value.fix or "")
    assert "every sampled chunk" in (caught.value.kept or "")


def test_other_errors_pass() -> None:
    with pytest.raises(KeyError):
        decode(SmallVae(0, KeyError), 4)


@pytest.mark.parametrize("fails_from", [2, pytest.param(0, marks=pytest.mark.slow)])
def test_one_frame_that_does_not_fit_is_decoded_in_tiles(fails_from: int) -> None:
    """From the very state before it, cut like the picture; the result is marked with the tiles."""
    plenty, latent = cramped(10**6), some_latent(4, 24, 24)
    start, state = plenty.decode_next(latent[:, :, :2], None) if fails_from else (None, None)
    expected = [] if start is None else [start]
    for index in range(fails_from, 4):
        pixels, state = decode_next_tiled(plenty, latent[:, :, index : index + 1], state, 2)  # type: ignore[assignment]
        expected.append(pixels)
    vae, place = cramped(16 * 16, group=2), Place()
    vae.room = 10**6 if fails_from else vae.room
    decoder = StreamDecoder(vae, 2, 1, place.context)
    found = []
    for part in latent.split(2, dim=2):
        found.extend(decoder.decode(part))
        vae.room = 16 * 16
    assert torch.equal(torch.cat(found, 2), torch.cat(expected, 2))
    assert place.facts["degraded"] == {"frames_per_call": 1, "tiles": 2}
    assert place.told[-1] == "memory ran out in frames: retries with 2x2 tiles"


@pytest.mark.slow
def test_more_tiles_follow_until_none_would_be_smaller_than_16() -> None:
    """40 x 40 latent pixels: 2x2 tiles of 24, 3x3 of 19, 4x4 of 16; then exit code 7."""
    place = Place()
    with pytest.raises(S2VFlowError, match=r"one latent frame of 320x320 in 4x4 tiles at once") as caught:
        list(StreamDecoder(cramped(16 * 16 - 1), 1, 1, place.context).decode(some_latent(1, 40, 40)))
    assert caught.value.exit_code == ExitCode.OUT_OF_MEMORY
    assert place.facts["retreats"] == ["free", "tiles", "tiles", "tiles"]
    place = Place()
    list(StreamDecoder(cramped(19 * 19), 1, 1, place.context).decode(some_latent(1, 40, 40)))
    assert place.facts["degraded"] == {"tiles": 3}


def test_tiles_that_were_asked_for_are_not_marked() -> None:
    """They are in the result's identity already."""
    place, latent = Place(), some_latent(2, 24, 24)
    (found,) = StreamDecoder(cramped(16 * 16), 2, 2, place.context).decode(latent)
    assert torch.equal(found, decode_next_tiled(cramped(10**6), latent, None, 2)[0])
    assert place.facts == {}


@pytest.mark.slow
def test_a_clip_that_cannot_be_encoded_whole_is_encoded_in_tiles() -> None:
    pixels = torch.rand(1, 3, 5, 192, 192, generator=torch.Generator().manual_seed(1)) * 2 - 1
    place = Place()
    assert torch.equal(encoded(cramped(10**6), pixels, place.context), cramped(10**6).encode(pixels))
    assert place.facts == {}
    found = encoded(cramped(16 * 16), pixels, place.context)
    assert torch.equal(found, encode_tiled(cramped(10**6), pixels, 2))
    assert place.facts == {"retreats": ["free", "tiles"], "degraded": {"encode_tiles": 2}}
    with pytest.raises(S2VFlowError, match=r"encode, with four frames of 192x192 in 2x2 tiles at once") as caught:
        encoded(cramped(16 * 16 - 1), pixels, Place().context)
    assert caught.value.exit_code == ExitCode.OUT_OF_MEMORY
