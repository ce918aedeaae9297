"""The command line: options, commands, and the one place where errors become exit codes."""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import click

import s2v_flow
from s2v_flow.cli import report
from s2v_flow.cli.batch import batch
from s2v_flow.cli.cache import cache
from s2v_flow.cli.completion import complete_kind
from s2v_flow.cli.help import MainGroup
from s2v_flow.cli.models import models
from s2v_flow.cli.options import (
    FILE,
    TextFile,
    folder_options,
    gpus_option,
    json_option,
    level_options,
    make_options,
    output_options,
    recipe_options,
    record_options,
    selection_options,
    start_options,
    view_options,
)
from s2v_flow.cli.runs import diff, lock, quality, report_, reproduce, runs, show
from s2v_flow.cli.start import completion, doctor, explain, help_, init, ui, version
from s2v_flow.cli.streams import Streams
from s2v_flow.errors import ExitCode, S2VFlowError, broken_package
from s2v_flow.graph.interrupt import StoppedError, StopRequest

if TYPE_CHECKING:
    from s2v_flow.cli.progress import Level
    from s2v_flow.start.project import Start

EXIT_CODES = """\
  0  all is well
  1  a node failed while running
  2  the command line is wrong
  3  the recipe is wrong; nothing was run
  4  a model or an input is missing or cannot be used
  5  refused for safety (pickles, paths outside the allowed folders, limits)
  6  the disk is full
  7  out of memory
  8  NaN or infinity in a result
  9  a defect of s2vflow
  10  plan --detailed-exitcode: a run would compute something
  11  a video, which is there, does not meet the recipe's require
  75  stopped with a resume point by SIGUSR1: the same command goes on
  130  interrupted (Ctrl-C); the same command goes on
  143  terminated, or the terminal was closed; the same command goes on"""


