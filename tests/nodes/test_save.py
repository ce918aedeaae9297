"""Where a result can never be written is found before anything is computed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from faults_for_tests import as_a_user
from recipes_for_tests import call, tiny, write_recipe, write_voice

from s2v_flow.files.atomic import CannotWriteError
from s2v_flow.nodes.save import SaveVideo


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
    ("make", "why"),
    [
        (folder, "a folder has this name"),
        (below_a_file, "a.mp4 is no folder"),
        (below_a_circle, "a.mp4 is no folder"),
        (lambda path: path.with_name("n" * 300 + ".mp4"), "its name is too long"),
    ],
)
def test_a_place_that_takes_no_file_is_refused_at_once(
    tmp_path: Path, tiny_models: Path, make: Callable[[Path], Path], why: str
) -> None:
    write_voice(tmp_path / "voice.wav", 0.5)
    recipe = write_recipe(tmp_path, tiny(video={"file": str(make(tmp_path / "a.mp4"))}))
    where = ("--models-dir", tiny_models, "--cache-dir", tmp_path / "cache")
    code, _, err = call("run", recipe, *where)
    assert (code, "error[R136]: file: " in err, why in err) == (3, True, True), err
    assert not list((tmp_path / "cache").glob("objects/**/*.safetensors")), "nothing was computed"


@pytest.mark.parametrize("where", ["disk/talk.mp4", "disk/more/talk.mp4", "talk.mp4"])
def test_what_a_link_leads_to_is_not_made(tmp_path: Path, tiny_models: Path, where: str) -> None:
    """A disk that is not there: the plan refuses; a link under the very name stays, and the result is numbered."""
    write_voice(tmp_path / "voice.wav", 0.5)
    os.symlink(tmp_path / "gone" / "away", tmp_path / where.partition("/")[0])
    recipe = write_recipe(tmp_path, tiny(video={"file": where}))
    code, out, err = call("plan", recipe, "--models-dir", tiny_models, "--cache-dir", tmp_path / "cache")
    if "/" in where:
        assert (code, "error[R136]: file: " in err, "disk is no folder" in err) == (3, True, True), err
    else:
        assert (code, "else written as talk.2.mp4" in out) == (0, True), out + err
    assert not (tmp_path / "gone").exists()


def test_a_folder_where_nobody_may_write_is_refused_at_once() -> None:
    node = SaveVideo.model_construct(file="talk.mp4")
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        (Path(name) / "shut").mkdir()
        os.chmod(Path(name) / "shut", 0o555)

        def act() -> None:
            node.check({("file",): Path(name) / "talk.mp4"})
            for file in ("talk.mp4", "new/talk.mp4"):
                with pytest.raises(CannotWriteError, match="Permission denied"):
                    node.check({("file",): Path(name) / "shut" / file})

        as_a_user(act, Path(name))
