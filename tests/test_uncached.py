"""Whole runs whose cache cannot be written: the video is there, and what is not kept is said."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from faults_for_tests import needs_small_disks, small_disk
from recipes_for_tests import call, write_voice
from runs_for_tests import Place, copy_encoded, place

from s2v_flow.history.find import read_manifest

STORED = ["positive", "speech", "reference", "first", "talk[1]", "talk[2]", "video"]


@pytest.fixture
def made(tmp_path: Path, tiny_models: Path) -> Place:
    return place(tmp_path, tiny_models)


def warnings(err: str) -> list[str]:
    return [line for line in err.splitlines() if "warning: " in line]


def files_of_a_user(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand among files with the names that nodes use."""
    folder.mkdir()
    for name in ("00000.safetensors", "00001.safetensors", "waveform", "video.mp4", "frame_00001.png"):
        (folder / name).write_text("mine")
    monkeypatch.chdir(folder)


@pytest.mark.slow
def test_a_run_whose_cache_folder_cannot_be_made_ends_in_a_video(
    made: Place, quick_run: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes as with a cache; one warning for the results, one for the manifest; nobody's files are touched."""
    files_of_a_user(made.folder / "here", monkeypatch)
    command = [made.recipe, *made.where[:2], "--cache-dir", "/dev/null/cache", "--device", "cpu"]
    assert call("plan", *command)[0] == 0
    code, out, err = call("run", *command, "--json")
    assert code == 0, err
    assert sorted(json.loads(out)["not_kept"]) == sorted(STORED)
    assert made.video.read_bytes() == quick_run.video.read_bytes()
    said = warnings(err)
    assert len(said) == 2, said
    assert "the cache folder /dev/null/cache cannot be written (Not a directory): the run goes on" in said[0]
    assert "the run's manifest cannot be written" in said[1]
    assert list(made.video.parent.iterdir()) == [made.video]
    assert {path.read_text() for path in (made.folder / "here").iterdir()} == {"mine"}


@pytest.mark.slow
def test_a_voice_in_windows_leaves_nothing_behind_where_no_cache_can_be_made(
    made: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its waveform lies in a private folder, too; the result is for the cache alone, and that is an error."""
    files_of_a_user(made.folder / "here", monkeypatch)
    write_voice(made.folder / "voice.wav", 21.0)
    more = ["--until", "speech", "--set", "nodes.speech.window_seconds=20.0", "--cache-dir", "/dev/null/cache"]
    code, _, err = call("run", made.recipe, *made.where[:2], *more, "--device", "cpu")
    assert code == 1, err
    assert "recipe.yaml:11:3: error: cannot write under /dev/null/cache: Not a directory" in err
    assert "  in:  nodes.speech (kind: encode_audio)" in err
    assert {path.read_text() for path in (made.folder / "here").iterdir()} == {"mine"}
    assert len(list((made.folder / "here").iterdir())) == 5


@pytest.mark.slow
@needs_small_disks()
@pytest.mark.parametrize(("on_disk", "free", "code"), [("cache", 100_000, 0), ("out", 2_000, 6)])
def test_a_run_on_a_disk_that_is_full_ends_in_a_video_or_with_6(
    on_disk: str, free: int, code: int, made: Place, quick_run: Place
) -> None:
    """A disk of 400 kB: under the cache it costs a warning, under the output the run, though not its results."""
    disk = made.folder / on_disk
    disk.mkdir()
    if on_disk == "out":
        copy_encoded(quick_run.cache, made.cache)
    command = [sys.executable, "-m", "s2v_flow", "run", made.recipe, *made.where]
    video = made.folder / "copy.mp4"  # what is on the disk goes with the process
    shell = ["sh", "-c", f'"$@"; code=$?; cp "{made.video}" "{video}"; exit $code', "sh"]
    done = subprocess.run(
        [*shell, *command], capture_output=True, text=True, check=False, preexec_fn=lambda: small_disk(disk, free)
    )
    assert done.returncode == (code if code == 0 else 6), done.stderr
    assert "Traceback" not in done.stderr
    if code == 0:
        assert video.read_bytes() == quick_run.video.read_bytes()
        assert "warning: the cache folder" in done.stderr
        assert "no space left" in done.stderr
    else:
        assert "recipe.yaml:16:3: error: no space left while writing under" in done.stderr
        assert "  in:  nodes.video (kind: save_video)" in done.stderr
        assert made.run()[0] == 0  # with an empty disk again: nothing is computed twice


@pytest.mark.slow
def test_the_manifest_says_which_results_are_not_kept(made: Place) -> None:
    """Where only the results cannot be written."""
    (made.folder / "cache").mkdir()
    (made.folder / "cache" / "objects").write_text("in the way")
    code, _, err = made.run()
    assert code == 0, err
    assert len(warnings(err)) == 1
    (path,) = made.manifests()
    states = {node.name: node.kept for node in read_manifest(path).nodes if node.status == "computed"}
    assert states == dict.fromkeys(STORED, False)
    (made.folder / "cache" / "objects").unlink()
    assert made.run()[0] == 0
    assert {node.kept for node in read_manifest(made.manifests()[-1]).nodes} == {True}


@pytest.mark.slow
def test_events_that_cannot_be_written_any_more_cost_nobody_the_run(made: Place) -> None:
    """A full disk under the file of events."""
    code, out, err = made.run("--events", "/dev/full")
    assert (code, out) == (0, f"{made.video}\n"), err
    said = warnings(err)
    assert len(said) == 1
    assert "the events cannot be written: No space left on device; the run goes on without them" in said[0]


@pytest.mark.parametrize("command", [["ls"], ["stats"], ["verify"], ["gc"], ["rm", "ab"], ["pin", "ab"]])
def test_the_commands_that_look_after_a_cache_say_that_they_cannot(command: list[str]) -> None:
    code, _, err = call("cache", *command, "--cache-dir", "/dev/null/cache")
    assert code == 1
    assert "the cache cannot be read" in err
