"""Commands for making a start: the first recipe, the models, the machine, the shell."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from s2v_flow.cli_options import FILE, change_options, folder_options, make_options, start_options
from s2v_flow.completion import SHELLS, completion_script
from s2v_flow.errors import ExitCode
from s2v_flow.option_order import OrderedCommand


@click.command()
@click.argument("portrait", type=FILE, required=False)
@click.argument("voice", type=FILE, required=False)
@click.option("-o", "--output", type=FILE, default="recipe.yaml", help="The recipe to write.", show_default=True)
@click.option("--prompt", help="What the video shows.")
@start_options
def init(portrait: Path | None, voice: Path | None, output: Path, prompt: str | None, like: str, force: bool) -> None:
    """Write a first recipe, for a portrait and a voice."""
    from s2v_flow import report
    from s2v_flow.start import DEFAULT_PROMPT, Start, recipe_text, write_recipe

    start = Start(portrait, voice, prompt or DEFAULT_PROMPT, like, f"out/{output.stem}.mp4")
    write_recipe(output, recipe_text(start, output.parent), force=force)
    report.print_result(str(output))


@click.command(cls=OrderedCommand)
@click.argument("recipe", type=FILE, required=False)
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


@click.command()
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


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print a shell's completion script, to be put where it reads such scripts.

    \b
      bash: s2vflow completion bash > ~/.local/share/bash-completion/completions/s2vflow
      zsh:  s2vflow completion zsh > a folder of $fpath, as _s2vflow
      fish: s2vflow completion fish > ~/.config/fish/completions/s2vflow.fish
    """
    from s2v_flow import report

    report.print_result(completion_script(shell, click.get_current_context().find_root().command, "s2vflow"))
