"""The commands of batches: many jobs planned together, run by processes that keep their models."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from s2v_flow.cli import report
from s2v_flow.cli.options import (
    FILE,
    FOLDER,
    OrderedGroup,
    all_of,
    change_options,
    folder_options,
    json_option,
    make_options,
    remote_option,
)
from s2v_flow.errors import MissingError, S2VFlowError
from s2v_flow.wording import counted, duration_text, visible

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from s2v_flow.api import Options
    from s2v_flow.batch.plan import BatchFile, Row
    from s2v_flow.batch.record import Batch

_POLICY = ("engine", "address", "slurm", "notify", "fail_fast", "timeout", "retries", "devices", "workers")


class BatchGroup(OrderedGroup):
    """`batch RECIPE...` is `batch run RECIPE...`."""

    usual = "run"


@click.group(cls=BatchGroup, epilog="Example: s2vflow batch talk.yaml --jobs jobs.csv --workers 2")
def batch() -> None:
    """Run many jobs: recipes x rows of a table x values of -m; `batch RECIPE...` is short for `batch run`."""


_job_options = all_of(
    click.option("--overwrite", is_flag=True, help="Replace other files instead of numbering the new ones."),
    click.option("-m", "axes", multiple=True, metavar="PATH=VALUES", help="Vary a value: -m seed=1..8."),
    click.option(
        "--jobs", "table", type=FILE, metavar="FILE", help="A .csv (header: paths of --set) or .jsonl; a row a job."
    ),
    remote_option,
    folder_options,
    change_options,
    click.argument("recipes", nargs=-1, required=True, metavar="RECIPE...|batch.yaml"),
)


_policy_options = all_of(
    click.option(
        "--slurm", multiple=True, metavar="KEY=VALUE", help="slurm: a parameter of submitit: slurm_partition=gpu."
    ),
    click.option("--address", metavar="ADDRESS", help="ray: the cluster's, else one is started here."),
    click.option(
        "--engine", type=click.Choice(["local", "ray", "slurm"]), help="Where workers run; local unless given."
    ),
    click.option("--notify", metavar="CMD", help="Run it at the end, with a line of text as its last argument."),
    click.option("--fail-fast", is_flag=True, help="One job that fails stops the others."),
    click.option("--timeout", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS", help="Of a job."),
    click.option("--retries", type=click.IntRange(min=0), help="After a failure; 1 unless given."),
    click.option("--devices", metavar="NAMES", help="One process each: cuda:0,cuda:1."),
    click.option("--workers", type=click.IntRange(1, 256), metavar="N", help="Processes; 1 unless given."),
)


@batch.command()
@_job_options
@_policy_options
@click.option("--dry-run", is_flag=True, help="Plan and check the jobs, write batch.json, and run nothing.")
def run(recipes: tuple[str, ...], as_json: bool, table: Path | None, dry_run: bool, **given: Any) -> None:
    """Plan and check all jobs, write batch.json below the output folder, and run what is not stored.

    The same command goes on after any end. Leaves with 1 if a job failed.
    """
    from s2v_flow.batch.plan import plan_jobs, require_files, require_space
    from s2v_flow.batch.record import write_batch

    policy = {name: given.pop(name) for name in _POLICY}
    policy["slurm"] = _parameters(policy["slurm"])
    engine_options = {name: policy[name] for name in ("address", "slurm")}
    found, options, rows, file = _asked(recipes, make_options(**given), table)
    if file is not None:
        is_said = {name for name, value in policy.items() if value is not None and value is not False and value != {}}
        is_said |= {"devices", "workers"} if {"devices", "workers"} & is_said else set()
        named = None if file.devices is None else ",".join(file.devices)
        policy = {**file.model_dump(include=set(_POLICY)), "devices": named, **{name: policy[name] for name in is_said}}
    _refuse_unused(policy["engine"], **engine_options)
    devices = _devices(options, policy.pop("devices"), policy.pop("workers"), policy["engine"])
    jobs, missing = plan_jobs(found, options, rows)
    require_files(missing)
    if warning := require_space(jobs, options):
        report.print_message(f"warning: {warning}")
    made = write_batch(jobs, options)
    done = sum(job.is_done for job in jobs)
    known = [job.seconds for job in jobs if not job.is_done and job.seconds is not None]
    cost = f", about {duration_text(sum(known))} of work" if known and len(known) == len(jobs) - done else ""
    report.print_message(f"{counted(len(jobs), 'job')} in {made.path}: {done} done already{cost}")
    if dry_run:
        report.print_json(_summary(made)) if as_json else report.print_result(str(made.path))
        return
    _run(made, devices, as_json=as_json, **policy)


@batch.command()
@click.argument("path", type=FILE)
def cancel(path: Path) -> None:
    """Stop a running batch at the end of a step, as Ctrl-C does: a batch.json, or the one in a folder."""
    from s2v_flow.batch.record import read_batch

    pids = read_batch(path).cancel()
    for pid in pids:
        report.print_message(f"process {pid} stops at the end of a step")
    if not pids:
        report.print_message("nothing runs this batch")


@batch.command()
@click.argument("path", type=FILE)
@json_option
def status(path: Path, as_json: bool) -> None:
    """Show what became of a batch's jobs: of a batch.json, or of the one in a folder."""
    from s2v_flow.batch.record import read_batch
    from s2v_flow.cli.board import status_lines

    found = read_batch(path)
    report.print_json(_summary(found)) if as_json else report.print_table("\n".join(status_lines(found)))


