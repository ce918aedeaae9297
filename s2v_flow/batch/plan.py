"""From recipes, a table and axes to jobs: all are planned and checked before anything runs."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from s2v_flow.api import Options, Planned, plan
from s2v_flow.batch.record import Job
from s2v_flow.batch.spec import MAX_JOBS, Row
from s2v_flow.cache.budget import free_bytes
from s2v_flow.cache.housekeeping import objects_size
from s2v_flow.errors import Diagnostic, ExitCode, MissingError, RecipeError, S2VFlowError
from s2v_flow.graph.interrupt import StoppedError, exit_code_of
from s2v_flow.graph.status import other_files
from s2v_flow.wording import size_text

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
