"""What would break on a GPU, by a device that only pretends to be one; see `pretend_cuda` for what that shows."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pretend_cuda import OtherDeviceError, RaceError, WaitedError, pretend_cuda, serve_on_pretended
from recipes_for_tests import options, tiny, write_recipe, write_voice
from reference import fill_module, load_golden, relative_error
from safetensors.torch import load_file, save_file

from benchmarks import gpu
from benchmarks.models import Size, preparation, random_dit
from s2v_flow import api
from s2v_flow.errors import S2VFlowError
from s2v_flow.graph.events import Noted, StepDone
from s2v_flow.graph.interrupt import StoppedError
from s2v_flow.machine import resolve_device
from s2v_flow.models.attention import backends_for, usable_backend
from s2v_flow.models.dit import S2VConfig
from s2v_flow.models.footprint import Weights, decoding_bytes, encoding_bytes
from s2v_flow.models.gguf_blocks import dequantize_blocks
from s2v_flow.models.load import load_dit, load_vae
from s2v_flow.models.packed import multiply_in_fp8, read_packed, require_products
from s2v_flow.models.registry import weight_bytes
from s2v_flow.models.streaming import WeightStream
from s2v_flow.models.vae import VAEConfig, WanVAE
from s2v_flow.models.vae_tiles import decode_next_tiled
from s2v_flow.nodes.denoising import FiniteWatch
from s2v_flow.nodes.tensors import each_to_frames, to_frames
from s2v_flow.parallel import layout, team
from s2v_flow.weights.gguf import BLOCK_SIZES
from s2v_flow.weights.quantization import GGUF_FORMATS, read_quantization
from s2v_flow.weights.reader import Checkpoint

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or torch.cuda.is_available() or not hasattr(torch._C, "_ensureCUDADeviceGuardSet"),
    reason="needs a newer torch, for Linux, and no GPU: with one, `pytest -m gpu` shows more",
)

BF16 = torch.bfloat16
LATENT = {"kind": "save_latent", "latent": "$talk", "file": "out/talk.latent"}
SMALL = S2VConfig(dim=128, ffn_dim=128, num_layers=2, text_dim=32, audio_dim=32)
EXACT = {name: {"precision": "fp32"} for name in ("dit", "umt5", "vae")}


def test_it_refuses_what_a_gpu_refuses() -> None:
    with pretend_cuda(limit=2**20) as device:
        x, host = torch.ones(2, 3, device="cuda"), torch.ones(2, 3)
        assert x.is_cuda
        assert str(x.device) == "cuda:0"
        assert float((x * torch.tensor(2.0)).sum()) == 12
        for mixed in (lambda: x + host, lambda: host.add_(x), lambda: torch.cat([x, host]), lambda: F.linear(x, host)):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        with pytest.raises(TypeError, match="can't convert cuda"):
            x.numpy()
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(2, device="cuda", generator=torch.Generator().manual_seed(0))
        assert device.allocated == 512
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2**21, device="cuda", dtype=torch.uint8)
    assert not torch.cuda.is_available()


def test_it_refuses_what_is_for_another_gpu() -> None:
    """Where the one that there is has another number than 0, which is the present one."""
    with pretend_cuda(index=1):
        assert float(torch.ones(2, device="cuda:1").sum()) == 2
        for wrong in (lambda: torch.ones(2, device="cuda"), torch.cuda.current_stream, torch.cuda.Stream):
            with pytest.raises(OtherDeviceError, match="cuda:1 is meant"):
                wrong()


def test_it_finds_where_the_host_waits() -> None:
    with pretend_cuda():
        x = torch.ones(3, device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        for waits in (x.cpu, x.sum().item, lambda: x[x > 0], lambda: torch.tensor([1.0], device="cuda")):
            with pytest.raises(WaitedError):
                waits()
        x.to("cpu", non_blocking=True)
        torch.full((2,), 3.0, device="cuda")


def test_it_finds_what_nothing_waits_for() -> None:
    """Copies to and from the host, and another stream, before a wait for them and after."""
    with pretend_cuda():
        x, side = torch.ones(3, device="cuda"), torch.cuda.Stream()
        copied = x.to("cpu", non_blocking=True)
        with pytest.raises(RaceError, match="add"):
            copied + 1
        torch.cuda.current_stream().record_event().synchronize()
        assert (copied + 1).tolist() == [2, 2, 2]
        x.mul_(2)
        with torch.cuda.stream(side), pytest.raises(RaceError, match="add_"):
            x.add_(1)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            x.add_(1)
        with pytest.raises(RaceError, match="sum"):
            x.sum()


def test_it_finds_memory_that_is_freed_while_another_stream_may_use_it() -> None:
    def free_early() -> None:
        with pretend_cuda():
            x, side = torch.empty(3, device="cuda"), torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                x.zero_()
            del x

    with pytest.raises(RaceError, match="is freed while"):
        free_early()


@pytest.mark.parametrize("name", ["int8_tensor", "int8_row", "int8_convrot", "nvfp4", "mxfp8"])
def test_packed_weights_are_expanded_without_a_wait(name: str, tmp_path: Path) -> None:
    """And to the CPU's bits."""
    inputs, _, case = load_golden(f"components/quant_{name}")
    save_file(inputs, tmp_path / "a.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "a.safetensors")
    quantization = read_quantization(checkpoint)
    for layer, item in case["layers"].items():
        given: Any = (checkpoint, quantization, f"{layer}.weight", tuple(item["shape"]))
        expected = read_packed(*given, "cpu").expand(BF16)
        with pretend_cuda():
            packed = read_packed(*given, "cuda")
            torch.cuda.set_sync_debug_mode("error")
            found = packed.expand(BF16)
            torch.cuda.set_sync_debug_mode("default")
            assert torch.equal(found.cpu(), expected)


def test_blocks_of_gguf_are_expanded_without_a_wait() -> None:
    generator = torch.Generator().manual_seed(0)
    with pretend_cuda():
        for name in sorted(GGUF_FORMATS):
            rows = torch.randint(0, 256, (4, 3 * BLOCK_SIZES[name][1]), dtype=torch.uint8, generator=generator)
            given = rows.cuda()
            torch.cuda.set_sync_debug_mode("error")
            found = dequantize_blocks(given, name)
            torch.cuda.set_sync_debug_mode("default")
            assert torch.equal(found.cpu().nan_to_num(), dequantize_blocks(rows, name).nan_to_num())


@pytest.mark.parametrize("way", [pytest.param("resident", marks=pytest.mark.slow), "streamed", "fp8"])
def test_a_forward_never_waits_and_is_the_cpus(way: str) -> None:
    """In bfloat16, with what watches for bad numbers; streamed weights, on a second GPU, are copied in time."""
    index = int(way == "streamed")

    def velocity(device: str) -> torch.Tensor:
        model = random_dit(SMALL, BF16, "cpu").to(device)
        if way == "streamed":
            model.stream_weights(device)
        if way == "fp8":
            multiply_in_fp8(model.blocks)
        forward = preparation(model, Size(8, 8, 2), device, num_branches=2)()
        torch.cuda.set_sync_debug_mode("error")
        found, watch = forward()[1], FiniteWatch()
        watch.add(1, found)
        torch.cuda.set_sync_debug_mode("default")
        assert watch.first_bad(waits=True) is None
        return found.cpu()

    with pretend_cuda(index=index) as device:
        assert relative_error(velocity(f"cuda:{index}"), velocity("cpu")) < 0.01
    assert device.attention


def test_loading_for_products_in_fp8_holds_the_wider_weights_of_one_layer(tiny_models: Path) -> None:
    """Of a file in 16 or 32 bits, where the device has no room for all of it."""
    path = tiny_models / "diffusion_models/tiny_s2v.safetensors"
    with pretend_cuda() as device:
        model = load_dit(path, dtype=BF16, device="cuda", quantized=True, fp8_fast=True).module
        assert device.peak <= 1.05 * device.allocated
        assert weight_bytes(model) <= device.allocated <= 1.05 * weight_bytes(model)


def test_products_in_fp8_are_tried_before_a_model_is_loaded_for_them() -> None:
    """A build of torch may lack them where the GPU has the units: here of a GPU that has none."""
    with pretend_cuda(capability=(8, 9)):
        require_products("cuda")
    with pretend_cuda(capability=(8, 6)), pytest.raises(S2VFlowError, match=r"fp8_fast does not work on cuda .* needs"):
        require_products("cuda")


def test_convolutions_in_float32_are_not_rounded_to_fewer_bits(tiny_models: Path) -> None:
    """As cuDNN does unless told otherwise; the whole process is told by the first model on a GPU."""
    with pretend_cuda():
        assert torch.backends.cudnn.allow_tf32
        load_vae(tiny_models / "vae/tiny_vae.safetensors", torch.float32, "cuda")
        assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(
    ("capability", "chosen"), [((7, 5), "sdpa"), ((8, 6), "flash"), ((9, 0), "cudnn"), ((12, 0), "sdpa")]
)
def test_attention_is_chosen_by_what_the_gpu_can_do(capability: tuple[int, int], chosen: str) -> None:
    with pretend_cuda(capability=capability):
        assert usable_backend("auto", backends_for(capability, BF16), "cuda", BF16) == (chosen, "")


def test_a_backend_that_fails_with_a_bias_is_passed_over() -> None:
    """The text's attention has one; flash leaves it to cuDNN."""
    with pretend_cuda() as device:
        device.has_biased_cudnn = False
        found, told = usable_backend("auto", backends_for((9, 0), BF16), "cuda", BF16)
    assert found == "sdpa"
    assert "cudnn does not work on cuda (RuntimeError: cuDNN Frontend error" in told


def test_a_device_that_is_not_there_is_refused_by_name() -> None:
    with pretend_cuda():
        assert resolve_device("auto") == "cuda"
        assert resolve_device("cuda:0") == "cuda:0"
        for name, fix in (("cuda:1", "use --device cuda:0"), ("cuda:00", "use auto, cpu, cuda or cuda:N")):
            with pytest.raises(S2VFlowError) as caught:
                resolve_device(name)
            assert caught.value.fix == fix


def test_streamed_weights_are_right_whatever_the_streams_do_first() -> None:
    """Six units through two places: each is copied once the one before last is used, and used once it is there."""
    layers = [torch.nn.Linear(8, 8).requires_grad_(False) for _ in range(6)]
    x = torch.ones(1, 8)
    expected = x
    for layer in layers:
        expected = layer(expected)
    with pretend_cuda() as device:
        stream = WeightStream([[layer] for layer in layers], "cuda", is_pinned=True)
        found = x.cuda()
        torch.cuda.set_sync_debug_mode("error")
        for index in stream:
            found = layers[index](found)
        torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(found.cpu(), expected)
        assert device.peak <= 2 * stream.largest_bytes + 4 * 512


def test_frames_that_are_copied_beside_the_next_decoding_are_right() -> None:
    groups = [torch.rand(1, 3, 4, 16, 16) * 2.2 - 1.1 for _ in range(4)]
    with pretend_cuda():
        torch.cuda.set_sync_debug_mode("error")
        copied = [frames.numpy().copy() for frames in each_to_frames(group.cuda(non_blocking=True) for group in groups)]
    assert all((found == to_frames(group).numpy()).all() for found, group in zip(copied, groups, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_the_plan_counts_what_the_vae_takes_on_a_gpu(dtype: torch.dtype) -> None:
    """Within 15 %; the kernels' own workspaces are not among it."""
    vae, side = fill_module(WanVAE(VAEConfig(8))).to(dtype), 48
    shapes = {key: tuple(value.shape) for key, value in vae.state_dict().items()}
    weights = Weights(shapes, 0, dtype.itemsize, is_packed=False, on_cpu=False)
    with pretend_cuda() as device:
        vae, latent, clip = vae.to("cuda"), torch.randn(1, 16, 2, side // 8, side // 8), torch.rand(1, 3, 9, side, side)
        there = device.allocated
        vae.decode_next(latent.cuda(), vae.decode_next(latent.cuda(), None)[1])
        assert decoding_bytes(weights, side, side, 2) == pytest.approx(device.peak - there, rel=0.15)
        device.reset_peak()
        vae.encode(clip.cuda())
        assert encoding_bytes(weights, side, side, 9) == pytest.approx(device.peak - there, rel=0.15)


def test_decoding_in_tiles_holds_one_tiles_state_at_a_time() -> None:
    """What the plan counts for a tile, and the picture twice; with the state of the one before it were a third more."""
    vae, latent = fill_module(WanVAE(VAEConfig(4))), torch.randn(1, 16, 2, 24, 24)
    with pretend_cuda() as device:
        vae, given, state = vae.to("cuda"), latent.cuda(), None
        there = device.allocated
        for part in given.split(1, dim=2):
            _, state = decode_next_tiled(vae, part, state, 2)
        assert device.peak - there <= (52 + 17) * 4 * 128 * 128 * 4 + 2 * 12 * 192 * 192 * 4


@pytest.mark.slow
def test_the_gpus_script_runs_at_toy_size() -> None:
    """Every part but that of torch's compiler, which makes its code for a real device."""
    for part in (part for part in gpu.PARTS if part is not gpu.compiled):
        with pretend_cuda():
            rows = [*gpu.rows_of(part, replace(gpu.TOY, device="cuda"))]
        assert {row["status"] for row in rows if row["case"] != "sage"} == {"ok"}, rows


def latent(recipe: Path, chosen: api.Options, *, device: str, on_event: Any = lambda event: None) -> torch.Tensor:
    """Run a recipe and return its latent."""
    result = api.run(recipe, chosen, on_event, device=device)
    return load_file(result.outputs["all"][0])["latent_tensor"]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Two chunks of four steps with guidance, and their latent as a file."""
    write_voice(tmp_path / "voice.wav", 0.4)
    return write_recipe(tmp_path, tiny(**EXACT, first={"steps": 4, "cfg": 2.0}, talk={"chunks": 1}, all=LATENT))


@pytest.mark.slow
def test_a_whole_run_is_the_cpus(recipe: Path, tiny_models: Path, tmp_path: Path) -> None:
    """In float32; streamed to the same bits; stopped at a step, too; steps wait for nothing."""
    on_cpu = latent(recipe, options(tmp_path, tiny_models, tmp_path / "cpu"), device="cpu")
    waits: list[int] = []
    with pretend_cuda() as device:

        def count(event: object) -> None:
            if isinstance(event, StepDone):
                waits.append(len(device.waits))

        resident = latent(recipe, options(tmp_path, tiny_models), device="cuda", on_event=count)
        assert waits[0] == waits[3] < waits[4] == waits[7]
        sets = ["nodes.dit.placement=streamed"]
        chosen = options(tmp_path, tiny_models, tmp_path / "b", sets=sets, should_stop=lambda: len(waits) == 10)
        with pytest.raises(StoppedError):
            latent(recipe, chosen, device="cuda", on_event=count)
        streamed = latent(recipe, replace(chosen, should_stop=lambda: False), device="cuda")
    assert relative_error(resident, on_cpu) < 1e-5
    assert torch.equal(resident, streamed)


@pytest.mark.slow
def test_a_run_does_what_the_plan_chose_for_a_budget(recipe: Path, tiny_models: Path, tmp_path: Path) -> None:
    """With exactly what the plan says that it takes, and with less: the same bits, and memory never runs out."""
    made, placements, least = list[torch.Tensor](), list[str](), None
    with pretend_cuda():
        for name in "ab":
            chosen = options(tmp_path, tiny_models, tmp_path / name, sets=["nodes.first.steps=1"], vram=least)
            planned = api.plan(recipe, chosen, device="cuda")
            budget = max(need.peak_bytes or 0 for need in planned.needs.values())
            result = api.run(recipe, replace(chosen, vram=budget, overwrite=True), device="cuda")
            facts, least = result.entries["first"].facts, budget - 1
            assert "retreats" not in facts
            placements.append(facts["placement"])
            made.append(load_file(result.outputs["all"][0])["latent_tensor"])
    assert placements == ["resident", "streamed"]
    assert torch.equal(*made)


@pytest.mark.slow
def test_two_gpus_make_what_a_cpu_makes(
    recipe: Path, tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes with a GPU each, which share branches, then tokens."""
    sets = ["nodes.first.steps=2", "nodes.talk.cfg=1"]
    on_cpu = latent(recipe, options(tmp_path, tiny_models, tmp_path / "cpu", sets=sets), device="cpu")
    monkeypatch.setattr(team, "serve", serve_on_pretended)
    with pretend_cuda():
        monkeypatch.setattr(layout, "num_gpus", lambda: 2)
        shared = latent(recipe, options(tmp_path, tiny_models, tmp_path / "b", sets=sets, gpus=2), device="cuda")
    assert relative_error(shared, on_cpu) < 1e-5


@pytest.mark.slow
def test_where_memory_runs_out_a_run_goes_on_with_less(recipe: Path, demo_models: Path, tmp_path: Path) -> None:
    """The transformer's weights, 48 MB, fit, but not a step beside them: the same bits in less."""
    with pretend_cuda():
        whole = latent(recipe, options(tmp_path, demo_models), device="cuda")
    told: list[str] = []
    chosen = options(tmp_path, demo_models, tmp_path / "b", sets=["nodes.dit.placement=resident"])
    with pretend_cuda(56_000_000):
        take = lambda event: told.append(event.text) if isinstance(event, Noted) else None  # noqa: E731
        less = latent(recipe, chosen, device="cuda", on_event=take)
    assert any(text.startswith("memory ran out in first: the model's weights are offloaded") for text in told)
    assert torch.equal(whole, less)
