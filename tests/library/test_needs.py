"""`s2vflow models`: what a recipe needs, what is there, and getting the rest from a server on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from recipes_for_tests import call, write_recipe
from serving import serving

from s2v_flow import api
from s2v_flow.errors import MissingError, RefusedError
from s2v_flow.library.needs import HOMES, ModelNeed, choose, download, target_path
from s2v_flow.options import Options

VAE, ENCODER = "wan_2.1_vae.safetensors", "umt5_xxl_fp16.safetensors"
CHANGES = {"vae": {"checkpoint": VAE}, "umt5": {"checkpoint": ENCODER}}
VAE_PATH = "/Comfy-Org/Wan_2.2_ComfyUI_Repackaged/resolve/main/split_files/vae/wan_2.1_vae.safetensors"


@dataclass
class Hub:
    """A hub with files; `damaged` ones are not what they promise to be."""

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    damaged: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *given: Any) -> None:
            """Say nothing."""

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            if self.answer():
                self.wfile.write(b"damaged"[:5] if self.path in state.damaged else state.files[self.path])

        def answer(self) -> bool:
            state.asked.append(f"{self.command} {self.path}")
            body = state.files.get(self.path)
            if body is None:
                self.send_error(404)
                return False
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            return True

    with serving(Handler) as state.address:
        monkeypatch.setenv("HF_ENDPOINT", state.address)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield state


def where(folder: Path) -> list[str]:
    return ["--models-dir", str(folder / "models"), "--cache-dir", str(folder / "cache")]


def put(path: Path, size: int = 5) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    return path


def statuses(text: str) -> Mapping[str, str]:
    return {item["file"]: item["status"] for item in json.loads(text)["models"]}


def test_each_file_of_a_recipe_is_listed_once_with_what_is_known_of_it(tmp_path: Path) -> None:
    """There, with its size; made by the program on first use; or missing, with its homes."""
    found = put(tmp_path / "models/clip" / ENCODER, 3 << 20)
    recipe = write_recipe(tmp_path, {**CHANGES, "vae2": {"kind": "load_vae", "checkpoint": VAE}})
    code, out, err = call("models", recipe, *where(tmp_path), "--json")
    assert (code, err) == (4, "")
    models = {item["file"]: item for item in json.loads(out)["models"]}
    assert list(models) == ["tiny_s2v.safetensors", ENCODER, "tiny_wav2vec2.safetensors", VAE]
    assert models["tiny_s2v.safetensors"]["status"] == "made"
    encoder, vae = models[ENCODER], models[VAE]
    assert (encoder["status"], encoder["path"], encoder["size_bytes"]) == ("found", str(found), 3 << 20)
    assert (vae["status"], vae["path"], vae["size_bytes"]) == ("missing", None, None)
    assert (vae["homes"], vae["looked_in"]) == (list(HOMES[VAE]), [str(tmp_path / "models/vae")])
    _, text, _ = call("models", recipe, *where(tmp_path))
    assert ["found", "text_encoders", ENCODER, "3.1", "MB", str(found)] in [
        line.split(None, 5) for line in text.splitlines()
    ]
    assert f"can be had at {HOMES[VAE][0]}" in text
    assert text.endswith("3 of 4 are there, 1 missing\n")


def test_profiles_and_overrides_change_what_is_needed(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, extra=f"profiles:\n  big: {{nodes: {{vae: {{checkpoint: {VAE}}}}}}}")
    assert call("models", recipe, *where(tmp_path))[0] == 0
    assert statuses(call("models", recipe, *where(tmp_path), "-p", "big", "--json")[1])[VAE] == "missing"
    code, out, _ = call("models", recipe, *where(tmp_path), "--set", "nodes.vae.checkpoint=x.bin", "--json")
    assert (code, statuses(out)["x.bin"]) == (4, "missing")


def test_without_a_recipe_all_known_files_are_listed(tmp_path: Path) -> None:
    """In their usual folders; to download all of them at once takes more than a flag."""
    put(tmp_path / "models/vae" / VAE)
    code, out, _ = call("models", *where(tmp_path), "--json")
    assert code == 4
    assert list(statuses(out)) == list(HOMES)
    assert statuses(out)[VAE] == "found"
    assert call("models", *where(tmp_path), "--only", VAE)[0] == 0
    code, _, err = call("models", *where(tmp_path), "--download")
    assert code == 2
    assert "--only" in err


def test_only_names_what_the_recipe_has(tmp_path: Path) -> None:
    code, out, err = call("models", write_recipe(tmp_path), *where(tmp_path), "--only", "tiny_va.safetensors")
    assert (code, out) == (2, "")
    assert "did you mean tiny_vae.safetensors?" in err


def test_nothing_is_asked_of_a_server_without_download(hub: Hub, tmp_path: Path) -> None:
    call("models", write_recipe(tmp_path, CHANGES), *where(tmp_path))
    assert hub.asked == []


def test_download_brings_what_is_missing_into_its_folder(hub: Hub, tmp_path: Path) -> None:
    """Of the first models folder; a second call asks for nothing."""
    hub.files[VAE_PATH] = b"a whole VAE"
    recipe = write_recipe(tmp_path, {"vae": {"checkpoint": f"wan/{VAE}"}})
    code, out, err = call("models", recipe, *where(tmp_path), "--models-dir", tmp_path / "more", "--download", "--json")
    assert code == 0, err
    assert statuses(out)[f"wan/{VAE}"] == "found"
    assert (tmp_path / "models/vae/wan" / VAE).read_bytes() == b"a whole VAE"
    assert hub.asked == [f"HEAD {VAE_PATH}", f"GET {VAE_PATH}"]
    assert f"{VAE}: 11 B of 11 B" in err
    assert call("models", recipe, *where(tmp_path), "--download")[0] == 0
    assert len(hub.asked) == 2


def test_nothing_is_downloaded_unless_everything_can_be_had(hub: Hub, tmp_path: Path) -> None:
    """A file that has gone from the hub, or one whose home nobody knows; --only leaves it out."""
    hub.files[VAE_PATH] = b"a whole VAE"
    recipe = write_recipe(tmp_path, CHANGES)
    code, out, err = call("models", recipe, *where(tmp_path), "--download")
    assert (code, out) == (4, "")
    assert "404" in err
    assert not (tmp_path / "models").exists()
    assert call("models", recipe, *where(tmp_path), "--download", "--only", VAE)[0] == 0
    unknown = write_recipe(tmp_path, {"vae": {"checkpoint": "mine.bin"}}, name="unknown.yaml")
    code, out, err = call("models", unknown, *where(tmp_path), "--download")
    assert (code, out) == (4, "")
    assert "no home is known of mine.bin" in err


def test_a_damaged_download_is_exit_code_5_and_leaves_nothing(hub: Hub, tmp_path: Path) -> None:
    hub.files[VAE_PATH] = b"right"
    hub.damaged.add(VAE_PATH)
    recipe = write_recipe(tmp_path, {"vae": {"checkpoint": VAE}})
    code, out, err = call("models", recipe, *where(tmp_path), "--download")
    assert (code, out) == (5, "")
    assert "another sha256" in err
    assert [path for path in (tmp_path / "models").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("name", [f"../{VAE}", f"/tmp/{VAE}", f"a/../../{VAE}", f"link/{VAE}"])
def test_a_name_that_leads_out_of_the_models_folder_is_refused(hub: Hub, tmp_path: Path, name: str) -> None:
    """Upwards, absolutely or through a link; no server is asked."""
    (tmp_path / "models/vae").mkdir(parents=True)
    (tmp_path / "models/vae/link").symlink_to(tmp_path)
    need = ModelNeed(name, "vae", None, "missing", HOMES[VAE])
    with pytest.raises(RefusedError, match="outside the models folder"):
        target_path(need, tmp_path / "models")
    with pytest.raises(RefusedError):
        download([need], tmp_path / "models", lambda file, done, total: None)
    assert hub.asked == []


def test_a_folder_that_is_a_link_itself_may_be_filled(hub: Hub, tmp_path: Path) -> None:
    """People keep models on other disks."""
    hub.files[VAE_PATH] = b"a whole VAE"
    (tmp_path / "disk").mkdir()
    (tmp_path / "models").mkdir()
    (tmp_path / "models/vae").symlink_to(tmp_path / "disk")
    need = ModelNeed(VAE, "vae", None, "missing", HOMES[VAE])
    download([need], tmp_path / "models", lambda file, done, total: None)
    assert (tmp_path / "disk" / VAE).read_bytes() == b"a whole VAE"


def test_a_run_without_its_models_says_how_to_get_them(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, {"vae": {"checkpoint": VAE}, "voice": {"file": "none.wav"}})
    with pytest.raises(MissingError) as caught:
        api.require_files(api.plan(recipe, api.Options(models_dirs=[tmp_path], cache_dir=tmp_path / "cache")))
    assert f"s2vflow models {recipe} --download" in (caught.value.fix or "")


def test_all_are_chosen_where_none_is_named() -> None:
    needs = [ModelNeed(name, "vae", None, "missing") for name in ("a", "b")]
    assert choose(needs, []) == needs
    assert choose(needs, ["b"]) == needs[1:]


def test_a_missing_model_shows_names_like_it_with_their_sizes(tmp_path: Path) -> None:
    """In a subfolder, beside, or under another kind; a plan, a run and the list of models say the same."""
    models = tmp_path / "models"
    for place, size in (("vae/old/wan2.1_vae.safetensors", 3), ("loras/WAN_2.1_VAE.SAFETENSORS", 5), ("vae/a.txt", 1)):
        (models / place).parent.mkdir(parents=True, exist_ok=True)
        (models / place).write_bytes(bytes(size * 1_000_000))
    recipe = write_recipe(tmp_path, {"vae": {"checkpoint": VAE}})
    exact = f"WAN_2.1_VAE.SAFETENSORS (5.0 MB) in {models / 'loras'}"
    for command in ("plan", "run", "models"):
        code, out, err = call(command, recipe, *where(tmp_path))
        assert (code, exact in out, "old" in out) == (4, True, False), err
        assert (exact in err) == (command == "run")
    (models / "loras/WAN_2.1_VAE.SAFETENSORS").unlink()
    assert f"near: wan2.1_vae.safetensors (3.0 MB) in {models / 'vae/old'}" in call("plan", recipe, *where(tmp_path))[1]


@pytest.mark.parametrize(
    ("node", "name", "meant"),
    [
        ("dit", "demo_dit.safetensor", "demo_s2v.safetensors, which this program makes"),
        ("vae", "demo_vea.safetensors", "demo_vae.safetensors, which this program makes"),
        ("vae", "my_vae.safetensors", None),
        ("vae", "demo_s2v.safetensors", None),
    ],
)
def test_a_name_like_one_of_the_demos_models_is_told(node: str, name: str, meant: str | None, tmp_path: Path) -> None:
    """Whether they have been made yet or not; of another kind, or another name, they are not what was meant."""
    recipe = write_recipe(tmp_path, {node: {"checkpoint": name}})
    for command in ("plan", "run", "models"):
        code, out, err = call(command, recipe, *where(tmp_path))
        assert (code, f"near: {meant}" in out) == (4, meant is not None), err
        assert command != "run" or (f"fix: is it {meant}?" in err) == (meant is not None)


def test_what_has_a_missing_models_name_and_is_no_file_is_called_so(tmp_path: Path) -> None:
    """A folder as diffusers has it, a link whose target is gone, one that leads to itself, a pipe."""
    folder = tmp_path / "models" / "vae"
    (folder / "folder.safetensors").mkdir(parents=True)
    (folder / "gone.safetensors").symlink_to(tmp_path / "unmounted" / "vae.safetensors")
    (folder / "loop.safetensors").symlink_to(folder / "loop.safetensors")
    os.mkfifo(folder / "pipe.safetensors")
    lost = "a link that leads nowhere"
    for name, what in (("folder", "a folder"), ("gone", lost), ("loop", lost), ("pipe", "no regular file")):
        recipe = write_recipe(tmp_path, {"vae": {"checkpoint": f"{name}.safetensors"}})
        for command in ("plan", "run", "models"):
            code, out, err = call(command, recipe, *where(tmp_path))
            said = f"{folder / name}.safetensors is {what}"
            assert (code, said in out, said in err) == (4, True, command == "run"), (command, out, err)


def test_a_missing_lora_of_an_unlike_name_shows_what_its_folder_holds(tmp_path: Path) -> None:
    """A few files with their sizes, and none of other folders."""
    models = tmp_path / "models"
    for place in (*(f"loras/style_{number}.safetensors" for number in range(9)), "vae/detail.safetensors"):
        (models / place).parent.mkdir(parents=True, exist_ok=True)
        (models / place).write_bytes(bytes(2_000_000))
    recipe = write_recipe(tmp_path, {"dit": {"loras": [{"id": "a", "file": "zoom.safetensors"}]}})
    lines = [line for line in call("plan", recipe, *where(tmp_path))[1].splitlines() if line.startswith("  there: ")]
    shown = [f"  there: style_{number}.safetensors (2.0 MB) in {models / 'loras'}" for number in range(5)]
    assert [line for line in lines if "loras" in line] == shown


def test_the_name_of_another_kind_s_file_is_called_so(tmp_path: Path, tiny_models: Path) -> None:
    """By the file's content where it lies in its own folder, by its home where it is nowhere; it is not downloaded."""
    (tmp_path / "m" / "vae").mkdir(parents=True)
    shutil.copy(tiny_models / "vae" / "tiny_vae.safetensors", tmp_path / "m" / "vae" / "own.safetensors")
    recipe = write_recipe(tmp_path, {"dit": {"checkpoint": "own.safetensors"}})
    out = call("plan", recipe, "--models-dir", tmp_path / "m", "--cache-dir", tmp_path / "cache")[1]
    assert f"in {tmp_path / 'm/vae'}: it is a wan vae file and belongs in a load_vae node" in out
    recipe = write_recipe(tmp_path, {"dit": {"checkpoint": VAE}})
    said = "this is the name of a wan vae file, which belongs in a load_vae node"
    code, out, err = call("run", recipe, *where(tmp_path))
    assert (code, said in out, said in err, "can be had" in out, "--download" in err) == (4, True, True, False, False)
    assert "no home is known of" in call("models", recipe, *where(tmp_path), "--download", "--only", VAE)[2]


def test_comfyui_s_own_folder_is_taken_for_its_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given, or where people have it: here, at home, in Documents."""
    monkeypatch.delenv("S2VFLOW_MODELS_DIR", raising=False)
    (tmp_path / "Comfy" / "models" / "vae").mkdir(parents=True)
    (tmp_path / "other" / "vae").mkdir(parents=True)
    given = Options(models_dirs=[tmp_path / "Comfy", tmp_path / "other"]).locations.models_dirs
    assert list(given) == [tmp_path / "Comfy" / "models", tmp_path / "other"]
    monkeypatch.setenv("HOME", str(tmp_path))
    usual = [Path("models"), Path("ComfyUI/models"), tmp_path / "ComfyUI/models", tmp_path / "Documents/ComfyUI/models"]
    assert list(Options().locations.models_dirs) == usual
