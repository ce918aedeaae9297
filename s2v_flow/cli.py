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
from s2v_flow.completion import SHELLS, complete_kind, complete_profile, completion_script
from s2v_flow.errors import ExitCode, S2VFlowError
from s2v_flow.option_order import OrderedGroup, override_options, take_overrides

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
        (10, "plan --detailed-exitcode: a run would compute something"),
        (130, "interrupted (Ctrl-C)"),
        (143, "terminated"),
    )
)


@click.group(
    cls=OrderedGroup,
    epilog=f"\b\nExit codes:\n{EXIT_CODES}",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, prog_name="s2vflow")
def cli() -> None:
    """Talking videos from a portrait, a voice and a prompt, with Wan2.2-S2V, from a recipe that lives in git."""


def recipe_options(command: _Command) -> _Command:
    """Add the recipe and the options that change it."""
    return click.argument("recipe", type=_FILE)(change_options(command))


def change_options(command: _Command) -> _Command:
    """Add the options that change a recipe."""
    for decorate in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout."),
        click.option("-f", "override_files", type=_FILE, multiple=True, metavar="FILE", help="Lay a file over it."),
        click.option(
            "-p",
            "profiles",
            multiple=True,
            metavar="NAMES",
            shell_complete=complete_profile,
            help="Profiles of the recipe: -p quality,bf16.",
        ),
        override_options,
    ):
        command = decorate(command)
    return command


