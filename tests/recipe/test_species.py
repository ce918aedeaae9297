"""What is given as a recipe and is something else is told by its content, whatever its name."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin
from recipes_for_tests import write_clip, write_voice

from s2v_flow.errors import RecipeError
from s2v_flow.recipe.load import Recipe, load_recipe
from s2v_flow.runs.essence import note_box

Load = Callable[..., Recipe]
API = {"3": {"class_type": "KSampler", "inputs": {"seed": 1}}}
EDITOR = {"last_node_id": 3, "nodes": [{"id": 3, "type": "KSampler"}], "links": []}
HISTORY = [1, "a-b", API, {}, ["3"]]


def save_png(path: Path, workflow: str | None = None) -> None:
    info = PngImagePlugin.PngInfo()
    if workflow is not None:
        info.add_text("prompt", workflow)
    Image.new("RGB", (64, 64)).save(path, format="PNG", pnginfo=info)


def save_ours(path: Path) -> None:
    write_clip(path, 5)
    with open(path, "ab") as file:
        file.write(note_box(b"{}"))


KINDS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "api": (lambda path: path.write_text(json.dumps(API)), "a ComfyUI workflow: s2vflow import ", "-o NAME"),
    "editor": (lambda path: path.write_text(json.dumps(EDITOR, indent=2)), "a ComfyUI workflow: ", "-o NAME"),
    "history, map": (lambda path: path.write_text(json.dumps({"a": {"prompt": HISTORY}})), "a ComfyUI workflow", "-o"),
    "history, list": (lambda path: path.write_text(json.dumps([{"prompt": HISTORY}])), "a ComfyUI workflow", "-o"),
    "long": (lambda path: path.write_text(json.dumps({**API, "note": "x" * 2_000_000})), "a ComfyUI workflow", "-o"),
    "with a BOM": (lambda path: path.write_text(json.dumps(API), encoding="utf-8-sig"), "a ComfyUI workflow", "-o"),
    "picture": (save_png, "a picture", "s2vflow make"),
    "picture with a workflow": (
        lambda path: save_png(path, json.dumps(API)),
        "a ComfyUI workflow in it",
        "import",
    ),
    "video": (lambda path: write_clip(path, 5), "a video", "s2vflow import"),
    "our video": (save_ours, "a video that s2vflow made", "s2vflow reproduce"),
    "sound": (lambda path: write_voice(path, 0.1), "a sound", "s2vflow make"),
    "mp3": (lambda path: path.write_bytes(b"ID3\x04" + bytes(99)), "a sound", "s2vflow make"),
    "model": (lambda path: path.write_bytes(struct.pack("<Q", 2) + b"{}"), "a model file", "models folder"),
    "GGUF": (lambda path: path.write_bytes(b"GGUF\x03" + bytes(99)), "a model file", "models folder"),
    "index": (lambda path: path.write_text('{"weight_map": {}}'), "the index of a model", "own file"),
    "zip": (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(99)), "a zip archive", "models convert"),
    "manifest": (lambda path: path.write_text('{"manifest": 1, "recipe": {}}'), "the manifest of a run", "reproduce"),
    "page": (lambda path: path.write_text("\n<!DOCTYPE html><html>"), "a web page", "download it again"),
    "LFS": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid"), "git LFS", "git lfs pull"),
    "other": (lambda path: path.write_bytes(b"abc\0\1\2"), "no text", "name a recipe"),
    "folder": (lambda path: path.mkdir(), "a folder", "--models-dir"),
    "run": (lambda path: (path.mkdir(), (path / "manifest.json").touch()), "the folder of a run", "s2vflow show"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_another_thing_is_answered_with_what_helps(kind: str, tmp_path: Path, kinds: object) -> None:
    """Under the name of a recipe, too."""
    write, what, fix = KINDS[kind]
    suffix = {"sound": ".wav", "video": ".mp4", "our video": ".mp4"}.get(kind, ".yaml")  # which their writers ask for
    write(tmp_path / f"recipe{suffix}")
    (path,) = tmp_path.iterdir()
    path = path.rename(tmp_path / "recipe.yaml")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, kinds=kinds)  # type: ignore[arg-type]
    (found,) = caught.value.diagnostics
    code = "R002" if kind in ("folder", "run") else "R070"
    assert (found.code, what in found.message, fix in (found.fix or "")) == (code, True, True), found


def test_an_address_is_not_looked_for_as_a_file(kinds: object) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(Path("https://example.org/talk.yaml"), kinds=kinds)  # type: ignore[arg-type]
    assert "this is an address" in caught.value.diagnostics[0].message


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("none.yaml", "check the path; there: talk.yaml"),
        ("tlak.yaml", "did you mean "),
        ("none/none.yaml", "there is no folder "),
        ("'talk.yaml'", "write talk.yaml"),
        (r"C:\Users\me\talk.yaml", "under WSL it is /mnt/c/Users/me/talk.yaml"),
        (r"recipes\talk.yaml", "write recipes/talk.yaml"),
        ("file:///home/me/talk.yaml", "write /home/me/talk.yaml"),
    ],
)
def test_a_file_that_is_not_there_is_answered_with_a_fix(
    name: str, fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kinds: object
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "talk.yaml").touch()
    with pytest.raises(RecipeError) as caught:
        load_recipe(Path(name), kinds=kinds)  # type: ignore[arg-type]
    (found,) = caught.value.diagnostics
    assert (found.code, fix in (found.fix or "")) == ("R002", True), found


@pytest.mark.parametrize("text", ['{"s2vflow": 1, "nodes": NODES}', "{s2vflow: 1, nodes: NODES}"])
def test_a_recipe_in_json_stays_a_recipe(text: str, load: Load) -> None:
    """Even if its prompt speaks of workflows."""
    nodes = '{"a": {"kind": "load_audio", "file": "\\"class_type\\" and weight_map"}}'
    assert list(load(text.replace("NODES", nodes)).nodes) == ["a"]
