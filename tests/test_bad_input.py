"""Inputs that cannot be used: each ends with its exit code and words that help, before anything is computed."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from recipes_for_tests import call, quoted, tiny, write_recipe, write_voice
from safetensors.numpy import load_file, save_file

Changes = Mapping[str, Mapping[str, Any] | None]


class Bomb:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.trace,)


@pytest.fixture
def models(tmp_path: Path, tiny_models: Path) -> Path:
    """Return a models folder of the test's own, to which it may add files."""
    root = tmp_path / "models"
    for path in tiny_models.glob("*/*.safetensors"):
        (root / path.parent.name).mkdir(parents=True, exist_ok=True)
        (root / path.parent.name / path.name).symlink_to(path)
    return root


def refused(folder: Path, models: Path, changes: Changes, *options: object, voice: bool = True) -> tuple[int, str]:
    """Run a recipe that must fail before anything is computed; return the exit code and stderr."""
    if voice:
        write_voice(folder / "voice.wav", 0.3)
    recipe = write_recipe(folder, tiny(**changes))
    where = ["--models-dir", models, "--cache-dir", folder / "cache", "--device", "cpu"]
    code, _, err = call("run", recipe, *where, *options)
    assert "Traceback" not in err
    assert "started" not in err
    assert not (folder / "out").exists()
    assert not list((folder / "cache").glob("objects/*"))
    return code, err


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    code, out, err = call("run", tmp_path / "gone.yaml")
    assert (code, out) == (3, "")
    assert err.startswith(f"{tmp_path / 'gone.yaml'}:1:1: error[R002]: ")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"portrait": {"file": "gone.png"}}, "gone.png"),
        ({"voice": {"file": "gone.wav"}}, "gone.wav"),
        ({"vae": {"checkpoint": "gone.safetensors"}}, "gone.safetensors"),
        ({"voice": {"file": "."}}, "."),
    ],
)
def test_a_file_that_is_not_there(changes: Changes, name: str, tmp_path: Path, models: Path) -> None:
    """A directory where a file should be counts as well."""
    code, err = refused(tmp_path, models, changes)
    assert code == 4
    assert f"error: a file is missing: {name}\n" in err
    assert re.search(r"fix: (.*else )?put ", err)


def test_all_missing_files_are_told_at_once(tmp_path: Path, models: Path) -> None:
    changes = {"portrait": {"file": "gone.png"}, "voice": {"file": "gone.wav"}}
    code, err = refused(tmp_path, models, changes)
    assert code == 4
    assert "error: 2 files are missing: gone.png, gone.wav" in err


def test_a_checkpoint_of_another_model(tmp_path: Path, models: Path) -> None:
    """A T2V file has no audio layers; the header is enough to see it."""
    name = "t2v.safetensors"
    weights = load_file(models / "diffusion_models" / "tiny_s2v.safetensors")
    audio = ("casual_audio_encoder.", "audio_injector.", "trainable_cond_mask")
    save_file({k: v for k, v in weights.items() if not k.startswith(audio)}, models / "diffusion_models" / name)
    code, err = refused(tmp_path, models, {"dit": {"checkpoint": name}})
    assert code == 4
    assert f"{name}: this is a wan t2v checkpoint: it has no audio_injector.*" in err
    assert "fix: name another file in node dit" in err