@click.group(
    cls=MainGroup,
    commands=[
        *(batch, runs, show, quality, report_, diff, reproduce, lock, cache, init, models, doctor, completion, explain),
        *(ui, help_, version),
    ],
    epilog=f"\b\nExit codes:\n{EXIT_CODES}",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(s2v_flow.__version__, prog_name="s2vflow")
def cli() -> None:
    """Talking videos from a portrait, a voice and a prompt, with Wan2.2-S2V, from a recipe that lives in git."""


@cli.command()
@recipe_options
@output_options
@selection_options
@record_options
@view_options
@level_options
@gpus_option
@folder_options
def run(recipe: Path, as_json: bool, events: str | None, level: Level, **given: Any) -> None:
    """Run a recipe: compute what is not stored yet, and write the results."""
    from s2v_flow.cli.running import execute

    if events == "-" and as_json:
        raise click.UsageError("--events - and --json both write to stdout: give --events a file")
    again = shlex.join(["s2vflow", *sys.argv[1:]])
    view = {name: given.pop(name) for name in ("previews", "first_look", "has_report")}
    options = make_options(**given)
    execute(s2v_flow.plan(recipe, options), options, level, again, as_json=as_json, events=events, **view)


@cli.command("try")
@recipe_options
@level_options
@folder_options
def try_(recipe: Path, as_json: bool, level: Level, **given: Any) -> None:
    """Make the first chunk alone, at half size in few steps, and estimate the whole by it."""
    from s2v_flow.cli.running import execute, trial

    options = make_options(**given)

    def estimate() -> dict[str, Any]:
        return {"estimate": s2v_flow.plan(recipe, options).to_json()["estimate"]}

    whole = shlex.join(["s2vflow", "run", *(word for word in sys.argv[1:] if word != "try")])
    execute(*trial(s2v_flow.plan(recipe, options), options), level, whole, as_json=as_json, also=estimate)
    if not as_json:
        report.print_result(report.whole_text(s2v_flow.plan(recipe, options)))


@cli.command()
@recipe_options
def check(recipe: Path, as_json: bool, **given: Any) -> None:
    """Check a recipe, without looking at models or inputs."""

    checked = s2v_flow.check(recipe, make_options(**given))
    if as_json:
        report.print_json({"recipe": str(checked.path), "ok": True, "nodes": list(checked.nodes)})
    else:
        report.print_table(f"{checked.path}: {len(checked.nodes)} nodes, no mistakes")


@cli.command()
@recipe_options
@output_options
@selection_options
@gpus_option
@folder_options
@click.option("--detailed-exitcode", is_flag=True, help="Leave with 10 if a run would compute something.")
@click.option("--calibrate", is_flag=True, help="Measure this machine first, once, to estimate what never ran here.")
def plan(recipe: Path, as_json: bool, detailed_exitcode: bool, calibrate: bool, **given: Any) -> None:
    """Show what a run would do: the order, the chunks, what is stored, what must run and why, what is missing."""
    from s2v_flow import api

    options = make_options(**given)
    planned = api.plan(recipe, options)
    planned = api.calibrated(planned, options) if calibrate else planned
    report.print_json(planned.to_json()) if as_json else report.print_plan(planned)
    if planned.plan.missing:
        sys.exit(ExitCode.MISSING)
    if detailed_exitcode and planned.has_work:
        sys.exit(ExitCode.WORK_TO_DO)


@cli.command()
@recipe_options
@selection_options
@folder_options
@click.option("--format", "form", type=click.Choice(["ascii", "mermaid", "dot"]), default="ascii")
def graph(recipe: Path, as_json: bool, form: str, **given: Any) -> None:
    """Draw the plan, with every node's status."""
    from s2v_flow.cli.describe import DRAWERS

    planned = s2v_flow.plan(recipe, make_options(**given))
    text = DRAWERS[form](planned.plan, planned.statuses)
    report.print_json({"format": form, "graph": text}) if as_json else report.print_result(text)


@cli.command()
@recipe_options
@click.option("--origin", "with_origins", is_flag=True, help="Say where each value was written.")
@click.option("--resolved/--references", default=True, help="Put parameters in (the default), or keep $params.NAME.")
def config(recipe: Path, as_json: bool, with_origins: bool, resolved: bool, **given: Any) -> None:
    """Print a recipe as one text, with everything that is laid over it."""
    from s2v_flow.recipe.config import config_json, config_text

    checked = s2v_flow.check(recipe, make_options(**given))
    if as_json:
        report.print_json(config_json(checked, resolved=resolved, with_origins=with_origins))
    else:
        report.print_result(config_text(checked, resolved=resolved, with_origins=with_origins).rstrip("\n"))


@cli.command()
@click.argument("video", type=FILE)
@click.option("-o", "--output", type=TextFile(), help="The recipe to write, instead of stdout.")
@click.option("--force", is_flag=True, help="Overwrite the recipe that is there.")
def recipe(video: Path, output: Path | None, force: bool) -> None:
    """Print the recipe that is inside an mp4 that s2vflow made; its paths are as seen from where it is written."""
    from s2v_flow.recipe.config import portable_text
    from s2v_flow.runs.essence import read_essence

    read_essence(video)  # says what is wrong with it
    checked = s2v_flow.check(video)
    if output is None:
        report.print_message(f"note: its relative paths start at {checked.folder}")
    _deliver(
        portable_text(checked if output is None else replace(checked, path=output, folder=None)), output, force=force
    )


@cli.command("import")
@click.argument("workflow", type=FILE)
@click.option("-o", "--output", type=TextFile(), help="The recipe to write, instead of stdout.")
@click.option("--modernise", is_flag=True, help="Exact time and one extend, instead of ComfyUI's numbers.")
@click.option("--as-of", type=click.Choice(["2025"]), help="Reproduce how ComfyUI rounded fp8-scaled files in 2025.")
@click.option("--force", is_flag=True, help="Overwrite the recipe that is there.")
def import_(workflow: Path, output: Path | None, modernise: bool, as_of: str | None, force: bool) -> None:
    """Make a recipe of a ComfyUI workflow: JSON, or a picture, video or sound with the workflow in it."""
    from s2v_flow.api import KINDS
    from s2v_flow.comfy.importer import import_workflow

    imported = import_workflow(workflow, KINDS, modernises=modernise, as_of=int(as_of) if as_of else None)
    for warning in imported.warnings:
        report.print_message(f"warning: {warning}")
    for note in imported.notes:
        report.print_message(f"note: {note}")
    for change in imported.changes:
        report.print_message(f"changed: {change}")
    _deliver(imported.text, output, force=force)


@cli.command()
@recipe_options
@folder_options
@click.option("-o", "--output", type=TextFile(), help="The workflow to write, instead of stdout.")
@click.option("--format", "form", type=click.Choice(["editor", "api"]), default="editor", show_default=True)
@click.option("--force", is_flag=True, help="Overwrite the workflow that is there.")
def export(recipe: Path, as_json: bool, output: Path | None, form: Literal["editor", "api"], **given: Any) -> None:
    """Make a ComfyUI workflow of a recipe; what ComfyUI does differently is said."""
    from s2v_flow.comfy.exporter import export_workflow

    force = given.pop("force")
    planned = s2v_flow.plan(recipe, make_options(**given))
    text, notes = export_workflow(planned.recipe, planned.plan, form)
    for note in notes:
        report.print_message(f"note: {note}")
    _deliver(text, output, force=force)


def _deliver(text: str, output: Path | None, **rules: Any) -> None:
    """Write a text to a file, or print it."""
    from s2v_flow.start.project import write_recipe

    if output is None:
        report.print_result(text.rstrip("\n"))
    else:
        write_recipe(output, text, **rules)


@cli.command()
@click.argument("kind", required=False, shell_complete=complete_kind)
@json_option
def nodes(kind: str | None, as_json: bool) -> None:
    """List the kinds of nodes; with KIND, its fields."""
    from s2v_flow.cli.describe import describe_kinds, kinds_text

    described = describe_kinds(kind)
    report.print_json(described) if as_json else report.print_table(kinds_text(described, in_full=kind is not None))


@cli.command()
@click.option("-o", "--output", type=TextFile(), help="Write to a file instead of stdout.")
@click.option(
    "--of",
    "what",
    type=click.Choice(["recipe", "manifest", "events"]),
    default="recipe",
    help="Recipes, runs' manifests, or a line of run --events.",
    show_default=True,
)
@click.option("--force", is_flag=True, help="Overwrite another file that is there.")
def schema(output: Path | None, what: str, force: bool) -> None:
    """Print the JSON Schema of recipes, for editors, or of what programs read."""
    from s2v_flow.cli.describe import schema_text

    if output is not None and not output.parent.is_dir():
        text, fix = f"{output}: cannot be written: there is no such folder", "name another file with -o"
        raise S2VFlowError(text, fix, exit_code=ExitCode.USAGE)
    _deliver(schema_text(what), output, force=force, replaces=b'"$schema"')


@cli.command()
@click.argument("portrait", type=FILE)
@click.argument("voice", type=FILE)
@click.argument("prompt", required=False)
@click.option("-o", "--output", type=FILE, default="talk.mp4", help="The video to make.", show_default=True)
@click.option("-p", "--profile", "profiles", multiple=True, metavar="NAMES", help="The new recipe's: -p quality.")
@json_option
@click.option("--overwrite", is_flag=True, help="Replace another video instead of numbering the new one.")
@start_options
@level_options
@folder_options
def make(
    portrait: Path,
    voice: Path,
    prompt: str | None,
    output: Path,
    as_json: bool,
    like: str,
    force: bool,
    level: Level,
    **given: Any,
) -> None:
    """Make a video without a recipe; one is left beside it, to change and to run again."""
    from s2v_flow.api import KINDS
    from s2v_flow.cli.running import execute
    from s2v_flow.start.project import DEFAULT_PROMPT, Start, is_as_written, recipe_path, recipe_text, write_recipe
    from s2v_flow.start.recipes import RECIPES

    recipe = recipe_path(output)
    start = Start(portrait, voice, prompt or DEFAULT_PROMPT, like, output.name)
    text = recipe_text(start, recipe.parent) if like in RECIPES else _text_like(start, recipe)
    write_recipe(recipe, text, force=force or is_as_written(recipe, KINDS))
    given["output_dir"] = given["output_dir"] or recipe.parent  # -o says more than the user's defaults
    options = make_options(**given)
    again = " ".join(["s2vflow run", str(recipe), *(f"-p {name}" for name in options.profiles)])
    if level != "quiet":
        report.print_message(f"the recipe is {recipe}; to run it again: {again}")
    execute(s2v_flow.plan(recipe, options), options, level, again, as_json=as_json)


def _text_like(start: Start, recipe: Path) -> str:
    """Return the recipe inside a video, for another portrait, voice and prompt."""
    from s2v_flow.recipe.config import portable_text
    from s2v_flow.start.project import changes_like

    changes = changes_like(start, s2v_flow.check(start.like))
    return portable_text(replace(s2v_flow.check(start.like, overrides=changes), path=recipe, folder=None))


def main() -> NoReturn:
    """Run the command line and leave with its exit code."""
    streams = Streams()
    stop = StopRequest(_tell)
    stop.install()
    try:
        try:
            _main(stop, streams)
        finally:
            stop.ignore()
    except StoppedError as stopped:  # by one more signal, on the way out
        stop.ignore()
        sys.exit(stopped.exit_code)


def _main(stop: StopRequest, streams: Streams) -> NoReturn:
    code: Any = ExitCode.OK
    try:
        try:
            cli(prog_name="s2vflow", standalone_mode=False, obj=stop)
        except SystemExit as left:
            code = left.code
        streams.check()
    except click.ClickException as error:
        error.show()
        sys.exit(ExitCode.USAGE)
    except (click.Abort, KeyboardInterrupt):
        _leave(str(StoppedError()), ExitCode.INTERRUPTED)
    except StoppedError as stopped:
        _leave(str(stopped), stopped.exit_code)
    except S2VFlowError as error:
        report.print_error(error)
        sys.exit(error.exit_code)
    except Exception as error:
        _explain_unexpected(error)
    sys.exit(code)


def _tell(text: str) -> None:
    """Write to stderr inside a signal handler, where its buffer may be in use."""
    with suppress(OSError):
        os.write(2, text.encode())


def _leave(text: str, code: ExitCode) -> NoReturn:
    click.echo(text, err=True)
    sys.exit(code)


def _explain_unexpected(error: Exception) -> NoReturn:
    """Leave after an error that is not ours: another package, no memory, a file that may not be read; or a defect."""
    if broken := broken_package(error):
        _leave(f"error: {broken.message}\n  fix: {broken.fix}", broken.exit_code)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        text = f"out of memory: {error}\n  fix: a smaller width and height, or a lower frames_per_call in decode"
        _leave(f"error: {text}\n  kept: every chunk that was finished", ExitCode.OUT_OF_MEMORY)
    if isinstance(error, PermissionError):
        text = f"error: {error.filename}: {error.strerror}\n  fix: check its permissions, or name another folder"
        _leave(text, ExitCode.MISSING)
    traceback.print_exc()
    _leave("error: this is a defect of s2vflow, please report it with the lines above", ExitCode.INTERNAL)
