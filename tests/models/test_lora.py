"""LoRA: every spelling gives the same update, and nothing goes missing unsaid."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from reference import load_keys, relative_error
from safetensors.torch import save_file
from torch import Tensor

from s2v_flow.errors import CheckpointError, RefusedError
from s2v_flow.models.lora import LoraSpec, LoraStack, open_loras
from s2v_flow.weights.names import Layers

SHAPES = {
    "blocks.0.self_attn.q.weight": (6, 4),
    "blocks.0.self_attn.q.bias": (6,),
    "blocks.0.norm3.weight": (6,),
    "blocks.0.modulation": (1, 6, 4),
    "patch_embedding.weight": (6, 2, 1, 2, 2),
}
KEY = "blocks.0.self_attn.q.weight"
Q = "blocks.0.self_attn.q"


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


DOWN, UP = draw(2, 4), draw(6, 2, seed=1)


def open_one(tmp_path: Path, tensors: dict[str, Tensor], strength: float = 1.0, name: str = "lora") -> LoraStack:
    file = tmp_path / f"{name}.safetensors"
    save_file(tensors, file)
    return open_loras([LoraSpec(file, strength)], SHAPES)


@pytest.mark.parametrize(
    ("path", "down", "up"),
    [
        (f"diffusion_model.{Q}", "lora_down.weight", "lora_up.weight"),
        (Q, "lora_down.weight", "lora_up.weight"),
        (f"model.diffusion_model.{Q}", "lora_down.weight", "lora_up.weight"),
        ("lora_unet_blocks_0_self_attn_q", "lora_down.weight", "lora_up.weight"),
        (f"diffusion_model.{Q}", "lora_A.weight", "lora_B.weight"),
        (Q, "lora_A.weight", "lora_B.weight"),
        (f"diffusion_model.{Q}", "lora_A.default.weight", "lora_B.default.weight"),
        (f"base_model.model.{Q}", "lora_A.other_name.weight", "lora_B.other_name.weight"),
        (f"transformer.{Q}", "lora_A.weight", "lora_B.weight"),
        (f"pipe.dit.{Q}", "lora_A.default.weight", "lora_B.default.weight"),
        (f"_orig_mod.module.{Q}", "lora_down.weight", "lora_up.weight"),
        (f"_fsdp_wrapped_module.{Q}", "lora_A.weight", "lora_B.weight"),
        ("net.blocks.0._fsdp_wrapped_module.self_attn.q", "lora_A.default.weight", "lora_B.default.weight"),
        (f"state_dict.{Q}", "lora_down.weight", "lora_up.weight"),
        (f"generator.{Q}", "lora_A.weight", "lora_B.weight"),
        ("lora_unet__blocks_0_self_attn_q", "lora_down.weight", "lora_up.weight"),
        ("lycoris_blocks_0_self_attn_q", "lora_down.weight", "lora_up.weight"),
        ("blocks.0_self_attn.q", "lora_down.weight", "lora_up.weight"),
        ("transformer.blocks.0.attn1.to_q", "lora_A.weight", "lora_B.weight"),
        ("base_model.model.blocks.0.attn1.to_q", "lora_A.default.weight", "lora_B.default.weight"),
        (Q, "lora.down.weight", "lora.up.weight"),
        (Q, "lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
        (Q, "lora_down", "lora_up"),
    ],
)
def test_every_spelling_gives_the_same_update(tmp_path: Path, path: str, down: str, up: str) -> None:
    stack = open_one(tmp_path, {f"{path}.{down}": DOWN, f"{path}.{up}": UP}, strength=0.5)
    weight = draw(6, 4, seed=2)
    plain = open_one(tmp_path, {f"{Q}.lora_down.weight": DOWN, f"{Q}.lora_up.weight": UP}, strength=0.5, name="plain")
    assert torch.equal(stack.merge(KEY, weight), plain.merge(KEY, weight))
    assert relative_error(stack.merge(KEY, weight), weight + 0.5 * UP @ DOWN) < 1e-6
    assert (stack.reports[0].matched, stack.reports[0].total, stack.reports[0].coverage) == (2, 2, 1.0)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_alpha_over_rank_scales_the_update(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = {f"{Q}.lora_down.weight": DOWN, f"{Q}.lora_up.weight": UP, f"{Q}.alpha": torch.full(shape, 3.0)}
    stack = open_one(tmp_path, tensors, strength=0.5)
    weight = draw(6, 4, seed=2)
    assert relative_error(stack.merge(KEY, weight), weight + 0.5 * 3 / 2 * UP @ DOWN) < 1e-6


@pytest.mark.parametrize(
    ("told", "scale"),
    [
        ({"transformer.lora_alpha": 32, "transformer.r": 64}, 0.5),
        ({"lora_alpha": 16, "r": 16, "text_encoder.lora_alpha": 1, "text_encoder.r": 2}, 1.0),
        ({"transformer.lora_alpha": 8, "transformer.r": 16, "transformer.use_rslora": True}, 2.0),
        ({"transformer.lora_alpha": "8", "transformer.r": 0}, 1.0),
        ([], 1.0),
    ],
)
def test_what_only_the_metadata_says_of_alpha_is_reported_and_not_applied(
    tmp_path: Path, told: object, scale: float
) -> None:
    """As ComfyUI does; where a tensor says alpha, that counts."""
    file, metadata = tmp_path / "lora.safetensors", {"lora_adapter_metadata": json.dumps(told)}
    tensors = {f"transformer.{Q}.lora_A.weight": DOWN, f"transformer.{Q}.lora_B.weight": UP}
    save_file(tensors, file, metadata)
    stack = open_loras([LoraSpec(file)], SHAPES)
    assert stack.reports[0].told_scale == scale
    assert relative_error(stack.merge(KEY, torch.zeros(6, 4)), UP @ DOWN) < 1e-6
    save_file({**tensors, f"transformer.{Q}.alpha": torch.tensor(4.0)}, file, metadata)
    stack = open_loras([LoraSpec(file)], SHAPES)
    assert stack.reports[0].told_scale == 1.0
    assert relative_error(stack.merge(KEY, torch.zeros(6, 4)), 2 * UP @ DOWN) < 1e-6


def test_half_precision_factors_are_multiplied_in_float32(tmp_path: Path) -> None:
    stack = open_one(tmp_path, {f"{Q}.lora_A.weight": DOWN.half(), f"{Q}.lora_B.weight": UP.half()})
    merged = stack.merge(KEY, torch.zeros(6, 4))
    assert relative_error(merged, UP.half().float() @ DOWN.half().float()) < 1e-6


def test_whole_numbers_are_no_factors(tmp_path: Path) -> None:
    """A quantised LoRA is refused, not read as if its codes were values; an alpha may be a whole number."""
    down = {f"{Q}.lora_A.weight": DOWN, f"{Q}.alpha": torch.tensor(2)}
    assert open_one(tmp_path, {**down, f"{Q}.lora_B.weight": UP}).reports[0].matched == 3
    with pytest.raises(CheckpointError, match="is I8: factors are read in float only"):
        open_one(tmp_path, {**down, f"{Q}.lora_B.weight": UP.to(torch.int8)})


def test_factors_of_a_linear_layer_may_be_stored_as_those_of_a_convolution(tmp_path: Path) -> None:
    tensors = {f"{Q}.lora_down.weight": DOWN[:, :, None, None], f"{Q}.lora_up.weight": UP[:, :, None, None]}
    assert torch.equal(open_one(tmp_path, tensors).merge(KEY, torch.zeros(6, 4)), UP @ DOWN)


def test_a_trained_bias_of_a_factor_is_reported_not_taken_for_the_factor(tmp_path: Path) -> None:
    tensors = {f"{Q}.lora_A.weight": DOWN, f"{Q}.lora_B.weight": UP, f"{Q}.lora_B.bias": draw(6)}
    assert open_one(tmp_path, tensors).reports[0].unmatched == (f"{Q}.lora_B.bias",)


def test_differences_go_to_weight_bias_and_parameters_of_their_own(tmp_path: Path) -> None:
    tensors = {
        f"diffusion_model.{Q}.diff_b": draw(6),
        "lycoris_blocks_0_norm3.w_norm": draw(6, seed=1),
        "diffusion_model.blocks.0.modulation.diff": draw(1, 6, 4, seed=2),
        f"diffusion_model.{Q}.lora_down.weight": DOWN,
        f"diffusion_model.{Q}.lora_up.weight": UP,
        f"diffusion_model.{Q}.diff": draw(6, 4, seed=3),
    }
    stack = open_one(tmp_path, tensors, strength=2.0)
    assert stack.reports[0].unmatched == ()
    assert torch.equal(stack.merge(f"{Q}.bias", torch.ones(6)), 1 + 2 * draw(6))
    assert torch.equal(stack.merge("blocks.0.norm3.weight", torch.ones(6)), 1 + 2 * draw(6, seed=1))
    assert torch.equal(stack.merge("blocks.0.modulation", torch.zeros(1, 6, 4)), 2 * draw(1, 6, 4, seed=2))
    assert relative_error(stack.merge(KEY, torch.zeros(6, 4)), 2 * (UP @ DOWN + draw(6, 4, seed=3))) < 1e-6
    assert not stack.is_low_rank(KEY)


ONE = torch.ones(1, 1)


@pytest.mark.parametrize(
    ("tensors", "is_idle"),
    [
        ({"lora_down.weight": DOWN, "lora_up.weight": UP}, False),
        ({"lora_down.weight": DOWN, "lora_up.weight": 0 * UP}, True),  # as training begins
        ({"lora_down.weight": 0 * DOWN, "lora_up.weight": UP.half()}, True),
        ({"lora_down.weight": DOWN, "lora_up.weight": UP, "alpha": torch.tensor(0.0)}, True),
        ({"lora_down.weight": DOWN, "lora_up.weight": 0 * UP, "dora_scale": draw(6, 1)}, False),
        ({"lora_down.weight": DOWN, "lora_up.weight": 0 * UP, "diff_b": draw(6)}, False),
        ({"diff": torch.zeros(6, 4), "diff_b": torch.zeros(6)}, True),
        ({"diff": torch.full((6, 4), torch.nan)}, False),
        ({"lokr_w1": ONE, "lokr_w2": draw(6, 4)}, False),
        ({"lokr_w1": 0 * ONE, "lokr_w2": draw(6, 4)}, True),
        ({"hada_w1_a": UP, "hada_w1_b": DOWN, "hada_w2_a": UP, "hada_w2_b": DOWN}, False),
        ({"hada_w1_a": UP, "hada_w1_b": DOWN, "hada_w2_a": UP, "hada_w2_b": 0 * DOWN}, True),
    ],
)
def test_a_lora_that_changes_nothing_is_told_by_its_values(
    tmp_path: Path, tensors: dict[str, Tensor], is_idle: bool
) -> None:
    """One of several layers that changes is enough; at strength 0 none does."""
    one = {f"{Q}.{name}": tensor.clone() for name, tensor in tensors.items()}
    assert open_one(tmp_path, one).reports[0].is_idle() is is_idle
    assert open_one(tmp_path, one, strength=0.0, name="off").reports[0].is_idle()
    more = {"blocks.0.modulation.diff": torch.zeros(1, 6, 4), "blocks.0.norm3.diff": draw(6)}
    assert not open_one(tmp_path, {**one, **more}, name="more").reports[0].is_idle()


def test_convolutions_take_low_rank_updates(tmp_path: Path) -> None:
    down, up = draw(3, 2, 1, 2, 2), draw(6, 3, 1, 1, 1, seed=1)
    stack = open_one(tmp_path, {"patch_embedding.lora_down.weight": down, "patch_embedding.lora_up.weight": up})
    expected = torch.einsum("or,rcthw->octhw", up.flatten(1), down)
    assert relative_error(stack.merge("patch_embedding.weight", torch.zeros(6, 2, 1, 2, 2)), expected) < 1e-6


def test_several_loras_add_up_and_share_one_side_branch(tmp_path: Path) -> None:
    specs = []
    for index, strength in enumerate([1.0, -0.5]):
        file = tmp_path / f"{index}.safetensors"
        save_file({f"{Q}.lora_A.weight": draw(2 + index, 4), f"{Q}.lora_B.weight": draw(6, 2 + index, seed=1)}, file)
        specs.append(LoraSpec(file, strength))
    stack = open_loras(specs, SHAPES)
    expected = draw(6, 2, seed=1) @ draw(2, 4) - 0.5 * draw(6, 3, seed=1) @ draw(3, 4)
    assert relative_error(stack.merge(KEY, torch.zeros(6, 4)), expected) < 1e-6
    branch = stack.side_branch(KEY, "cpu", torch.float32)
    assert branch is not None
    down, up = branch
    assert (down.shape, up.shape) == ((5, 4), (6, 5))
    assert relative_error(up @ down, expected) < 1e-6
    assert [report.strength for report in stack.reports] == [1.0, -0.5]


def test_parameters_without_an_update_stay_the_same_tensor(tmp_path: Path) -> None:
    stack = open_one(tmp_path, {f"{Q}.lora_A.weight": DOWN, f"{Q}.lora_B.weight": UP})
    norm = torch.ones(6)
    assert stack.merge("blocks.0.norm3.weight", norm) is norm
    assert stack.side_branch("blocks.0.norm3.weight", "cpu", torch.float32) is None


def test_keys_without_a_home_are_reported_sorted(tmp_path: Path) -> None:
    tensors = {
        f"diffusion_model.{Q}.lora_down.weight": DOWN,
        f"diffusion_model.{Q}.lora_up.weight": UP,
        "diffusion_model.img_emb.proj.1.lora_up.weight": UP.clone(),
        "diffusion_model.img_emb.proj.1.lora_down.weight": DOWN.clone(),
        "diffusion_model.blocks.0.diff_m": draw(6),
        "diffusion_model.blocks.0.norm3.diff_b": draw(6, seed=4),
    }
    report = open_one(tmp_path, tensors).reports[0]
    assert (report.matched, report.total) == (2, 6)
    assert report.coverage == pytest.approx(1 / 3)
    assert report.unmatched == (
        "diffusion_model.blocks.0.diff_m",
        "diffusion_model.blocks.0.norm3.diff_b",
        "diffusion_model.img_emb.proj.1.lora_down.weight",
        "diffusion_model.img_emb.proj.1.lora_up.weight",
    )
    assert report.misshapen == ()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {f"{Q}.lora_A.weight": draw(2, 5), f"{Q}.lora_B.weight": UP},
            "up [6, 2] times down [2, 5] does not give [6, 4]",
        ),
        (
            {f"{Q}.lora_A.weight": draw(3, 4), f"{Q}.lora_B.weight": UP},
            "up [6, 2] times down [3, 4] does not give [6, 4]",
        ),
        (
            {f"{Q}.lora_A.weight": DOWN, f"{Q}.lora_B.weight": UP, f"{Q}.diff": draw(4, 6)},
            "diff has the shape [4, 6], expected [6, 4]",
        ),
    ],
)
def test_updates_of_another_shape_are_reported_and_left_out(
    tmp_path: Path, tensors: dict[str, Tensor], message: str
) -> None:
    stack = open_one(tmp_path, tensors)
    assert stack.reports[0].misshapen == (f"{KEY}: {message}",)
    assert stack.reports[0].matched == 0
    assert set(stack.reports[0].unmatched) == set(tensors)
    assert stack.updates == {}


def test_half_a_pair_is_damage(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="but not both factors"):
        open_one(tmp_path, {f"{Q}.lora_A.weight": DOWN})


DIFFUSERS = {
    "blocks.3.attn1.to_out.0": "blocks.3.self_attn.o.weight",
    "blocks.3.attn2.to_k": "blocks.3.cross_attn.k.weight",
    "blocks.3.attn2.norm_q": "blocks.3.cross_attn.norm_q.weight",
    "blocks.3.norm2": "blocks.3.norm3.weight",
    "blocks.3.ffn.net.0.proj": "blocks.3.ffn.0.weight",
    "blocks.3.ffn.net.2": "blocks.3.ffn.2.weight",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2.weight",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0.weight",
    "condition_embedder.time_proj": "time_projection.1.weight",
    "proj_out": "head.head.weight",
}


def test_every_layer_of_the_model_is_found_under_all_its_names() -> None:
    """Dots or underscores, bare or behind prefixes, none taken for another; and diffusers' names for Wan."""
    parameters = load_keys("s2v_14b")
    layers = Layers(parameters)
    for name in parameters:
        path, role = (name.removesuffix(".bias"), "diff_b") if name.endswith(".bias") else (name, "diff")
        path = path.removesuffix(".weight")
        for spelling in (
            path,
            path.replace(".", "_"),
            f"diffusion_model.{path}",
            f"lora_unet__{path.replace('.', '_')}",
        ):
            assert layers.parameter(spelling, role) == name, spelling
    for theirs, ours in DIFFUSERS.items():
        assert layers.parameter(f"transformer.{theirs}", "down") == ours
    assert layers.parameter("blocks.40.self_attn.q", "down") is None


