"""Chunks that are stopped and gone on with: the same bits, for every sampler and every step; and bad numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chunk_bench import KEY, SAMPLERS, STEPS, Bench, CurvedModel
from safetensors.torch import load, save
from torch import Tensor

from s2v_flow.cache.resume_point import seal
from s2v_flow.errors import BadNumbersError
from s2v_flow.graph.interrupt import StoppedError
from s2v_flow.nodes import denoising


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_chunk_that_was_stopped_goes_on_to_the_same_bits_at_every_step(sampler: str, tmp_path: Path) -> None:
    """One stop at each step, and a stop at every step in turn; each step is taken once."""
    bench = Bench(tmp_path, sampler)
    whole = bench.run()
    assert bench.steps() == list(range(1, STEPS + 1))
    for step in range(1, STEPS):
        with pytest.raises(StoppedError, match=rf"talk\[1\] after step {step} of {STEPS}, resume point written"):
            bench.run(step)
        resumed = bench.run()
        assert bench.steps() == list(range(step + 1, STEPS + 1))
        assert torch.equal(resumed.view(torch.int32), whole.view(torch.int32)), step
        bench.folder.forget(KEY)
    for step in range(1, STEPS):
        with pytest.raises(StoppedError):
            bench.run(step)
        assert bench.steps() == [step]
    assert torch.equal(bench.run().view(torch.int32), whole.view(torch.int32))


def test_the_latent_alone_would_not_do(tmp_path: Path) -> None:
    """The test above can fail: without its history a solver goes on to other bits."""
    bench = Bench(tmp_path, "dpmpp_2m")
    whole = bench.run()
    with pytest.raises(StoppedError):
        bench.run(3)
    facts, payload = bench.folder.read(KEY) or ({}, b"")
    tensors = {name: tensor * (not name.startswith("history.")) for name, tensor in load(payload).items()}
    bench.folder.write(
        KEY, {name: facts[name] for name in facts if name not in ("schema", "fingerprint")}, save(tensors)
    )
    assert not torch.equal(bench.run(), whole)


def test_a_stop_in_the_last_step_finishes_the_chunk(tmp_path: Path) -> None:
    """Its result is there: nothing is to be gone on with."""
    bench = Bench(tmp_path)
    assert torch.equal(bench.run(STEPS), bench.run())
    assert bench.folder.peek(KEY) is None


def test_checkpoints_are_written_so_that_no_more_than_a_minute_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With steps of 25 s: after the 2nd and the 4th, for another step would be too late; with 61 s: after each."""
    for seconds, expected in ((25.0, [2, 4]), (61.0, [1, 2, 3, 4, 5]), (1.0, [])):
        bench = Bench(tmp_path)
        written: list[int] = []
        monkeypatch.setattr(
            bench.folder, "write", lambda key, facts, payload, to=written: to.append(int(facts["step"]))
        )
        now = SimpleNamespace(seconds=100.0)
        monkeypatch.setattr(denoising, "time", SimpleNamespace(monotonic=lambda now=now: now.seconds))

        class SlowModel(CurvedModel):
            def __call__(self, *args: Any, seconds: float = seconds, now: Any = now) -> list[Tensor]:
                now.seconds += seconds
                return super().__call__(*args)

        bench.run(model=SlowModel())
        assert written == expected


@pytest.mark.parametrize(
    "changes",
    [{"steps": 7}, {"shift": 5.0}, {"sampler": "uni_pc_bh2"}, {"seed": 8}],
    ids=lambda changes: next(iter(changes)),
)
def test_a_checkpoint_that_does_not_fit_is_told_and_not_used(changes: Mapping[str, Any], tmp_path: Path) -> None:
    """Fingerprints keep them apart; should one be wrong, the sampler, its levels, its seed and its steps do."""
    with pytest.raises(StoppedError):
        Bench(tmp_path).run(3)
    other = Bench(tmp_path, **changes)
    expected = other.run(key="cd" + KEY[2:])
    assert torch.equal(other.run(), expected)
    (note,) = other.notes()
    assert note.is_warning
    assert note.text.startswith("the resume point is not used, it is of another run: s")
    assert other.steps()[0] == 1


def test_a_node_that_is_computed_anew_does_not_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    """`--force` means all of it."""
    bench = Bench(tmp_path)
    with pytest.raises(StoppedError):
        bench.run(3)
    bench.run(is_fresh=True)
    assert bench.steps()[0] == 1


def test_every_flipped_bit_of_a_checkpoint_is_seen(tmp_path: Path) -> None:
    """It is put aside with a warning, and the chunk begins anew, to the right result."""
    bench = Bench(tmp_path)
    with pytest.raises(StoppedError):
        bench.run(2)
    path = bench.folder.path(KEY)
    sound = path.read_bytes()
    assert int.from_bytes(sound[:8], "little") % 8 == 0, "readable by any safetensors reader"
    assert load(sound)["x"].shape == (1, 16, 2, 8, 8)
    whole = Bench(tmp_path).run(key="ef" + KEY[2:])
    positions = [*range(0, 1500, 7), *range(1500, len(sound), 4001), len(sound) - 1]
    for position in positions:
        path.write_bytes(sound[:position] + bytes([sound[position] ^ 4]) + sound[position + 1 :])
        with pytest.raises(ValueError, match=r"damaged"):
            bench.folder.read(KEY)
        assert not path.exists()
    path.write_bytes(sound[:-1])
    assert torch.equal(bench.run(), whole)
    assert [note.is_warning for note in bench.notes()] == [True]
    assert bench.steps()[0] == 1
    assert {file.name for file in (tmp_path / "quarantine").iterdir()} == {path.name}


