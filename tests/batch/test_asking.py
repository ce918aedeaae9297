"""What a batch is asked by: batch.yaml, --notify, cancel, and options that stop it."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from faults_for_tests import own_disk
from recipes_for_tests import call
from runs_for_tests import Place
from terminal import run_in_terminal
from test_batch import batch, entries, program, running, seeded, until, written

from s2v_flow.batch.dispatch import Told
from s2v_flow.batch.plan import BatchFile
from s2v_flow.batch.record import read_batch
from s2v_flow.batch.worker import Outcome
from s2v_flow.cli.board import Board, status_lines
from s2v_flow.files.lock import held

FILE = """batch: 1
recipes: [rec*.yaml]
set: {nodes.first.cfg: 1.0}
axes: {seed: 1..2}
retries: 0
"""


def asked(made: Place, text: str, *arguments: object) -> tuple[int, str, str]:
    (made.folder / "batch.yaml").write_text(text, encoding="utf-8")
    return call("batch", made.folder / "batch.yaml", *made.where, *arguments)


def test_a_batch_file_says_what_the_options_say(tiny_models: Path, tmp_path: Path) -> None:
    """Recipes beside the file, axes and changes; the command line's are laid over them."""
    (tmp_path / "of [2026]").mkdir()
    made = seeded(tmp_path / "of [2026]", tiny_models)
    code, _, err = asked(made, FILE, "--dry-run", "--set", "nodes.first.steps=3")
    assert code == 0, err
    assert [Path(job["outputs"][0]).name for job in written(made)["jobs"]] == ["talk_1.seed=1.mp4", "talk_2.seed=2.mp4"]
    assert written(made)["options"]["overrides"] == [
        ["set-json", "nodes.first.cfg=1.0"],
        ["set", "nodes.first.steps=3"],
    ]