@batch.command()
@click.argument("path", type=FILE)
@_policy_options
@json_option
def retry(path: Path, as_json: bool, devices: str | None, workers: int | None, **policy: Any) -> None:
    """Run the jobs of a batch.json that failed or never ran, without planning again."""
    from s2v_flow.batch.record import read_batch
    from s2v_flow.graph.interrupt import StopRequest

    found = read_batch(path)
    if not found.folder.is_dir():
        text = f"{found.path}: its jobs' paths start at {found.folder}, which is gone"
        raise MissingError(text, fix="plan the batch again where its files are now: s2vflow batch RECIPE...")
    states = found.states()
    jobs = tuple(replace(job, is_done=states[job.number]["state"] == "done") for job in found.jobs)
    stop = click.get_current_context().find_object(StopRequest)
    options = found.options if stop is None else replace(found.options, should_stop=stop)
    report.print_message(f"{sum(not job.is_done for job in jobs)} of {counted(len(jobs), 'job')} to run")
    names = _devices(options, devices, workers, policy["engine"])
    policy["slurm"] = _parameters(policy["slurm"])
    _refuse_unused(policy["engine"], policy["address"], policy["slurm"])
    _run(replace(found, jobs=jobs, options=options), names, as_json=as_json, **policy)


@batch.command()
@_job_options
@click.option("--format", "form", type=click.Choice(["shell", "slurm", "k8s"]), default="shell", show_default=True)
@click.option("--image", help="k8s: the container's image; s2vflow unless given.")
@click.option("-o", "--output", "folder", type=FOLDER, metavar="DIR", help="Write files there instead of to stdout.")
@click.option("--force", is_flag=True, help="Overwrite the file that is there.")
def export(
    recipes: tuple[str, ...],
    as_json: bool,
    table: Path | None,
    form: str,
    image: str | None,
    folder: Path | None,
    force: bool,
    **given: Any,
) -> None:
    """Print the jobs, checked, as a shell script, a Slurm array or a Kubernetes Job; each is one `s2vflow run`."""
    from s2v_flow.batch.export import FORMATS, export_jobs
    from s2v_flow.batch.plan import plan_jobs
    from s2v_flow.start.project import write_recipe

    if image is not None and form != "k8s":
        raise click.UsageError("--image is for --format k8s")
    found, options, rows, _ = _asked(recipes, make_options(**given), table)
    jobs, missing = plan_jobs(found, options, rows)
    for file, needing in missing.items():
        report.print_message(visible(f"warning: {file} is missing here: {counted(len(needing), 'job')} need it"))
    text = export_jobs(jobs, options, form, image or "s2vflow")
    if folder is not None:
        write_recipe(folder / FORMATS[form][0], text, force=force)
    facts = {"format": form, "jobs": len(jobs), "file": str(folder / FORMATS[form][0]) if folder else None}
    if as_json:
        report.print_json(facts if folder else {**facts, "text": text})
    else:
        report.print_result(str(facts["file"]) if folder else text.rstrip("\n"))


def _asked(
    given: Sequence[str], options: Options, table: Path | None
) -> tuple[list[str], Options, list[Row] | None, BatchFile | None]:
    """Return recipes, options and rows, and the batch.yaml that stands for the recipes; the command line says more."""
    from s2v_flow.batch.plan import find_recipes, is_batch_file, read_batch_file, read_rows

    file = read_batch_file(Path(given[0])) if len(given) == 1 and is_batch_file(Path(given[0])) else None
    rows = None if table is None else read_rows(table)
    if file is None:
        return find_recipes(given), options, rows, None
    options = replace(
        options,
        profiles=(*file.profiles, *options.profiles),
        overrides=(*file.overrides(), *options.overrides),
        axes=(*file.axis_texts(), *options.axes),
    )
    return find_recipes(file.patterns()), options, file.rows() if rows is None else rows, file


