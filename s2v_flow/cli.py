"""The command line: options, commands, and the one place where errors become exit codes."""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from s2v_flow import __version__
from s2v_flow.errors import ExitCode, S2VFlowError

if TYPE_CHECKING:
    from s2v_flow.api import Options

_Command = TypeVar("_Command", bound=Callable[..., Any])
_FOLDER = click.Path(path_type=Path, file_okay=False)
_FILE = click.Path(path_type=Path)

EXIT_CODES = "\n".join(
    f"  {code}  {meaning}"
    for code, meaning in (
        (0, "all is well"),
        (1, "a node failed while running"),
        (2, "the command line is wrong"),
        (3, "the recipe is wrong; nothing was run"),
        (4, "a model or an input is missing or cannot be used"),
        (5, "refused for safety (pickles, paths outside the allowed folders, limits)"),
        (6, "the disk is full"),
        (7, "out of memory"),
        (8, "NaN or infinity in a result"),
        (9, "a defect of s2vflow"),
        (130, "interrupted (Ctrl-C)"),
        (143, "terminated"),
    )
)


@click.group(
    epilog=f"\b\nExit codes:\n{EXIT_CODES}",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, prog_name="s2vflow")
def cli() -> None:
    """Talking videos from a portrait, a voice and a prompt, with Wan2.2-S2V, from a recipe that lives in git."""


def recipe_options(command: _Command) -> _Command:
    """Add the recipe and the options that change it."""
    for decorate in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout."),
        click.option("-f", "override_files", type=_FILE, multiple=True, metavar="FILE", help="Lay a file over it."),
        click.option("-p", "profiles", multiple=True, metavar="NAMES", help="Profiles of the recipe: -p quality,bf16."),
        click.option("--set", "sets", multiple=True, metavar="PATH=VALUE", help="Set a value: steps=20."),
        click.argument("recipe", type=_FILE),
    ):
        command = decorate(command)
    return command


def folder_options(command: _Command) -> _Command:
    """Add the options that say where things are."""
    for decorate in (
        click.option("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps."),
        click.option("--cache-dir", type=_FOLDER, help="Where artifacts are kept.  [env: S2VFLOW_CACHE_DIR]"),
        click.option("--output-dir", type=_FOLDER, help="Where relative outputs go."),
        click.option("--input-dir", "input_dirs", type=_FOLDER, multiple=True, help="Where inputs are looked for too."),
        click.option(
            "--models-dir",
            "models_dirs",
            type=_FOLDER,
            multiple=True,
            help="A models folder in ComfyUI's layout; repeatable.  [env: S2VFLOW_MODELS_DIR]",
        ),
    ):
        command = decorate(command)
    return command


def make_options(**given: Any) -> Options:
    """Make `Options` from the command line's values."""
    from s2v_flow.api import Options

    given["profiles"] = [name for names in given.get("profiles", ()) for name in names.split(",") if name]
    return Options(**given)


@cli.command()
@recipe_options
@folder_options
def run(recipe: Path, as_json: bool, **given: Any) -> None:
    """Run a recipe: compute what is not stored yet, and write the results."""
    from s2v_flow import api, report

    options = make_options(**given)
    planned = api.plan(recipe, options)
    if planned.plan.missing:
        report.print_json(planned.to_json()) if as_json else report.print_plan(planned)
    api.require_files(planned)
    for note in planned.plan.notes:
        report.print_message(f"note: {note}")
    progress = report.Progress()
    try:
        result = api.run_planned(planned, options, progress)
    finally:
        progress.close()
    if as_json:
        report.print_json(result.to_json())
    else:
        for paths in result.outputs.values():
            for path in paths[:1] if len(paths) > 3 else paths:
                report.print_result(f"{path}" + (f" and {len(paths) - 1} more" if len(paths) > 3 else ""))


@cli.command()
@recipe_options
def check(recipe: Path, as_json: bool, **given: Any) -> None:
    """Check a recipe, without looking at models or inputs."""
    from s2v_flow import api, report

    checked = api.check(recipe, make_options(**given))
    if as_json:
        report.print_json({"recipe": str(checked.path), "ok": True, "nodes": list(checked.nodes)})
    else:
        report.print_result(f"{checked.path}: {len(checked.nodes)} nodes, no mistakes")


@cli.command()
@recipe_options
@folder_options
def plan(recipe: Path, as_json: bool, **given: Any) -> None:
    """Show what a run would do: the order, the chunks, what is stored and what is missing."""
    from s2v_flow import api, report

    planned = api.plan(recipe, make_options(**given))
    report.print_json(planned.to_json()) if as_json else report.print_plan(planned)
    if planned.plan.missing:
        sys.exit(ExitCode.MISSING)


@cli.command()
@click.argument("kind", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout.")
def nodes(kind: str | None, as_json: bool) -> None:
    """List the kinds of nodes; with KIND, its fields."""
    from s2v_flow import report
    from s2v_flow.describe import describe_kinds, kinds_text

    described = describe_kinds(kind)
    report.print_json(described) if as_json else report.print_result(kinds_text(described, in_full=kind is not None))


@cli.command()
@click.option("-o", "--output", type=_FILE, help="Write to a file instead of stdout.")
def schema(output: Path | None) -> None:
    """Print the JSON Schema of recipes, for editors."""
    from s2v_flow import report
    from s2v_flow.api import KINDS
    from s2v_flow.recipe.schema import schema_text

    text = schema_text(KINDS)
    if output is None:
        report.print_result(text.rstrip("\n"))
    else:
        output.write_text(text, encoding="utf-8")


def main() -> NoReturn:
    """Run the command line and leave with its exit code."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        cli(prog_name="s2vflow", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(ExitCode.USAGE)
    except (click.Abort, KeyboardInterrupt):
        _leave("interrupted; what was finished is stored, and the same command goes on from there", ExitCode.INTERRUPTED)
    except _TerminatedError:
        _leave("terminated; what was finished is stored, and the same command goes on from there", ExitCode.TERMINATED)
    except S2VFlowError as error:
        from s2v_flow import report

        report.print_error(error)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.exit(ExitCode.FAILED)
    except Exception as error:
        _explain_unexpected(error)
    sys.exit(ExitCode.OK)


class _TerminatedError(Exception):
    """SIGTERM came."""


def _terminate(number: int, frame: object) -> NoReturn:
    raise _TerminatedError


def _leave(text: str, code: ExitCode) -> NoReturn:
    click.echo(text, err=True)
    sys.exit(code)


def _explain_unexpected(error: Exception) -> NoReturn:
    """Leave after an error that is not one of ours: out of memory, or a defect."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        text = f"out of memory: {error}\n  fix: a smaller width and height, or a lower frames_per_call in decode"
        _leave(f"error: {text}\n  kept: every chunk that was finished", ExitCode.OUT_OF_MEMORY)
    traceback.print_exc()
    _leave("error: this is a defect of s2vflow, please report it with the lines above", ExitCode.INTERNAL)