def spoilt(tensor: Tensor) -> Iterator[Tensor]:
    """Yield what may stand in a tensor's place in a sound file: another dtype, shape or step, bad numbers."""
    yield from (tensor.to(dtype) for dtype in (torch.float16, torch.int32))
    yield from (tensor.reshape(1, -1).clone(), tensor.reshape(-1)[:0].clone())
    if tensor.is_floating_point():
        yield torch.full_like(tensor, float("nan"))
    elif tensor.ndim:
        yield torch.zeros_like(tensor)  # no state of a generator
    else:
        yield from (tensor + 1, tensor + 2**62)


@pytest.mark.parametrize("sampler", ["uni_pc", "euler_ancestral", "euler"])
def test_a_state_that_this_sampler_does_not_make_is_told_and_not_used(sampler: str, tmp_path: Path) -> None:
    """Whatever stands in a tensor's place, or one is missing or too many: it begins anew, to the right result."""
    cached = {"step_cache": "easy", "step_cache_threshold": 1.0} if sampler == "euler" else {}
    bench = Bench(tmp_path, sampler, **cached)
    whole = bench.run()
    with pytest.raises(StoppedError):
        bench.run(3)
    facts, payload = bench.folder.read(KEY) or ({}, b"")
    sound = load(payload)
    needed = {name for name in sound if name != "cache.rate" and not name.endswith(("_2", "_3"))}
    wrong = [{**sound, name: tensor} for name in needed for tensor in spoilt(sound[name])]
    wrong += [{key: sound[key] for key in sound if key != name} for name in needed]
    wrong += [
        {**sound, name: sound["x"].clone()} for name in {"rng", "history.guess_1", "history.denoised_9"} - {*sound}
    ]
    for tensors in wrong:
        bench.folder.write(KEY, facts, save(tensors))
        assert torch.equal(bench.run().view(torch.int32), whole.view(torch.int32))
        assert bench.steps()[0] == 1
        assert [note.text.partition(":")[0] for note in bench.notes()] == [
            "the resume point is not used, it holds no solver's state"
        ]


def test_a_sound_file_that_holds_no_state_is_not_used(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    with pytest.raises(StoppedError):
        bench.run(3)
    facts, _ = bench.folder.read(KEY) or ({}, b"")
    for step, tensors in (("3", {"latent": torch.zeros(1)}), ("3", {"step": torch.tensor(3)}), ("0", {}), ("", {})):
        bench.folder.write(KEY, {**facts, "step": step}, save(tensors))
        bench.run()
        assert [note.is_warning for note in bench.notes()] == [True]
        assert bench.steps()[0] == 1
    with pytest.raises(ValueError, match="header"):
        seal(b"no safetensors", {})


def test_a_checkpoint_that_cannot_be_written_costs_the_checkpoint_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run says so; a stop still stops."""

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("s2v_flow.files.atomic.finish", refuse)
    bench = Bench(tmp_path)
    with pytest.raises(StoppedError, match="without a resume point"):
        bench.run(3)
    (note,) = bench.notes()
    assert note.is_warning
    assert "no space left" in note.text
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_bad_numbers_stop_the_run_at_their_step(number: float, tmp_path: Path) -> None:
    """The message names the node, the step, the precision and the attention; no checkpoint holds them."""
    bench = Bench(tmp_path, "euler")
    with pytest.raises(BadNumbersError) as caught:
        bench.run(4, model=CurvedModel(lambda call: number if call == 4 else 0.0))
    words = (
        r"talk\[1\]: NaN or infinity in the latent after step 4 of 6 \(sampler euler, precision fp32, attention sdpa"
    )
    assert re.match(words, caught.value.message)
    assert caught.value.exit_code == 8
    assert bench.steps() == [1, 2, 3, 4]
    assert bench.folder.peek(KEY) is None


def test_one_bad_number_is_enough_and_none_is_overlooked_at_the_end() -> None:
    """In any place, in any step, the last one too."""
    from s2v_flow.nodes.denoising import FiniteWatch

    for step in (1, 2, 3):
        watch = FiniteWatch()
        for number in (1, 2, 3):
            x = torch.randn(1, 16, 2, 4, 4)
            if number == step:
                x.view(-1)[37 * step] = float("nan")
            watch.add(number, x)
        assert watch.first_bad(waits=True) == step
    watch = FiniteWatch()
    watch.add(1, torch.full((5,), 3e38))
    assert watch.first_bad(waits=True) is None