def test_the_batch_file_of_the_docs_is_one() -> None:
    """Every key of it, with a value of its type."""
    text = (Path(__file__).parent.parent.parent / "docs" / "scale.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    found = BatchFile.model_validate(yaml.safe_load(block))
    assert found.model_fields_set == set(BatchFile.model_fields) - {"set", "devices", "address", "slurm"}


@pytest.mark.parametrize("jobs", ["jobs.csv", '[{seed: 1}, {seed: 2, nodes.positive.text: "Hm, \\"so\\"."}]'])
def test_a_batch_file_names_its_table_or_holds_its_jobs(tiny_models: Path, tmp_path: Path, jobs: str) -> None:
    """A row a job; `--jobs` would take its place."""
    made = seeded(tmp_path, tiny_models)
    code, _, err = asked(made, f"batch: 1\nrecipes:\n- recipe.yaml\njobs: {jobs}\n", "--dry-run")
    assert code == 0, err
    assert [Path(job["outputs"][0]).name for job in written(made)["jobs"]] == ["talk_1.mp4", "talk_2.mp4"]
    assert written(made)["jobs"][0]["origin"].startswith(str(tmp_path))


def test_mistakes_of_a_batch_file_are_told_together_with_their_lines(tiny_models: Path, tmp_path: Path) -> None:
    """Exit code 3; unknown keys, wrong types, and what no such file may say."""
    text = "batch: 1\nrecipes: talk.yaml\nworker: 2\nretries: -1\nfolder: x\n_folder: x\njobs:\n- seed\n"
    code, out, err = asked(seeded(tmp_path, tiny_models), text, "--dry-run")
    assert (code, out) == (3, "")
    for line in ("batch.yaml:2:", "batch.yaml:3:", "batch.yaml:4:", "batch.yaml:5:", "batch.yaml:6:", "batch.yaml:8:"):
        assert line in err, err
    assert "the keys are batch, recipes" in err


@pytest.fixture
def stored(quick_run: Place, tmp_path: Path) -> Place:
    """Return a batch of which all is there: it ends without a worker."""
    from runs_for_tests import copied

    made = copied(quick_run, tmp_path)
    (tmp_path / "jobs.csv").write_text("nodes.first.cfg\n1.0\n", encoding="utf-8")
    return made


def test_the_end_is_told_to_a_command_without_a_shell(stored: Place) -> None:
    """Its last argument is the line that is printed; nothing of it is expanded."""
    target = stored.folder / "told.json"
    show = "import json, sys; json.dump(sys.argv[1:], open(sys.argv[1], 'w'))"
    command = shlex.join([sys.executable, "-c", show, str(target), "$HOME; touch pwned"])
    code, _, err = batch(stored, "--notify", command)
    assert code == 0, err
    told = json.loads(target.read_text(encoding="utf-8"))
    assert told[1] == "$HOME; touch pwned"
    assert told[2].startswith("1 of 1 job done, 0 failed, in ")
    assert told[2] in err


@pytest.mark.parametrize(
    ("command", "said"), [("false", "exit code 1"), ("no-such-program", "No such file"), ("'", "No closing quotation")]
)
def test_a_notice_that_fails_is_a_warning(stored: Place, command: str, said: str) -> None:
    """The batch has done what it was asked for."""
    code, _, err = batch(stored, "--notify", command)
    assert (code, f"warning: --notify {command}: " in err, said in err) == (0, True, True), err


def test_what_does_not_run_cannot_be_cancelled(stored: Place) -> None:
    """Neither a batch that ended, nor one whose process was killed, whatever has its number now."""
    assert batch(stored)[0] == 0
    assert "nothing runs this batch" in call("batch", "cancel", stored.video.parent)[2]
    left = stored.video.parent / "batch" / "running.json"
    left.write_text(json.dumps({"pid": os.getpid(), "host": os.uname().nodename}), encoding="utf-8")
    assert "nothing runs this batch" in call("batch", "cancel", stored.video.parent)[2]
    with held(left):  # by a container whose name is ours, and whose process numbers are not
        code, _, err = call("batch", "cancel", stored.video.parent)
        assert (code, f"the batch runs on {os.uname().nodename}" in err) == (1, True)
    left.write_text(json.dumps({"pid": os.getpid(), "host": "elsewhere"}), encoding="utf-8")
    code, _, err = call("batch", "cancel", stored.video.parent)
    assert (code, "the batch runs on elsewhere" in err) == (1, True)


def test_the_board_tells_what_is_done_what_failed_and_what_is_left(stored: Place) -> None:
    """Lines with a clock where it is no terminal; the rest is taken from what the jobs before took, by their length."""
    assert batch(stored, "--dry-run")[0] == 0
    one = read_batch(stored.video.parent)
    jobs = tuple(replace(one.jobs[0], number=number, is_done=False, frames=20 * number) for number in (1, 2, 3))
    made = replace(one, jobs=jobs)
    made.logs.mkdir(exist_ok=True)
    made.log(jobs[1]).write_text("\n".join(f"line {number}" for number in range(9)), encoding="utf-8")
    stream = io.StringIO()
    board = Board(made, 1, stream)
    for job, state, outcome in (
        (jobs[0], "begins", Outcome(0)),
        (jobs[0], "done", Outcome(0, "", ("a.mp4",))),
        (jobs[1], "failed", Outcome(1, "no")),
    ):
        board(Told(job, state, 1, 7, "cpu", 10.0 * job.number, outcome))
        made.note(job, {"begins": "running"}.get(state, state), worker=1, seconds=10.0 * job.number, message="")
    board(Told(jobs[2], "begins", 1, 7, "cpu"))
    made.note(jobs[2], "running", worker=1)
    board.close()
    lines = stream.getvalue().splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d worker 1 \(cpu, process 7\): job 1 \(.*\) begins", lines[0])
    assert lines[1].endswith("done after 10 s a.mp4; 1 of 3 jobs done, about 50 s left")
    assert lines[2].endswith("failed after 20 s: no; 1 of 3 jobs done, 1 failed, about 30 s left")
    assert lines[3:8] == [f"    line {number}" for number in range(4, 9)]
    told = status_lines(made)
    assert [line.split()[0] for line in told] == ["done", "failed", *["line"] * 5, "running", "1"]
    assert told[-1] == "1 of 3 jobs done, 1 failed, 1 running, about 30 s left"


def test_a_disk_that_is_too_small_is_told_before_anything_runs(tiny_models: Path, tmp_path: Path) -> None:
    """Exit code 6 where one job alone does not fit; a warning where they do not fit together."""
    disk = tmp_path / "disk"
    disk.mkdir()
    with own_disk(disk, 16 << 10) as is_mounted:
        if not is_mounted:
            pytest.skip("only root can mount a small disk for these tests")
        made = seeded(tmp_path, tiny_models)
        made = replace(made, where=tuple(part.replace(str(made.cache), str(disk / "cache")) for part in made.where))
        assert batch(made, "--dry-run")[0] == 6
        assert not (tmp_path / "out").exists()
        subprocess.run(["mount", "-o", "remount,size=300k", str(disk)], check=True)
        code, _, err = batch(made, "--dry-run")
        assert (code, "warning: the jobs need " in err) == (0, True), err


@pytest.mark.slow
def test_in_a_terminal_the_board_is_a_table_of_workers(tiny_models: Path, quick_run: Place, tmp_path: Path) -> None:
    """While jobs run; their ends stand above it, begins do not."""
    made = seeded(tmp_path, tiny_models, known=quick_run)
    command = ["batch", str(made.recipe), "--jobs", str(made.folder / "jobs.csv"), *made.where]
    screen, _, code = run_in_terminal([sys.executable, "-m", "s2v_flow", *command], columns=240)
    text = str(screen)
    assert code == 0, text
    assert re.search(r"^worker 1 \(cpu\)  job 1 \(.*\)  ", screen.ever.replace("\r", "\n"), re.MULTILINE), screen.ever
    assert re.search(r"^1 of 2 jobs done, 1 running, about .* left; .* so far", screen.ever, re.MULTILINE), screen.ever
    assert "begins" not in text
    assert re.search(r"^2 of 2 jobs done; .* so far$", text, re.MULTILINE), text


@pytest.mark.slow
def test_a_running_batch_is_cancelled_at_the_end_of_a_step(tiny_models: Path, quick_run: Place, tmp_path: Path) -> None:
    """Exit code 143, no worker left; `retry` finishes it."""
    made = seeded(tmp_path, tiny_models, known=quick_run)
    process = program(made)
    (pid,) = until(lambda: {e["pid"] for e in running(made)}, process)
    code, _, err = call("batch", "cancel", tmp_path / "out")
    assert (code, f"process {process.pid} stops" in err) == (0, True), err
    _, err = process.communicate(timeout=120)
    assert (process.returncode, Path(f"/proc/{pid}").exists()) == (143, False), err
    code, _, err = call("batch", "retry", tmp_path / "out")
    assert code == 0, err


@pytest.mark.slow
def test_a_job_that_takes_too_long_is_stopped_and_the_first_failure_ends_the_batch(
    tiny_models: Path, tmp_path: Path
) -> None:
    """--timeout counts as a failure, --fail-fast leaves the second job undone."""
    made = seeded(tmp_path, tiny_models)
    code, out, err = batch(made, "--timeout", 0.5, "--retries", 0, "--fail-fast", "--json")
    states = [(job["state"], job.get("message", "")) for job in json.loads(out)["jobs"]]
    assert code == 1, err
    assert states[0] == ("failed", "took longer than 0.5 s (--timeout)")
    assert states[1][0] in ("waiting", "stopped")


@pytest.mark.slow
def test_a_worker_asked_to_leave_a_resume_point_costs_no_retry(
    tiny_models: Path, quick_run: Place, tmp_path: Path
) -> None:
    """SIGUSR1: the worker goes with 75, another one goes on with the job."""
    made = seeded(tmp_path, tiny_models, rows="seed\n1\n", known=quick_run)
    process, before = program(made, "--retries", 0), entries(made)
    (pid,) = until(lambda: {e["pid"] for e in running(made)}, process)
    until(lambda: entries(made) - before, process)
    os.kill(pid, signal.SIGUSR1)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert len({e["pid"] for e in running(made)}) == 2
