"""Streamed weights: the same bits as resident ones, two copies at a time, and nothing changed afterwards."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from reference import load_golden
from torch import Tensor, nn

from s2v_flow.models import streaming
from s2v_flow.models.conditioning import Branch
from s2v_flow.models.dit import STREAMED, WanS2V
from s2v_flow.models.load import _Target, load_dit
from s2v_flow.models.lora import LoraSpec
from s2v_flow.models.streaming import ALIGNMENT, PINNED_BYTES, Unit, WeightStream, can_pin, piece_bytes, pinned_slabs

F32, BF16 = torch.float32, torch.bfloat16
LAYOUTS = {
    "plain": ("tiny_s2v", F32, False, ()),
    "bf16": ("tiny_s2v", BF16, False, ()),
    "fp8": ("tiny_s2v_fp8_scaled", BF16, True, ()),
    "fp8 with a LoRA beside it": ("tiny_s2v_fp8_metadata", BF16, True, ("tiny_lightning_lora",)),
}


def load(models: Path, layout: str, *, streamed: bool) -> WanS2V:
    name, dtype, quantized, loras = LAYOUTS[layout]
    specs = [LoraSpec(models / "loras" / f"{lora}.safetensors") for lora in loras]
    file = models / "diffusion_models" / f"{name}.safetensors"
    return load_dit(file, dtype=dtype, device="cpu", quantized=quantized, loras=specs, streamed=streamed).module


def velocities(model: WanS2V) -> list[Tensor]:
    """Prepare and run a golden case with both branches of guidance."""
    inputs = load_golden("components/dit_extend_short_motion")[0]
    x = inputs["x"]
    chunk = model.prepare_chunk(
        num_latent_frames=x.shape[2],
        height=x.shape[3],
        width=x.shape[4],
        reference_latent=inputs["reference_latent"],
        motion_latent=inputs["reference_motion"],
        conditioning="comfyui",
    )
    audio = [
        model.prepare_audio(inputs["audio_embed"] * factor, num_latent_frames=x.shape[2], conditioning="comfyui")
        for factor in (1.0, 0.0)
    ]
    texts = [model.prepare_text(inputs["context"]), model.prepare_text(inputs["context"] * 0.5)]
    branches = [Branch(text, sound) for text, sound in zip(texts, audio, strict=True)]
    found: list[Tensor] = model(x, inputs["timestep"], chunk, branches)
    return found


def weights(model: nn.Module) -> dict[str, Tensor]:
    return dict([*model.named_parameters(), *model.named_buffers()])


class Stack(nn.Module):
    """Four layers of unequal size, with a buffer and a parameter of their own dtype."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(7, 7 + 3 * index) for index in range(4))
        for layer in self.layers:
            layer.requires_grad_(False)
            layer.register_buffer("small", torch.randn(5, generator=generator).to(torch.float8_e4m3fn))

    def stream(self, **options: Any) -> WeightStream:
        return WeightStream([[layer] for layer in self.layers], "cpu", **{"is_pinned": False, **options})


@pytest.mark.parametrize("layout", ["plain", *(pytest.param(it, marks=pytest.mark.slow) for it in [*LAYOUTS][1:])])
def test_streamed_weights_give_the_same_bits_as_resident_ones(layout: str, tiny_models: Path) -> None:
    """Loaded so, or moved so while the model lives; plain, fp8 with scales, LoRAs beside it; both branches at once."""
    resident = load(tiny_models, layout, streamed=False)
    expected = velocities(resident)
    loaded = load(tiny_models, layout, streamed=True)
    assert (resident.is_streamed, loaded.is_streamed) == (False, True)
    resident.stream_weights("cpu")
    for model in (loaded, resident):
        assert model.is_streamed
        assert all(map(torch.equal, velocities(model), expected))