def _devices(options: Options, devices: str | None, workers: int | None, engine: str | None) -> list[str]:
    """Return a device for each process; other engines' workers find theirs where they run."""
    from s2v_flow.machine import resolve_device

    if engine in ("ray", "slurm"):
        if devices is not None:
            raise click.UsageError(f"--devices and --engine {engine}: say --workers N; each is given a GPU of its own")
        return [options.device] * (workers or 1)
    if devices is None:
        device = resolve_device(options.device)
        if device != "cpu" and (workers or 1) > 1:
            raise click.UsageError(f"--workers {workers}: one process for each GPU: --devices cuda:0,cuda:1")
        return [device] * (workers or 1)
    if workers is not None:
        raise click.UsageError("--devices and --workers: --devices says how many processes there are")
    found = [resolve_device(name.strip()) for name in devices.split(",") if name.strip()]
    if not found or any(found.count(name) > 1 for name in found if name != "cpu"):
        raise click.UsageError(f"--devices {devices}: name each device once: cuda:0,cuda:1")
    return found


def _run(
    made: Batch,
    devices: Sequence[str],
    *,
    as_json: bool,
    retries: int | None,
    timeout: float | None,
    fail_fast: bool,
    notify: str | None,
    engine: str | None,
    address: str | None,
    slurm: Mapping[str, Any],
) -> None:
    from s2v_flow.batch.dispatch import BatchRun, Policy, notify_end, open_engine, setups_of
    from s2v_flow.cli.board import Board
    from s2v_flow.cli.progress import Progress

    began, board = time.monotonic(), Board(made, len(devices))
    policy = Policy(1 if retries is None else retries, timeout, fail_fast)
    states: Mapping[int, str] = {}
    try:
        with made.running():
            workers = open_engine(engine or "local", setups_of(made, devices, Progress), made, address, slurm)
            states = BatchRun(made, workers, policy, board).run()
    finally:
        board.close()
        states = states or {number: found["state"] for number, found in made.states().items()}
        failed = [job.name for job in made.jobs if states[job.number] == "failed"]
        done = sum(state == "done" for state in states.values())
        took = duration_text(time.monotonic() - began)
        text = f"{done} of {counted(len(states), 'job')} done, {len(failed)} failed, in {took}; logs: {made.logs}"
        report.print_message(text)
        warning = notify_end(notify, text) if notify else ""
        if warning:
            report.print_message(f"warning: {warning}")
    if as_json:
        report.print_json(_summary(made))
    if done < len(states):
        more = f" and {len(failed) - 3} more" if len(failed) > 3 else ""
        raise S2VFlowError(
            f"failed: {', '.join(failed[:3])}{more}",
            kept="every job that is done, and all that was finished in the others",
            fix=f"see {made.logs}, then: s2vflow batch retry {made.path}",
        )


def _parameters(texts: Sequence[str]) -> dict[str, Any]:
    """Return parameters that are written KEY=VALUE; numbers and true become what they are."""
    from s2v_flow.recipe.tree import read_scalar

    pairs = [text.partition("=") for text in texts]
    wrong = next((key for key, equals, value in pairs if not equals or not value), None)
    if wrong is not None:
        raise click.UsageError(f"--slurm {wrong}: expected KEY=VALUE, such as slurm_partition=gpu")
    return {key: read_scalar(value) for key, _, value in pairs}


def _refuse_unused(engine: str | None, address: str | None, slurm: Mapping[str, Any]) -> None:
    """Refuse settings of an engine that is not used."""
    for option, value, needed in (("--address", address, "ray"), ("--slurm", slurm, "slurm")):
        if value and engine != needed:
            raise click.UsageError(f"{option} is for --engine {needed}; the engine is {engine or 'local'}")


def _summary(made: Batch) -> Mapping[str, Any]:
    states = made.states()
    jobs = [
        {"name": job.name, "outputs": list(job.outputs), "job": job.number, **states[job.number]} for job in made.jobs
    ]
    return {"batch": str(made.path), "jobs": sorted(jobs, key=lambda entry: entry["job"])}
