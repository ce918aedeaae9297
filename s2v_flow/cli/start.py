"""Commands for making a start and for asking: recipes of other files, kinds, the page, the machine."""

from __future__ import annotations

import json
import os
import sys
import textwrap
import webbrowser
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

import s2v_flow
from s2v_flow.cli import report
from s2v_flow.cli.completion import SHELLS, complete_kind, completion_script
from s2v_flow.cli.options import (
    FILE,
    OrderedCommand,
    TextFile,
    folder_options,
    json_option,
    level_options,
    make_options,
    recipe_options,
    start_options,
)
from s2v_flow.errors import ExitCode, UsageError
from s2v_flow.machine import resolve_device

if TYPE_CHECKING:
    from s2v_flow.cli.progress import Level
    from s2v_flow.start.project import Start


@click.command(cls=OrderedCommand)
@click.argument("portrait", type=FILE, required=False)
@click.argument("voice", type=FILE, required=False)
@click.option("-o", "--output", type=FILE, default="recipe.yaml", help="The recipe to write.", show_default=True)
@click.option("--prompt", help="What the video shows.")
@start_options
def init(portrait: Path | None, voice: Path | None, output: Path, prompt: str | None, like: str, force: bool) -> None:
    """Write a first recipe, for a portrait and a voice."""
    from s2v_flow.start.project import DEFAULT_PROMPT, RECIPES, Start, recipe_text, write_recipe

    if like not in RECIPES:
        fix = f"s2vflow recipe {like} -o {output} writes what is in it"
        raise UsageError(f"--like {like}: init knows its own names only", fix)
    start = Start(portrait, voice, prompt or DEFAULT_PROMPT, like, f"out/{output.stem}.mp4")
    write_recipe(output, recipe_text(start, output.parent), force=force)
    report.print_result(str(output))


@click.command("recipe", cls=OrderedCommand)
@click.argument("video", type=FILE)
@click.option("-o", "--output", type=TextFile(), help="The recipe to write, instead of stdout.")
@click.option("--force", is_flag=True, help="Overwrite the recipe that is there.")
def recipe_(video: Path, output: Path | None, force: bool) -> None:
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


@click.command("import", cls=OrderedCommand)
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


@click.command(cls=OrderedCommand)
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


@click.command(cls=OrderedCommand)
@click.argument("kind", required=False, shell_complete=complete_kind)
@json_option
def nodes(kind: str | None, as_json: bool) -> None:
    """List the kinds of nodes; with KIND, its fields."""
    from s2v_flow.cli.describe import describe_kinds, kinds_text

    described = describe_kinds(kind)
    report.print_json(described) if as_json else report.print_table(kinds_text(described, in_full=kind is not None))


@click.command(cls=OrderedCommand)
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
        raise UsageError(f"{output}: cannot be written: there is no such folder", "name another file with -o")
    _deliver(schema_text(what), output, force=force, replaces=b'"$schema"')


@click.command(cls=OrderedCommand)
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
    from s2v_flow.start.project import (
        DEFAULT_PROMPT,
        RECIPES,
        Start,
        is_as_written,
        recipe_path,
        recipe_text,
        write_recipe,
    )

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


@click.command(cls=OrderedCommand)
@json_option
@click.option("--precision", is_flag=True, help="Show what is stored and computed in which precision, by device.")
@folder_options
def doctor(as_json: bool, precision: bool, **given: Any) -> None:
    """Look at this machine: Python, torch and devices, codecs, the cache, models, packages."""
    from s2v_flow.cli.doctor import examine, findings_json, findings_text, precision_json, precision_text

    if precision:
        table = precision_json(resolve_device(make_options(**given).device))
        report.print_json(table) if as_json else report.print_result(precision_text(table))
        return
    findings = examine(make_options(**given))
    report.print_json(findings_json(findings)) if as_json else report.print_table(findings_text(findings))
    if any(finding.status == "problem" for finding in findings):
        sys.exit(ExitCode.FAILED)


@click.command(cls=OrderedCommand)
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print a shell's completion script, to be put where it reads such scripts.

    \b
      bash: s2vflow completion bash > ~/.local/share/bash-completion/completions/s2vflow
      zsh:  s2vflow completion zsh > a folder of $fpath, as _s2vflow
      fish: s2vflow completion fish > ~/.config/fish/completions/s2vflow.fish
    """
    report.print_result(completion_script(shell, click.get_current_context().find_root().command, "s2vflow"))


@click.command(cls=OrderedCommand)
@click.argument("code")
def explain(code: str) -> None:
    """Print what an error code (R051) or an exit code (7) means, and what to do."""
    from s2v_flow.wording import did_you_mean

    known = json.loads((Path(__file__).parent / "explanations.json").read_text(encoding="utf-8"))
    wanted = code.strip("[]").upper().removeprefix("ERROR[").removeprefix("EXIT ")
    if wanted not in known:
        raise click.UsageError(f"there is no code {code!r}: {did_you_mean(wanted, known, 'codes')}")
    title = f"exit {wanted}" if wanted.isdecimal() else wanted
    report.print_result(textwrap.fill(f"{title}: {known[wanted]}", 100, break_on_hyphens=False, break_long_words=False))


@click.command("help", cls=OrderedCommand)
@click.argument("command", nargs=-1)
def help_(command: tuple[str, ...]) -> None:
    """Print what --help prints, of the program or of a COMMAND."""
    root = click.get_current_context().find_root()
    root.command.main([*command, "--help"], prog_name=root.info_name, standalone_mode=False)


@click.command(cls=OrderedCommand)
def version() -> None:
    """Print the version."""
    report.print_result(f"s2vflow, version {s2v_flow.__version__}")


@click.command(cls=OrderedCommand)
@click.option("--port", type=click.IntRange(0, 65_535), default=0, help="On 127.0.0.1; any free one unless given.")
@click.option("--no-browser", is_flag=True, help="Only print the address.")
@folder_options
def ui(port: int, no_browser: bool, **given: Any) -> None:
    """Serve a page for this folder: drop a portrait and a voice, run, watch, compare. Ctrl-C ends it.

    The address, with a secret token, is the one line on stdout. Only this machine can open it. (extra: ui)
    """
    try:
        from s2v_flow.views.ui.app import serve
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn"):
            raise
        fix = f"{sys.executable} -m pip install 's2vflow[ui]'"
        raise UsageError(f"ui needs {error.name}, which is not installed", fix) from error
    words = []
    for option in click.get_current_context().command.params:
        value = given.get(option.name or "")
        for each in value if isinstance(value, tuple) else [value] if value else []:
            words += [option.opts[0], str(each)]

    def tell(address: str) -> None:
        report.print_result(address)
        report.print_message("the page is open until Ctrl-C; recipes, inputs and videos go to ./ui")
        if not no_browser and (sys.platform == "darwin" or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()):
            webbrowser.open(address)

    serve(make_options(**given), words, port, is_ready=tell)