def test_a_truncated_checkpoint(tmp_path: Path, models: Path) -> None:
    name = "cut.safetensors"
    whole = (models / "vae" / "tiny_vae.safetensors").read_bytes()
    (models / "vae" / name).write_bytes(whole[: len(whole) // 2])
    code, err = refused(tmp_path, models, {"vae": {"checkpoint": name}})
    assert code == 4
    assert f"{name}: damaged or not a safetensors file" in err
    assert "(truncated?)" in err
    assert "fix: download or copy the file again" in err


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt", "model.pt"])
def test_a_pickle_is_never_opened_whatever_its_name(name: str, tmp_path: Path, models: Path) -> None:
    trace = tmp_path / "opened"
    (models / "vae" / name).write_bytes(pickle.dumps(Bomb(trace)))
    code, err = refused(tmp_path, models, {"vae": {"checkpoint": name}})
    assert code == 5
    assert f"{name}: is a pickle" in err
    assert f"fix: convert it first: s2vflow models convert {quoted(models / 'vae' / name)} -o " in err
    assert not trace.exists()


def test_a_sound_without_samples(tmp_path: Path, models: Path) -> None:
    soundfile.write(tmp_path / "voice.wav", np.zeros(0, np.float32), 16_000)
    code, err = refused(tmp_path, models, {}, voice=False)
    assert code == 4
    assert f"{tmp_path / 'voice.wav'}: " in err
    assert "no samples" in err
    assert "fix: " in err


def test_a_sound_with_nan(tmp_path: Path, models: Path) -> None:
    wave = np.zeros(16_000, np.float32)
    wave[8_000] = np.nan
    soundfile.write(tmp_path / "voice.wav", wave, 16_000, subtype="FLOAT")
    code, err = refused(tmp_path, models, {}, voice=False)
    assert code == 4
    assert f"{tmp_path / 'voice.wav'}: holds NaN, infinity or a value over 1e+09 at 0.500 s" in err
    assert "fix: export the sound again" in err


def test_text_that_is_called_png(tmp_path: Path, models: Path) -> None:
    (tmp_path / "portrait.png").write_text("hello")
    code, err = refused(tmp_path, models, {"portrait": {"file": "portrait.png"}})
    assert code == 4
    assert f"{tmp_path / 'portrait.png'}: not an image that can be read" in err
    assert "fix: use png, jpeg" in err


def test_an_image_of_a_hundred_megapixels_is_refused_by_its_header(tmp_path: Path, models: Path) -> None:
    def piece(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + piece(b"IHDR", header)
    (tmp_path / "large.png").write_bytes(start + piece(b"IDAT", zlib.compress(b"")) + piece(b"IEND", b""))
    code, err = refused(tmp_path, models, {"portrait": {"file": "large.png"}})
    assert code == 5
    assert f"{tmp_path / 'large.png'}: the image has more than 64 megapixels" in err
    assert "fix: scale it down" in err


def test_a_sound_that_is_called_mp4(tmp_path: Path, models: Path) -> None:
    shutil.copy(write_voice(tmp_path / "voice.wav", 0.3), tmp_path / "pose.mp4")
    changes = {"pose": {"kind": "load_video", "file": "pose.mp4"}, "first": {"control_video": "$pose"}}
    code, err = refused(tmp_path, models, changes)
    assert code == 4
    assert f"{tmp_path / 'pose.mp4'}: not a video but a sound (wav)" in err


def test_a_latent_file_without_a_latent(tmp_path: Path, models: Path) -> None:
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "x.latent")
    unused = dict.fromkeys(("model", "positive", "negative", "speech", "reference", "vae", "seed"))
    latent = {"kind": "load_latent", "file": "x.latent", **unused, **dict.fromkeys(("length", "steps", "cfg"))}
    code, err = refused(tmp_path, models, {"first": latent, "talk": {"chunks": 0}, "frames": {"latent": "$first"}})
    assert code == 4
    assert "x.latent holds no latent of a video" in err


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"reference": {"width": 100}}, "R013", "width: must be a multiple of 16, got 100"),
        ({"first": {"sampler": "unipc"}}, "R014", "did you mean uni_pc?"),
        ({"first": {"length": 6}}, "R016", "must be 4n+1, like 5 or 9"),
        ({"video": {"file": "out/talk.avi"}}, "R016", "talk.avi"),
    ],
)
def test_a_value_that_no_model_takes(changes: Changes, code: str, words: str, tmp_path: Path, models: Path) -> None:
    number, err = refused(tmp_path, models, changes)
    assert number == 3
    assert f"error[{code}]" in err
    assert words in err


@pytest.mark.parametrize("allow_partial", [False, True])
def test_a_lora_for_another_model(allow_partial: bool, tmp_path: Path, models: Path) -> None:
    """Not one of its keys has a home: an error, even where parts may be left over."""
    lora = {
        "diffusion_model.up.7.lora_up.weight": np.zeros((8, 2), np.float32),
        "diffusion_model.up.7.lora_down.weight": np.zeros((2, 8), np.float32),
    }
    save_file(lora, models / "loras" / "foreign.safetensors")
    changes = {
        "dit": {"loras": [{"id": "foreign", "file": "foreign.safetensors", "allow_partial": allow_partial}]},
        "talk": {"chunks": 0},
    }
    words = "LoRA foreign: 0 of 2 tensors applied (0%); 2 have no home in this model: diffusion_model.up.7.lora_down"
    code, err = refused(tmp_path, models, changes)
    assert code == 4
    assert f"error: {words}" in err
    assert "fix: it is for another model: name another file, or remove the LoRA foreign" in err


def write_prompt_recipe(folder: Path, text: str) -> Path:
    """Write a recipe that encodes a prompt and nothing more."""
    everything = json.loads(call("check", write_recipe(folder), "--json")[1])["nodes"]
    changes: dict[str, Any] = {name: None for name in everything if name != "umt5"}
    encoded = {"kind": "encode_text", "text_encoder": "$umt5", "text": text}
    return write_recipe(folder, {**changes, "encoded": encoded})


def test_an_empty_prompt_is_a_prompt_and_a_recipe_without_outputs_is_noted(tmp_path: Path, models: Path) -> None:
    where = ["--models-dir", models, "--cache-dir", tmp_path / "cache", "--device", "cpu"]
    code, out, err = call("run", write_prompt_recipe(tmp_path, ""), *where)
    assert (code, out) == (0, "")
    assert err.startswith("note: the recipe writes no file: results stay in the cache")
    assert "encoded: done" in err


def test_a_models_folder_of_the_demo_that_lost_a_file_is_made_again(
    tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that this program keeps has to be repaired by hand."""
    monkeypatch.setattr("s2v_flow.demo.models.make_demo_models", lambda root: shutil.copytree(tiny_models, root))
    where = ["--models-dir", tmp_path / "none", "--cache-dir", tmp_path / "cache", "--device", "cpu"]
    assert call("run", write_prompt_recipe(tmp_path, "a"), *where)[0] == 0
    (encoder,) = (tmp_path / "cache" / "demo-models").glob("*/text_encoders/tiny_umt5.safetensors")
    encoder.unlink()
    code, _, err = call("run", write_prompt_recipe(tmp_path, "b"), *where)
    assert code == 0, err
    assert encoder.is_file()