@pytest.mark.slow
@pytest.mark.parametrize("is_pinned", [False, True])
def test_weights_at_rest_are_as_before(is_pinned: bool, tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a pass; after an error in the middle of one; packed into slabs or where they were."""
    monkeypatch.setattr("s2v_flow.models.dit.can_pin", lambda *_: is_pinned)
    before = weights(load(tiny_models, "fp8", streamed=False))
    model = load(tiny_models, "fp8", streamed=True)
    places = {name: tensor.data_ptr() for name, tensor in weights(model).items()}

    def check() -> None:
        after = weights(model)
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name].float(), tensor.float()) for name, tensor in before.items())
        assert {name: tensor.data_ptr() for name, tensor in after.items()} == places

    velocities(model)
    check()
    for failing in (0, 2, 4):
        hook = model.blocks[failing].ffn.register_forward_pre_hook(lambda *_: exec("raise torch.OutOfMemoryError"))
        with pytest.raises(torch.OutOfMemoryError):
            velocities(model)
        hook.remove()
        check()


def test_a_pass_that_is_left_early_puts_everything_back() -> None:
    stack = Stack()
    stream = stack.stream()
    places = {name: tensor.data_ptr() for name, tensor in weights(stack).items()}
    with closing(iter(stream)) as numbers:
        assert next(numbers) == 0
        assert next(numbers) == 1
        assert {name for name, tensor in weights(stack).items() if tensor.data_ptr() != places[name]} == {
            f"layers.1.{part}" for part in ("weight", "bias", "small")
        }
    assert {name: tensor.data_ptr() for name, tensor in weights(stack).items()} == places


def test_two_copies_are_alive_at_once_and_each_weight_is_copied_once_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """In turn into two pieces of memory of the largest unit's size; after the pass both are gone."""
    stack = Stack()
    stream = stack.stream()
    copied: list[tuple[int, int, int]] = []
    memories: list[weakref.ref[Tensor]] = []
    plain = Unit.copy_to

    def copy_to(unit: Unit, memory: Tensor) -> None:
        copied.append((stream._units.index(unit), memory.data_ptr(), memory.nbytes))
        memories.append(weakref.ref(memory))
        plain(unit, memory)

    monkeypatch.setattr(Unit, "copy_to", copy_to)
    for number in stream:
        assert [index for index, _, _ in copied] == list(range(number + 1)), "no more than what is asked for"
    largest = max(sum(-(-t.nbytes // ALIGNMENT) for t in weights(layer).values()) for layer in stack.layers) * ALIGNMENT
    assert [index for index, _, _ in copied] == [0, 1, 2, 3]
    assert [place for _, place, _ in copied] == [copied[0][1], copied[1][1]] * 2
    assert copied[0][1] != copied[1][1]
    assert {size for _, _, size in copied} == {largest} == {stream.largest_bytes}
    assert [memory() for memory in memories] == [None] * 4


def test_copies_on_a_side_stream_wait_for_what_used_their_memory_and_are_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a device with queues, played here: a copy overlaps the unit before it, and no number is read too early."""
    log: list[tuple[str, Any]] = []
    clock = iter(range(10**6))

    def record() -> Any:
        log.append(("event", moment := next(clock)))
        return moment

    side = SimpleNamespace(wait_event=lambda event: log.append(("copies wait", event)))
    main = SimpleNamespace(record_event=record, wait_stream=lambda stream: log.append(("computing waits", stream)))

    @contextmanager
    def on(stream: Any) -> Iterator[None]:
        assert stream is side
        yield

    monkeypatch.setattr(streaming, "side_stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", on)
    plain = Unit.copy_to
    stack = Stack()
    stream = stack.stream()
    monkeypatch.setattr(
        Unit, "copy_to", lambda unit, memory: (log.append(("copy", stream._units.index(unit))), plain(unit, memory))
    )
    for number in stream:
        log.append(("compute", number))
    for number in range(4):
        copy, compute = log.index(("copy", number)), log.index(("compute", number))
        assert ("computing waits", side) in log[copy:compute], "the copy is there before it is used"
        what, awaited = log[copy - 1]
        assert what == "copies wait"
        moment = log.index(("event", awaited))
        if number >= 2:
            assert log.index(("compute", number - 2)) < moment, "what used this memory is over"
        if number >= 1:
            assert moment < log.index(("compute", number - 1)) < copy, "it does not wait for the unit before it"
    assert log[-1] == ("computing waits", side), "no copy is on its way when the memory is given back"


def test_all_of_the_blocks_and_injectors_are_streamed_and_each_weight_once(tiny_models: Path) -> None:
    """What is needed once per prompt or chunk does not travel in every step: an eighth of a full block."""
    model = load(tiny_models, "plain", streamed=True)
    slots = [(slot.holder, slot.name) for use in model._streams.values() for unit in use._units for slot in unit.slots]
    assert len(slots) == len(set(slots))
    named = {name: f"{name.rpartition('.')[0]}" for name, _ in model.named_parameters() if name.startswith(STREAMED)}
    streamed = {(holder, name) for holder, name in slots}
    used = (0, 1)  # of the twelve injectors two have a block in this small model; the others' q and o are never used
    missing = [
        name for name, path in named.items() if (model.get_submodule(path), name.rpartition(".")[2]) not in streamed
    ]
    parts = {"q", "o", "norm_q"}
    idle = {f"audio_injector.injector.{index}" for index in range(12) if index not in used}
    assert all(".".join(name.split(".")[:3]) in idle and name.split(".")[3] in parts for name in missing)
    step = {name for unit in model._streams["step"]._units for name in [slot.holder for slot in unit.slots]}
    assert step.isdisjoint({model.blocks[0].cross_attn.k, model.blocks[0].cross_attn.v})


def test_the_loader_brings_blocks_to_the_host_and_everything_else_to_the_device() -> None:
    target = _Target(F32, torch.device("cuda:1"), streamed=STREAMED)
    assert target.home_of("blocks.39.ffn.0.weight") == torch.device("cpu")
    assert target.home_of("audio_injector.injector.3.q.weight") == torch.device("cpu")
    assert target.home_of("time_projection.1.weight") == torch.device("cuda:1")
    assert _Target(F32, torch.device("cuda:1")).home_of("blocks.39.ffn.0.weight") == torch.device("cuda:1")


def test_slabs_are_cut_from_pieces_that_are_powers_of_two() -> None:
    """Of 14 GB in blocks of 351 MB less than a twentieth is wasted; torch alone would take half as much again."""
    block, count = 351_000_064, 40
    left, pinned, piece = block * count, 0, 0
    for _ in range(count):
        if block > piece:
            piece = piece_bytes(block, left)
            assert piece.bit_count() == 1
            assert block <= piece <= PINNED_BYTES
            pinned += piece
        piece -= block
        left -= block
    assert pinned <= 1.05 * block * count
    assert piece_bytes(3 * 2**30, 3 * 2**30) == 2**32
    assert [len(slab) for slab in pinned_slabs([512, 0, 2048, 1024])] == [512, 0, 2048, 1024]


def test_memory_is_pinned_on_a_gpu_only_and_if_the_host_keeps_2_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "free_memory_bytes", lambda device: 10 * 2**30)
    cuda = torch.device("cuda")
    assert can_pin(8 * 2**30, cuda)
    assert not can_pin(8 * 2**30 + 1, cuda)
    assert not can_pin(1, torch.device("cpu"))
    monkeypatch.setattr(streaming, "free_memory_bytes", lambda device: None)
    assert can_pin(2**40, cuda)
