"""Sampling where memory runs out: the same bits as with plenty, or exit code 7 with figures and nothing lost."""

from __future__ import annotations

import copy
import gc
import os
import re
import weakref
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from chunk_bench import STEPS, Bench, CurvedModel, artifact, text
from reference import fill_module
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from s2v_flow.errors import ExitCode, S2VFlowError
from s2v_flow.models.dit import S2VConfig, WanS2V
from s2v_flow.models.footprint import activation_bytes
from s2v_flow.nodes import handle, shortage
from s2v_flow.nodes.handle import ModelHandle, lacks_room
from s2v_flow.nodes.shortage import memory_failure

SMALL = S2VConfig(dim=128, ffn_dim=128, num_layers=2, text_dim=8, audio_dim=8)
SOME_SAMPLERS = (
    "uni_pc",
    "heun",
    "euler_ancestral",
    "flow_dpmpp",
)  # many steps' history, two calls, noise, the authors'
FREED, STREAMED, IN_TURN = "free", "stream", "turns"


class Scarce(TorchDispatchMode):
    """Counts tensor operations; an allocator that fails in those that `fails` names."""

    def __init__(self, fails: Callable[[int], bool] = lambda call: False) -> None:
        super().__init__()
        self.calls = 0
        self.fails = fails

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        if self.fails(self.calls):
            raise torch.OutOfMemoryError(f"tried to allocate 20 GiB in call {self.calls}")
        return function(*args, **(kwargs or {}))


class Peak(TorchDispatchMode):
    """Watches how many bytes of tensors are alive at most, counting storages that operations make; not `there`."""

    def __init__(self, there: Iterable[Tensor]) -> None:
        super().__init__()
        self.most = self.alive = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in there}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            storage = result.untyped_storage()
            if storage._cdata not in self._known and storage.nbytes():
                self._known.add(storage._cdata)
                self.alive += storage.nbytes()
                self.most = max(self.most, self.alive)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return result

    def _gone(self, name: int, size: int) -> None:
        self._known.discard(name)
        self.alive -= size


