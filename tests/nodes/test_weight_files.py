"""A file that cannot serve as the model it is named for is found by planning, from its header, with what helps."""

from __future__ import annotations

import gzip
import json
import shlex
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from pickles_for_tests import authors_text_key
from recipes_for_tests import call, quoted, write_recipe, write_voice
from safetensors.numpy import load_file, save_file

from s2v_flow.errors import BadNumbersError
from s2v_flow.nodes.tensors import to_frames

Weights = Mapping[str, np.ndarray]
FOLDERS = {"dit": "diffusion_models", "umt5": "text_encoders", "wav2vec2": "audio_encoders", "vae": "vae"}
TINY = {
    "dit": "diffusion_models/tiny_s2v.safetensors",
    "umt5": "text_encoders/tiny_umt5.safetensors",
    "wav2vec2": "audio_encoders/tiny_wav2vec2.safetensors",
    "vae": "vae/tiny_vae.safetensors",
    "lora": "loras/tiny_lightning_lora.safetensors",
}


def planned(folder: Path, models: Path, node: str, file: Path) -> tuple[int, str]:
    """Plan a recipe in which a node names a file; return the exit code and stderr."""
    write_voice(folder / "voice.wav", 1)
    if node == "lora":
        changes = {"dit": {"loras": [{"id": "a", "file": str(file)}]}}
    else:
        changes = {node: {"checkpoint": str(file)}}
    recipe = write_recipe(folder, changes)
    where = ["--models-dir", models, "--cache-dir", folder / "cache", "--device", "cpu"]
    code, _, err = call("plan", recipe, *where)
    assert "Traceback" not in err
    return code, err


def keys(*names: str, shape: tuple[int, ...] = (1,)) -> Weights:
    return {name: np.zeros(shape, np.float32) for name in names}


def only(weights: Weights, keep: Callable[[str], bool]) -> Weights:
    return {key: value for key, value in weights.items() if keep(key)}


