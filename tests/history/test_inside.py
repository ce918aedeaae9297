"""An mp4 of ours in the place of a recipe: it runs again, is written out, and is followed for another face."""

from __future__ import annotations

import json
from pathlib import Path

import av
import pytest
from recipes_for_tests import PORTRAIT, call, quoted, write_voice
from runs_for_tests import Place, copied

from s2v_flow import api
from s2v_flow.recipe.config import portable_text
from s2v_flow.runs.essence import note_box, read_essence, read_note

DEMO = Path(__file__).parents[1] / "untrained.yaml"


@pytest.fixture
def done(quick_run: Place, tmp_path: Path) -> Place:
    return copied(quick_run, tmp_path / "here")


def test_a_video_runs_as_the_recipe_that_it_was_made_of(done: Place) -> None:
    """It is up to date then, byte for byte, also where it has a number; with another seed it is the first's base."""
    content = done.video.read_bytes()
    for name in ("talk.mp4", "talk.2.mp4"):
        video = done.video.rename(done.video.with_name(name))
        (done.video.parent / "talk.mp4").write_bytes(content)
        code, out, err = call("run", video, *done.where, "--json")
        assert (code, json.loads(out)["computed"]) == (0, []), err
        assert f"the recipe is the one inside {video}; its relative paths start at {done.folder}" in err
        assert json.loads(out)["outputs"] == {"video": [str(done.video)]}
        assert done.video.read_bytes() == content
    code, out, err = call("plan", done.video, *done.where, "--set", "nodes.first.seed=7")
    assert (code, "seed: 20 -> 7" in out, "talk.3.mp4" in out) == (0, True, True), out


@pytest.mark.parametrize("command", ["check", "config", "plan", "graph"])
def test_commands_that_look_at_a_recipe_take_a_video(done: Place, command: str) -> None:
    where = done.where if command in ("plan", "graph") else ()
    code, out, err = call(command, done.video, *where)
    assert (code, "error" in err, bool(out)) == (0, False, True)


def test_a_video_that_was_moved_finds_its_inputs_beside_it(done: Place, tmp_path: Path) -> None:
    """Where the recipe stood is not known any more; a file with other content is a warning."""
    moved = tmp_path / "there" / "talk.mp4"
    moved.parent.mkdir()
    done.video.rename(moved)
    code, out, _ = call("plan", moved, *done.where)
    assert (code, "missing: voice.wav" in out) == (4, True)
    write_voice(moved.with_name("voice.wav"), 1.1)
    code, out, _ = call("plan", moved, *done.where)
    assert (code, f"relative paths start at {moved.parent}" in out) == (0, True)
    assert "warning: nodes.voice.file: voice.wav has changed since it went into talk.mp4" in out


def test_the_recipe_is_written_out_with_paths_that_lead_there(done: Place, tmp_path: Path) -> None:
    """On the screen it is as it was; a recipe that stands there is not overwritten."""
    code, out, err = call("recipe", done.video)
    assert (code, out.rstrip()) == (0, read_essence(done.video).recipe.rstrip())
    assert err == f"note: its relative paths start at {done.folder}\n"
    assert call("recipe", done.video, "-o", "-")[1] == out
    target = tmp_path / "new.yaml"
    assert call("recipe", done.video, "-o", target)[0] == 0
    assert getattr(api.check(target).nodes["voice"].node, "file", "") == "here/voice.wav"
    target.write_text("mine")
    assert call("recipe", done.video, "-o", target)[0] == 2
    assert call("recipe", done.video, "-o", target, "--force")[0] == 0
    assert api.check(target)


def test_a_remux_still_has_the_recipe(done: Place, tmp_path: Path) -> None:
    target = tmp_path / "remuxed.mp4"
    with av.open(str(done.video)) as old, av.open(str(target), "w") as new:
        new.metadata.update(old.metadata)
        streams = {stream.index: new.add_stream_from_template(stream) for stream in old.streams}
        for packet in old.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream.index]
                new.mux(packet)
    assert call("recipe", target)[1] == call("recipe", done.video)[1]
    code, _, err = call("import", target)  # ComfyUI's graph is lost in it
    assert (code, f"fix: write it out: s2vflow recipe {quoted(target)} -o remuxed.yaml" in err) == (3, True)