def scarce(model: WanS2V, allocator: Scarce) -> WanS2V:
    """Let everything that a model computes ask `allocator`."""

    def asking(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with allocator:
            return method(*args, **kwargs)

    for name in ("prepare_text", "prepare_chunk", "prepare_audio", "forward"):
        setattr(model, name, partial(asking, getattr(model, name)))
    return model


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the CPU for a device with memory of its own: weights can be streamed to it."""
    monkeypatch.setattr(ModelHandle, "is_on_device", True)


def small_bench(folder: Path, steps: int = 2) -> Bench:
    bench = Bench(folder, steps=steps, width=32, height=32)
    generator = torch.Generator().manual_seed(3)
    bench.inputs |= {
        "positive": text(0.3),
        "negative": text(-0.4),
        "reference": artifact(latent=torch.randn(1, 16, 1, 4, 4, generator=generator)),
    }
    return bench


@cache
def filled() -> WanS2V:
    return fill_module(WanS2V(SMALL))


def small_model() -> WanS2V:
    return copy.deepcopy(filled())


def failing_at(*calls: int) -> Callable[[int], float]:
    def spoil(call: int) -> float:
        if call in calls:
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")
        return 0.0

    return spoil


@pytest.mark.parametrize("sampler", SOME_SAMPLERS)
def test_a_step_that_ran_out_of_memory_is_taken_again_to_the_same_bits(sampler: str, tmp_path: Path) -> None:
    """At every model call in turn; each step is told once."""
    bench = Bench(tmp_path, sampler)
    model = CurvedModel()
    whole = bench.run(model=model)
    for call in range(1, model.calls + 1):
        found = bench.run(model=CurvedModel(failing_at(call)))
        assert torch.equal(found.view(torch.int32), whole.view(torch.int32)), call
        assert bench.steps() == list(range(1, STEPS + 1))
        assert bench.facts["retreats"] == [FREED]
        assert "degraded" not in bench.facts
        (note,) = bench.notes()
        assert note.is_warning
        assert note.text == "memory ran out in talk[1]: frees what is unused and tries again"


@pytest.mark.parametrize(
    ("num_failures", "expected"), [(1, [FREED]), (2, [FREED, STREAMED]), (3, [FREED, STREAMED, IN_TURN])]
)
def test_fallback_by_fallback_the_result_stays_the_same(
    num_failures: int, expected: list[str], tmp_path: Path, on_device: None
) -> None:
    """Streamed weights, and branches one after the other, change no bit; the result says what was given up."""
    bench = small_bench(tmp_path)
    whole = bench.run(model=small_model())
    allocator = Scarce()
    bench.run(model=scarce(small_model(), allocator))
    last = allocator.calls
    model = scarce(small_model(), Scarce(lambda call: last - 60 <= call < last - 60 + num_failures))
    assert torch.equal(bench.run(model=model), whole)
    assert bench.facts["retreats"] == expected
    assert bench.facts.get("placement") == ("streamed" if STREAMED in expected else "resident")
    assert "degraded" not in bench.facts
    assert len(bench.notes()) == num_failures
    assert model.is_streamed == (STREAMED in expected)


@pytest.mark.slow
def test_an_allocator_that_fails_at_any_call_changes_no_bit(tmp_path: Path, on_device: None) -> None:
    """Every 97th tensor operation of preparation and steps in turn; S2VFLOW_SOAK_STRIDE=1 takes every one."""
    bench = small_bench(tmp_path)
    allocator = Scarce()
    whole = bench.run(model=scarce(small_model(), allocator))
    stride = int(os.environ.get("S2VFLOW_SOAK_STRIDE", "97"))
    for call in range(1, allocator.calls + 1, stride):
        found = bench.run(model=scarce(small_model(), Scarce(lambda now, call=call: now == call)))
        assert torch.equal(found, whole), call
        assert bench.facts["retreats"] == [FREED], call


@pytest.mark.slow
def test_running_out_twenty_times_leaks_nothing(tmp_path: Path, on_device: None) -> None:
    """After each failed run every byte of every tensor that it made is given back, the model's too."""
    bench = small_bench(tmp_path)
    for _ in range(20):
        model = scarce(small_model(), Scarce(lambda call: call > 150))
        gone = weakref.ref(model)
        with Peak([]) as peak:
            with pytest.raises(S2VFlowError) as caught:
                bench.run(model=model)
            assert caught.value.exit_code == ExitCode.OUT_OF_MEMORY
            assert bench.facts["retreats"] == [FREED, STREAMED, IN_TURN]
            assert peak.most > 100_000
            del caught, model
            gc.collect()
        assert (peak.alive, gone()) == (0, None)


def test_when_nothing_helps_the_message_has_figures_and_the_steps_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 7; what is done of the chunk is a checkpoint, from which it goes on to the same bits."""
    monkeypatch.setattr(shortage, "memory_text", lambda device: "; 1.2 GiB of 24.0 GiB are free on cuda:0")
    bench = Bench(tmp_path)
    whole = bench.run()
    with pytest.raises(S2VFlowError) as caught:
        bench.run(model=CurvedModel(failing_at(4, 5, 6)))
    error = caught.value
    assert error.exit_code == ExitCode.OUT_OF_MEMORY
    words = (
        r"out of memory in talk\[1\], with a latent of 16x2x8x8, 32 tokens, weights of \d+ B \(resident\)"
        r"; 1\.2 GiB of 24\.0 GiB are free on cuda:0: tried to allocate 20 GiB"
    )
    assert re.fullmatch(words, error.message)
    for advice in ("smaller width and height", "length", "fp8", "--device", "other programs"):
        assert advice in (error.fix or "")
    assert error.kept == (
        "every chunk that was finished, and 3 of 6 steps of this chunk: the same command goes on from there"
    )
    assert bench.facts["retreats"] == [FREED, IN_TURN]
    assert torch.equal(bench.run(), whole)
    assert bench.steps() == [4, 5, 6]


def test_a_model_that_does_not_fit_is_loaded_streamed(tmp_path: Path, on_device: None) -> None:
    bench = small_bench(tmp_path)
    whole = bench.run(model=small_model())
    asked: list[bool] = []

    def load(streams: bool) -> WanS2V:
        asked.append(streams)
        if not streams:
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")
        return small_model()

    assert torch.equal(bench.run(load_model=load), whole)
    assert asked == [False, False, True]
    assert bench.facts["retreats"] == [FREED, STREAMED]
    assert bench.facts["placement"] == "streamed"


def test_a_model_that_does_not_fit_at_all_ends_with_exit_code_7(tmp_path: Path) -> None:
    def load(streams: bool) -> WanS2V:
        raise MemoryError

    with pytest.raises(S2VFlowError, match=r"32 tokens.*MemoryError") as caught:
        Bench(tmp_path).run(load_model=load)
    assert caught.value.exit_code == ExitCode.OUT_OF_MEMORY
    assert caught.value.kept == "every chunk that was finished"


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
            True,
        ),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8 GiB)"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (OSError("out of memory"), False),
    ],
)
def test_what_says_that_memory_has_run_out_is_known(error: Exception, is_memory: bool) -> None:
    assert (memory_failure(error) is not None) == is_memory


def test_other_errors_pass_and_nothing_is_tried_again(tmp_path: Path) -> None:
    calls = []

    def spoil(call: int) -> float:
        calls.append(call)
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    bench = Bench(tmp_path)
    with pytest.raises(RuntimeError, match="mat1"):
        bench.run(model=CurvedModel(spoil))
    assert calls == [1]
    assert "retreats" not in bench.facts


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "num_branches"), [(torch.float32, 1), (torch.float32, 2), (torch.bfloat16, 2)])
def test_what_a_step_holds_is_counted_within_a_tenth(dtype: torch.dtype, num_branches: int) -> None:
    """Beside the weights, on the CPU, where attention never holds all scores: measured on a small model."""
    from s2v_flow.models.conditioning import Branch

    config = S2VConfig(dim=256, ffn_dim=692, num_layers=2, text_dim=8, audio_dim=8)
    model = fill_module(WanS2V(config, compute_dtype=dtype)).to(dtype)
    chunk = model.prepare_chunk(num_latent_frames=4, height=40, width=40, conditioning="official")
    branches = [Branch(model.prepare_text(torch.ones(1, 16, 8))) for _ in range(num_branches)]
    x, timestep = torch.randn(1, 16, 4, 40, 40), torch.full((1,), 500.0)
    with Peak([*model.parameters(), x, timestep, chunk.rotations]) as peak:
        model(x, timestep, chunk, branches)
    expected = activation_bytes(256, 692, 1600, num_branches, dtype.itemsize)
    assert 0.9 < peak.most / expected < 1.1, peak.most / expected


def test_auto_streams_where_weights_and_activations_would_not_fit(
    tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the file's header, what fp8 keeps counted as such, and what is free; a device that does not say is trusted."""
    from types import SimpleNamespace

    from s2v_flow.graph.context import Numerics
    from s2v_flow.models.footprint import read_weights, step_bytes
    from s2v_flow.models.load import load_dit
    from s2v_flow.models.registry import ModelRegistry, weight_bytes

    for name, quantized in (("tiny_s2v", False), ("tiny_s2v_fp8_scaled", True), ("tiny_s2v_fp8_scaled", False)):
        file = tiny_models / "diffusion_models" / f"{name}.safetensors"
        options: dict[str, Any] = {"dtype": torch.bfloat16, "quantized": quantized}
        counted = read_weights(file, "load_diffusion_model", "bf16", on_cpu=not quantized).num_bytes
        loaded = weight_bytes(load_dit(file, **options, device="cpu").module)
        assert abs(counted / loaded - 1) < 0.001  # scales are held in float32

    kind = "load_diffusion_model"
    registry = ModelRegistry(memory_budget_bytes=0)
    context: Any = SimpleNamespace(
        device="cuda:0",
        files={("checkpoint",): file},
        numerics=Numerics("cuda"),
        kind=kind,
        models=lambda: registry,
    )
    dit = read_weights(file, kind, "bf16", on_cpu=False)
    needed = dit.num_bytes + step_bytes(dit, 1000, 2) + 77 + handle.RESERVE_BYTES
    for free, expected in ((needed, False), (needed - 1, True), (None, False)):
        monkeypatch.setattr(handle, "free_device_bytes", lambda device, limit=None, free=free: free)
        assert lacks_room(context, "auto", 77, 1000, 2) == expected


def test_placement_is_obeyed_and_auto_asks_only_for_a_model_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A live model has its room already."""
    from s2v_flow.nodes import load

    asked: list[tuple[int, int]] = []
    found: list[Any] = []
    monkeypatch.setattr(load, "lacks_room", lambda context, *sizes: asked.append(sizes[2:]) or True)
    monkeypatch.setattr(load, "open_handle", lambda *_, should_stream, **__: found.append(should_stream))
    for placement in ("auto", "resident", "streamed"):
        bench = Bench(tmp_path)
        load.LoadDiffusionModel(checkpoint="a.safetensors", placement=placement).run(bench.context(), {})
        answers = [found[-1](1000, 2, is_live) for is_live in (False, True)]
        assert answers == {"auto": [True, False], "resident": [False] * 2, "streamed": [True] * 2}[placement]
    assert asked == [(1000, 2)]
