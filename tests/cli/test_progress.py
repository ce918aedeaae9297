"""What a person sees: in a real terminal, in a pipe, and of how long it still takes."""

from __future__ import annotations

import io
import os
import re
import sys
import threading
import time
from pathlib import Path

import pytest
from recipes_for_tests import call, options
from runs_for_tests import Place, copied
from terminal import run_in_terminal

from s2v_flow import api
from s2v_flow.cli import progress as shown
from s2v_flow.cli.main import cli
from s2v_flow.cli.report import for_people
from s2v_flow.graph import events
from s2v_flow.runs.environment import FileDigests


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, quick_run: Place) -> Place:
    return copied(quick_run, tmp_path_factory.mktemp("progress"))


@pytest.mark.slow
def test_a_run_in_a_terminal_shows_a_bar_stages_and_a_closing_line(done: Place) -> None:
    """As the tiny run is drawn, 80 columns wide; the path is on stdout, which is no terminal, alone."""
    command = [sys.executable, "-m", "s2v_flow", "run", str(done.recipe), *done.where, "--set", "nodes.talk.seed=[1,9]"]
    screen, out, code = run_in_terminal(command, columns=80)
    assert (code, out) == (0, f"{done.video.with_name('talk.2.mp4')}\n")
    text = str(screen)
    assert re.search(r"^recipe  ━+ +100%  .* s$", text, re.MULTILINE), text
    assert re.search(r"^done +talk\[2\] +sampling chunk 3 of 3 +[\d.]+ s  +\d+\.\d [MG]iB$", text, re.MULTILINE), text
    assert re.search(r"^done +video +decoding and writing frames ", text, re.MULTILINE), text
    assert "save_video" not in text
    end = r"^talk\.2\.mp4  1\.2 s · 64x64 · 3 chunks · 2 computed, 5 stored · [^·]+ s · seed 20$"
    assert re.search(end, text, re.MULTILINE), text
    assert text.rstrip().endswith("look closer: s2vflow show last")
    drawn = screen.ever
    assert re.search(r"^running +talk\[2\] +\S", drawn, re.MULTILINE), drawn  # what it does at that moment is left open
    assert "\x1b[32mdone" in screen.raw
    assert all(len(line) <= 80 or line.startswith("again: ") for line in text.splitlines())


def test_nothing_but_the_result_is_said_where_quiet_and_more_where_verbose(done: Place) -> None:
    assert done.run("-q") == (0, f"{done.video}\n", "")
    code, out, err = done.run("-v")
    assert (code, out) == (0, f"{done.video}\n")
    assert " recipe: first: stored already\n" in err
    assert f" recipe: video: {done.video} is up to date\n" in err
    assert "stored already" not in done.run()[2]