def test_a_note_that_cannot_be_read_is_told_as_before(done: Place, tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp4"
    content = done.video.read_bytes()
    broken.write_bytes(content[: -len(note_box(read_note(done.video) or b""))] + note_box(b'{"essence": 2}'))
    code, _, err = call("check", broken)
    assert (code, "R070" in err, "a video that s2vflow made" in err) == (3, True, True)
    code, _, err = call("recipe", broken)
    assert (code, "its note cannot be read" in err) == (4, True)


@pytest.mark.parametrize("node", ["nobody", "dit", "a=b]["])
def test_a_note_of_a_node_that_writes_nothing_is_refused(node: str, done: Place) -> None:
    """Somebody has changed it."""
    note = read_note(done.video) or b""
    told = note.replace(b'"node":"video"', f'"node":"{node}"'.encode())
    content = done.video.read_bytes()
    done.video.write_bytes(content[: -len(note_box(note))] + note_box(told))
    for command in ("plan", "reproduce", "recipe"):
        code, out, err = call(command, done.video, *(done.where if command != "recipe" else ()))
        assert (code, out, f"its note says that {node} wrote it" in err) == (4, "", True), err
    cache = done.folder / "new"
    assert call("reproduce", done.video, "--cache-dir", cache)[0] == 4
    assert (cache.stat().st_mode & 0o777, list((cache / "tmp").iterdir())) == (0o700, []), "its owner's alone"


def test_a_recipe_inside_that_is_no_utf_8_is_told_where(done: Place) -> None:
    note = read_note(done.video) or b""
    told, content = note.replace(b"text: blurry", rb"text: \ud800"), done.video.read_bytes()
    done.video.write_bytes(content[: -len(note_box(note))] + note_box(told))
    for command in ("check", "report", "reproduce"):
        page = ("-o", done.folder / "a.html") if command == "report" else ()
        code, _, err = done.call(command, done.video, *page) if page else call(command, done.video)
        assert (code, "is not UTF-8" in err) == ((0, False) if page else (3, True)), err


def test_parameters_stay_and_files_given_from_elsewhere_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that `--set seed=7` reaches what it reached before."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me.png").write_bytes(Path(PORTRAIT).read_bytes())
    text = portable_text(api.check(DEMO, sets=["image=me.png", "seed=3"]))
    copy = tmp_path / "copy.yaml"
    copy.write_text(portable_text(api.check(DEMO, sets=["image=me.png"])))
    assert "seed: 3" in text
    assert "seed: $params.seed" in text
    assert "file: $params.image" in text
    again = api.check(copy, sets=["seed=7"])
    assert getattr(again.nodes["first"].node, "seed", None) == 7
    assert (DEMO.parent / str(again.params["image"])).resolve() == tmp_path / "me.png"


def test_make_follows_a_video(done: Place, tmp_path: Path) -> None:
    """Its settings, for another portrait, voice and prompt; paths as the new recipe sees them."""
    voice = write_voice(tmp_path / "other.wav", 0.4)
    arguments = [PORTRAIT, voice, "It costs ${x}.", "--like", done.video, "-o", tmp_path / "new" / "other.mp4"]
    code, out, err = call("make", *arguments, *done.where)
    assert (code, out) == (0, f"{tmp_path / 'new' / 'other.mp4'}\n"), err
    made = api.check(tmp_path / "new" / "other.yaml").nodes
    assert [getattr(made[name].node, "file", "") for name in ("voice", "video")] == ["../other.wav", "other.mp4"]
    assert getattr(made["positive"].node, "text", "") == "It costs ${x}."
    assert getattr(made["first"].node, "seed", 0) == 20
    assert call("init", "--like", done.video, "-o", tmp_path / "x.yaml")[0] == 2