def test_a_kronecker_product_of_two_factors_is_added(tmp_path: Path) -> None:
    """LoKr: without alpha, or with whole factors, its scale is 1; with a factor in two parts alpha over their rank."""
    weight = draw(6, 4, seed=2)
    one, two = draw(3, 2), draw(2, 2, seed=1)
    stack = open_one(tmp_path, {f"{Q}.lokr_w1": one, f"{Q}.lokr_w2": two, f"{Q}.alpha": torch.tensor(7.0)}, 0.5)
    assert relative_error(stack.merge(KEY, weight), weight + 0.5 * torch.kron(one, two)) < 1e-6
    a, b = draw(2, 3, seed=3), draw(3, 2, seed=4)
    parts = {f"{Q}.lokr_w1": one, f"{Q}.lokr_w2_a": a, f"{Q}.lokr_w2_b": b}
    for alpha, scale in (({}, 1.0), ({f"{Q}.alpha": torch.tensor(6.0)}, 2.0)):
        stack = open_one(tmp_path, {**parts, **alpha}, 0.5)
        assert relative_error(stack.merge(KEY, weight), weight + 0.5 * scale * torch.kron(one, a @ b)) < 1e-6
        assert not stack.is_low_rank(KEY)


def test_an_element_wise_product_of_two_products_is_added(tmp_path: Path) -> None:
    """LoHa, with alpha over the rank, or 1 without."""
    weight = draw(6, 4, seed=2)
    a1, b1, a2, b2 = draw(6, 2), draw(2, 4, seed=1), draw(6, 2, seed=3), draw(2, 4, seed=4)
    parts = {f"{Q}.hada_w1_a": a1, f"{Q}.hada_w1_b": b1, f"{Q}.hada_w2_a": a2, f"{Q}.hada_w2_b": b2}
    for alpha, scale in (({}, 1.0), ({f"{Q}.alpha": torch.tensor(3.0)}, 1.5)):
        merged = open_one(tmp_path, {**parts, **alpha}, 0.5).merge(KEY, weight)
        assert relative_error(merged, weight + 0.5 * scale * (a1 @ b1) * (a2 @ b2)) < 1e-6


