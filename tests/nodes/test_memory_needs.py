"""What a plan says of memory: formulas against what torch really holds, and what is told where files are missing."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes_for_tests import options, tiny, write_recipe, write_voice
from torch.profiler import ProfilerActivity, profile

from s2v_flow import api
from s2v_flow.graph.context import Numerics
from s2v_flow.graph.node import PlanNode
from s2v_flow.models.conditioning import Branch
from s2v_flow.models.dit import S2VConfig, WanS2V
from s2v_flow.models.footprint import (
    Weights,
    chunk_bytes,
    decoding_bytes,
    encoding_bytes,
    num_tokens,
    read_weights,
    streamed_bytes,
    tile_side,
)
from s2v_flow.models.vae import VAEConfig, WanVAE
from s2v_flow.models.vae_tiles import Axis
from s2v_flow.nodes.chunk import Chunk
from s2v_flow.nodes.memory import PROCESS_BYTES, needs

ITEM = {torch.float32: 4, torch.bfloat16: 2}


def most_held(work: Callable[[], object]) -> int:
    """Return the most bytes that torch held at once of what `work` allocated."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def filled(module: torch.nn.Module, dtype: torch.dtype) -> Any:
    """Give a module on the meta device weights: linear layers in `dtype`, all else in float32."""
    linear = {name for name, layer in module.named_modules() if type(layer) is torch.nn.Linear}
    weights = {
        key: torch.full(value.shape, 0.01, dtype=dtype if key.rpartition(".")[0] in linear else torch.float32)
        for key, value in module.state_dict().items()
    }
    module.load_state_dict(weights, assign=True)
    return module.eval().requires_grad_(False)


def shapes_of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


