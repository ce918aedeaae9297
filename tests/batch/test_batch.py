"""Batches through the command line: what is planned and written down, and real worker processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from recipes_for_tests import call, tiny, write_recipe
from runs_for_tests import QUICK, Place, copied, copy_encoded, place

from s2v_flow.batch.record import read_batch
from s2v_flow.cache.housekeeping import verify

SEEDED = {
    **QUICK,
    "first": {**(QUICK["first"] or {}), "seed": "$params.seed"},
    "video": {"preset": "ultrafast", "file": "out/talk_${params.seed}.mp4"},
}


def seeded(
    folder: Path, models: Path, changes: Any = SEEDED, rows: str = "seed\n1\n2\n", known: Place | None = None
) -> Place:
    """Write a recipe and a table of its seeds, with what is encoded in the cache of `known` in its own."""
    made = place(folder, models, changes, extra="params: {seed: 20}")
    (folder / "jobs.csv").write_text(rows, encoding="utf-8")
    if known is not None:
        copy_encoded(known.cache, made.cache)
    return made


def batch(made: Place, *arguments: object) -> tuple[int, str, str]:
    return call("batch", made.recipe, "--jobs", made.folder / "jobs.csv", *made.where, *arguments)


def written(made: Place) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((made.folder / "out" / "batch.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture
def stored(quick_run: Place, tmp_path: Path) -> Place:
    """Return a recipe of which all but the video's file is there, and a table that names it."""
    made = copied(quick_run, tmp_path)
    made.video.unlink()
    (tmp_path / "jobs.csv").write_text("nodes.first.cfg\n1.0\n", encoding="utf-8")
    return made


def test_a_worker_delivers_what_is_stored_and_the_next_batch_has_nothing_to_do(stored: Place) -> None:
    """A real process; the same command again starts none."""
    code, out, err = batch(stored, "--json")
    assert code == 0, err
    (job,) = json.loads(out)["jobs"]
    assert (job["state"], job["outputs"]) == ("done", [str(stored.video)])
    assert stored.video.is_file()
    assert "worker 1 (cpu, process " in err
    assert (stored.video.parent / "batch" / "job-00001.log").is_file()
    code, _, err = batch(stored)
    assert (code, "worker 1 (" in err) == (0, False), err
    assert "1 of 1 job done, 0 failed" in err
    assert call("batch", "status", stored.video.parent)[:2] == (
        0,
        f"done      job 1 ({stored.recipe}, {stored.folder / 'jobs.csv'}:2)\n1 of 1 job done\n",
    )


def test_a_batch_is_written_down_before_anything_runs(tiny_models: Path, tmp_path: Path) -> None:
    """A line a job: recipe, overrides, fingerprints, cost, output."""
    made = seeded(tmp_path, tiny_models)
    code, out, _ = batch(made, "--dry-run")
    assert (code, out) == (0, f"{tmp_path / 'out' / 'batch.json'}\n")
    first, second = written(made)["jobs"]
    assert first["overrides"] == [["set", "seed=1"]]
    assert first["outputs"] == [str(tmp_path / "out" / "talk_1.mp4")]
    assert (first["frames"], first["seconds"], first["is_done"]) == (20, None, False)
    assert first["fingerprints"]["positive"] == second["fingerprints"]["positive"]
    lines = (tmp_path / "out" / "batch.json").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line.rstrip(","))["number"] for line in lines[1:-1]] == [1, 2]


def test_another_batch_in_the_same_folder_is_numbered(tiny_models: Path, tmp_path: Path) -> None:
    """The same one again keeps its name."""
    made = seeded(tmp_path, tiny_models)
    assert batch(made, "--dry-run")[1] == batch(made, "--dry-run")[1]
    (tmp_path / "jobs.csv").write_text("seed\n3\n", encoding="utf-8")
    assert batch(made, "--dry-run")[1] == f"{tmp_path / 'out' / 'batch.2.json'}\n"
    (tmp_path / "more.yaml").write_text("nodes: {first: {steps: 3}}\n", encoding="utf-8")
    assert batch(made, "--dry-run", "-f", tmp_path / "more.yaml")[1] == f"{tmp_path / 'out' / 'batch.3.json'}\n"


def test_a_job_of_a_changed_recipe_is_another_one(tiny_models: Path, tmp_path: Path) -> None:
    """What another process says of the job before the change does not count; its file keeps its name."""
    made = seeded(tmp_path, tiny_models, rows="seed\n1\n")
    path = Path(batch(made, "--dry-run")[1].strip())
    (before,) = read_batch(path).jobs
    text = made.recipe.read_text(encoding="utf-8")
    made.recipe.write_text(text.replace('"steps": 2', '"steps": 3'), encoding="utf-8")
    assert batch(made, "--dry-run")[1].strip() == str(path)
    (after,) = read_batch(path).jobs
    assert before.key != after.key
    assert batch(made, "--dry-run")[1].strip() == str(path)
    assert read_batch(path).jobs[0].key == after.key


