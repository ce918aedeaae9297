"""Making a video again from what it says of itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recipes_for_tests import call, write_voice
from runs_for_tests import Place, copied

from s2v_flow.runs.essence import note_box, read_note

Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, quick_run: Place) -> Place:
    """A video, of a recipe with an override that is written nowhere else."""
    made = copied(quick_run, tmp_path_factory.mktemp("reproduce"))
    code, _, err = made.run("--set", "nodes.talk.seed=[1,9]")
    assert code == 0, err
    return made


def reproduce(done: Place, *arguments: object, video: Path | None = None) -> tuple[int, str, str]:
    """Make a video again; the inputs of one that was moved are named, else they are found from where it stands."""
    inputs = [] if video is None else ["--input-dir", done.folder]
    return call("reproduce", video or done.video, *done.where, *inputs, *arguments)


def retold(done: Place, folder: Path, change: Change) -> Path:
    """Return a copy of the video that says something else of itself."""
    note = read_note(done.video) or b""
    essence = json.loads(note)
    change(essence)
    path = folder / "retold.mp4"
    path.write_bytes(done.video.read_bytes()[: -len(note_box(note))] + note_box(json.dumps(essence).encode()))
    return path


def contents(cache: Path) -> list[str]:
    return sorted(str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file())


@pytest.mark.slow
def test_the_same_frames_come_out_again(done: Place, tmp_path: Path) -> None:
    """All anew, without the recipe, the cache it was made with stays as it was; the new file is the old one."""
    before = contents(done.cache)
    done.recipe.rename(done.folder / "gone.yaml")
    try:
        code, out, err = reproduce(done, "-o", tmp_path)
    finally:
        (done.folder / "gone.yaml").rename(done.recipe)
    assert (code, out) == (0, f"{done.video}: the same frames\n"), err
    assert ": first: sampling\n" in err
    assert contents(done.cache) == before
    (kept,) = tmp_path.iterdir()
    assert kept.name == done.video.name
    again = json.loads(read_note(kept) or b"")
    was = json.loads(read_note(done.video) or b"")
    assert {**again, "recipe": ""} == {**was, "recipe": ""}


@pytest.mark.slow
def test_another_input_is_named_and_nothing_is_run(done: Place, tmp_path: Path) -> None:
    write_voice(tmp_path / "voice.wav", 0.9)
    where = [*done.where, "--input-dir", tmp_path]
    shutil.copy(done.video, tmp_path / "talk.mp4")
    code, out, err = call("reproduce", tmp_path / "talk.mp4", *where)
    assert code == 1
    assert out.splitlines()[0].endswith("cannot be made again: nothing was run")
    assert "differs: input voice.wav (nodes.voice.file): expected sha256 " in out
    assert "started" not in err


def test_another_model_is_named_before_another_input(done: Place, tmp_path: Path, tiny_models: Path) -> None:
    shutil.copytree(tiny_models, tmp_path / "models")
    vae = tmp_path / "models" / "vae" / "tiny_vae.safetensors"
    content = bytearray(vae.read_bytes())
    content[-1] ^= 1
    vae.chmod(0o644)
    vae.write_bytes(content)
    write_voice(tmp_path / "voice.wav", 0.9)
    shutil.copy(done.video, tmp_path / "talk.mp4")
    where = ["--models-dir", tmp_path / "models", "--cache-dir", tmp_path / "cache", "--device", "cpu"]
    code, out, _ = call("reproduce", tmp_path / "talk.mp4", *where, "--json")
    found = json.loads(out)
    assert (code, found["same"], found["was_run"]) == (1, False, False)
    assert [text.split(":")[0] for text in found["differences"]] == [
        "model tiny_vae.safetensors (nodes.vae.checkpoint)",
        "input voice.wav (nodes.voice.file)",
    ]


def test_a_missing_input_is_exit_code_4(done: Place, tmp_path: Path) -> None:
    shutil.copy(done.video, tmp_path / "talk.mp4")
    code, out, err = call("reproduce", tmp_path / "talk.mp4", *done.where)
    assert (code, out) == (4, "")
    assert "a file is missing: voice.wav" in err


@pytest.mark.slow
def test_the_first_result_that_differs_is_named_after_versions_and_device(done: Place, tmp_path: Path) -> None:
    def change(essence: dict[str, Any]) -> None:
        essence["software"] = {"s2vflow": ["0.0.9"], "torch": ["1.0"]}
        essence["device"] = "cuda"
        essence["frames_sha256"] = "0" * 64
        for name in ("talk[1]", "talk[2]"):
            essence["nodes"][name]["outputs"]["latent"] = "0" * 64

    code, out, _ = reproduce(done, video=retold(done, tmp_path, change))
    assert code == 1
    lines = out.splitlines()
    assert lines[0].endswith("retold.mp4: other frames")
    assert lines[1].startswith("  differs: s2vflow: made with 0.0.9, this is ")
    assert lines[2].startswith("  differs: torch: made with 1.0, this is 2.")
    assert lines[3:] == [
        "  differs: device: made on cuda, this is cpu",
        "  differs: talk[1]: its latent is the first result that differs",
    ]


@pytest.mark.slow
def test_the_same_frames_from_another_version_are_the_same(done: Place, tmp_path: Path) -> None:
    """What differs is still said."""

    def change(essence: dict[str, Any]) -> None:
        essence["software"]["torch"] = ["1.0"]
        essence["nodes"] = {}

    code, out, _ = reproduce(done, video=retold(done, tmp_path, change))
    assert code == 0
    assert out.splitlines()[0].endswith("retold.mp4: the same frames")
    assert "torch: made with 1.0" in out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda essence: essence.update(frames_sha256=None), "does not say which frames it had"),
        (lambda essence: essence.update(essence=2), "its note cannot be read"),
    ],
)
def test_a_video_that_says_too_little_is_refused(done: Place, tmp_path: Path, change: Change, words: str) -> None:
    code, out, err = reproduce(done, video=retold(done, tmp_path, change))
    assert (code, out) == (4, "")
    assert words in err


def test_a_recipe_inside_a_video_may_not_write_elsewhere(done: Place, tmp_path: Path) -> None:
    """The video's own file goes where the user says; any other output would be a stranger's wish."""

    def change(essence: dict[str, Any]) -> None:
        line = f"  more: {{kind: save_latent, latent: $talk, file: {tmp_path}/stolen.latent}}\n"
        essence["recipe"] += line

    code, _, err = reproduce(done, video=retold(done, tmp_path, change))
    assert code == 5
    assert "the recipe wants to write outside its folder" in err
    assert not (tmp_path / "stolen.latent").exists()
