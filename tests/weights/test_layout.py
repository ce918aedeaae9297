"""What a complete file holds is written down once more than in the modules, and is the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from reference import load_keys

from s2v_flow.errors import CheckpointError
from s2v_flow.weights.header import TensorEntry
from s2v_flow.weights.layout import check_layout, own_keys
from s2v_flow.weights.quantization import Packing

FULL = {"wan s2v": "s2v_14b", "umt5 encoder": "umt5_xxl", "wan vae": "wan21_vae", "wav2vec2": "wav2vec2_large"}


@pytest.mark.parametrize("family", FULL)
def test_the_full_models_files_are_complete_and_nothing_can_be_taken_away(family: str) -> None:
    """Nor added."""
    shapes = {**load_keys(FULL[family]), **({"spiece_model": (9,)} if family == "umt5 encoder" else {})}
    entries = {key: TensorEntry("F32", shape, 0, 0) for key, shape in shapes.items()}
    check_layout(Path("x"), family, entries)
    for key in [*list(entries)[::25], "spiece_model", "head.modulation", "decoder.head.0.gamma"]:
        if key in entries and key != "masked_spec_embed":  # for training only
            with pytest.raises(CheckpointError) as caught:
                check_layout(Path("x"), family, {name: entry for name, entry in entries.items() if name != key})
            assert key in caught.value.message
    with pytest.raises(CheckpointError, match=r"1 unexpected \(more\.weight\)"):
        check_layout(Path("x"), family, {**entries, "more.weight": TensorEntry("F32", (1,), 0, 0)})


def test_a_packed_weight_counts_with_the_shape_that_it_is_expanded_to() -> None:
    """Two numbers in a byte are half as wide; without the format it is misshapen."""
    key = "blocks.3.ffn.0.weight"
    entries = {key: TensorEntry("BF16", shape, 0, 0) for key, shape in load_keys("s2v_14b").items()}
    out, width = entries[key].shape
    half = (out, width // 2)
    packing = Packing("nvfp4", (out, width), f"{key}_scale", f"{key}_scale_2")
    check_layout(Path("x"), "wan s2v", {**entries, key: TensorEntry("U8", half, 0, 0)}, {key: packing})
    with pytest.raises(CheckpointError, match="1 misshapen"):
        check_layout(Path("x"), "wan s2v", {**entries, key: TensorEntry("BF16", half, 0, 0)})


def test_what_no_module_takes_is_left_out() -> None:
    """Scales of fp8, heads, the tokenizer; a weight norm's older spelling becomes the newer one."""
    old, new = "encoder.pos_conv_embed.conv.weight_g", "encoder.pos_conv_embed.conv.parametrizations.weight.original0"
    keys = ["a.weight", "a.scale_weight", "a.comfy_quant", "scaled_fp8", "spiece_model", "lm_head.weight", old]
    assert own_keys(keys) == {"a.weight": "a.weight", new: old}
    assert own_keys(["encoder.embed_tokens.weight"]) == {"shared.weight": "encoder.embed_tokens.weight"}
    assert own_keys(["encoder.embed_tokens.weight", "shared.weight"]) == {"shared.weight": "shared.weight"}


def test_looking_at_a_file_needs_no_torch() -> None:
    code = "import s2v_flow.weights.family, s2v_flow.weights.layout, sys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
