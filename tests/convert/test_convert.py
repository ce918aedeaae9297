"""The authors' own files, converted, load with our loaders and are the same model, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from pickles_for_tests import authors_text_key
from reference import load_keys
from safetensors.torch import load_file, save_file
from torch import Tensor

from s2v_flow.convert.convert import Request, convert
from s2v_flow.convert.release import KINDS, TOKENIZER_FILE, kind_of, new_names
from s2v_flow.demo import models as demo
from s2v_flow.errors import CheckpointError, ExitCode, MissingError, RefusedError, S2VFlowError
from s2v_flow.models.load import load_audio_encoder, load_dit, load_text_encoder, load_vae
from s2v_flow.weights.header import read_header

Weights = Mapping[str, Tensor]
SPIECE = Path(demo.__file__).with_name("tiny_spiece.model")
F32 = torch.float32


def weights(models: Path, name: str) -> dict[str, Tensor]:
    return load_file(models / name)


def make_text(folder: Path, models: Path, *, has_tokenizer: bool = True) -> Path:
    """Write the tiny text encoder as the authors do: their keys, a pickle, its tokenizer beside it."""
    state = weights(models, "text_encoders/tiny_umt5.safetensors")
    del state["spiece_model"]
    path = folder / "models_t5_umt5-xxl-enc-bf16.pth"
    torch.save({authors_text_key(key): value for key, value in state.items()}, path)
    if has_tokenizer:
        (folder / TOKENIZER_FILE).parent.mkdir(parents=True)
        shutil.copy(SPIECE, folder / TOKENIZER_FILE)
    return path


def make_vae(folder: Path, models: Path) -> Path:
    torch.save(weights(models, "vae/tiny_vae.safetensors"), folder / "Wan2.1_VAE.pth")
    return folder / "Wan2.1_VAE.pth"


def make_audio(folder: Path, models: Path) -> Path:
    """Write the tiny audio encoder as transformers did: a prefix, the older weight norm, a head."""
    state = {}
    for key, value in weights(models, "audio_encoders/tiny_wav2vec2.safetensors").items():
        old = key.replace("parametrizations.weight.original0", "weight_g")
        state["wav2vec2." + old.replace("parametrizations.weight.original1", "weight_v")] = value
    state["lm_head.weight"] = torch.zeros(33, 64)
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    return folder / "pytorch_model.bin"


def make_dit(folder: Path, models: Path, num_shards: int = 3) -> Path:
    """Write the tiny diffusion model in shards, with their index."""
    state = weights(models, "diffusion_models/tiny_s2v.safetensors")
    weight_map = {}
    for number in range(num_shards):
        name = f"diffusion_pytorch_model-0000{number + 1}-of-0000{num_shards}.safetensors"
        keys = list(state)[number::num_shards]
        save_file({key: state[key] for key in keys}, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(keys, name)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index.parent


def text_state(path: Path) -> Weights:
    encoder = load_text_encoder(path, dtype=F32, device="cpu", quantized=False)
    return {**encoder.module.state_dict(), "tokens": torch.tensor(encoder.tokenize("She speaks."))}


def dit_state(path: Path) -> Weights:
    return load_dit(path, dtype=F32, device="cpu", quantized=False).module.state_dict()


RELEASE: dict[str, tuple[Callable[[Path, Path], Path], str, Callable[[Path], Weights]]] = {
    "text_encoder": (make_text, "text_encoders/tiny_umt5.safetensors", text_state),
    "vae": (make_vae, "vae/tiny_vae.safetensors", lambda path: load_vae(path, F32, "cpu").state_dict()),
    "audio_encoder": (
        make_audio,
        "audio_encoders/tiny_wav2vec2.safetensors",
        lambda path: load_audio_encoder(path, dtype=F32, device="cpu").module.state_dict(),
    ),
    "diffusion_model": (make_dit, "diffusion_models/tiny_s2v.safetensors", dit_state),
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "diffusion_model" else pytest.mark.slow) for kind in RELEASE]
)
def test_a_file_of_the_release_loads_as_the_same_model(tmp_path: Path, tiny_models: Path, kind: str) -> None:
    """Every parameter, every token; and the same source gives the same bytes."""
    make, name, load = RELEASE[kind]
    source = make(tmp_path, tiny_models)
    steps: list[tuple[int, int]] = []
    made = convert(Request(source, tmp_path / "out" / "a.safetensors"), lambda *step: steps.append(step))
    assert made.kind == kind
    converted, original = load(made.target), load(tiny_models / name)
    assert converted.keys() == original.keys()
    assert all(torch.equal(converted[key], original[key]) for key in original)
    assert steps[-1][0] == steps[-1][1] > 0
    assert os.listdir(tmp_path / "out") == ["a.safetensors"]
    header = read_header(made.target)
    assert header.metadata["s2vflow_source_sha256"].split() == list(made.source_sha256.values())
    if kind == "diffusion_model":
        again = convert(Request(source, tmp_path / "b.safetensors"))
        assert again.target.read_bytes() == made.target.read_bytes()


def test_the_full_text_encoder_s_keys_become_those_of_comfyui_s_file() -> None:
    """All 242, for the 24 layers of the released file; there and back."""
    ours = [key for key in load_keys("umt5_xxl") if key != "spiece_model"]
    theirs = [authors_text_key(key) for key in ours]
    assert len(set(theirs)) == 242
    assert "blocks.23.pos_embedding.embedding.weight" in theirs
    assert list(new_names(theirs).values()) == ours
    assert new_names(ours) == {key: key for key in ours}


def test_every_kind_is_recognised_by_its_full_keys() -> None:
    names = {
        "text_encoder": "umt5_xxl",
        "vae": "wan21_vae",
        "diffusion_model": "s2v_14b",
        "audio_encoder": "wav2vec2_large",
    }
    assert {kind: kind_of(load_keys(name)) for kind, name in names.items()} == {kind: kind for kind in KINDS}


def test_two_spellings_of_one_tensor_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"holds 'shared\.weight' twice"):
        new_names(["token_embedding.weight", "blocks.0.ffn.gate.0.weight", "shared.weight"])


def one(tmp_path: Path, tiny_models: Path) -> Path:
    """Return a copy of the tiny VAE, in safetensors: the quickest thing to convert."""
    return Path(shutil.copy(tiny_models / "vae/tiny_vae.safetensors", tmp_path / "vae.pth"))


def test_contents_count_not_names(tmp_path: Path, tiny_models: Path) -> None:
    """A safetensors file that is called .pth; with another dtype."""
    made = convert(Request(one(tmp_path, tiny_models), tmp_path / "a.safetensors", dtype="bf16"))
    original = weights(tiny_models, "vae/tiny_vae.safetensors")
    assert all(torch.equal(value, original[key].bfloat16()) for key, value in load_file(made.target).items())


def test_metadata_of_the_source_is_kept(tmp_path: Path, tiny_models: Path) -> None:
    """It says which layers are in fp8; a dtype cannot be asked for there."""
    source = tiny_models / "diffusion_models/tiny_s2v_fp8_metadata.safetensors"
    made = convert(Request(source, tmp_path / "a.safetensors"))
    assert read_header(source).metadata.items() <= read_header(made.target).metadata.items()
    with pytest.raises(CheckpointError, match="is in fp8"):
        convert(Request(source, tmp_path / "b.safetensors", dtype="bf16"))
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors"]


def test_a_quantised_model_stays_readable(tmp_path: Path, tiny_models: Path) -> None:
    """Its formats are named with a prefix that the converted file has no more; what cannot be read is not made."""
    tensors = weights(tiny_models, "diffusion_models/tiny_s2v.safetensors")
    layer, source = "blocks.0.ffn.0", tmp_path / "prefixed.safetensors"
    tensors[f"{layer}.weight"] = torch.full(tensors[f"{layer}.weight"].shape, 3, dtype=torch.int8)
    tensors[f"{layer}.weight_scale"] = torch.tensor(0.3)
    for name, is_read in (("int8_tensorwise", True), ("int8_blockwise", False)):
        told = json.dumps({"layers": {f"model.diffusion_model.{layer}": {"format": name}}})
        prefixed = {f"model.diffusion_model.{key}": value for key, value in tensors.items()}
        save_file(prefixed, source, {"_quantization_metadata": told})
        request = Request(source, tmp_path / f"{name}.safetensors")
        if is_read:
            state = dit_state(convert(request).target)
            assert state[f"{layer}.weight"].equal(torch.full(tensors[f"{layer}.weight"].shape, 3 * torch.tensor(0.3)))
            with pytest.raises(CheckpointError, match="is in int8, which is not expanded"):
                convert(Request(source, tmp_path / "b.safetensors", dtype="bf16"))
        else:
            with pytest.raises(CheckpointError, match=r"prefixed\.safetensors: is quantised as int8_blockwise"):
                convert(request)
    assert sorted(os.listdir(tmp_path)) == ["int8_tensorwise.safetensors", "prefixed.safetensors"]


def test_a_text_encoder_needs_its_tokenizer(tmp_path: Path, tiny_models: Path) -> None:
    """Named, or where the release has it; a damaged one is found before the target appears."""
    state = weights(tiny_models, "text_encoders/tiny_umt5.safetensors")
    del state["spiece_model"]
    source, target = tmp_path / "t5.safetensors", tmp_path / "a.safetensors"
    save_file(state, source)
    with pytest.raises(MissingError, match="without its tokenizer") as caught:
        convert(Request(source, target))
    assert "--tokenizer" in (caught.value.fix or "")
    (tmp_path / "bad.model").write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match=r"bad\.model: its tokenizer"):
        convert(Request(source, target, tokenizer=tmp_path / "bad.model"))
    with pytest.raises(MissingError, match=r"none\.model: cannot be read"):
        convert(Request(source, target, tokenizer=tmp_path / "none.model"))
    assert not target.exists()
    assert text_state(convert(Request(source, target, tokenizer=SPIECE)).target)


@pytest.mark.parametrize("is_pickle", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_tokenizer_for_anything_else_is_a_slip(is_pickle: bool, tmp_path: Path, tiny_models: Path) -> None:
    """Told before anything is written."""
    source = (make_vae if is_pickle else one)(tmp_path, tiny_models)
    written: list[int] = []
    request = Request(source, tmp_path / "a.safetensors", tokenizer=SPIECE)
    with pytest.raises(S2VFlowError, match=f"{source.name}: is no text encoder") as caught:
        convert(request, lambda done, total: written.append(done))
    assert (caught.value.exit_code, written) == (2, [])
    assert os.listdir(tmp_path) == [source.name]


def test_a_target_is_never_overwritten_unless_asked(tmp_path: Path, tiny_models: Path) -> None:
    """Nor is the source, not even then; nor a file that appears meanwhile."""
    source, target = one(tmp_path, tiny_models), tmp_path / "a.safetensors"
    target.write_text("mine")
    with pytest.raises(S2VFlowError, match="is there already") as caught:
        convert(Request(source, target))
    assert (caught.value.exit_code, target.read_text()) == (ExitCode.USAGE, "mine")
    assert convert(Request(source, target, overwrites=True)).num_bytes == target.stat().st_size > 4
    with pytest.raises(S2VFlowError, match="is the source itself"):
        convert(Request(target, target, overwrites=True))
    late = tmp_path / "late.safetensors"
    with pytest.raises(S2VFlowError, match="is there already"):
        convert(Request(source, late), lambda done, total: None if late.exists() else late.touch())
    assert late.read_bytes() == b""


def test_without_hard_links_it_is_renamed(tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on the file systems of memory sticks."""

    def refuse(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    made = convert(Request(one(tmp_path, tiny_models), tmp_path / "a.safetensors"))
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "vae.pth"]
    assert made.num_tensors == len(load_file(made.target))