def folder_options(command: _Command) -> _Command:
    """Add the options that say where things are."""
    for decorate in (
        click.option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps."),
        click.option("--cache-dir", type=_FOLDER, help="Where artifacts are kept.  [env: S2VFLOW_CACHE_DIR]"),
        click.option("--output-dir", type=_FOLDER, help="Where relative outputs go."),
        click.option("--input-dir", "input_dirs", type=_FOLDER, multiple=True, help="Where inputs are looked for too."),
        click.option(
            "--extra-model-paths",
            type=_FILE,
            multiple=True,
            metavar="FILE",
            help="ComfyUI's extra_model_paths.yaml.  [env: S2VFLOW_EXTRA_MODEL_PATHS]",
        ),
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


def selection_options(command: _Command) -> _Command:
    """Add the options that pick a part of the plan."""
    for decorate in (
        click.option("--cache-only", is_flag=True, help="Fail instead of computing anything."),
        click.option("--no-cache", is_flag=True, help="Compute everything anew."),
        click.option("--force", multiple=True, metavar="NODE[+]", help="Compute it anew; + and what follows it."),
        click.option("--only", multiple=True, metavar="NODE", help="Run it alone, from stored inputs."),
        click.option("--from", "start", metavar="NODE", help="Compute nothing before it."),
        click.option("--until", multiple=True, metavar="NODE", help="Run nothing after it."),
    ):
        command = decorate(command)
    return command


def make_options(**given: Any) -> Options:
    """Make `Options` from the command line's values."""
    from s2v_flow.api import Options
    from s2v_flow.defaults import with_defaults
    from s2v_flow.graph.selection import Selection

    given["selection"] = Selection(
        until=given.pop("until", ()),
        only=given.pop("only", ()),
        start=given.pop("start", None),
        force=given.pop("force", ()),
        is_fresh=given.pop("no_cache", False),
        is_cached_only=given.pop("cache_only", False),
    )

    given["profiles"] = [name for names in given.get("profiles", ()) for name in names.split(",") if name]
    given["overrides"] = take_overrides(given)
    if "device" in given:  # the commands that look for files
        given = with_defaults(given)
        given["device"] = given["device"] or "auto"
    return Options(**given)


@cli.command()
@recipe_options
@selection_options
@folder_options
def run(recipe: Path, as_json: bool, **given: Any) -> None:
    """Run a recipe: compute what is not stored yet, and write the results."""
    _run(recipe, make_options(**given), as_json=as_json)


def _run(recipe: Path, options: Options, *, as_json: bool) -> None:
    from s2v_flow import api, report

    planned = api.plan(recipe, options)
    if planned.plan.missing:
        report.print_json(planned.to_json()) if as_json else report.print_plan(planned)
    api.require_files(planned)
    for note in planned.notes:
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
@selection_options
@folder_options
@click.option("--detailed-exitcode", is_flag=True, help="Leave with 10 if a run would compute something.")
def plan(recipe: Path, as_json: bool, detailed_exitcode: bool, **given: Any) -> None:
    """Show what a run would do: the order, the chunks, what is stored, what must run and why, what is missing."""
    from s2v_flow import api, report

    planned = api.plan(recipe, make_options(**given))
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
    from s2v_flow import api, report
    from s2v_flow.graph.draw import DRAWERS

    planned = api.plan(recipe, make_options(**given))
    text = DRAWERS[form](planned.plan, planned.statuses)
    report.print_json({"format": form, "graph": text}) if as_json else report.print_result(text)


@cli.command()
@recipe_options
@click.option("--origin", "with_origins", is_flag=True, help="Say where each value was written.")
@click.option("--resolved/--references", default=True, help="Put parameters in (the default), or keep $params.NAME.")
def config(recipe: Path, as_json: bool, with_origins: bool, resolved: bool, **given: Any) -> None:
    """Print a recipe as one text, with everything that is laid over it."""
    from s2v_flow import api, report
    from s2v_flow.recipe.config import config_json, config_text

    checked = api.check(recipe, make_options(**given))
    if as_json:
        report.print_json(config_json(checked, resolved=resolved, with_origins=with_origins))
    else:
        report.print_result(config_text(checked, resolved=resolved, with_origins=with_origins).rstrip("\n"))


@cli.command()
@click.argument("kind", required=False, shell_complete=complete_kind)
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
        try:
            output.write_text(text, encoding="utf-8")
        except OSError as error:
            raise S2VFlowError(f"{output}: cannot be written: {error.strerror}", exit_code=ExitCode.USAGE) from error


def start_options(command: _Command) -> _Command:
    """Add the options of commands that write a first recipe."""
    for decorate in (
        click.option("--force", is_flag=True, help="Overwrite the recipe that is there."),
        click.option(
            "--like",
            type=click.Choice(["lightning", "quality", "bf16", "official", "demo"]),
            default="lightning",
            help="Which settings to begin with.",
            show_default=True,
        ),
    ):
        command = decorate(command)
    return command


@cli.command()
@click.argument("portrait", type=_FILE, required=False)
@click.argument("voice", type=_FILE, required=False)
@click.option("-o", "--output", type=_FILE, default="recipe.yaml", help="The recipe to write.", show_default=True)
@click.option("--prompt", help="What the video shows.")
@start_options
def init(portrait: Path | None, voice: Path | None, output: Path, prompt: str | None, like: str, force: bool) -> None:
    """Write a first recipe, for a portrait and a voice."""
    from s2v_flow import report
    from s2v_flow.start import DEFAULT_PROMPT, Start, recipe_text, write_recipe

    start = Start(portrait, voice, prompt or DEFAULT_PROMPT, like, f"out/{output.stem}.mp4")
    write_recipe(output, recipe_text(start, output.parent), force=force)
    report.print_result(str(output))


@cli.command()
@click.argument("portrait", type=_FILE)
@click.argument("voice", type=_FILE)
@click.argument("prompt")
@click.option("-o", "--output", type=_FILE, default="talk.mp4", help="The video to make.", show_default=True)
@click.option("-p", "profiles", multiple=True, metavar="NAMES", help="Profiles of the new recipe: -p quality.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout.")
@start_options
@folder_options
def make(
    portrait: Path, voice: Path, prompt: str, output: Path, as_json: bool, like: str, force: bool, **given: Any
) -> None:
    """Make a video without a recipe; one is left beside it, to change and to run again."""
    from s2v_flow import report
    from s2v_flow.start import Start, recipe_path, recipe_text, write_recipe

    recipe = recipe_path(output)
    start = Start(portrait, voice, prompt, like, output.name)
    write_recipe(recipe, recipe_text(start, recipe.parent), force=force)
    options = make_options(**given)
    again = " ".join(["s2vflow run", str(recipe), *(f"-p {name}" for name in options.profiles)])
    report.print_message(f"the recipe is {recipe}; to run it again: {again}")
    _run(recipe, options, as_json=as_json)


@cli.command()
@click.argument("recipe", type=_FILE, required=False)
@change_options
@folder_options
@click.option("--download", is_flag=True, help="Download what is missing, into the first models folder.")
@click.option("--only", multiple=True, metavar="FILE", help="Only this one; repeatable.")
def models(recipe: Path | None, as_json: bool, download: bool, only: tuple[str, ...], **given: Any) -> None:
    """List the model files that a recipe needs (or all that are known), and download them on request."""
    from s2v_flow import api, need, report

    if download and recipe is None and not only:
        raise click.UsageError("--download needs a recipe, or --only FILE: all known models together are very large")
    options = make_options(**given)
    needs = need.choose(api.model_needs(recipe, options), only)
    if download:
        progress = report.DownloadProgress()
        need.download(needs, options.locations.models_dirs[0], progress)
        needs = need.choose(api.model_needs(recipe, options), only)
    report.print_json(need.needs_json(needs)) if as_json else report.print_result(need.needs_text(needs))
    if any(item.status == "missing" for item in needs):
        sys.exit(ExitCode.MISSING)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout.")
@folder_options
def doctor(as_json: bool, **given: Any) -> None:
    """Look at this machine: Python, torch and devices, codecs, the cache, models, packages."""
    from s2v_flow import report
    from s2v_flow.doctor import examine, findings_json, findings_text

    findings = examine(make_options(**given))
    report.print_json(findings_json(findings)) if as_json else report.print_result(findings_text(findings))
    if any(finding.status == "problem" for finding in findings):
        sys.exit(ExitCode.FAILED)


@cli.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print a shell's completion script, to be put where it reads such scripts.

    \b
      bash: s2vflow completion bash > ~/.local/share/bash-completion/completions/s2vflow
      zsh:  s2vflow completion zsh > a folder of $fpath, as _s2vflow
      fish: s2vflow completion fish > ~/.config/fish/completions/s2vflow.fish
    """
    from s2v_flow import report

    report.print_result(completion_script(shell, cli, "s2vflow"))


def main() -> NoReturn:
    """Run the command line and leave with its exit code."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        cli(prog_name="s2vflow", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(ExitCode.USAGE)
    except (click.Abort, KeyboardInterrupt):
        _leave(
            "interrupted; what was finished is stored, and the same command goes on from there", ExitCode.INTERRUPTED
        )
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


class _TerminatedError(BaseException):
    """SIGTERM came. Like KeyboardInterrupt, it is nothing that code on the way should catch."""


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