@pytest.mark.parametrize("key", ["dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.default.weight"])
@pytest.mark.parametrize("shape", [(6, 1), (6,)])
def test_a_magnitude_for_each_row_decomposes_the_changed_weight(
    tmp_path: Path, key: str, shape: tuple[int, ...]
) -> None:
    """DoRA: the rows of W + up @ down get the lengths that the file gives; the strength blends it in."""
    weight, magnitude = draw(6, 4, seed=2), draw(6, 1, seed=3).abs()
    parts = {f"{Q}.lora_A.weight": DOWN, f"{Q}.lora_B.weight": UP, f"{Q}.{key}": magnitude.reshape(shape)}
    moved = weight + UP @ DOWN
    whole = magnitude * moved / moved.norm(dim=1, keepdim=True)
    assert relative_error(open_one(tmp_path, parts).merge(KEY, weight), whole) < 1e-6
    assert relative_error(open_one(tmp_path, parts, 0.25).merge(KEY, weight), 0.75 * weight + 0.25 * whole) < 1e-6


def test_a_magnitude_decomposes_a_kronecker_product_too(tmp_path: Path) -> None:
    weight, magnitude, one, two = draw(6, 4, seed=2), draw(6, 1, seed=3).abs(), draw(3, 2), draw(2, 2, seed=1)
    parts = {f"{Q}.lokr_w1": one, f"{Q}.lokr_w2": two, f"{Q}.dora_scale": magnitude}
    moved = weight + torch.kron(one, two)
    whole = magnitude * moved / moved.norm(dim=1, keepdim=True)
    assert relative_error(open_one(tmp_path, parts).merge(KEY, weight), whole) < 1e-6


