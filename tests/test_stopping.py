"""Stopping the program: signals, exit codes, what the plan says afterwards, and that nothing is computed twice."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from recipes_for_tests import SIGNALS, call, options, tiny, write_recipe, write_voice

from s2v_flow import api
from s2v_flow.cli.progress import Progress
from s2v_flow.errors import ExitCode
from s2v_flow.graph.events import Event, NodeStarted, StepDone
from s2v_flow.graph.interrupt import StoppedError, StopRequest

STEPS = 4
LATENT = {"kind": "save_latent", "latent": "$talk", "file": "out/talk.latent"}
STOPS = [
    (signal.SIGINT, 130),
    *(
        pytest.param(*it, marks=pytest.mark.slow)
        for it in ((signal.SIGTERM, 143), (signal.SIGHUP, 143), (signal.SIGUSR1, 75))
    ),
]


class Scene:
    """A recipe of two chunks, its uninterrupted latent, and a way to send signals at a step."""

    def __init__(self, folder: Path, models: Path) -> None:
        write_voice(folder / "voice.wav", 0.4)
        changes = tiny(first={"steps": STEPS}, talk={"chunks": 2}, frames=None, video=None, all=LATENT)
        self.folder, self.models, self.recipe = folder, models, write_recipe(folder, changes)
        api.run(self.recipe, options(folder, models, folder / "whole"))
        self.whole = self.latent()

    def latent(self) -> bytes:
        path = self.folder / "out/talk.latent"
        payload = path.read_bytes()
        path.unlink()
        return payload

    def where(self, cache: Path) -> list[str]:
        return ["--models-dir", str(self.models), "--cache-dir", str(cache), "--device", "cpu"]

    def at(self, monkeypatch: pytest.MonkeyPatch, matches: Callable[[Event], bool], *numbers: int) -> list[StepDone]:
        """Send signals to this process when an event matches; return the steps that are taken."""
        shows, steps = Progress.__call__, []

        def show(progress: Progress, event: Event) -> None:
            shows(progress, event)
            if isinstance(event, StepDone):
                steps.append(event)
            if matches(event):
                for number in numbers:
                    os.kill(os.getpid(), number)

        monkeypatch.setattr(Progress, "__call__", show)
        return steps


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> Scene:
    return Scene(tmp_path_factory.mktemp("stopping"), tiny_models)


def is_step(event: Event, node: str, step: int) -> bool:
    return isinstance(event, StepDone) and (event.node, event.step) == (node, step)


@pytest.mark.parametrize(("number", "code"), STOPS, ids=lambda value: str(value))
def test_a_signal_stops_at_the_steps_end_and_the_same_command_goes_on(
    number: int, code: int, scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step is taken once, over both commands, and the latent is the uninterrupted run's, bit for bit."""
    where = scene.where(tmp_path)
    with monkeypatch.context() as patched:
        steps = scene.at(patched, lambda event: is_step(event, "talk[1]", 2), number)
        found, out, err = call("run", scene.recipe, *where)
    assert (found, out) == (code, "")
    assert "talk[1] after step 2 of 4, resume point written" in err.splitlines()[-1]
    assert err.splitlines()[-1].endswith("the same command goes on from there")
    plan = json.loads(call("plan", scene.recipe, *where, "--json")[1])
    statuses = {node["name"]: (node["status"], node["reason"]) for node in plan["nodes"]}
    assert statuses["first"] == ("HIT", "stored")
    assert statuses["talk[1]"] == ("RESUME", "resume point at step 2 of 4")
    assert statuses["talk[2]"][0] == "RUN"
    text = call("plan", scene.recipe, *where)[1]
    assert "  RESUME  talk[1]" in text
    assert re.search(r"^\d+ stored, 3 to run;", text, re.MULTILINE)
    with monkeypatch.context() as patched:
        steps += scene.at(patched, lambda event: False)
        found, out, err = call("run", scene.recipe, *where)
    assert found == 0, err
    assert "talk[1]: goes on from the resume point after step 2 of 4" in err
    assert scene.latent() == scene.whole
    assert not list((tmp_path / "checkpoints").glob("*/*"))


@pytest.mark.slow
def test_the_second_signal_stops_at_once(scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a checkpoint, and with the chunks that were finished."""
    scene.at(monkeypatch, lambda event: is_step(event, "talk[1]", 2), signal.SIGINT, signal.SIGINT)
    code, _, err = call("run", scene.recipe, *scene.where(tmp_path))
    assert code == 130
    assert err.splitlines()[-1].startswith("interrupted; what was finished is stored")
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), STOPS, ids=lambda value: str(value))
def test_outside_of_sampling_the_first_signal_stops_at_once(
    number: int, code: int, scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading a model, say, has no steps."""
    scene.at(monkeypatch, lambda event: isinstance(event, NodeStarted) and event.node == "talk[1]", number)
    found, _, err = call("run", scene.recipe, *scene.where(tmp_path))
    assert found == code
    assert "what was finished is stored, and the same command goes on from there" in err.splitlines()[-1]


@pytest.mark.slow
def test_from_python_a_callable_stops_a_run(scene: Scene, tmp_path: Path) -> None:
    """At the step's end, and before the next node where the last step was just taken."""
    for stop_at, where in ((3, "first after step 3 of 4, resume point written"), (STEPS, r"before talk\[1\]")):
        seen: list[StepDone] = []
        listen = lambda event, seen=seen: seen.append(event) if isinstance(event, StepDone) else None  # noqa: E731
        given = options(
            tmp_path, scene.models, should_stop=lambda seen=seen, at=stop_at: bool(seen) and seen[-1].step == at
        )
        with pytest.raises(StoppedError, match=where) as caught:
            api.run(scene.recipe, given, listen)
        assert caught.value.exit_code == ExitCode.INTERRUPTED
    assert [event.step for event in seen] == [4], "the second run took the one step that was left"


def test_a_stop_request_waits_only_inside_its_block() -> None:
    """And only the first signal does."""
    told: list[str] = []
    stop = StopRequest(told.append)
    with stop.patiently():
        assert not stop()
        stop.handle(signal.SIGTERM, None)
        assert stop()
        with pytest.raises(StoppedError) as caught:
            stop.handle(signal.SIGTERM, None)
    assert caught.value.exit_code == ExitCode.TERMINATED
    assert len(told) == 1
    with pytest.raises(StoppedError):
        StopRequest(told.append).handle(signal.SIGINT, None)


def test_what_nohup_ignores_is_ignored_still() -> None:
    """A terminal that is closed stops other runs."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        for handler, is_ignored in ((signal.SIG_IGN, True), (signal.SIG_DFL, False)):
            signal.signal(signal.SIGHUP, handler)
            StopRequest(print).install()
            assert (signal.getsignal(signal.SIGHUP) == signal.SIG_IGN) is is_ignored
    finally:
        for number, was in before.items():
            signal.signal(number, was)
