"""Whole runs whose cache cannot be written: the video is there, and what is not kept is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from recipes_for_tests import call
from runs_for_tests import Place, place

from s2v_flow.history.find import read_manifest

STORED = ["positive", "speech", "reference", "first", "talk[1]", "talk[2]", "video"]


@pytest.fixture
def made(tmp_path: Path, tiny_models: Path) -> Place:
    return place(tmp_path, tiny_models)


def warnings(err: str) -> list[str]:
    return [line for line in err.splitlines() if "warning: " in line]


def test_a_run_whose_cache_folder_cannot_be_made_ends_in_a_video(made: Place, quick_run: Place) -> None:
    """The same bytes as with a cache; one warning for the results, one for the manifest."""
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