WAN = ("head.modulation", "blocks.0.self_attn.q.weight", "blocks.0.ffn.0.weight")
FOREIGN: dict[str, tuple[str, Weights, str]] = {
    "wan_t2v": ("dit", keys(*WAN), "this is a wan t2v checkpoint: it has no audio_injector.*"),
    "wan_i2v": ("dit", keys(*WAN, "img_emb.proj.0.weight"), "this is a wan i2v checkpoint"),
    "wan_ti2v": (
        "dit",
        {**keys(*WAN), **keys("patch_embedding.weight", shape=(8, 48, 1, 2, 2))},
        "this is a wan ti2v 5b checkpoint",
    ),
    "wan_vace": ("dit", keys(*WAN, "vace_patch_embedding.weight"), "this is a wan vace checkpoint"),
    "wan_animate": ("dit", keys(*WAN, "pose_patch_embedding.weight"), "this is a wan animate checkpoint"),
    "diffusers_wan": ("dit", keys("condition_embedder.time_embedder.linear_1.weight"), "a diffusers wan checkpoint"),
    "flux": ("dit", keys("double_blocks.0.img_attn.qkv.weight"), "this is a flux or hunyuan video checkpoint"),
    "sdxl_unet": ("dit", keys("input_blocks.0.0.weight"), "this is a stable diffusion unet checkpoint"),
    "t5xxl": (
        "umt5",
        keys(*(f"encoder.block.{index}.layer.0.SelfAttention.q.weight" for index in (0, 1))),
        "this is a t5 encoder checkpoint: it has no encoder.block.*.SelfAttention.relative_attention_bias",
    ),
    "clip_l": ("umt5", keys("text_model.encoder.layers.0.self_attn.q_proj.weight"), "a clip text encoder checkpoint"),
    "clip_g": ("umt5", keys("transformer.resblocks.0.attn.in_proj_weight"), "a clip text encoder checkpoint"),
    "clip_vision": (
        "umt5",
        keys("vision_model.encoder.layers.0.self_attn.q_proj.weight"),
        "a clip vision encoder checkpoint",
    ),
    "qwen": ("umt5", keys("model.layers.0.self_attn.q_proj.weight"), "this is a language model checkpoint"),
    "whisper": (
        "wav2vec2",
        keys("model.encoder.layers.0.self_attn.q_proj.weight", "model.encoder.conv1.weight"),
        "this is a whisper checkpoint: it has no feature_extractor.conv_layers.*",
    ),
    "wavlm": ("wav2vec2", keys("encoder.layers.0.attention.gru_rel_pos_const"), "this is a wavlm checkpoint"),
    "hubert": ("wav2vec2", keys("hubert.feature_extractor.conv_layers.0.conv.weight"), "this is a hubert checkpoint"),
    "wan22_vae": (
        "vae",
        {**keys("decoder.head.0.gamma"), **keys("conv2.weight", shape=(48, 48, 1, 1, 1))},
        "this is a wan 2.2 vae checkpoint",
    ),
    "wide_vae": (
        "vae",
        {**keys("decoder.head.0.gamma"), **keys("conv2.weight", shape=(32, 32, 1, 1, 1))},
        "this is a video vae of 32 channels checkpoint",
    ),
    "flux_vae": ("vae", keys("decoder.mid.block_1.conv1.weight"), "this is an image vae checkpoint"),
    "unknown": ("vae", keys("b", "a"), "this is an unknown (2 tensors, the first 'a') file"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_model_of_another_kind_is_called_by_its_name(tmp_path: Path, tiny_models: Path, name: str) -> None:
    node, weights, message = FOREIGN[name]
    save_file(dict(weights), tmp_path / "x.safetensors")
    code, err = planned(tmp_path, tiny_models, node, tmp_path / "x.safetensors")
    assert code == 4
    assert f"{tmp_path / 'x.safetensors'}: " in err
    assert message in err
    assert f"fix: name another file in node {node}, such as " in err


@pytest.mark.parametrize(("end", "method"), [("_weight_qdata", "torchao's"), ("qweight", "GPTQ, AWQ or SVDQuant")])
def test_a_form_of_quantisation_that_hides_the_family_is_named(
    tmp_path: Path, tiny_models: Path, end: str, method: str
) -> None:
    save_file(dict(keys("head.modulation", f"blocks.0.ffn.0.{end}")), tmp_path / "x.safetensors")
    code, err = planned(tmp_path, tiny_models, "dit", tmp_path / "x.safetensors")
    assert code == 4
    assert f"is quantised as {method} ('blocks.0.ffn.0.{end}'), which is not supported" in err
    assert "fix: use a file in float8_e4m3fn" in err


@pytest.mark.parametrize(
    ("node", "given", "message", "place"),
    [
        ("dit", "lora", "this is a lora checkpoint", "the loras of a load_diffusion_model node"),
        ("dit", "vae", "this is a wan vae checkpoint", "a load_vae node"),
        ("lora", "dit", "this is a wan s2v checkpoint", "the checkpoint of a load_diffusion_model node"),
        ("vae", "dit", "this is a wan s2v checkpoint", "the checkpoint of a load_diffusion_model node"),
        ("umt5", "wav2vec2", "this is a wav2vec2 checkpoint", "a load_audio_encoder node"),
        ("wav2vec2", "umt5", "this is a umt5 encoder checkpoint", "a load_text_encoder node"),
    ],
)
def test_a_model_in_another_model_s_place_is_told_where_it_belongs(
    tmp_path: Path, tiny_models: Path, node: str, given: str, message: str, place: str
) -> None:
    code, err = planned(tmp_path, tiny_models, node, tiny_models / TINY[given])
    assert code == 4
    assert message in err
    assert f"this one belongs in {place}" in err


def archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("model/vae.safetensors", b"x")


NO_WEIGHTS: dict[str, tuple[bytes | Callable[[Path], None], str]] = {
    "error_page": (
        b"Invalid username or password.",
        "is text, not a model: the download failed; it says 'Invalid username or password.'",
    ),
    "short_text": (b"Nope\n", "it says 'Nope'"),
    "html": (
        b"<!DOCTYPE html><html><head><style>a{}</style><title>Sign in</title></head><body>Log in please</body></html>",
        "is a web page or XML, not a model: the download failed; it says 'Sign in Log in please'",
    ),
    "latin_1": ("<html><body>Accès refusé</body></html>".encode("latin-1"), "it says 'Acc\ufffds refus\ufffd'"),
    "json": (b'{"error": "Access to model X is restricted"}', "Access to model X is restricted"),
    "long_text": ("Zugriff verweigert: ü " .encode() * 900, "it says 'Zugriff verweigert"),
    "empty": (b"", "it has 0 bytes"),
    "gzip": (gzip.compress(b"x" * 100), "is an archive (gzip): unpack it"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(90), "is an archive (7z)"),
    "zip": (archive, "is a zip archive without a model of PyTorch's: unpack it"),
    "onnx": (b"\x08\x07\x12\x07pytorch\x1a\x052.0.0:" + bytes(90), "is an ONNX model"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(90), "is a picture"),
    "mp4": (b"\x00\x00\x00\x20ftypisom" + bytes(90), "is a video or sound"),
    "lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 16000000000\n",
        "is a Git LFS pointer, not the file itself, which has 16000000000 bytes",
    ),
    "index": (b'{"metadata": {}, "weight_map": {"x": "a-00001-of-00002.safetensors"}}', "is an index of shards"),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_WEIGHTS)
def test_what_holds_no_weights_is_called_by_its_name(tmp_path: Path, tiny_models: Path, name: str) -> None:
    content, message = NO_WEIGHTS[name]
    path = tmp_path / "x.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)
    code, err = planned(tmp_path, tiny_models, "vae", path)
    assert (code, message in err) == (4, True), err
    assert len(err) < 1500


def test_a_file_that_is_cut_says_how_much_is_lacking(tmp_path: Path, tiny_models: Path) -> None:
    whole = (tiny_models / TINY["vae"]).read_bytes()
    (tmp_path / "x.safetensors").write_bytes(whole[:-1234])
    code, err = planned(tmp_path, tiny_models, "vae", tmp_path / "x.safetensors")
    assert code == 4
    assert "(truncated?): the file is 1234 bytes short" in err
    assert "fix: download or copy the file again" in err


def test_parts_of_a_model_are_told_the_command_that_joins_them(tmp_path: Path, tiny_models: Path) -> None:
    """A part, with or without its index beside it, and the index itself."""
    part, index = tmp_path / "m-00001-of-00002.safetensors", tmp_path / "m.safetensors.index.json"
    save_file(dict(keys("head.modulation")), part)
    command = f"join them: s2vflow models convert {quoted(index)} -o {quoted(tmp_path / 'm.safetensors')}"
    code, err = planned(tmp_path, tiny_models, "dit", part)
    assert code == 4
    assert f"{part}: is part 1 of 2 of a model" in err
    assert f"fix: download {index.name} and the other parts into its folder, and {command}" in err
    index.write_text(json.dumps({"weight_map": {"head.modulation": part.name}}))
    assert f"fix: {command}" in planned(tmp_path, tiny_models, "dit", part)[1]
    assert f"fix: {command}" in planned(tmp_path, tiny_models, "dit", index)[1]


@pytest.mark.parametrize("node", ["dit", "vae", "umt5"])
def test_an_all_in_one_checkpoint_is_told_the_command_that_takes_the_model_out(
    tmp_path: Path, tiny_models: Path, node: str
) -> None:
    """And after that command the plan succeeds."""
    path = tmp_path / "all.safetensors"
    prefixes = {"dit": "model.diffusion_model.", "vae": "first_stage_model.", "umt5": "text_encoders."}
    weights = {
        f"{prefix}{key}": value
        for part, prefix in prefixes.items()
        for key, value in load_file(tiny_models / TINY[part]).items()
    }
    save_file(weights, path)
    code, err = planned(tmp_path, tiny_models, node, path)
    assert code == 4
    assert "this is an all-in-one checkpoint of several models: diffusion_model (wan s2v), text_encoder (umt5 " in err
    command = shlex.split(err.split("s2vflow ", 1)[1])
    assert command[:2] == ["models", "convert"]
    assert call(*command)[0] == 0
    assert planned(tmp_path, tiny_models, node, Path(command[4]))[0] == 0


def test_an_all_in_one_checkpoint_of_another_model_is_not_taken_apart(tmp_path: Path, tiny_models: Path) -> None:
    path = tmp_path / "sdxl.safetensors"
    parts = ("model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.x", "conditioner.x")
    save_file(dict(keys(*parts)), path)
    code, err = planned(tmp_path, tiny_models, "dit", path)
    assert code == 4
    assert "diffusion_model (stable diffusion unet)" in err
    assert "fix: name another file in node dit" in err


@pytest.mark.parametrize("node", ["dit", "umt5", "wav2vec2", "vae"])
def test_any_tensor_that_is_missing_or_misshapen_is_named(tmp_path: Path, tiny_models: Path, node: str) -> None:
    """Each in turn of a sample that reaches every part of the model."""
    whole = load_file(tiny_models / TINY[node])
    empty = {
        key: np.zeros(value.shape, np.uint8 if value.dtype == np.uint8 else np.bool_) for key, value in whole.items()
    }
    for key in sorted(empty)[:: len(empty) // 8]:
        path = tmp_path / "x.safetensors"
        save_file(only(empty, lambda name, gone=key: name != gone), path)  # type: ignore[misc]
        code, err = planned(tmp_path, tiny_models, node, path)
        assert (code, key in err) == (4, True), (key, err)
    key = sorted(key for key, value in empty.items() if value.ndim == 1 and key != "spiece_model")[-1]
    save_file({**empty, key: np.zeros(7, np.bool_)}, path)
    assert f"{key} is [7], expected [{empty[key].shape[0]}]" in planned(tmp_path, tiny_models, node, path)[1]


def test_a_text_encoder_without_its_tokenizer_is_told_the_command(tmp_path: Path, tiny_models: Path) -> None:
    """In the spelling of the authors' release, too."""
    path = tmp_path / "x.safetensors"
    save_file(only(load_file(tiny_models / TINY["umt5"]), lambda key: key != "spiece_model"), path)
    code, err = planned(tmp_path, tiny_models, "umt5", path)
    assert code == 4
    assert "x.safetensors: has no tokenizer inside ('spiece_model')" in err
    target = quoted(tmp_path / "x-converted.safetensors")
    assert f"s2vflow models convert {quoted(path)} -o {target} --tokenizer spiece.model" in err
    save_file({authors_text_key(key): value for key, value in load_file(path).items()}, path)
    assert planned(tmp_path, tiny_models, "umt5", path) == (4, err)


def test_a_tokenizer_s_own_file_is_read_by_the_plan(tmp_path: Path, tiny_models: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    write_voice(tmp_path / "voice.wav", 1)
    recipe = write_recipe(tmp_path, {"umt5": {"tokenizer": str(tmp_path / "tokenizer.json")}})
    code, _, err = call("plan", recipe, "--models-dir", tiny_models, "--cache-dir", tmp_path / "cache")
    assert code == 4
    assert "is no SentencePiece model" in err
    assert "fix: name the spiece.model of google/umt5-xxl" in err


def layer(key: str) -> int:
    return int(key.split(".")[2]) if key.startswith("encoder.layers.") else 0


def test_a_base_audio_encoder_is_not_a_large_one(tmp_path: Path, tiny_models: Path) -> None:
    """12 layers and a norm in the first convolution alone; with 24 layers it is the older large one."""
    path, whole = tmp_path / "x.safetensors", load_file(tiny_models / TINY["wav2vec2"])

    def is_grouped(key: str) -> bool:
        _, _, rest = key.partition("conv_layers.")
        return not rest or ("conv.bias" not in rest and ("layer_norm" not in rest or rest.startswith("0.")))

    save_file(only(whole, lambda key: is_grouped(key) and layer(key) < 12), path)
    code, err = planned(tmp_path, tiny_models, "wav2vec2", path)
    assert code == 4
    assert "this is a wav2vec2 base model, not large" in err
    save_file(only(whole, is_grouped), path)
    assert "this is a wav2vec2 with group norm checkpoint" in planned(tmp_path, tiny_models, "wav2vec2", path)[1]


def resized(weights: Weights, old: int, new: int) -> Weights:
    """Return weights of another width: every side of `old` becomes `new`."""
    return {
        key: np.zeros([new if side == old else side for side in value.shape], np.bool_)
        if key != "spiece_model"
        else value
        for key, value in weights.items()
    }


def test_an_encoder_of_another_depth_or_width_than_the_model_s_is_found(tmp_path: Path, tiny_models: Path) -> None:
    """Either file may be the one to change: both nodes are named."""
    path, whole = tmp_path / "x.safetensors", load_file(tiny_models / TINY["wav2vec2"])
    save_file(only(whole, lambda key: layer(key) < 12), path)
    code, err = planned(tmp_path, tiny_models, "wav2vec2", path)
    assert code == 4
    assert f"{path}: has 12 layers, the model needs 24" in err
    assert "fix: name another file in node wav2vec2, or another model in node dit" in err
    save_file(resized(whole, 64, 96), path)
    assert "has features of width 96, the model needs 64" in planned(tmp_path, tiny_models, "wav2vec2", path)[1]
    text = load_file(tiny_models / TINY["umt5"])
    save_file(resized(text, 64, 80), path)
    code, err = planned(tmp_path, tiny_models, "umt5", path)
    assert code == 4
    assert "has features of width 80, the model needs 64" in err


def test_a_pickle_is_told_the_command_whatever_it_is_called(tmp_path: Path, tiny_models: Path) -> None:
    for name in ("x.pth", "x.bin", "x.safetensors"):
        (tmp_path / name).write_bytes(b"\x80\x02}q\x00.")
        code, err = planned(tmp_path, tiny_models, "vae", tmp_path / name)
        assert code == 5
        assert f"fix: convert it first: s2vflow models convert {quoted(tmp_path / name)} -o " in err


@pytest.mark.parametrize(
    ("node", "key", "until"),
    [
        ("umt5", "encoder.final_layer_norm.weight", "positive"),
        pytest.param("wav2vec2", "encoder.layer_norm.bias", "speech", marks=pytest.mark.slow),
        ("vae", "encoder.head.2.bias", "reference"),
    ],
)
def test_an_encoder_that_makes_nan_is_named_where_it_is_used(
    tmp_path: Path, tiny_models: Path, node: str, key: str, until: str
) -> None:
    """Not a sampler's step later; nothing of it is stored."""
    weights = load_file(tiny_models / TINY[node])
    weights[key] = np.full_like(weights[key], np.nan)
    save_file(weights, tmp_path / "nan.safetensors")
    write_voice(tmp_path / "voice.wav", 0.2)
    recipe = write_recipe(tmp_path, {node: {"checkpoint": str(tmp_path / "nan.safetensors")}})
    where = ["--models-dir", tiny_models, "--cache-dir", tmp_path / "cache", "--device", "cpu"]
    for _ in range(2):
        code, _, err = call("run", recipe, "--until", until, *where)
        assert (code, "NaN or infinity in what the model has made" in err, f"nodes.{until}" in err) == (8, True, True)


def test_a_frame_that_holds_nan_is_no_frame() -> None:
    pixels = torch.zeros(1, 3, 2, 8, 8)
    pixels[0, 0, 0, 0, 0] = torch.inf
    assert to_frames(pixels)[0, 0, 0].tolist() == [255, 128, 128]
    pixels[0, 1, 1, 3, 3] = torch.nan
    with pytest.raises(BadNumbersError):
        to_frames(pixels)
