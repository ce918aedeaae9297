"""Spoilt model files and latents: a module whose weights are the file's, or an error of ours.

Most of a model's file is a hole: what is spoilt is its header, and the layout is made to fit again half of the time, so
that loading goes on to the odd shapes and dtypes. Eight files are part of the slow tests. `make soak` runs more
and prints figures: S2VFLOW_SOAK_CHECKPOINTS says how many.
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
import shutil
import struct
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from byte_mutation import spoilt
from limited import survey
from safetensors.numpy import load_file
from safetensors.numpy import save as save_numpy

from s2v_flow import api
from s2v_flow.errors import BadNumbersError, CheckpointError, MissingError, RefusedError, S2VFlowError
from s2v_flow.models import load
from s2v_flow.models.lora import LoraSpec, open_loras
from s2v_flow.weights.header import ITEM_BYTES, MAX_HEADER_BYTES, read_header
from s2v_flow.weights.quantization import read_quantization
from s2v_flow.weights.reader import Checkpoint

FILES = {
    "dit": "diffusion_models/tiny_s2v.safetensors",
    "fp8": "diffusion_models/tiny_s2v_fp8_scaled.safetensors",
    "fp8_metadata": "diffusion_models/tiny_s2v_fp8_metadata.safetensors",
    "vae": "vae/tiny_vae.safetensors",
    "umt5": "text_encoders/tiny_umt5.safetensors",
    "umt5_tagged": "text_encoders/tiny_umt5_fp8_tagged.safetensors",
    "wav2vec2": "audio_encoders/tiny_wav2vec2.safetensors",
    "lora": "loras/tiny_lightning_lora.safetensors",
    "lora_peft": "loras/tiny_lightning_lora_peft.safetensors",
}
WHOLE_BYTES = 1 << 20  # of larger files the data is a hole
OURS = (CheckpointError, MissingError, RefusedError)
LATENT = """
s2vflow: 1
nodes:
  read: {kind: load_latent, file: spoilt.latent}
  copy: {kind: save_latent, latent: $read, file: out/copy.latent}
"""
_DTYPES = [*ITEM_BYTES, "F4", "C64", "f32", "", None, 3, "\x1b[31m"]
_SUFFIXES = (".comfy_quant", ".scale_weight", ".weight_scale", ".lora_up.weight", ".alpha", ".dora_scale")
_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "wav2vec2.", "first_stage_model.", "module.")
_SIZES = [0, 1, 2, 3, 16, 17, 64, 4096, 2**31, 2**32, 2**62, 2**63, 10**30, -1, 1.0, True, "1", None, [1]]


def write_seeds(folder: Path, models: Path) -> Path:
    """Write the tiny models' files, large ones as their header and the size of their data, and a latent."""
    (folder / "seeds").mkdir(parents=True)
    for name, file in FILES.items():
        data = (models / file).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        hole = len(data) - 8 - length if len(data) > WHOLE_BYTES else 0
        (folder / "seeds" / name).write_bytes(sealed(data[: 8 + length] if hole else data, hole))
    latent = {"latent_tensor": np.ones((1, 16, 2, 4, 4), np.float32), "latent_format_version_0": np.zeros(0, np.int8)}
    (folder / "seeds" / "latent").write_bytes(sealed(save_numpy(latent), 0))
    (folder / "recipe.yaml").write_text(LATENT, encoding="utf-8")
    return folder


def sealed(data: bytes, hole: int) -> bytes:
    """Return bytes that are kept, and behind them how many zeros are to follow in the file."""
    return data + struct.pack("<Q", hole)