@pytest.mark.parametrize(
    ("dim", "ffn", "layers", "frames", "rows", "branches", "dtype"),
    [
        (256, 512, 3, 4, 16, 1, torch.float32),
        (256, 1024, 4, 2, 16, 2, torch.float32),
        (512, 1382, 3, 2, 16, 1, torch.float32),
        pytest.param(256, 690, 3, 2, 24, 2, torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_a_denoising_step_holds_what_is_computed_of_it(
    dim: int, ffn: int, layers: int, frames: int, rows: int, branches: int, dtype: torch.dtype
) -> None:
    """Within 15 %, in length, width, depth, branches and precision, from the text's preparation to the step.

    What is not seen here is left out: the rotations, in numpy's memory, and five of the solver's latents.
    """
    config = S2VConfig(dim=dim, ffn_dim=ffn, num_layers=layers, text_dim=16, audio_dim=16)
    with torch.device("meta"):
        module = WanS2V(config, compute_dtype=dtype)
    model = filled(module, dtype)

    def work() -> None:
        texts = [model.prepare_text(torch.ones(1, 512, 16)) for _ in range(branches)]
        audio = model.prepare_audio(torch.ones(1, 25, 16, 4 * frames), num_latent_frames=frames, conditioning="comfyui")
        chunk = model.prepare_chunk(
            num_latent_frames=frames,
            height=rows,
            width=rows,
            reference_latent=torch.ones(1, 16, 1, rows, rows),
            motion_latent=torch.ones(1, 16, 19, rows, rows),
            control_latent=torch.zeros(1, 16, 1, 2, 2),
            conditioning="comfyui",
        )
        tokens.append(chunk.rotations.shape[0])
        model(torch.ones(1, 16, frames, rows, rows), torch.ones(1), chunk, [Branch(text, audio) for text in texts])

    tokens: list[int] = []
    held = most_held(work)
    size = 8 * rows, 8 * rows, frames
    inputs = ["speech", "reference", "history", *(["negative"] if branches == 2 else [])]
    assert num_tokens(*size, inputs)[1] == tokens[0]
    weights = Weights(shapes_of(model), 0, ITEM[dtype], is_packed=False, on_cpu=True)
    unseen = 512 * tokens[0] + 5 * 16 * frames * rows * rows * 4
    assert chunk_bytes(weights, *size, inputs) - unseen == pytest.approx(held, rel=0.15)


@pytest.mark.parametrize(
    ("width", "side", "group"), [(8, 64, 1), (8, 64, 4), pytest.param(16, 96, 2, marks=pytest.mark.slow)]
)
def test_decoding_and_encoding_hold_what_is_computed_of_them(width: int, side: int, group: int) -> None:
    """Within 15 %: what convolutions need besides is invisible here, and counted."""
    with torch.device("meta"):
        module = WanVAE(VAEConfig(width))
    vae = filled(module, torch.float32)
    weights = Weights(shapes_of(vae), 0, 4, is_packed=False, on_cpu=True)

    def decode() -> None:
        state = None
        for _ in range(2):
            _, state = vae.decode_next(torch.ones(1, 16, group, side // 8, side // 8), state)

    assert decoding_bytes(weights, side, side, group) == pytest.approx(most_held(decode), rel=0.15)
    for count in (1, 9):
        held = most_held(lambda count=count: vae.encode(torch.ones(1, 3, count, side, side)))  # type: ignore[misc]
        assert encoding_bytes(weights, side, side, count) == pytest.approx(held, rel=0.15)


def test_a_tile_of_the_decoder_is_counted_as_large_as_it_is() -> None:
    """By the same arithmetic that cuts it."""
    for length in (16, 60, 104):
        for tiles in (1, 2, 3, 8):
            assert tile_side(8 * length, tiles) == 8 * Axis.cut(length, tiles).size


def test_injectors_behind_the_last_block_are_not_read_where_the_file_is_mapped(tiny_models: Path) -> None:
    """On a CPU, in the file's precision; cast or on a GPU they are in memory like all others."""
    path, size = (
        tiny_models / "diffusion_models" / "tiny_s2v.safetensors",
        partial(read_weights, kind="load_diffusion_model"),
    )
    shapes = size(path, precision="fp32", on_cpu=True).shapes
    unread = [f"audio_injector.injector{part}.{n}." for part in ("", "_adain_layers") for n in range(2, 12)]
    count = sum(math.prod(shape) for key, shape in shapes.items() if key.startswith(tuple(unread)))
    whole = size(path, precision="fp32", on_cpu=False).num_bytes
    assert size(path, precision="fp32", on_cpu=True).num_bytes == whole - 4 * count
    assert count > 10**6
    assert size(path, precision="bf16", on_cpu=True).num_bytes == size(path, precision="bf16", on_cpu=False).num_bytes


def test_streamed_weights_are_counted_by_what_is_on_the_device() -> None:
    """What steps need beside blocks and injectors, and two buffers of the largest block with the largest injector."""
    with torch.device("meta"):
        module = WanS2V(S2VConfig(dim=256, ffn_dim=512, num_layers=2, text_dim=16, audio_dim=16))
    sizes = {key: value.nbytes for key, value in module.state_dict().items()}
    injector = module.audio_injector
    alone = [module.text_embedding, module.casual_audio_encoder, module.frame_packer]
    moved = [*module.blocks, *injector.injector, *injector.injector_adain_layers, *alone]

    def size(layer: torch.nn.Module) -> int:
        return sum(value.nbytes for value in layer.state_dict().values())

    resting = sum(sizes.values()) - sum(map(size, moved))
    buffers = size(module.blocks[0]) + size(injector.injector[0]) + size(injector.injector_adain_layers[0])
    assert streamed_bytes(sizes) == resting + 2 * buffers


def planned(folder: Path, models: Path, **changes: Any) -> api.Planned:
    write_voice(folder / "voice.wav", 1.2)
    return api.plan(write_recipe(folder, tiny(**changes)), options(folder, models))


def stored(plan: api.Planned) -> set[str]:
    return {node.name for node in plan.plan.nodes if node.node.is_stored}


def test_a_plan_tells_what_every_node_will_need_before_anything_ran(tmp_path: Path, tiny_models: Path) -> None:
    plan = planned(tmp_path, tiny_models)
    memory = plan.estimate.memory
    assert memory.keys() == stored(plan)
    assert {found.source for found in memory.values()} == {"computed"}
    assert min(found.peak_bytes or 0 for found in memory.values()) > PROCESS_BYTES
    found = plan.to_json()
    assert {node["name"] for node in found["nodes"] if "memory" in node} == stored(plan)
    assert found["estimate"]["peak_bytes"] == max(node.peak_bytes or 0 for node in memory.values())
    assert found["estimate"]["free_bytes"] is None or found["estimate"]["free_bytes"] > 0
    latents = sum(isinstance(node.node, Chunk) for node in plan.plan.nodes) * 16 * 2 * 8 * 8 * 4
    assert found["estimate"]["known_disk_bytes"] >= latents


def test_where_a_model_is_missing_its_nodes_need_is_unknown(tmp_path: Path, tiny_models: Path) -> None:
    """And is not invented; those whose models are there are told all the same."""
    plan = planned(tmp_path, tiny_models, dit={"checkpoint": "none.safetensors"})
    known = {name for name, found in plan.estimate.memory.items() if found.peak_bytes is not None}
    assert known == {"positive", "speech", "reference", "video"}  # the film is made when the model is gone
    assert plan.estimate.peak_bytes is None
    assert plan.estimate.memory["first"].source == "unknown"


def test_fp8_weights_stay_small_on_a_gpu_and_are_expanded_on_a_cpu(tmp_path: Path, tiny_models: Path) -> None:
    plan = planned(tmp_path, tiny_models, dit={"checkpoint": "tiny_s2v_fp8_scaled.safetensors"})
    wide = planned(tmp_path, tiny_models)

    def peak(of: api.Planned, device: str) -> int:
        found = needs(of.plan, stored(of), Numerics(device))["talk[1]"].peak_bytes
        assert found is not None
        return found

    assert peak(plan, "cpu") == pytest.approx(peak(wide, "cpu"), rel=0.05)  # which is mapped, and not read in full
    assert peak(plan, "cuda") < 0.8 * peak(wide, "cuda")


def test_a_model_counts_as_long_as_something_needs_it(tmp_path: Path, tiny_models: Path) -> None:
    """The VAE, which the decoder needs again, while chunks are sampled; the text encoder not."""
    plan = planned(tmp_path, tiny_models)
    alone = {"speech", *(node.name for node in plan.plan.nodes if isinstance(node.node, Chunk))}
    numerics = Numerics("cpu")
    of_run, of_chunks = (needs(plan.plan, names, numerics)["first"] for names in (stored(plan), alone))
    vae = (tiny_models / "vae" / "tiny_vae.safetensors").stat().st_size
    assert (of_run.peak_bytes or 0) - (of_chunks.peak_bytes or 0) == pytest.approx(vae, rel=0.05)


def test_what_is_equal_is_computed_once(tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk's place and seed do not count: 13 chunks are of four shapes at most."""
    from s2v_flow.nodes import memory

    calls: list[str] = []

    def counted(node: PlanNode, model: Any, way: Any) -> int | None:
        calls.append(node.name)
        return chunk_work(node, model, way)

    chunk_work = memory._WORK["chunk"]
    monkeypatch.setattr(memory, "_WORK", {**memory._WORK, "chunk": counted})
    plan = planned(tmp_path, tiny_models, talk={"chunks": 12}, frames={"trim": "none"})
    assert sum(isinstance(node.node, Chunk) for node in plan.plan.nodes) == 13
    assert len(calls) == 2


def test_a_plan_warns_where_memory_will_not_do(
    tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(tmp_path, tiny_models)
    assert not [note for note in plan.notes if " of memory, " in note]
    monkeypatch.setattr(api, "free_memory_bytes", lambda device: 2**20)
    ways, note = [note for note in planned(tmp_path, tiny_models).notes if " of memory, " in note]
    assert ways == ("to fit into 1.0 MiB of memory, with the same result: fewer latent frames are decoded at once")
    assert "1.0 MiB are free" in note
