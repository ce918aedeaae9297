"""What is written down of a batch: batch.json with its jobs, and beside it a folder of logs and what became of each."""

from __future__ import annotations

import json
import os
import platform
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from operator import itemgetter
from pathlib import Path
from typing import Any

from s2v_flow.batch.job import Job
from s2v_flow.errors import MissingError, S2VFlowError
from s2v_flow.files.atomic import TakenError, free_name, is_alive, machine_id, put_new, temporary, writing
from s2v_flow.files.lock import held, is_held
from s2v_flow.options import Options
from s2v_flow.recipe.argument import Override
from s2v_flow.version import __version__

NAME = "batch.json"
_PROCESS = f"-{machine_id()}-{os.getpid()}"
_PATHS = ("override_files", "models_dirs", "extra_model_paths", "input_dirs")
_PATH = ("output_dir", "cache_dir")
_CHANGES = ("profiles", "override_files", "overrides", "axes")  # of every recipe
_PLAIN = ("profiles", "axes", "cache_remote", "cache_limit", "device", "vram", "overwrite")


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
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MissingError(f"{path}: this is no batch.json that s2vflow wrote", fix="plan it again") from error


def _identity(path: Path) -> object:
    """Return what makes a batch the same one; None where the file is none."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(path.read_bytes())
        return _identity_of(found, found["jobs"])
    return None


def _identity_of(head: Any, jobs: Sequence[Any]) -> object:
    asked = [json.dumps([job[name] for name in ("recipe", "overrides", "axes")]) for job in jobs]
    return head["folder"], json.dumps([head["options"][name] for name in _CHANGES]), asked
