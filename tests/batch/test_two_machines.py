"""Two machines on one shared folder whose locks do not reach the other: each has a FUSE mount, a name and processes of
its own, on this computer."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs_for_tests import Place
from test_batch import batch, running, seeded

from s2v_flow.batch.record import Claims
from s2v_flow.cache.housekeeping import verify

SEEDS = range(1, 4)
MOUNT = 'hostname "$1"; bindfs --no-allow-other "$2" "$3" && shift 3 && exec "$@"'


def machine(name: str, real: Path, shared: Path, *command: object) -> subprocess.Popen[str]:
    """Run a command on a machine of that name, which sees the folder `real` as `shared`."""
    spaces = ("unshare", "--mount", "--pid", "--fork", "--mount-proc", "--uts")
    words = (*spaces, "sh", "-c", MOUNT, "sh", name, real, shared, *command)
    return subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Return a folder and where machines mount it; skip where they cannot, and check that locks end at the mount."""
    if shutil.which("bindfs") is None or shutil.which("unshare") is None:
        pytest.skip("bindfs or unshare is not installed")
    real, shared = tmp_path / "real", tmp_path / "shared"
    real.mkdir()
    shared.mkdir()
    (real / "lock").touch()
    take = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    with (real / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        trial = machine("trial", real, shared, sys.executable, "-c", take, shared / "lock")
        _, err = trial.communicate(timeout=60)
    if trial.returncode:
        pytest.skip(f"no folder can be mounted here: {err.strip()}")
    return real, shared


def batch_on(name: str, real: Path, shared: Path, made: Place, *more: object) -> subprocess.Popen[str]:
    where = [str(shared / "cache") if part == str(made.cache) else part for part in made.where]
    words = ("batch", shared / "recipe.yaml", "--jobs", shared / "jobs.csv", *where, "--workers", 1, *more)
    return machine(name, real, shared, sys.executable, "-m", "s2v_flow", *words)


@pytest.mark.slow
def test_two_machines_share_a_batch_on_a_folder_without_locks(
    tiny_models: Path, quick_run: Place, tmp_path: Path, folders: tuple[Path, Path]
) -> None:
    """Both end with every job, which one of them has computed and told the other; the files are as from one process."""
    real, shared = folders
    made = seeded(real, tiny_models, rows="seed\n" + "".join(f"{seed}\n" for seed in SEEDS), known=quick_run)
    machines = [batch_on(name, real, shared, made) for name in ("one", "two")]
    errors = [process.communicate(timeout=300)[1] for process in machines]
    assert [process.returncode for process in machines] == [0, 0], errors
    assert all(f"{len(SEEDS)} of {len(SEEDS)} jobs done" in err for err in errors), errors
    assert sorted(path.name for path in (real / "out").glob("*.mp4")) == [f"talk_{seed}.mp4" for seed in SEEDS]
    manifests = [json.loads(path.read_text(encoding="utf-8")) for path in made.cache.glob("runs/*/manifest.json")]
    computed = [
        node["fingerprint"]
        for found in manifests
        for node in found["nodes"]
        if node["status"] == "computed" and node["name"] == "first"
    ]
    assert sorted(set(computed)) == sorted(computed)
    assert {entry["pid"] for entry in running(Place(real, made.recipe, made.where)) if entry["state"] == "done"}
    assert any("machine t" in err or "machine o" in err for err in errors), errors
    assert verify(made.cache)["damaged"] == []
    (tmp_path / "alone").mkdir()
    rows = (real / "jobs.csv").read_text(encoding="utf-8")
    alone = seeded(tmp_path / "alone", tiny_models, rows=rows, known=quick_run)
    code, _, err = batch(alone)
    assert code == 0, err
    assert digests(real / "out") == digests(alone.folder / "out")


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.mp4"))}


def test_a_job_is_taken_once_and_comes_back_from_a_process_that_is_gone(tmp_path: Path) -> None:
    """Another's claim is passed by; one of a process that has died counts no more; old ends do not count."""
    mine = Claims(tmp_path)
    assert mine.take("1")
    other = json.loads(next(tmp_path.glob("claims-*.json")).read_bytes())
    other |= {"jobs": {"2": ["running", "", "there"], "3": ["done", "", "there"]}}
    path = tmp_path / "claims-00000000-1.json"  # of another machine
    path.write_text(json.dumps(other), encoding="utf-8")
    assert (mine.take("2"), mine.take("3")) == (False, True)
    path.write_text(json.dumps({**other, "beat": 9, "jobs": {"4": ["done", "", "there"]}}), encoding="utf-8")
    assert (mine.take("2"), mine.take("4")) == (True, False)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    own = next(file for file in tmp_path.glob("claims-*.json") if file != path)
    left = own.with_name(own.name.replace(str(os.getpid()), str(gone.pid)))
    left.write_text(json.dumps({"pid": gone.pid, "beat": 1, "jobs": {"5": ["running", "", "here"]}}), encoding="utf-8")
    assert mine.take("5")
    assert not left.exists()
    mine.close()
    assert list(tmp_path.glob("claims-*.json")) == [path]