def test_the_jobs_of_a_folder_that_is_gone_are_not_run_again(
    tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their paths start there: exit code 4, and no worker."""
    (tmp_path / "here").mkdir()
    made = seeded(tmp_path / "here", tiny_models)
    monkeypatch.chdir(made.folder)
    assert batch(made, "--dry-run")[0] == 0
    monkeypatch.chdir(tmp_path)
    made.folder.rename(tmp_path / "there")
    code, _, err = call("batch", "retry", tmp_path / "there" / "out")
    assert (code, f"start at {made.folder}, which is gone" in err) == (4, True), err


def test_states_follow_the_lines_of_a_process_whatever_its_clock_does(tiny_models: Path, tmp_path: Path) -> None:
    """A clock that is set back an hour makes no job run for ever."""
    made = seeded(tmp_path, tiny_models, rows="seed\n1\n")
    found = read_batch(Path(batch(made, "--dry-run")[1].strip()))
    entries = [("running", "12:00"), ("done", "11:00")]
    lines = [json.dumps({"job": 1, "state": state, "time": f"2026-11-29T{at}:00+00:00"}) for state, at in entries]
    (found.logs / "results-00000000-1.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert found.states()[1]["state"] == "done"


def test_what_a_killed_process_ran_is_stopped(tiny_models: Path, tmp_path: Path) -> None:
    """Once it is dead; what lives, or may live elsewhere, runs."""
    made = seeded(tmp_path, tiny_models, rows="seed\n1\n")
    path = Path(batch(made, "--dry-run")[1].strip())
    note = "from pathlib import Path; import sys; from s2v_flow.batch.record import read_batch\n"
    note += "made = read_batch(Path(sys.argv[1])); made.note(made.jobs[0], 'running', worker=1)\n"
    note += "assert made.states()[1]['state'] == 'running'"
    subprocess.run([sys.executable, "-c", note, str(path)], check=True)
    assert read_batch(path).states()[1]["state"] == "stopped"
    (left,) = path.with_suffix("").glob("results-*.jsonl")
    left.rename(left.with_name("results-00000000-1.jsonl"))
    assert read_batch(path).states()[1]["state"] == "running"
    assert call("batch", "status", path)[1].startswith("running   job 1 (")


def test_cells_are_jobs_with_the_names_that_run_gives(tiny_models: Path, tmp_path: Path) -> None:
    """Each recipe of a pattern, each value of -m."""
    made = place(tmp_path, tiny_models)
    write_recipe(tmp_path, tiny(video={"file": "out/other.mp4"}), name="recipe2.yaml")
    arguments = ("batch", tmp_path / "rec*.yaml", "-m", "nodes.first.seed=3..4", *made.where, "--dry-run")
    assert call(*arguments)[0] == 0
    names = [Path(output).name for job in written(made)["jobs"] for output in job["outputs"]]
    assert names == ["talk.seed=3.mp4", "talk.seed=4.mp4", "other.seed=3.mp4", "other.seed=4.mp4"]
    code, out, _ = call("plan", made.recipe, "-m", "nodes.first.seed=3..4", *made.where, "--json")
    assert (code, json.loads(out)["cells"]) == (0, ["seed=3", "seed=4"])


def test_two_jobs_with_one_output_are_refused_before_anything_runs(tiny_models: Path, tmp_path: Path) -> None:
    """Both are named, with their lines."""
    made = place(tmp_path, tiny_models)
    (tmp_path / "jobs.csv").write_text("nodes.first.seed\n1\n2\n", encoding="utf-8")
    code, _, err = batch(made)
    assert code == 3, err
    assert f"job 1 ({made.recipe}, {tmp_path / 'jobs.csv'}:2) and job 2 ({made.recipe}, " in err
    assert "talk.mp4" in err
    assert not (tmp_path / "out").exists()
    assert not made.cache.joinpath("entries").exists()


def test_missing_files_are_told_with_the_jobs_that_need_them(tiny_models: Path, tmp_path: Path) -> None:
    """Exit code 4, nothing written."""
    made = seeded(tmp_path, tiny_models, rows="seed,nodes.voice.file\n1,\n2,nobody.wav\n")
    code, _, err = batch(made)
    assert code == 4
    assert f"nobody.wav (needed by job 2 ({made.recipe}, {tmp_path / 'jobs.csv'}:3))" in err
    assert not (tmp_path / "out").exists()


def test_mistakes_of_all_jobs_are_told_at_once(tiny_models: Path, tmp_path: Path) -> None:
    """Exit code 3; each mistake once, with its jobs."""
    made = seeded(tmp_path, tiny_models, rows="seed,nodes.first.steps\n1,-3\n2,-3\n3,many\n")
    code, _, err = batch(made)
    assert code == 3
    assert f"jobs.csv:2), job 2 ({made.recipe}" in err
    assert "many" in err
    assert "2 mistakes; nothing was run" in err


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("jobs.csv", b"seed,cfg\n1\n", "jobs.csv:2: 1 cells, the header has 2"),
        ("jobs.csv", b"seed,seed\n1,2\n", "empty or given twice"),
        ("jobs.csv", b"seed\n", "there are no jobs in it"),
        ("jobs.csv", b'seed\n"1\n', "this is not CSV"),
        ("jobs.csv", b"seed\n\xff\n", "is not UTF-8"),
        ("jobs.jsonl", b"{}\n[1]\n", "jobs.jsonl:2: expected an object, got a list"),
        ("jobs.jsonl", b"{seed: 1}\n", "jobs.jsonl:1: this is not JSON"),
        ("jobs.txt", b"1\n", "a .csv or a .jsonl file"),
        ("jobs.csv", None, "cannot be read"),
    ],
)
def test_a_faulty_table_is_a_mistake_with_its_line(
    tiny_models: Path, tmp_path: Path, name: str, content: bytes | None, said: str
) -> None:
    """Exit code 3, and no traceback."""
    made = place(tmp_path, tiny_models)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    code, _, err = call("batch", made.recipe, "--jobs", tmp_path / name, *made.where)
    assert (code, said in err) == (3, True), err


def test_a_table_may_have_semicolons(tiny_models: Path, tmp_path: Path) -> None:
    """As spreadsheets write it where the comma stands in numbers."""
    made = seeded(tmp_path, tiny_models, rows="seed;nodes.positive.text\n1;Hello, you\n")
    assert batch(made, "--dry-run")[0] == 0
    assert written(made)["jobs"][0]["overrides"] == [["set", "seed=1"], ["set", "nodes.positive.text=Hello, you"]]


def test_json_lines_keep_their_types_and_an_empty_cell_changes_nothing(tiny_models: Path, tmp_path: Path) -> None:
    """A text with quotes, a list, a number."""
    made = seeded(tmp_path, tiny_models, rows="seed,nodes.positive.text\n1,\n")
    text = 'She says "oh,\nno".'
    row = {"seed": 7, "nodes.positive.text": text, "nodes.talk.seed": [3, 4]}
    (tmp_path / "jobs.jsonl").write_text(json.dumps(row) + "\n\n", encoding="utf-8")
    code, _, err = call("batch", made.recipe, "--jobs", tmp_path / "jobs.jsonl", *made.where, "--dry-run")
    assert code == 0, err
    assert len(written(made)["jobs"][0]["overrides"]) == 3
    assert batch(made, "--dry-run", "--output-dir", tmp_path / "other")[0] == 0
    other = json.loads((tmp_path / "other" / "batch.json").read_text(encoding="utf-8"))
    assert other["jobs"][0]["overrides"] == [["set", "seed=1"]]


@pytest.mark.slow
def test_a_job_that_cannot_succeed_is_not_tried_again(stored: Place) -> None:
    """A missing input after the plan: exit code 4 of the job, 1 of the batch; `retry` runs it once it is back."""
    assert batch(stored, "--dry-run")[0] == 0
    voice = stored.folder / "voice.wav"
    voice.rename(stored.folder / "gone.wav")
    path = stored.video.parent / "batch.json"
    code, out, err = call("batch", "retry", path, "--retries", 3, "--json")
    (job,) = json.loads(out)["jobs"]
    assert (code, job["state"], job["code"], job["attempt"]) == (1, "failed", 4, 1), err
    assert "missing: voice.wav" in err
    (stored.folder / "gone.wav").rename(voice)
    text = stored.recipe.read_text(encoding="utf-8")
    stored.recipe.write_text(text.replace('"preset": "ultrafast"', '"preset": "fast"'), encoding="utf-8")
    code, _, err = call("batch", "retry", path)
    assert (code, stored.video.is_file()) == (0, True), err
    assert "another one than when the batch was planned" in err


def test_what_is_no_batch_is_said(tmp_path: Path) -> None:
    """A folder without one, and a file of something else."""
    assert call("batch", "status", tmp_path)[0] == 4
    given = {
        name: []
        for name in (*["profiles", "axes", "override_files", "models_dirs", "extra_model_paths", "input_dirs"],)
    }
    given |= dict.fromkeys(("cache_remote", "cache_limit", "output_dir", "cache_dir"))
    given |= {"device": "cpu", "overwrite": False, "overrides": []}
    job = {"number": 1, "recipe": "a.yaml", "overrides": [["set", "a=1"]], "axes": [], "outputs": []}
    batch = {"folder": ".", "options": given, "jobs": [job]}
    whole, deep = json.dumps(batch), "[" * 100_000
    for changes in ({"number": []}, {"recipe": 5}, {"origin": ["x"]}, {"fingerprints": "x"}, {"axes": "x"}):
        batches = json.dumps({**batch, "jobs": [{**job, **changes}]})
        assert status_of(tmp_path, batches) == (4, True), changes
    assert status_of(tmp_path, "{}") == status_of(tmp_path, deep) == (4, True)
    assert status_of(tmp_path, whole) == (0, False)


def status_of(folder: Path, text: str) -> tuple[int, bool]:
    (folder / "batch.json").write_text(text, encoding="utf-8")
    code, _, err = call("batch", "status", folder)
    return code, "this is no batch.json that s2vflow wrote" in err


def program(made: Place, *arguments: object) -> subprocess.Popen[str]:
    command = ["batch", made.recipe, "--jobs", made.folder / "jobs.csv", *made.where, *arguments]
    return subprocess.Popen(
        [sys.executable, "-m", "s2v_flow", *map(str, command)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_worker_that_cannot_be_started_is_an_error_with_its_reason(tiny_models: Path, tmp_path: Path) -> None:
    """Where a user may have 12 open files."""
    made = seeded(tmp_path, tiny_models)
    limited = ["prlimit", "--nofile=12", sys.executable, "-m", "s2v_flow", "batch", made.recipe, *made.where]
    command = [*map(str, limited), "--jobs", str(tmp_path / "jobs.csv")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, "worker 1 (cpu) cannot be started: Too many open files" in done.stderr) == (1, True), done


def until(condition: Any, process: subprocess.Popen[str], seconds: float = 120.0) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(process.communicate())


def running(made: Place) -> list[dict[str, Any]]:
    paths = (made.folder / "out" / "batch").glob("results-*.jsonl")
    return [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]


def entries(made: Place) -> set[str]:
    return {path.stem for path in made.cache.glob("entries/??/*.json")}


@pytest.mark.slow
def test_a_killed_worker_costs_its_job_a_retry(tiny_models: Path, quick_run: Place, tmp_path: Path) -> None:
    """kill -9 while the second job samples; the batch ends well, with every video and nothing damaged."""
    made = seeded(tmp_path, tiny_models, rows="seed\n1\n2\n3\n", known=quick_run)
    process = program(made)

    def second() -> int:
        begun = [entry for entry in running(made) if entry["state"] == "running"]
        return begun[1]["pid"] if len(begun) > 1 else 0

    pid = until(second, process)
    os.kill(pid, signal.SIGKILL)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "failed, will be tried again" in err
    assert "killed by SIGKILL" in err
    assert len({entry["pid"] for entry in running(made)}) == 2
    assert all((tmp_path / "out" / f"talk_{seed}.mp4").is_file() for seed in (1, 2, 3))
    assert verify(made.cache)["damaged"] == []


@pytest.mark.slow
def test_two_workers_compute_equal_nodes_once_and_ctrl_c_stops_both(
    tiny_models: Path, quick_run: Place, tmp_path: Path
) -> None:
    """Stopped, no process is left, and the same command finishes; the portrait was encoded once for all jobs."""
    made = seeded(tmp_path, tiny_models, rows="seed\n1\n2\n3\n", known=quick_run)
    (portrait,) = (path for path in made.cache.glob("entries/??/*.json") if '"encode_image"' in path.read_text())
    portrait.unlink()
    process, before = program(made, "--workers", 2), entries(made) | {portrait.stem}
    until(lambda: entries(made) - before, process)
    pids = {entry["pid"] for entry in running(made)}
    assert len(pids) == 2
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    code, _, err = batch(made, "--workers", 2)
    assert code == 0, err
    assert "3 of 3 jobs done" in err
    manifests = [json.loads(path.read_text(encoding="utf-8")) for path in made.cache.glob("runs/*/manifest.json")]
    computed = [node["name"] for found in manifests for node in found["nodes"] if node["status"] == "computed"]
    assert (computed.count("reference"), computed.count("first")) == (1, 3)