@pytest.mark.parametrize("name", ["a.pth", "a", "a.SAFETENSORS"])
def test_a_target_is_called_safetensors(tmp_path: Path, tiny_models: Path, name: str) -> None:
    with pytest.raises(S2VFlowError, match=r"end in \.safetensors"):
        convert(Request(one(tmp_path, tiny_models), tmp_path / name))


def test_a_source_that_changes_meanwhile_gives_no_target(tmp_path: Path, tiny_models: Path) -> None:
    source = one(tmp_path, tiny_models)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        convert(Request(source, tmp_path / "a.safetensors"), lambda done, total: os.utime(source, ns=(done, done)))
    assert os.listdir(tmp_path) == ["vae.pth"]


def test_what_is_no_model_or_another_kind_is_said(tmp_path: Path, tiny_models: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"x\.safetensors: this is an unknown .* only umt5 encoder, wan vae"):
        convert(Request(tmp_path / "x.safetensors", tmp_path / "a.safetensors"))
    with pytest.raises(CheckpointError, match="this is a wan vae checkpoint"):
        convert(Request(one(tmp_path, tiny_models), tmp_path / "a.safetensors", kind="text_encoder"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGUF\x03" + bytes(50), "a GGUF file, which is loaded as it is"),
        (b"hello" * 20, "is text, not a model"),
        (b"", "it has 0 bytes"),
    ],
    ids=["gguf", "text", "empty"],
)
def test_other_files_are_called_by_their_names(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        convert(Request(tmp_path / "a.pth", tmp_path / "a.safetensors"))
    assert ("name it as the checkpoint of a load node" in (caught.value.fix or "")) == content.startswith(b"GGUF")


def test_a_folder_is_its_one_index(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="this one holds 0"):
        convert(Request(tmp_path, tmp_path / "a.safetensors"))
    for name in "ab":
        (tmp_path / f"{name}.safetensors.index.json").write_text("{}")
    with pytest.raises(MissingError, match="this one holds 2"):
        convert(Request(tmp_path, tmp_path / "a.safetensors"))


def test_a_result_that_is_not_what_was_asked_for_is_thrown_away(
    tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one would be that a pickle wrote after it had taken the process over: a model, but with other words in it."""
    source, forged = make_vae(tmp_path, tiny_models), tiny_models / "vae/tiny_vae.safetensors"
    monkeypatch.setattr("s2v_flow.convert.convert.convert_pickle", lambda _, file, *__: file.write(forged.read_bytes()))
    with pytest.raises(RefusedError, match="not what was asked for"):
        convert(Request(source, tmp_path / "a.safetensors"))
    assert os.listdir(tmp_path) == ["Wan2.1_VAE.pth"]


@pytest.mark.slow
def test_what_stands_beside_the_state_dict_is_left_out_and_said(tmp_path: Path, tiny_models: Path) -> None:
    torch.save(
        {"state_dict": weights(tiny_models, "vae/tiny_vae.safetensors"), "step": 3, "lr": 0.1}, tmp_path / "a.pt"
    )
    made = convert(Request(tmp_path / "a.pt", tmp_path / "a.safetensors"))
    assert made.notes == ("2 other entries beside the state dict were left out",)


@pytest.mark.slow
def test_a_killed_conversion_leaves_no_target_and_nothing_to_repair(tmp_path: Path, tiny_models: Path) -> None:
    """kill -9 while the pickle is written out: its process goes too, and the next conversion clears up."""
    state = {"decoder.head.0.gamma": torch.zeros(96), "conv2.weight": torch.zeros(16, 16)}
    state["large"] = torch.zeros(40 << 20, dtype=torch.uint8)
    source, target = tmp_path / "a.pth", tmp_path / "out" / "a.safetensors"
    torch.save(state, source)
    code = (
        "import os, signal; from pathlib import Path; from s2v_flow.convert.convert import Request, convert\n"
        f"request = Request(Path({str(source)!r}), Path({str(target)!r}))\n"
        "convert(request, lambda *_: os.kill(os.getpid(), signal.SIGKILL))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (left,) = os.listdir(target.parent)
    assert left.startswith(".s2vflow-")
    assert not target.exists()
    deadline = time.monotonic() + 10
    while any(str(target.parent) in names for names in open_files()):
        assert time.monotonic() < deadline, "the process that opened the pickle lives on"
    convert(Request(one(tmp_path, tiny_models), target))
    assert os.listdir(target.parent) == ["a.safetensors"]


def open_files() -> list[str]:
    """Return what the processes of this machine that can be looked at have open."""
    found = []
    for folder in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            found.append(os.readlink(folder))
        except OSError:
            continue
    return found
