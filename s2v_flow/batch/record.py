"""What is written down of a batch: batch.json with its jobs, and beside it a folder of logs and what became of each.

Several processes may run one batch, on machines that share that folder, whose locks may not work. Each says which jobs
it has in a file of its own, whose beat counts up. Nobody waits for another's job: another one is taken. Two that take a
job at the same moment may both run it; the store lets the first result count.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from operator import itemgetter
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from s2v_flow.errors import MissingError, S2VFlowError
from s2v_flow.files.atomic import TakenError, free_name, is_alive, machine_id, put_new, temporary, write_whole, writing
from s2v_flow.files.lock import held, is_held
from s2v_flow.options import Options
from s2v_flow.recipe.argument import Override
from s2v_flow.version import __version__

NAME = "batch.json"
NEVER_AGAIN = frozenset({2, 3, 4, 5, 6, 8})  # exit codes that the same job would give again
BEAT_SECONDS = 2.0
STALE_SECONDS = 30.0  # without a beat: its process, or its machine, is gone
_PROCESS = f"-{machine_id()}-{os.getpid()}"
_PATHS = ("override_files", "models_dirs", "extra_model_paths", "input_dirs")
_PATH = ("output_dir", "cache_dir")
_CHANGES = ("profiles", "override_files", "overrides", "axes")  # of every recipe
_PLAIN = ("profiles", "axes", "cache_remote", "cache_limit", "device", "vram", "overwrite")


@dataclass(frozen=True)
class Job:
    """One recipe, the changes that are this job's own, and what its plan says.

    `axes` are those of its cell ("seed=1"), `origin` says where the job was written ("jobs.csv:4"). `group` is equal
    for jobs that need the same model and LoRA files. `seconds` is the estimate, `frames` the length of the video.
    """

    number: int
    recipe: str
    overrides: tuple[Override, ...] = ()
    axes: tuple[str, ...] = ()
    origin: str = ""
    group: str = ""
    seconds: float | None = None
    frames: int | None = None
    disk_bytes: int = 0  # that the cache will hold of it, at least
    fingerprints: Mapping[str, str] = field(default_factory=dict)  # of plan nodes, as far as they are known
    outputs: tuple[str, ...] = ()
    is_done: bool = False  # stored and delivered before the batch began
    asked: str = ""  # a digest of the plan's nodes and their fields: what is to be computed, on whatever device

    @property
    def key(self) -> str:
        """What the job is among processes that run the batch: its number, and what is asked."""
        return f"{self.number} {self.asked}"

    @property
    def name(self) -> str:
        """The job for people: "job 3 (talk.yaml, seed=1, jobs.csv:4)"."""
        return f"job {self.number} ({', '.join(part for part in (self.recipe, *self.axes, self.origin) if part)})"

    def options(self, given: Options) -> Options:
        """Return a batch's options with the job's own changes."""
        axes = self.axes or given.axes
        return replace(given, overrides=(*given.overrides, *self.overrides), axes=axes)

    def to_json(self) -> dict[str, Any]:
        """Return the job's entry in batch.json."""
        return {**vars(self), "overrides": [[item.kind, item.text] for item in self.overrides]}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Job:
        """Return the job of such an entry.

        Raises:
            KeyError, TypeError, ValueError: It is none.
        """
        overrides = tuple(Override(kind, str(text)) for kind, text in entry["overrides"])
        return _JOB.validate_python({**entry, "overrides": overrides})


_JOB = TypeAdapter(Job)


