"""The event stream: what `run --events` writes, and its schema."""

from __future__ import annotations

import io
import json
import os
import typing
from datetime import datetime, timedelta
from pathlib import Path

import jsonschema
import pytest
from recipes_for_tests import call
from runs_for_tests import Place, copied

from s2v_flow.cli.describe import schema_text
from s2v_flow.errors import S2VFlowError
from s2v_flow.graph import events
from s2v_flow.runs.stream import EventStream, open_events, type_name

SCHEMA = Path(__file__).parent.parent / "schemas" / "events.schema.json"
EXAMPLES: tuple[events.Event, ...] = (
    events.RunStarted(("first", "video"), 9),
    events.NodeStarted("first", "sample"),
    events.StageStarted("dit", "loading demo_s2v.safetensors"),
    events.StepDone("first", 1, 2, "step"),
    events.Preview("first", 1, 2, "runs/20261122-161502-7f3a/first-01.jpg"),
    events.NodeFinished("first", 1.5, 2**40, 2**37),
    events.NodeCached("talk[1]"),
    events.Noted("first", "odd \x1b[31m\n中", is_warning=True),
    events.Delivered("video", "out/talk.mp4", True),
    events.RunFinished("20261122-161502-7f3a", "failed", "why"),
    events.RunFinished("20261122-161502-7f3a", "finished"),
)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, quick_run: Place) -> Place:
    return copied(quick_run, tmp_path_factory.mktemp("events"))


def checked(text: str) -> list[dict[str, typing.Any]]:
    """Return the lines as objects, each valid by the stored schema."""
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines:
        validator.validate(line)
    return lines


def test_the_stored_schema_is_the_generated_one() -> None:
    """schemas/events.schema.json is never edited by hand."""
    assert SCHEMA.read_text(encoding="utf-8") == schema_text("events")
    assert call("schema", "--of", "events") == (0, schema_text("events"), "")


def test_every_kind_of_event_has_a_type_of_its_own() -> None:
    kinds = typing.get_args(events.Event)
    assert {type(event) for event in EXAMPLES} == set(kinds)
    assert type_name(events.NodeStarted) == "node_started"
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    assert [line["title"] for line in schema["oneOf"]] == ["version", *map(type_name, kinds)]


def test_each_event_is_one_line_that_the_schema_knows() -> None:
    """Also text with line breaks; the first line is the version. Each has the time and the run."""
    stream = io.StringIO()
    listen = EventStream(stream, "20261122-161502-7f3a")
    for event in EXAMPLES:
        listen(event)
    lines = checked(stream.getvalue())
    assert lines[0].keys() == {"type", "time", "run", "events", "s2vflow"}
    assert (lines[0]["type"], lines[0]["events"]) == ("version", 1)
    assert lines[8]["text"] == "odd \x1b[31m\n中"
    assert stream.getvalue().isascii()


@pytest.mark.parametrize("line", [{"type": "dance"}, {"type": "node_cached"}, {"type": "node_cached", "node": 1}])
def test_the_schema_refuses_what_is_no_event(line: dict[str, object]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        checked(json.dumps(line))


def test_a_run_writes_its_events_to_a_file(done: Place, tmp_path: Path) -> None:
    code, out, err = done.run("--events", tmp_path / "events.jsonl", "--set", "nodes.talk.seed=[1,5]")
    assert (code, out) == (0, f"{done.video.with_name('talk.2.mp4')}\n")
    assert "talk[2]: sampling chunk 3 of 3\n" in err
    lines = checked((tmp_path / "events.jsonl").read_text())
    types = [line["type"] for line in lines]
    assert types[:2] == ["version", "run_started"]
    assert types[-2:] == ["delivered", "run_finished"]
    assert [line["node"] for line in lines if line["type"] == "node_finished"] == ["talk[2]", "video"]
    assert {line["run"] for line in lines} == {done.manifests()[-1].parent.name}
    times = [datetime.fromisoformat(line["time"]) for line in lines]
    assert times == sorted(times)
    assert {time.utcoffset() for time in times} == {timedelta(0)}
    assert any(line["type"] == "step_done" and line["unit"] == "step" for line in lines)


def test_a_dash_gives_stdout_to_the_events_alone(done: Place) -> None:
    code, out, err = done.run("--events", "-", "--force", "video")
    assert code == 0
    assert [line["type"] for line in checked(out)][:3] == ["version", "run_started", "node_started"]
    assert "video: decoding and writing frames\n" in err


def test_a_run_that_fails_says_so_in_its_last_line(done: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise S2VFlowError("the film tore")

    monkeypatch.setattr("s2v_flow.nodes.save.require_frames", fail)
    code, out, _ = done.run("--events", "-", "--force", "video")
    assert code == 1
    last = checked(out)[-1]
    assert (last["type"], last["status"], last["error"]) == ("run_finished", "failed", "the film tore")


def test_two_kinds_of_output_on_stdout_are_refused(done: Place) -> None:
    code, out, err = done.run("--events", "-", "--json")
    assert (code, out) == (2, "")
    assert "give --events a file" in err


def test_events_replace_earlier_events_and_no_other_file(done: Place, tmp_path: Path) -> None:
    """Such as the recipe, named by mistake."""
    before = done.recipe.read_bytes()
    code, out, err = done.run("--events", done.recipe)
    assert (code, out, done.recipe.read_bytes()) == (2, "", before)
    assert f"--events {done.recipe}: another file is there, and stays" in err
    (tmp_path / "events.jsonl").touch()
    for _ in range(3):
        assert done.run("--events", tmp_path / "events.jsonl")[0] == 0
        assert [line["type"] for line in checked((tmp_path / "events.jsonl").read_text())].count("version") == 1


def test_two_runs_at_once_do_not_write_to_one_file(done: Place, tmp_path: Path) -> None:
    """The second is refused, whatever is in it by then; once the first is over, its events are replaced."""
    target = tmp_path / "events.jsonl"
    with open_events(str(target), lambda event: None, "20261122-161502-7f3a") as (tell,):
        for _ in range(2):
            before = target.read_bytes()
            code, out, err = done.run("--events", target)
            assert (code, out, target.read_bytes()) == (2, "", before)
            assert f"--events {target}: another run writes to it" in err
            tell(EXAMPLES[0])
    assert done.run("--events", target)[0] == 0
    assert {line["run"] for line in checked(target.read_text())} != {"20261122-161502-7f3a"}
    with open_events(os.devnull, lambda event: None, "1"), open_events(os.devnull, lambda event: None, "2"):
        pass  # it has room for both


def test_a_file_that_cannot_be_written_is_refused_before_the_run(done: Place, tmp_path: Path) -> None:
    before = len(done.manifests())
    code, out, err = done.run("--events", tmp_path / "no" / "such" / "folder")
    assert (code, out) == (2, "")
    assert "cannot be written" in err
    assert len(done.manifests()) == before
