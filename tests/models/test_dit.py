"""The DiT against the reference outputs, and the contract of its two phases."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import fill_module, load_golden, load_keys, prepare_case, relative_error
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from s2v_flow.models.attention import repetition_biases
from s2v_flow.models.conditioning import Branch, PreparedChunk
from s2v_flow.models.dit import S2VConfig, WanS2V

TINY = S2VConfig(dim=256, ffn_dim=512, num_layers=5, text_dim=64, audio_dim=64)
FULL = S2VConfig(dim=5120, ffn_dim=13824, num_layers=40, text_dim=4096, audio_dim=1024)
TOLERANCE = 5e-6
CASES = (
    "dit_batch2",
    "dit_extend_full_motion",
    "dit_extend_short_motion",
    "dit_extend_tail_over",
    "dit_extend_tail_short",
    "dit_first_chunk",
    "dit_many_frames",
    "dit_no_audio",
    "dit_official_extend",
    "dit_official_extend_odd",
    "dit_official_first_chunk",
    "dit_official_many_frames",
    "dit_wide_text",
)


@pytest.fixture(scope="module")
def model() -> WanS2V:
    return fill_module(WanS2V(TINY))


def on_meta(config: S2VConfig) -> WanS2V:
    with torch.device("meta"):
        return WanS2V(config)


def run_case(model: WanS2V, name: str) -> tuple[Tensor, Tensor]:
    """Return the velocity of a golden case, and what it must be."""
    inputs, outputs, case = load_golden(f"components/{name}")
    chunk, branch = prepare_case(model, name, inputs, case)
    (velocity,) = model(inputs["x"], inputs["timestep"], chunk, [branch])
    return velocity, outputs["velocity"]


def tensors_of(prepared: object) -> Iterator[Tensor]:
    if isinstance(prepared, Tensor):
        yield prepared
    elif isinstance(prepared, tuple):
        for item in prepared:
            yield from tensors_of(item)
    elif isinstance(prepared, dict):
        yield from tensors_of(tuple(prepared.values()))
    elif dataclasses.is_dataclass(prepared):
        yield from tensors_of(tuple(getattr(prepared, field.name) for field in dataclasses.fields(prepared)))


@pytest.mark.parametrize("name", CASES)
def test_velocity_equals_the_reference(model: WanS2V, name: str) -> None:
    assert relative_error(*run_case(model, name)) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["dit_extend_full_motion", "dit_official_extend_odd", "dit_no_audio"])
def test_16_bits_stay_within_one_percent(name: str, dtype: torch.dtype) -> None:
    model = fill_module(WanS2V(TINY, compute_dtype=dtype)).to(dtype)
    velocity, expected = run_case(model, name)
    assert velocity.dtype == torch.float32
    assert relative_error(velocity, expected) <= 1e-2


def test_parameters_outside_linear_layers_may_be_stored_in_another_dtype() -> None:
    model = fill_module(WanS2V(TINY))
    linear = {
        parameter for layer in model.modules() if isinstance(layer, nn.Linear) for parameter in layer.parameters()
    }
    for parameter in set(model.parameters()) - linear:
        parameter.data = parameter.data.to(torch.bfloat16)
    assert relative_error(*run_case(model, "dit_extend_full_motion")) <= 1e-2


def test_names_and_shapes_are_the_checkpoints() -> None:
    names = {key: tuple(tensor.shape) for key, tensor in on_meta(FULL).state_dict().items()}
    assert names == load_keys("s2v_14b")
    assert len(names) == 1260


def test_names_and_shapes_of_the_tiny_model_follow_the_full_ones() -> None:
    widths = {5120: 256, 13824: 512, 4096: 64, 1024: 64, 30720: 1536, 1280: 64, 2560: 128, 10240: 512}
    expected = {
        key: tuple(widths.get(size, size) for size in shape)
        for key, shape in load_keys("s2v_14b").items()
        if not (block := re.match(r"blocks\.(\d+)\.", key)) or int(block[1]) < 5
    }
    assert {key: tuple(tensor.shape) for key, tensor in on_meta(TINY).state_dict().items()} == expected


@pytest.mark.parametrize("config", [TINY, FULL])
def test_sizes_are_read_off_the_shapes(config: S2VConfig) -> None:
    shapes = {key: tuple(tensor.shape) for key, tensor in on_meta(config).state_dict().items()}
    assert S2VConfig.from_shapes({**shapes, "blocks.0.ffn.0.scale_weight": ()}) == config


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("casual_audio_encoder.encoder.final_linear.weight", None, "not a Wan2.2-S2V model"),
        ("head.modulation", None, "head.modulation is missing"),
        ("head.modulation", (2, 256), "head.modulation: expected 3 sizes"),
        ("head.modulation", (1, 2, 200), "expected a width that 128 divides, got 200"),
        (
            "blocks.7.norm3.bias",
            (256,),
            r"blocks: expected layers numbered from 0 without gaps, got \[0, 1, 2, 3, 4, 7\]",
        ),
        ("audio_injector.injector.12.q.bias", (256,), "audio_injector.injector: expected 12 layers, got 13"),
    ],
)
def test_contradictory_shapes_are_refused(key: str, shape: tuple[int, ...] | None, message: str) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in on_meta(TINY).state_dict().items()}
    shapes.pop(key, None)
    if shape is not None:
        shapes[key] = shape
    with pytest.raises(ValueError, match=message):
        S2VConfig.from_shapes(shapes)


def test_prepared_state_is_not_changed_by_forward(model: WanS2V) -> None:
    """One preparation serves many steps: the second call gives the same bits, and nothing prepared has changed."""
    inputs, _, case = load_golden("components/dit_extend_full_motion")
    chunk, branch = prepare_case(model, "dit_extend_full_motion", inputs, case)
    before = copy.deepcopy([*tensors_of(chunk), *tensors_of(branch), inputs["x"]])
    (first,) = model(inputs["x"], inputs["timestep"], chunk, [branch])
    (second,) = model(inputs["x"], inputs["timestep"], chunk, [branch])
    after = [*tensors_of(chunk), *tensors_of(branch), inputs["x"]]
    assert torch.equal(first, second)
    assert len(before) > 20
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_two_branches_equal_two_calls_bit_for_bit(dtype: torch.dtype) -> None:
    model = fill_module(WanS2V(TINY, compute_dtype=dtype)).to(dtype)
    inputs, _, case = load_golden("components/dit_official_extend")
    chunk, positive = prepare_case(model, "dit_official_extend", inputs, case)
    silence = torch.zeros_like(inputs["audio_embed"])
    negative = Branch(
        model.prepare_text(inputs["context"].flip(1)),
        model.prepare_audio(silence, num_latent_frames=3, conditioning="official"),
    )
    x, timestep = inputs["x"], inputs["timestep"]
    both = model(x, timestep, chunk, [positive, negative])
    each = model(x, timestep, chunk, [positive]) + model(x, timestep, chunk, [negative])
    assert all(torch.equal(*pair) for pair in zip(both, each, strict=True))
    assert not torch.equal(*both)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float32, 1e-6),
        pytest.param(torch.bfloat16, 8e-3, marks=pytest.mark.slow),
        pytest.param(torch.float16, 1e-3, marks=pytest.mark.slow),
    ],
)
def test_a_few_rows_stand_for_a_texts_padding(dtype: torch.dtype, tolerance: float) -> None:
    model = fill_module(WanS2V(TINY, compute_dtype=dtype)).to(dtype)
    inputs, _, case = load_golden("components/dit_official_extend")
    chunk, branch = prepare_case(model, "dit_official_extend", inputs, case)
    text, padding = inputs["context"][:, :11], 501
    padded = model.prepare_text(F.pad(text, (0, 0, 0, padding)))
    short = model.prepare_text(text, padding=padding)
    assert padded.blocks[0].keys.shape[2] == 512
    assert short.blocks[0].keys.shape[2] < 20
    given = inputs["x"], inputs["timestep"], chunk
    (expected,) = model(*given, [Branch(padded, branch.audio)])
    (found,) = model(*given, [Branch(short, branch.audio)])
    (unpadded,) = model(*given, [Branch(model.prepare_text(text), branch.audio)])
    assert relative_error(found, expected) < tolerance
    assert relative_error(unpadded, expected) > 5 * tolerance


@pytest.mark.parametrize("count", [1, 2, 7, 100, 511])
def test_few_equal_keys_count_as_many(count: int) -> None:
    biases = torch.tensor(repetition_biases(count))
    assert len(biases) <= 5
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert float(biases.to(dtype).double().exp().sum()) == pytest.approx(count, rel=2e-6)


def test_what_branches_share_is_computed_once() -> None:
    """The first self-attention does not see the text yet: a second branch costs a forward pass less that."""
    model = on_meta(TINY)
    chunk, branch = prepare_on_meta(model, num_latent_frames=2, size=8, num_audio_frames=8)
    inputs = torch.empty(chunk.latent_shape, device="meta"), torch.empty(1, device="meta"), chunk
    tokens, video, dim = 2 * 16 + 16 + 16 + 4 + 4, 2 * 16, TINY.dim
    once = 2 * 4 * tokens * dim * dim + 4 * tokens * tokens * dim + 2 * 2 * dim * (256 + dim + 6 * dim)
    embedding = 2 * video * 64 * dim
    assert 2 * flops(model, *inputs, [branch]) - flops(model, *inputs, [branch, branch]) == once + embedding


@pytest.mark.slow
def test_blocks_share_one_graph_but_for_the_last_which_is_not_compiled() -> None:
    """Another number of tokens is another graph: it is compiled for all sizes then."""
    graphs = []

    def counting(graph: Any, inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    model = fill_module(WanS2V(TINY))
    model.compile_blocks(counting)
    assert relative_error(*run_case(model, "dit_extend_full_motion")) <= TOLERANCE
    assert len(graphs) == 1


@pytest.mark.slow
def test_a_full_forward_pass_needs_fewer_flops_than_comfyui() -> None:
    """640x640, 20 latent frames, with motion: ComfyUI's takes 1980.2e12.

    It runs on the meta device, so nothing in it waits for a tensor's value on the host.
    """
    model = on_meta(FULL)
    chunk, branch = prepare_on_meta(model, num_latent_frames=20, size=80, num_audio_frames=80)
    x = torch.empty(chunk.latent_shape, device="meta")
    count = flops(model, x, torch.empty(1, device="meta"), chunk, [branch])
    assert 1900e12 < count < 1975e12


def prepare_on_meta(
    model: WanS2V, *, num_latent_frames: int, size: int, num_audio_frames: int
) -> tuple[PreparedChunk, Branch]:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    chunk = model.prepare_chunk(
        num_latent_frames=num_latent_frames,
        height=size,
        width=size,
        reference_latent=empty(1, 16, 1, size, size),
        motion_latent=empty(1, 16, 19, size, size),
        control_latent=empty(1, 16, 1, 2, 2),
        conditioning="official",
        device="meta",
    )
    audio_embed = empty(1, 25, model.config.audio_dim, num_audio_frames)
    audio = model.prepare_audio(audio_embed, num_latent_frames=num_latent_frames, conditioning="official")
    return chunk, Branch(model.prepare_text(empty(1, 512, model.config.text_dim)), audio)


def flops(model: WanS2V, x: Tensor, timestep: Tensor, chunk: PreparedChunk, branches: list[Branch]) -> int:
    with FlopCounterMode(display=False) as counter:
        model(x, timestep, chunk, branches)
    return int(counter.get_total_flops())


def test_a_batch_of_one_serves_every_sample(model: WanS2V) -> None:
    inputs, _, case = load_golden("components/dit_extend_short_motion")
    name = "dit_extend_short_motion"
    noise = torch.stack([inputs["x"][0], inputs["x"][0].flip(0)])
    timestep = torch.tensor([777.5, 20.0])
    chunk, branch = prepare_case(model, name, {**inputs, "x": noise}, case)
    repeated = {key: value.repeat_interleave(2, 0) for key, value in inputs.items()}
    chunk2, branch2 = prepare_case(model, name, {**repeated, "x": noise}, case)
    (velocity,) = model(noise, timestep, chunk, [branch])
    (expected,) = model(noise, timestep, chunk2, [branch2])
    assert relative_error(velocity, expected) <= 1e-6


def test_one_control_patch_stands_for_all(model: WanS2V) -> None:
    inputs, _, case = load_golden("components/dit_first_chunk")
    zeros = torch.zeros_like(inputs["control_video"])
    velocities = []
    for control in (zeros, zeros[:, :, :1, :2, :2]):
        chunk, branch = prepare_case(model, "dit_first_chunk", {**inputs, "control_video": control}, case)
        velocities += model(inputs["x"], inputs["timestep"], chunk, [branch])
    assert torch.equal(*velocities)


def test_wrong_shapes_are_refused(model: WanS2V) -> None:
    """The message names the tensor, the shape that is expected and the one that is given."""
    inputs, _, case = load_golden("components/dit_first_chunk")
    chunk, branch = prepare_case(model, "dit_first_chunk", inputs, case)
    x, timestep = inputs["x"], inputs["timestep"]
    with pytest.raises(ValueError, match=r"x: expected shape \[1, 16, 3, 12, 16\], got \[1, 16, 2, 12, 16\]"):
        model(x[:, :, :2], timestep, chunk, [branch])
    with pytest.raises(ValueError, match=r"timestep: expected shape \[1\], got \[3\]"):
        model(x, timestep.expand(3), chunk, [branch])
    with pytest.raises(ValueError, match="branches: expected at least one"):
        model(x, timestep, chunk, [])
    with pytest.raises(ValueError, match=r"context: expected shape \[any, any, 64\], got \[1, 5, 65\]"):
        model.prepare_text(torch.zeros(1, 5, 65))
    short = model.prepare_audio(inputs["audio_embed"][..., :8], num_latent_frames=2, conditioning="comfyui")
    with pytest.raises(
        ValueError, match=r"audio keys: expected shape \[1, 3, any, any, 128\], got \[1, 2, 2, 5, 128\]"
    ):
        model(x, timestep, chunk, [Branch(branch.text, short)])
    with pytest.raises(ValueError, match=r"audio_embed: expected shape \[any, 25, 64, 8\], got \[1, 25, 64, 12\]"):
        model.prepare_audio(inputs["audio_embed"], num_latent_frames=2, conditioning="official")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 11}, r"H and W even, got \[1, 16, 3, 11, 16\]"),
        ({"num_latent_frames": 0}, r"got \[1, 16, 0, 12, 16\]"),
        ({"conditioning": "kijai"}, "conditioning: expected one of official, comfyui, got 'kijai'"),
        ({"reference_latent": torch.zeros(1, 16, 2, 12, 16)}, r"reference_latent: expected shape \[1, 16, 1, 12, 16\]"),
        ({"motion_latent": torch.zeros(1, 16, 19, 12, 14)}, r"motion_latent: expected shape \[1, 16, any, 12, 16\]"),
        ({"height": 6, "motion_latent": torch.zeros(1, 16, 19, 6, 16)}, "at least 8 rows and columns, got 6 and 16"),
        ({"control_latent": torch.zeros(1, 16, 2, 12, 16)}, r"control_latent: expected shape \[1, 16, 3, 12, 16\]"),
    ],
)
def test_wrong_chunks_are_refused(model: WanS2V, change: dict[str, Any], message: str) -> None:
    sizes = {"num_latent_frames": 3, "height": 12, "width": 16, "conditioning": "official"}
    with pytest.raises(ValueError, match=message):
        model.prepare_chunk(**{**sizes, **change})
