"""From recipes, a table and axes to jobs: all are planned and checked before anything runs.

Jobs are written in a table, CSV or JSON lines, or in batch.yaml, a whole batch. A CSV's header names paths of `--set`;
each of the JSON lines is an object of paths and values.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from s2v_flow.api import Options, Planned, plan
from s2v_flow.batch.record import Job
from s2v_flow.cache.budget import free_bytes
from s2v_flow.cache.housekeeping import objects_size
from s2v_flow.errors import Diagnostic, ExitCode, MissingError, Origin, RecipeError, S2VFlowError
from s2v_flow.graph.interrupt import StoppedError, exit_code_of
from s2v_flow.graph.status import other_files
from s2v_flow.recipe.argument import Override
from s2v_flow.recipe.problems import Problems, collecting
from s2v_flow.recipe.reader import MAX_BYTES, read_file
from s2v_flow.recipe.tree import Tree, origins_of, plain
from s2v_flow.wording import shown, size_text

MAX_FILE_BYTES = 64_000_000
MAX_JOBS = 100_000
Row = tuple[str, tuple[Override, ...]]  # where it is written ("jobs.csv:4"), and what it changes
_MARK = re.compile(rb"^batch:", re.MULTILINE)
_CODES = {"extra_forbidden": "R010", "missing": "R015", "literal_error": "R014", "greater_than": "R013"}


class BatchFile(BaseModel):
    """What such a file says; the names are those of the command's options."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    batch: Literal[1]
    recipes: list[str] = Field(min_length=1)
    profiles: list[str] = []
    params: dict[str, Any] = {}
    set: dict[str, Any] = {}
    axes: dict[str, list[Any] | str | int | float] = {}
    jobs: str | list[dict[str, Any]] | None = None
    engine: Literal["local", "ray", "slurm"] = "local"
    address: str | None = None
    slurm: dict[str, Any] = {}
    workers: int | None = Field(None, gt=0)
    devices: list[str] | None = None
    retries: int = Field(1, ge=0)
    timeout: float | None = Field(None, gt=0)
    fail_fast: bool = False
    notify: str | None = None
    _folder: str = PrivateAttr("")  # where the file is: relative recipes and tables start there
    _lines: tuple[str, ...] = PrivateAttr(())  # where each of its own jobs is written

    def patterns(self) -> list[str]:
        """Return the recipes, from the current folder."""
        return [os.path.join(glob.escape(self._folder), name) for name in self.recipes]

    def overrides(self) -> list[Override]:
        """Return what it changes in every recipe."""
        changes = {**{f"params.{name}": value for name, value in self.params.items()}, **self.set}
        return [_override(path, value) for path, value in changes.items()]

    def axis_texts(self) -> list[str]:
        """Return its axes as -m takes them."""
        return [
            f"{path}={','.join(map(_json, values)) if isinstance(values, list) else values}"
            for path, values in self.axes.items()
        ]

    def rows(self) -> list[Row] | None:
        """Return its jobs, None where it has none.

        Raises:
            RecipeError: See `read_rows`.
        """
        if isinstance(self.jobs, str):
            return read_rows(Path(self._folder, self.jobs))
        if self.jobs is None:
            return None
        made = (tuple(_override(path, value) for path, value in job.items()) for job in self.jobs)
        return list(zip(self._lines, made, strict=True))


def is_batch_file(path: Path) -> bool:
    """Tell whether a file is a batch.yaml: it says `batch:` at the start of a line."""
    with suppress(OSError), path.open("rb") as file:
        return path.suffix.lower() in (".yaml", ".yml") and _MARK.search(file.read(MAX_BYTES)) is not None
    return False


def read_batch_file(path: Path) -> BatchFile:
    """Read and check a batch.yaml.

    Raises:
        RecipeError: With every mistake; exit code 3.
    """
    found: BatchFile | None = None
    with collecting(str(path)) as problems:
        tree = read_file(path, str(path), problems)
        origins = origins_of(tree)
        try:
            found = BatchFile.model_validate(plain(tree))
        except ValidationError as error:
            _collect(error, tree, origins, problems)
    assert found is not None, "a batch file is wrong, but nothing was said of it"
    count = len(found.jobs) if isinstance(found.jobs, list) else 0
    found._folder = os.path.dirname(path)
    found._lines = tuple(f"{path}:{origins['jobs', index].place.line}" for index in range(count))
    return found


def _collect(error: ValidationError, tree: Tree, origins: Mapping[Any, Origin], problems: Problems) -> None:
    keys = ", ".join(BatchFile.model_fields)
    for item in error.errors(include_url=False, include_input=False):
        where = item["loc"]
        while where not in origins:
            where = where[:-1]
        name = ".".join(map(str, item["loc"][: len(where) + 1]))
        is_unknown = item["type"] == "extra_forbidden"
        text = "unknown key" if is_unknown else item["msg"].replace("Input s", "s")
        fix = f"the keys are {keys}" if is_unknown or item["type"] == "missing" else None
        problems.add(_CODES.get(item["type"], "R012"), f"{name}: {text}", origins[where], fix=fix)