@dataclass(frozen=True)
class Batch:
    """A batch that is written down: its file, its jobs in order, what they have in common, where they were asked for.

    Relative paths of the jobs start at `folder`.
    """

    path: Path
    jobs: tuple[Job, ...]
    options: Options
    folder: Path

    @property
    def logs(self) -> Path:
        """The folder of logs, and of what each process that runs the batch notes: results-*.jsonl."""
        return self.path.with_suffix("")

    def log(self, job: Job) -> Path:
        """Return a job's log."""
        return self.logs / f"job-{job.number:05}.log"

    @contextmanager
    def running(self) -> Iterator[None]:
        """Note this process as the one that runs the batch, for `cancel`, inside this block."""
        path = self.logs / f"running{_PROCESS}.json"
        with suppress(OSError):
            path.write_text(json.dumps({"pid": os.getpid(), "host": platform.node()}), encoding="utf-8")
        try:
            with held(path):
                yield
        finally:
            with suppress(OSError):
                path.unlink()

    def cancel(self) -> list[int]:
        """Ask the processes of this machine that run the batch to stop at the end of a step; return their numbers.

        Raises:
            S2VFlowError: Only other machines run it, or it is another user's.
        """
        pids, elsewhere = [], []
        for path in self.logs.glob("running*.json"):
            try:
                found = json.loads(path.read_bytes())
                if not path.name.startswith(f"running-{machine_id()}-"):  # its process ids mean others here
                    elsewhere += [str(found["host"])] if found["host"] != platform.node() or is_held(path) else []
                elif is_held(path) is not False:
                    os.kill(found["pid"], signal.SIGTERM)
                    pids.append(int(found["pid"]))
            except PermissionError as error:
                raise S2VFlowError("the batch is another user's", fix="cancel it as that user") from error
            except (OSError, ValueError, KeyError, TypeError):
                continue  # it has ended meanwhile, or is no such file
        if elsewhere and not pids:
            raise S2VFlowError(f"the batch runs on {', '.join(elsewhere)}", fix="cancel it there")
        return pids

    def note(self, job: Job, state: str, **facts: Any) -> None:
        """Append what became of a job: `state` is running, done, failed or stopped."""
        now = datetime.now().astimezone().isoformat(timespec="milliseconds")
        line = json.dumps({"job": job.number, "state": state, "time": now, **facts})
        with writing(self.logs), (self.logs / f"results{_PROCESS}.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def states(self) -> dict[int, dict[str, Any]]:
        """Return the last state of every job by number: waiting where nothing was noted, else as it was noted.

        What a process ran that has died on this machine is stopped.
        """
        found: dict[int, dict[str, Any]] = {job.number: {"state": "waiting"} for job in self.jobs}
        entries = []
        for path in self.logs.glob("results*.jsonl"):
            latest = 0.0  # a clock that is set back changes nothing in one process
            machine, _, pid = path.stem.removeprefix("results-").partition("-")
            is_gone = machine == machine_id() and not is_alive(int(pid))
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError, KeyError, TypeError):  # the last line of a process that was killed
                    entry = json.loads(line)
                    entry["state"] = "stopped" if is_gone and entry["state"] == "running" else entry["state"]
                    latest = max(latest, datetime.fromisoformat(entry["time"]).timestamp())
                    entries.append((latest, entry["job"], entry))
        found |= {number: entry for _, number, entry in sorted(entries, key=itemgetter(0)) if number in found}
        return found | {job.number: {"state": "done"} for job in self.jobs if job.is_done}


def write_batch(jobs: Sequence[Job], options: Options) -> Batch:
    """Write batch.json below the output folder; another batch's stays, and this one's is numbered.

    Raises:
        CannotWriteError: It cannot be written.
    """
    parents = {os.path.dirname(output) for job in jobs for output in job.outputs}
    common = os.path.commonpath(parents) if parents else os.getcwd()
    folder = (options.output_dir or Path(common)).absolute()
    given: dict[str, Any] = {name: getattr(options, name) for name in _PLAIN}
    given |= {name: [str(path.absolute()) for path in getattr(options, name)] for name in _PATHS}
    given |= {name: str(path.absolute()) if (path := getattr(options, name)) else None for name in _PATH}
    given["cache_dir"] = str(options.cache_root.absolute())
    given["overrides"] = [[item.kind, item.text] for item in options.changes.overrides]
    head: dict[str, Any] = {"s2vflow": __version__, "batch": 1, "folder": os.getcwd(), "options": given}
    entries = [job.to_json() for job in sorted(jobs, key=lambda job: job.number)]
    lines = ",\n".join(map(json.dumps, entries))
    text = f'{json.dumps(head)[:-1]}, "jobs": [\n{lines}\n]}}\n'

    def is_free(path: Path) -> bool:
        return not os.path.lexists(path) or _identity(path) == identity

    identity = _identity_of(head, json.loads(json.dumps(entries)))
    with writing(folder / NAME), temporary(folder, ".json") as (file, name):
        file.write(text.encode())
        file.flush()
        while True:
            path = free_name(folder / NAME, is_free)
            path.with_suffix("").mkdir(parents=True, exist_ok=True)
            with suppress(TakenError):  # by another batch, just now
                os.replace(name, path) if os.path.lexists(path) else put_new(name, path)
                return Batch(path, tuple(jobs), options, Path(head["folder"]))


