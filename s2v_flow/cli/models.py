"""The commands about model files: which a recipe needs, and making them of the authors' own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

import s2v_flow
from s2v_flow.cli import report
from s2v_flow.cli.options import FILE, OrderedGroup, change_options, folder_options, json_option, make_options
from s2v_flow.errors import ExitCode


class _ModelsGroup(OrderedGroup):
    """`models`, and what follows it, is `models list`."""

    usual = "list"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """List also where nothing follows."""
        return super().parse_args(ctx, args if args or ctx.resilient_parsing else ["list"])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Propose the commands, and what may follow `list`."""
        listing = self.commands["list"]
        context = listing.make_context("list", [], parent=ctx, resilient_parsing=True)
        argument = next(parameter for parameter in listing.params if parameter.name == "recipe")
        return [*super().shell_complete(ctx, incomplete), *argument.shell_complete(context, incomplete)]


@click.group(cls=_ModelsGroup, options_metavar="", subcommand_metavar="[RECIPE] [OPTIONS] | COMMAND [ARGS]...")
def models() -> None:
    """List a recipe's model files, download them, convert the authors' own.

    `s2vflow models [RECIPE]` is short for `s2vflow models list [RECIPE]`.
    """


@models.command("list")
@click.argument("recipe", type=FILE, required=False)
@change_options
@folder_options
@click.option("--download", is_flag=True, help="Download what is missing, into the first models folder.")
@click.option("--only", multiple=True, metavar="FILE", help="Only this one; repeatable.")
def list_(recipe: Path | None, as_json: bool, download: bool, only: tuple[str, ...], **given: Any) -> None:
    """List the model files that a recipe needs (or all that are known), and download them on request."""
    from s2v_flow.library import needs

    if download and recipe is None and not only:
        raise click.UsageError("--download needs a recipe, or --only FILE: all known models together are very large")
    options = make_options(**given)

    def look() -> list[needs.ModelNeed]:
        if recipe is None:
            return needs.choose(needs.known_needs(needs.HOMES, options.locations), only)
        return needs.choose(needs.recipe_needs(s2v_flow.check(recipe, options), options.locations), only)

    found = look()
    if download:
        progress = report.DownloadProgress()
        needs.download(found, options.locations.models_dirs[0], progress)
        found = look()
    listed = {"models": [item.to_json() for item in found]}
    report.print_json(listed) if as_json else report.print_table(needs.needs_text(found))
    if any(item.status == "missing" for item in found):
        sys.exit(ExitCode.MISSING)


@models.command()
@click.argument("source", type=FILE)
@click.option("-o", "--output", type=FILE, required=True, metavar="FILE.safetensors", help="The file to make.")
@click.option(
    "--kind",
    type=click.Choice(["auto", "text_encoder", "vae", "diffusion_model", "audio_encoder"]),
    default="auto",
    help="What it has to be; what is taken out of an all-in-one checkpoint.",
    show_default=True,
)
@click.option("--tokenizer", type=FILE, help="A text encoder's; else google/umt5-xxl/spiece.model beside SOURCE.")
@click.option(
    "--dtype",
    type=click.Choice(["keep", "bf16", "fp16", "fp32"]),
    default="keep",
    help="What floating point is stored in.",
    show_default=True,
)
@click.option("--force", is_flag=True, help="Overwrite the file that is there.")
@json_option
def convert(source: Path, output: Path, as_json: bool, force: bool, **given: Any) -> None:
    """Make one safetensors file of SOURCE, as the recipes take it.

    SOURCE is a file that torch.save wrote (.pth, .pt, .bin, .ckpt), a *.safetensors.index.json or the folder that
    holds it, or a single safetensors file. A pickle is opened by a process of its own with few rights, by PyTorch's
    restricted unpickler, and by nothing else. The authors' own release, for example:

    \b
      s2vflow models convert Wan2.2-S2V-14B/Wan2.1_VAE.pth -o models/vae/wan_2.1_vae.safetensors
      s2vflow models convert Wan2.2-S2V-14B -o models/diffusion_models/wan2.2_s2v_14B_bf16.safetensors
    """
    from s2v_flow.convert.convert import Request, convert

    progress = report.DownloadProgress()
    report.print_message(f"reading {source}")
    made = convert(
        Request(source, output, overwrites=force, **given), lambda done, total: progress(output.name, done, total)
    )
    for note in made.notes:
        report.print_message(f"note: {note}")
    report.print_json(made.to_json()) if as_json else report.print_result(str(made.target))