def read_rows(path: Path) -> list[Row]:
    """Read a table of jobs. An empty cell of a CSV changes nothing; JSON's values keep their types.

    Raises:
        RecipeError: It cannot be read, is no such table, or has no rows; exit code 3.
    """
    readers = {".csv": _csv, ".jsonl": _json_lines}
    if path.suffix.lower() not in readers:
        raise RecipeError(f"{path}: a table of jobs is a .csv or a .jsonl file", fix="rename it, or write one")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}", fix="check --jobs") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: byte {error.start} is not UTF-8", fix="save it as UTF-8") from error
    if len(content) > MAX_FILE_BYTES:
        raise RecipeError(f"{path}: larger than {MAX_FILE_BYTES // 1_000_000} MB", fix="split it")
    rows = []
    for line, overrides in readers[path.suffix.lower()](path, text):
        rows.append((f"{path}:{line}", overrides))
        if len(rows) > MAX_JOBS:
            raise RecipeError(f"{path}: more than {MAX_JOBS} jobs", fix="split it")
    if not rows:
        raise RecipeError(f"{path}: there are no jobs in it", fix="write a row for each job")
    return rows


def _csv(path: Path, text: str) -> Iterator[tuple[int, tuple[Override, ...]]]:
    first = text.partition("\n")[0]
    delimiter = ";" if ";" in first and "," not in first else ","  # where the comma stands in numbers
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    try:
        for cells in reader:
            if not any(cells):
                continue
            if not header:
                header = [cell.strip() for cell in cells]
                if "" in header or len(set(header)) < len(header):
                    fix = "each cell of the first row is a path of --set, such as seed or nodes.video.file"
                    raise RecipeError(f"{path}:1: a cell of the header is empty or given twice", fix)
            elif len(cells) != len(header):
                fix = 'quote a value that has a comma in it: "Hello, you"'
                raise RecipeError(f"{path}:{reader.line_num}: {len(cells)} cells, the header has {len(header)}", fix)
            else:
                pairs = zip(header, cells, strict=True)
                yield reader.line_num, tuple(Override("set", f"{name}={value}") for name, value in pairs if value)
    except csv.Error as error:
        raise RecipeError(f"{path}:{reader.line_num}: this is not CSV: {error}", fix="check the quotes") from error


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, tuple[Override, ...]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"{path}:{number}: this is not JSON: {error}", fix='write {"seed": 1}') from error
        if not isinstance(value, dict):
            raise RecipeError(f"{path}:{number}: expected an object, got {shown(value)}", fix='write {"seed": 1}')
        yield number, tuple(_override(name, item) for name, item in value.items())


def _override(path: str, value: Any) -> Override:
    return Override("set-json", f"{path}={_json(value)}")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


_MAX_NAMED = 5  # jobs in a message
Missing = Mapping[str, Sequence[Job]]  # a file, and the jobs that need it


