"""Commands for making a start and for asking: the first recipe, the page, the machine, the shell, a code's meaning."""

from __future__ import annotations

import json
import os
import sys
import textwrap
import webbrowser
from pathlib import Path
from typing import Any

import click

from s2v_flow import __version__
from s2v_flow.cli import report
from s2v_flow.cli.completion import SHELLS, completion_script
from s2v_flow.cli.options import FILE, OrderedCommand, folder_options, json_option, make_options, start_options
from s2v_flow.errors import ExitCode, S2VFlowError
from s2v_flow.machine import resolve_device


@click.command(cls=OrderedCommand)
@click.argument("portrait", type=FILE, required=False)
@click.argument("voice", type=FILE, required=False)
@click.option("-o", "--output", type=FILE, default="recipe.yaml", help="The recipe to write.", show_default=True)
@click.option("--prompt", help="What the video shows.")
@start_options
def init(portrait: Path | None, voice: Path | None, output: Path, prompt: str | None, like: str, force: bool) -> None:
    """Write a first recipe, for a portrait and a voice."""
    from s2v_flow.start.project import DEFAULT_PROMPT, Start, recipe_text, write_recipe
    from s2v_flow.start.recipes import RECIPES

    if like not in RECIPES:
        fix = f"s2vflow recipe {like} -o {output} writes what is in it"
        raise S2VFlowError(f"--like {like}: init knows its own names only", fix, exit_code=ExitCode.USAGE)
    start = Start(portrait, voice, prompt or DEFAULT_PROMPT, like, f"out/{output.stem}.mp4")
    write_recipe(output, recipe_text(start, output.parent), force=force)
    report.print_result(str(output))


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
    report.print_result(f"s2vflow, version {__version__}")


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
        raise S2VFlowError(f"ui needs {error.name}, which is not installed", fix, exit_code=ExitCode.USAGE) from error
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