def spoil(chance: random.Random, seeds: dict[str, bytes]) -> tuple[str, bytes]:
    """Return a spoilt file, and the name of what it was."""
    name = chance.choice(sorted(seeds))
    data, (hole,) = seeds[name][:-8], struct.unpack("<Q", seeds[name][-8:])
    if chance.random() < 0.25:
        whole = chance.choice((hole, hole, hole, 0, hole // 2, hole + 1))
        return name, sealed(spoilt(data, [value[:-8] for value in seeds.values()], chance), whole)
    (length,) = struct.unpack("<Q", data[:8])
    header, tensors = json.loads(data[8 : 8 + length]), data[8 + length :]
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        header = _header_changed(header, chance)
    if tensors and chance.random() < 0.3:
        tensors = _tensors_changed(tensors, chance)
    size = len(tensors) + hole
    if isinstance(header, dict) and chance.random() < 0.6:
        size = _laid_out(header) or size
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    stated = len(text)
    if chance.random() < 0.05:
        stated = chance.choice((0, 7, 2**31, 2**62, 2**64 - 1, stated - 1, stated + 1))
    kept = tensors[: min(size, len(tensors))]
    return name, sealed(struct.pack("<Q", stated) + text + kept, max(0, size - len(kept)))


def _header_changed(header: Any, chance: random.Random) -> Any:
    """Change one thing in a header; what is no map any more stays as it is."""
    names = [name for name in header if name != "__metadata__"] if isinstance(header, dict) else []
    names = [name for name in names if isinstance(header[name], dict) and isinstance(header[name].get("shape"), list)]
    if not names:
        return header
    name, other = chance.choice(names), chance.choice(names)
    entry, kind = header[name], chance.randrange(13)
    if kind == 0:
        entry["dtype"] = chance.choice(_DTYPES)
    elif kind == 1:
        entry["shape"] = [chance.choice(_SIZES) for _ in range(chance.choice((0, 1, 2, 3, 5, 20)))]
    elif kind == 2 and entry["shape"]:
        entry["shape"][chance.randrange(len(entry["shape"]))] = chance.choice(_SIZES)
    elif kind == 3:
        shape = entry["shape"]
        entry["shape"] = chance.choice((shape[::-1], shape[1:], [1, *shape], header[other]["shape"]))
    elif kind == 4:
        entry["data_offsets"] = chance.choice(
            ([0, 0], [1, 0], [-1, 4], [0, 2**63], [0.0, 4], [0], None, [2**62, 2**62])
        )
    elif kind == 5:
        del header[name]
    elif kind == 6:
        new = chance.choice((other, name + ".scale_weight", name + "\x1b[31m", "x" * 5000, "", "\ud800", name.upper()))
        header[new] = header.pop(name)
    elif kind == 7:
        header[name.removesuffix(".weight") + chance.choice(_SUFFIXES)] = copy.deepcopy(
            chance.choice((entry, header[other]))
        )
    elif kind == 8:
        header["scaled_fp8"] = {**copy.deepcopy(entry), "dtype": chance.choice(list(ITEM_BYTES))}
    elif kind == 9:
        quantized = {"layers": {name.removesuffix(".weight"): {"format": chance.choice(("float8_e4m3fn", "nvfp4", 3))}}}
        text = chance.choice((json.dumps(quantized), "{", "[]", "[" * 5000, '{"layers": []}', 3, None))
        header["__metadata__"] = chance.choice(({"_quantization_metadata": text}, [], None, {"a": {}}))
    elif kind == 10:
        header = {f"x.{key}" if chance.random() < 0.1 else key: value for key, value in header.items()}
    elif kind == 11:
        prefix = chance.choice(_PREFIXES)
        header = {key if key == "__metadata__" else prefix + key: value for key, value in header.items()}
    else:
        text = json.dumps(header)
        bomb = chance.choice(("[" * 20_000, '{"a":' * 1000, "," * 1000, "NaN", "1e999", text))
        texts = (text[: len(text) // 2], text.replace(":", bomb, 1), f'{{"x": {bomb}}}', text + text, "[]")
        return chance.choice(texts).encode()
    return header


def _tensors_changed(tensors: bytes, chance: random.Random) -> bytes:
    """Put zeros, NaN or noise somewhere."""
    changed, at, size = bytearray(tensors), chance.randrange(len(tensors)), chance.choice((4, 64, 4096))
    changed[at : at + size] = chance.choice((bytes(size), b"\xff" * size, chance.randbytes(size)))
    return bytes(changed[: len(tensors)])


def _laid_out(header: dict[str, Any]) -> int | None:
    """Give every tensor its place, one after the other; return their size, or None where that cannot be."""
    at = 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if not isinstance(entry, dict) or not {"dtype", "shape"} <= entry.keys() or entry["dtype"] not in ITEM_BYTES:
            return None
        if not all(type(count) is int and count >= 0 for count in entry["shape"]):
            return None
        size = math.prod(entry["shape"]) * ITEM_BYTES[entry["dtype"]]
        if size >= 1 << 29:
            return None
        entry["data_offsets"] = [at, at + size]
        at += size
    return at


def check(data: bytes, name: str, folder: Path) -> str:
    """Write the file with its hole, read its header, load it, and compare."""
    name = name.partition(".")[0]
    path = folder / ("spoilt.latent" if name == "latent" else f"spoilt-{os.getpid()}.safetensors")
    kept, (hole,) = data[:-8], struct.unpack("<Q", data[-8:])
    with path.open("wb") as file:
        file.write(kept)
        file.truncate(len(kept) + min(hole, 1 << 30))
    try:
        header = read_header(path)
        checkpoint = Checkpoint.open(path)
    except OURS as error:
        hold(error, path)
        return "refused"
    assert sum(entry.end - entry.begin for entry in header.entries.values()) <= path.stat().st_size
    assert 8 + len(json.dumps({key: entry.shape for key, entry in header.entries.items()})) < 4 * MAX_HEADER_BYTES
    try:
        _load(name, path, folder, checkpoint)
    except OURS as error:
        hold(error, path)
        return "refused on loading"
    return "loaded"


def hold(error: S2VFlowError, path: Path) -> None:
    """Hold an error to what a person can read: which file, and no more than a screen."""
    assert path.name in error.message
    assert len(error.message) < 8000, "a message that nobody reads"


def warm(folder: Path) -> None:
    """Import what loading needs, before the limits."""
    torch.set_num_threads(1)
    for file in sorted((folder / "seeds").iterdir()):
        assert check(file.read_bytes(), file.name, folder) == "loaded", file


def _load(name: str, path: Path, folder: Path, checkpoint: Checkpoint) -> None:
    if name == "latent":
        _load_latent(folder)
    elif name.startswith("lora"):
        text = (folder / "seeds" / "dit").read_bytes()[8:-8]
        shapes = {key: tuple(entry["shape"]) for key, entry in json.loads(text).items()}
        stack = open_loras([LoraSpec(path)], shapes)
        for key in stack.updates:
            assert stack.merge(key, torch.zeros(shapes[key])).shape == shapes[key]
            if stack.is_low_rank(key):
                down, up = stack.side_branch(key, "cpu", torch.float32) or (torch.zeros(1, 1), torch.zeros(1, 1))
                assert down.shape[0] == up.shape[1]
    elif name in ("dit", "fp8", "fp8_metadata"):
        loaded = load.load_dit(path, dtype=torch.float32, device="cpu", quantized=name == "fp8_metadata")
        assert loaded.num_tensors <= len(checkpoint.entries)
    elif name == "vae":
        load.load_vae(path, torch.float32, "cpu")
    elif name.startswith("umt5"):
        encoder = load.load_text_encoder(path, dtype=torch.float32, device="cpu", quantized=name == "umt5_tagged")
        encoder.encode("She speaks.")
    else:
        load.load_audio_encoder(path, dtype=torch.float32, device="cpu")


def _load_latent(folder: Path) -> None:
    """Run a recipe that copies the latent; what it does not take it says before anything is computed."""
    shutil.rmtree(folder / "cache", ignore_errors=True)
    where = api.Options(cache_dir=folder / "cache", models_dirs=[folder], device="cpu")
    try:
        result = api.run(folder / "recipe.yaml", where)
    except BadNumbersError:
        return
    (copied,) = result.outputs["copy"]
    assert Checkpoint.open(copied).tensor("latent_tensor").isfinite().all(), "NaN is handed on"


def fuzz(folder: Path, models: Path, count: int, seed: int) -> str:
    """Load so many spoilt files; return what came of them."""
    found = survey("test_fuzz_checkpoints", write_seeds(folder, models), count, seed)
    assert found.failures == [], f"seed {seed}: {found.failures[:5]}"
    assert sum(found.outcomes.values()) == count
    assert found.outcomes["loaded"] > 0
    return ", ".join(f"{number} {what}" for what, number in found.outcomes.most_common())


@pytest.mark.slow
def test_spoilt_model_files_are_loaded_or_refused(tmp_path: Path, tiny_models: Path) -> None:
    """8 files; `make soak` has more."""
    fuzz(tmp_path, tiny_models, 8, seed=1)


@pytest.mark.parametrize(
    "tag", [np.ones(2, np.float32), np.full(3, 300), np.ones((2, 2), np.uint8), np.zeros(5000, np.uint8)]
)
def test_a_layers_format_that_is_no_short_text_is_refused(tag: np.ndarray, tmp_path: Path) -> None:
    """It was read as bytes whatever it was."""
    (tmp_path / "a.safetensors").write_bytes(save_numpy({"x.comfy_quant": tag}))
    with pytest.raises(CheckpointError, match=r"'x\.comfy_quant' is damaged"):
        read_quantization(Checkpoint.open(tmp_path / "a.safetensors"))


def test_a_long_name_is_not_quoted(tmp_path: Path) -> None:
    """A message stays a message."""
    (tmp_path / "a.safetensors").write_bytes(save_numpy({"x" * 5000: np.ones(1)}))
    with pytest.raises(CheckpointError, match="5000 characters; at most 1000") as caught:
        read_header(tmp_path / "a.safetensors")
    assert len(caught.value.message) < 500


@pytest.mark.parametrize(("latent", "code"), [(np.full((1, 16, 1, 2, 2), np.nan), 8), (np.ones((1, 16, 0, 2, 2)), 4)])
def test_a_latent_of_nothing_or_of_nan_is_refused(latent: np.ndarray, code: int, tmp_path: Path) -> None:
    """It was handed on."""
    (tmp_path / "recipe.yaml").write_text(LATENT, encoding="utf-8")
    (tmp_path / "spoilt.latent").write_bytes(save_numpy({"latent_tensor": latent}))
    with pytest.raises(S2VFlowError) as caught:
        api.run(tmp_path / "recipe.yaml", cache_dir=tmp_path / "cache", device="cpu")
    assert caught.value.exit_code == code


def test_a_tokenizer_that_is_no_bytes_is_refused(tmp_path: Path, tiny_models: Path) -> None:
    """It was taken for bytes whatever it was."""
    weights = load_file(tiny_models / FILES["umt5"])
    weights["spiece_model"] = weights["spiece_model"].astype(np.float32)
    (tmp_path / "a.safetensors").write_bytes(save_numpy(weights))
    with pytest.raises(CheckpointError, match=r"'spiece_model'.* is no bytes"):
        load.load_text_encoder(tmp_path / "a.safetensors", dtype=torch.float32, device="cpu", quantized=False)


def test_a_lora_with_a_misshapen_alpha_is_told(tmp_path: Path) -> None:
    """It is a number; of another shape, the pair does not fit."""
    weights = {f"x.{name}.weight": np.ones((2, 2), np.float32) for name in ("lora_up", "lora_down")}
    (tmp_path / "a.safetensors").write_bytes(save_numpy({**weights, "x.alpha": np.ones(3, np.float32)}))
    (report,) = open_loras([LoraSpec(tmp_path / "a.safetensors")], {"x.weight": (2, 2)}).reports
    assert (report.matched, report.misshapen) == (0, ("x.weight: alpha has the shape [3]",))


@pytest.mark.soak
def test_soak_checkpoints(tmp_path: Path, tiny_models: Path) -> None:
    """S2VFLOW_SOAK_CHECKPOINTS spoilt files (2,000 unless told otherwise)."""
    count, seed = int(os.environ.get("S2VFLOW_SOAK_CHECKPOINTS", "2000")), int(time.time())
    started = time.monotonic()
    told = fuzz(tmp_path, tiny_models, count, seed)
    rate = count / (time.monotonic() - started)
    sys.stdout.write(f"\nseed {seed}: {count} model files, {told}; {rate:.0f} a second\n")
