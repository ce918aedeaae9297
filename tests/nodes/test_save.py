"""Where a result can never be written is found before anything is computed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from recipes_for_tests import call, tiny, write_recipe, write_voice


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def below_a_file(path: Path) -> Path:
    path.write_bytes(b"mine")
    return path / "talk.mp4"


def below_a_circle(path: Path) -> Path:
    os.symlink(path.name, path)
    return path / "talk.mp4"


@pytest.mark.parametrize(
    ("make", "why", "fix"),
    [
        (folder, "Is a directory", "name a file"),
        (below_a_file, "Not a directory", "a part of this path is a file"),
        (below_a_circle, "Too many levels", "or name another folder"),
        (lambda path: path.with_name("n" * 300 + ".mp4"), "File name too long", "a shorter name"),
    ],
)
def test_a_place_that_takes_no_file_is_refused_at_once(
    tmp_path: Path, tiny_models: Path, make: Callable[[Path], Path], why: str, fix: str
) -> None:
    write_voice(tmp_path / "voice.wav", 0.5)
    recipe = write_recipe(tmp_path, tiny(video={"file": str(make(tmp_path / "a.mp4"))}))
    where = ("--models-dir", tiny_models, "--cache-dir", tmp_path / "cache")
    code, _, err = call("run", recipe, *where)
    assert code == 1
    assert why in err
    assert fix in err
    assert not list((tmp_path / "cache").glob("objects/**/*.safetensors")), "nothing was computed"
    assert call("run", recipe, *where, "--until", "reference")[0] == 0, "what needs no such file runs"
    assert list((tmp_path / "cache").glob("objects/**/*.safetensors"))