@pytest.mark.parametrize(
    ("key", "method"),
    [
        ("lora_mid.weight", "LoRA with a Tucker core"),
        ("lokr_t2", "LoRA with a Tucker core"),
        ("oft_blocks", "OFT"),
        ("lora_E", "AdaLoRA"),
        ("lora_E.default", "AdaLoRA"),
        ("on_input", "(IA)^3"),
        ("vera_lambda_b", "VeRA"),
        ("scalar", "LoRA with a scalar"),
        ("set_weight", "LoRA that sets or reshapes weights"),
        ("reshape_weight", "LoRA that sets or reshapes weights"),
    ],
)
def test_other_methods_are_refused_by_name(tmp_path: Path, key: str, method: str) -> None:
    tensors = {f"{Q}.lora_A.weight": DOWN, f"{Q}.lora_B.weight": UP, f"{Q}.{key}": draw(2)}
    with pytest.raises(CheckpointError, match=f"is {re.escape(method)} \\("):
        open_one(tmp_path, tensors)


def test_a_file_that_is_no_lora_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lora\.safetensors: this is a wan s2v checkpoint: it has no lora_down"):
        open_one(tmp_path, {"casual_audio_encoder.encoder.final_linear.weight": draw(2)})
    with pytest.raises(RefusedError):
        open_loras([LoraSpec(tmp_path / "lora.pt")], SHAPES)