def test_a_pace_is_that_of_the_last_steps_and_the_rest_is_estimated_from_like_nodes(
    done: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock is played: loading takes 60 s, a step 2 s; a chunk that is done says how long the next will take."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    planned = api.plan(done.recipe, options(done.folder, Path(done.where[1]), done.cache))
    stream = io.StringIO()
    progress = shown.Progress("talk", planned, stream=stream)
    nodes = ("talk[1]", "talk[2]")
    progress(events.RunStarted(nodes, 16))
    for node, first in zip(nodes, (60.0, 10.0), strict=True):
        progress(events.NodeStarted(node, "extend"))
        for step in range(1, 5):
            now[0] += first if step == 1 else 2.0
            progress(events.StepDone(node, step, 10, "step"))
        now[0] += 12.0
        progress(events.NodeFinished(node, first + 18.0, 2**30))
    progress.close()
    lines = [line.partition(" talk: ")[2] for line in stream.getvalue().splitlines()]
    assert lines[0].startswith("begin: 2 of 16 nodes to compute; 3 chunks, 20 frames, 1.25 s")
    assert "talk[1]: step 1/10" in lines
    assert "talk[1]: step 4/10, 2.00 s/step, 12 s left" in lines
    assert lines[-1] == "talk[2]: done, 28 s, peak 1.0 GiB"


def test_what_lasts_says_that_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also hashing, which is no node's; nothing is said any more once it is closed."""
    monkeypatch.setattr(shown, "LINE_EVERY_SECONDS", 0.0)
    is_told = threading.Event()

    class Stream(io.StringIO):
        def write(self, text: str) -> int:
            written = super().write(text)
            if "still running" in self.getvalue():
                is_told.set()
            return written

    stream = Stream()
    progress = shown.Progress("talk", stream=stream)
    progress(events.StageStarted("", "hashing dit.safetensors (15.3 GB), once"))
    assert is_told.wait(60)
    progress.close()
    assert re.match(
        r"\d\d:\d\d:\d\d talk: hashing dit\.safetensors \(15\.3 GB\), once: still running, \d+\.\d s\n",
        stream.getvalue(),
    )


def test_a_note_is_told_once_for_all_cells_and_details_to_those_who_ask() -> None:
    for level, expected in (
        ("normal", ["note: dit: LoRA a: 1 of 2"]),
        ("verbose", ["note: dit: LoRA a: 1 of 2", "note: dit: keys"]),
    ):
        stream = io.StringIO()
        progress = shown.Progress(level=level, stream=stream)  # type: ignore[arg-type]
        for cell in ("seed=1", "seed=2"):
            progress(events.Noted(f"{cell}/dit", "LoRA a: 1 of 2"))
            progress(events.Noted(f"{cell}/dit", "keys", is_detail=True))
        assert stream.getvalue().splitlines() == expected


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "environment", "is_coloured"),
    [
        (Terminal(), {}, True),
        (Terminal(), {"NO_COLOR": "1"}, False),
        (Terminal(), {"TERM": "dumb"}, False),
        (io.StringIO(), {}, False),
        (io.StringIO(), {"FORCE_COLOR": "1"}, True),
        (io.StringIO(), {"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
        (Terminal(), {"FORCE_COLOR": "0"}, False),
    ],
)
def test_colour_is_for_terminals_and_those_who_ask(
    stream: io.StringIO, environment: dict[str, str], is_coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    text = "  HIT  first  sample\nerror: no\n  fix: yes"
    coloured = "  \x1b[32mHIT\x1b[0m  first  sample\n\x1b[1;31merror:\x1b[0m no\n  \x1b[32mfix:\x1b[0m yes"
    assert for_people(text, stream) == (coloured if is_coloured else text)


def test_lines_wrap_at_words_below_their_last_column_in_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("NO_COLOR", "1")
    text = "  RUN  first  sample  steps differs: 4 -> 20 now"
    assert for_people(text, Terminal()) == "  RUN  first  sample  steps differs: 4\n                      -> 20 now"
    excerpt = "   12 | " + "x" * 60
    assert for_people(excerpt, Terminal()) == excerpt
    long = f"error: {'word ' * 20}{'x' * 60}"
    lines = for_people(long, Terminal()).splitlines()
    assert " ".join(lines).split() == long.split()
    assert all(len(line) <= 40 or len(line.split()) == 1 for line in lines)
    assert for_people(text, io.StringIO()) == text


def test_a_plan_of_many_cells_has_a_line_for_like_nodes(done: Place) -> None:
    code, out, _ = call("plan", done.recipe, *done.where, "-m", "nodes.first.seed=101..140")
    assert code == 0
    assert len(out.splitlines()) < 50
    assert re.search(r"^  RUN .* to .* extend .*\[x \d+\]$", out, re.MULTILINE), out
    assert re.search(r"; 40 cells: 120 chunks; the longest 20 frames, 1\.25 s", out)


def test_every_command_has_an_example_that_it_accepts() -> None:
    assert call("--help")[1].index("\n  run ") < call("--help")[1].index("\n  check ")
    with cli.make_context("s2vflow", [], resilient_parsing=True) as context:
        for name in cli.list_commands(context):
            command = cli.get_command(context, name)
            assert command is not None
            example = re.match(r"Example: s2vflow (\S+) ?(.*)$", command.epilog or "")
            assert example, name
            assert example[1] == name
            words = [word.strip("'") for word in re.findall(r"'[^']*'|\S+", example[2])]
            command.make_context(name, words, parent=context)


@pytest.mark.slow
def test_events_on_stdout_are_not_drawn_into_the_table(done: Place) -> None:
    """stderr is a terminal, stdout a pipe."""
    command = [sys.executable, "-m", "s2v_flow", "run", str(done.recipe), *done.where, "--events", "-"]
    screen, out, code = run_in_terminal(command, columns=120)
    assert code == 0
    assert out.startswith('{"type": "version"')
    assert "run_finished" in out
    assert '"type"' not in str(screen)


def test_a_large_file_that_has_to_be_read_is_named(tmp_path: Path) -> None:
    """With its size; a small one is not worth a word."""
    seen: list[events.Event] = []
    digests = FileDigests(tmp_path / "digests.json", seen.append)
    for name, size in (("small", 100), ("large", (64 << 20) + 1)):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, size)
        digests(tmp_path / name)
    assert seen == [events.StageStarted("", "hashing large (67.1 MB), once"), events.StageStarted("", "")]