def find_recipes(patterns: Sequence[str]) -> list[str]:
    """Return the recipes that are named, those of a pattern in order; none twice.

    Raises:
        RecipeError: A pattern has no file; exit code 3.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        is_pattern = glob.has_magic(pattern) and not os.path.lexists(pattern)
        names = sorted(glob.glob(pattern, recursive=True)) if is_pattern else [pattern]
        if not names:
            raise RecipeError(f"no recipe is called like {pattern}", fix="check the pattern, and the current folder")
        found |= dict.fromkeys(names)
    return list(found)


def plan_jobs(recipes: Sequence[str], options: Options, rows: Sequence[Row] | None = None) -> tuple[list[Job], Missing]:
    """Plan every recipe with every row of a table; each cell of a matrix is a job, a matrix with `include` one job.

    Returns the jobs, in the order in which they should run: by model and LoRA files, then the longest first. Their
    numbers are in the order in which they are written. And what is missing; see `require_files`.

    Raises:
        RecipeError: With the mistakes of all jobs, or two jobs have one output; exit code 3.
        S2VFlowError: A file that is there cannot be used.
    """
    rows = [("", ())] if rows is None else rows
    jobs: list[Job] = []
    mistakes: dict[Diagnostic | str, list[Job]] = {}
    missing: dict[str, list[Job]] = {}
    failure: S2VFlowError | None = None
    for recipe, (origin, overrides) in ((recipe, row) for recipe in recipes for row in rows):
        if len(jobs) >= MAX_JOBS:
            raise RecipeError(f"more than {MAX_JOBS} jobs", fix="make several batches of them")
        if options.should_stop():
            raise StoppedError("planning the batch", exit_code_of(options.should_stop))
        written = Job(len(jobs) + 1, recipe, overrides, origin=origin)
        try:
            for job, planned in _planned(written, options):
                jobs.append(_described(replace(job, number=len(jobs) + 1), planned))
                for item in planned.plan.missing:
                    missing.setdefault(item.file, []).append(jobs[-1])
        except S2VFlowError as error:
            jobs.append(written)
            failure = error if failure is None or isinstance(error, RecipeError) else failure
            for mistake in getattr(error, "diagnostics", ()) or (error.message,):
                mistakes.setdefault(mistake, []).append(written)
    if failure is not None:
        raise _failure(mistakes, failure)
    _refuse_same_outputs(jobs)
    return sorted(jobs, key=lambda job: (job.group, -(job.seconds or (job.frames or 0) / 16), job.number)), missing


def require_files(missing: Missing) -> None:
    """Refuse to run without files that jobs need.

    Raises:
        MissingError: Naming each, and the jobs; exit code 4.
    """
    if missing:
        what = "; ".join(f"{file} (needed by {_named(jobs)})" for file, jobs in missing.items())
        fix = "put them where they are looked for, or name other folders with --models-dir or --input-dir"
        raise MissingError(f"missing: {what}", fix=fix)


def require_space(jobs: Sequence[Job], options: Options) -> str:
    """Refuse to run where a job alone needs more space than the cache's disk can give.

    Returns what a person should know where all of them need more than is free; else "".

    Raises:
        S2VFlowError: With what is needed and what is free; exit code 6.
    """
    root, todo = options.cache_root, [job for job in jobs if not job.is_done]
    free, needed = free_bytes(root), sum(job.disk_bytes for job in todo)
    largest = max(todo, key=lambda job: job.disk_bytes, default=None)
    if largest is None or needed <= free:
        return ""
    if largest.disk_bytes > free + objects_size(root):
        what = f"{largest.name} needs {size_text(largest.disk_bytes)} under {root}, {size_text(free)} are free"
        fix = "free some space, or name another folder with --cache-dir"
        raise S2VFlowError(f"{what}; nothing was run", fix=fix, exit_code=ExitCode.DISK_FULL)
    what = f"the jobs need about {size_text(needed)} under {root}, {size_text(free)} are free"
    return f"{what}: what was used longest ago is removed"


def _planned(job: Job, options: Options) -> Iterator[tuple[Job, Planned]]:
    planned = plan(job.recipe, job.options(options))
    if not planned.variants or planned.recipe.matrix.include:
        yield job, planned
        return
    for variant in planned.variants:
        values = variant.cell.values.items()
        cell = replace(job, axes=tuple(f"{path}={json.dumps(value, ensure_ascii=False)}" for path, value in values))
        yield cell, plan(cell.recipe, cell.options(options))


def _described(job: Job, planned: Planned) -> Job:
    """Return a job with what its plan says."""
    models: set[str] = set()
    outputs: list[str] = []
    is_done = not planned.has_work
    for node in planned.plan.nodes:
        models |= {str(node.files.get(path)) for path, mark, _ in node.node.files() if mark.role == "model"}
        if node.node.is_sink:
            entry = planned.statuses[node.name].entry
            targets = list(node.node.targets(node.files, entry.outputs if entry else None).values())
            outputs += map(str, targets)
            is_done = is_done and all(map(os.path.lexists, targets)) and not other_files(node, entry)
    found = {name: status.fingerprint for name, status in planned.statuses.items() if status.fingerprint}
    group = hashlib.sha256("\n".join(sorted(models)).encode()).hexdigest()[:12]
    seconds = planned.estimate.seconds
    return replace(
        job,
        group=group,
        seconds=seconds,
        frames=planned.num_frames,
        disk_bytes=planned.estimate.known_disk_bytes,
        fingerprints=found,
        outputs=tuple(outputs),
        is_done=is_done and bool(outputs),
        asked=asked_of(planned),
    )


def asked_of(planned: Planned) -> str:
    """Return a digest of what a plan is to compute: see `Job.asked`."""
    nodes = [(node.name, node.kind, node.node, node.inputs) for node in planned.plan.nodes]
    return hashlib.sha256(repr(nodes).encode()).hexdigest()[:12]


def _failure(mistakes: Mapping[Diagnostic | str, Sequence[Job]], first: S2VFlowError) -> S2VFlowError:
    """Return one error for all jobs: each mistake once, with the jobs that have it."""
    found = []
    for mistake, jobs in mistakes.items():
        if isinstance(mistake, Diagnostic):
            inside = f"{mistake.inside}, " if mistake.inside else ""
            found.append(replace(mistake, inside=f"{inside}{_named(jobs)}"))
    if found:
        return RecipeError(f"{len(found)} mistakes in the batch's jobs", diagnostics=found)
    texts = "; ".join(f"{_named(jobs)}: {mistake}" for mistake, jobs in mistakes.items())
    return S2VFlowError(texts, first.fix, exit_code=first.exit_code)


def _refuse_same_outputs(jobs: Sequence[Job]) -> None:
    taken: dict[str, Job] = {}
    for job in jobs:
        for output in job.outputs:
            other = taken.setdefault(output, job)
            if other is not job:
                fix = "give each a file of its own: a column nodes.video.file in the table, a name like "
                fix += "out/talk_${params.seed}.mp4 in the recipe, or -m, which puts the value into the name"
                raise RecipeError(f"{other.name} and {job.name} both write {output}; nothing was run", fix)


def _named(jobs: Sequence[Job]) -> str:
    more = f" and {len(jobs) - _MAX_NAMED} more" if len(jobs) > _MAX_NAMED else ""
    return ", ".join(job.name for job in jobs[:_MAX_NAMED]) + more