def read_batch(path: Path) -> Batch:
    """Read a batch.json, or the one in a folder.

    Raises:
        MissingError: There is none, or it is damaged.
    """
    path = path / NAME if path.is_dir() else path
    try:
        found = json.loads(path.read_bytes())
        given = {"vram": None, **found["options"]}  # as it was before there was a budget
        overrides = [Override(kind, str(text)) for kind, text in given["overrides"]]
        known = {name: given[name] for name in (*_PLAIN, *_PATHS, *_PATH)}
        jobs = tuple(map(Job.from_json, found["jobs"]))
        return Batch(path, jobs, Options(**known, overrides=overrides), Path(found["folder"]))
    except OSError as error:
        fix = "name the batch.json, or its folder; `s2vflow batch` prints where it is"
        raise MissingError(f"{path}: cannot be read: {error.strerror}", fix) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MissingError(f"{path}: this is no batch.json that s2vflow wrote", fix="plan it again") from error


def _identity(path: Path) -> object:
    """Return what makes a batch the same one; None where the file is none."""
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        found = json.loads(path.read_bytes())
        return _identity_of(found, found["jobs"])
    return None


def _identity_of(head: Any, jobs: Sequence[Any]) -> object:
    asked = [json.dumps([job[name] for name in ("recipe", "overrides", "axes")]) for job in jobs]
    return head["folder"], json.dumps([head["options"][name] for name in _CHANGES]), asked


class Claims:
    """The jobs that this process has taken, and those of others, in a folder that all of them see.

    A job's key is equal in two processes where both mean the same work: see `Job.key`.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / f"claims-{machine_id()}-{os.getpid()}.json"
        self._beat, self._written, self._looked = 0, 0.0, 0.0
        self._own: dict[str, list[str]] = {}
        self._seen: dict[Path, tuple[bytes, float, bool]] = {}  # what, since when, whether it has ever changed
        self._others: dict[str, list[str]] = {}

    def take(self, key: str) -> bool:
        """Take a job, unless another process has it, or has ended it."""
        if key in self._look():
            return False
        self.note(key, "running")
        if self._look(before=self._path).get(key) is None:
            return True
        self.note(key, "")
        return False

    def note(self, key: str, state: str, message: str = "") -> None:
        """Say that a job runs here, or how it ended: done, failed; "": that it may be taken."""
        self._own.pop(key, None)
        if state:
            self._own[key] = [state, message, platform.node()]
        self._write()

    def elsewhere(self) -> dict[str, list[str]]:
        """Give a sign of life, and return what others say of jobs by key: state, message, host. Quick to ask."""
        now = time.monotonic()
        if now - self._written > BEAT_SECONDS:
            self._write()
        if now - self._looked > BEAT_SECONDS / 2:
            self._look()
        return self._others

    def close(self) -> None:
        """Give everything back."""
        with suppress(OSError):
            self._path.unlink()

    def _write(self) -> None:
        self._beat, self._written = self._beat + 1, time.monotonic()
        with suppress(OSError):
            told = {"pid": os.getpid(), "beat": self._beat, "jobs": self._own}
            write_whole(self._path, json.dumps(told).encode(), is_flushed=False)

    def _look(self, before: Path | None = None) -> dict[str, list[str]]:
        """Read what others say; `before`: only those whose names come first."""
        self._looked = time.monotonic()
        found: dict[str, list[str]] = {}
        for path, jobs in self._files():
            if before is None or path < before:
                found |= jobs
        self._others = found if before is None else self._others
        return found

    def _files(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        for path in self._path.parent.glob("claims-*.json"):
            with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
                text = path.read_bytes()
                told = json.loads(text)
                before = self._seen.get(path)
                if before is None or before[0] != text:
                    before = self._seen[path] = (text, self._looked, before is not None)
                is_here = path.name.startswith(f"claims-{machine_id()}-")
                is_gone = self._looked - before[1] > STALE_SECONDS or (is_here and not is_alive(told["pid"]))
                if is_gone and path != self._path:
                    path.unlink()
                elif path != self._path:
                    # what a process ended counts once it has been seen to live: its file may be an old one
                    jobs = told["jobs"].items()
                    yield path, {key: job for key, job in jobs if before[2] or job[0] == "running"}
