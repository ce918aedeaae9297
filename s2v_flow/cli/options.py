"""Options that several commands share, and what is made of them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from s2v_flow.cli.completion import complete_node, complete_profile, complete_set
from s2v_flow.graph.interrupt import StopRequest

if TYPE_CHECKING:
    from s2v_flow.api import Options
    from s2v_flow.recipe.argument import Override

_ORDER = "s2v_flow.cli.options"
_DASHES = "-\u2012\u2013\u2014\u2015\u2212"  # what word processors make of hyphens

_CHANGES: tuple[tuple[Literal["set", "set-json", "set-file", "unset", "seed"], str, str], ...] = (
    ("seed", "N", "Short for --set seed=N; without such a parameter, that of every sample node."),
    ("unset", "PATH", "Go back to the default; remove an item of a list."),
    ("set-file", "PATH=FILE", "Set a text to a file's: prompt=prompt.txt."),
    ("set-json", "PATH=JSON", "Set a value of any shape: nodes.dit.loras=[]."),
    ("set", "PATH=VALUE", "Set a value: steps=20."),
)


class OrderedCommand(click.Command):
    """A command that remembers the order of its options, which click by itself tells for each kind alone."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse as usual, and note the options' order beside."""
        words = list(args)
        try:
            order = self.make_parser(ctx).parse_args(args=list(args))[2]
            ctx.meta[_ORDER] = [parameter.name for parameter in order]
            _refuse_repeated([item for item in order if isinstance(item, click.Option)])
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            advice = self._advice(ctx, error, words)
            if advice is None:
                raise
            said = error.format_message()
            raise click.UsageError(f"{said}{'' if said[-1] in '.?)' else '.'} {advice}", ctx) from error

    def _advice(self, ctx: click.Context, error: click.UsageError, words: list[str]) -> str | None:
        """Return what more there is to say of words that click does not understand."""
        dashed = next((word for word in words if word[0:1] in _DASHES[1:] and word.lstrip(_DASHES)[:1].isalpha()), None)
        if dashed is not None:
            return f"An option begins with hyphens: --{dashed.lstrip(_DASHES)}"
        names = {item.name for item in self.params}
        if isinstance(error, click.NoSuchOption):
            name = next((word for word in words if word.startswith(error.option_name)), error.option_name).lstrip("-")
            if any(f"--{name}" in item.opts for item in self.params):
                return f"Did you mean --{name}?"
            is_misspelt = len(error.possibilities or ()) == 1 or "set" not in names
            return None if is_misspelt else f"A value of the recipe is changed with --set {name}=VALUE"
        if "unexpected extra argument" in error.message and "recipe" in names:
            if any(word == "--set" and "=" not in path for word, path in itertools.pairwise(words)):
                return "--set takes PATH=VALUE, without blanks: --set steps=4"
            many = f"`{ctx.find_root().command_path} batch 'recipes/*.yaml'` runs many, each after a check"
            return f"One recipe at a time: {many}; -m seed=1..8 varies a value of one"
        return None


def _refuse_repeated(given: Sequence[click.Option]) -> None:
    """Refuse options that say one thing twice, of which click would take the last in silence.

    Raises:
        click.UsageError: An option that has one value, or the two sides of a choice, are given more than once.
    """
    seen: dict[str | None, click.Option] = {}
    for option in given:
        before = seen.setdefault(option.name, option)
        if option is not before:
            raise click.UsageError(f"{before.opts[-1]} and {option.opts[-1]} contradict each other: give one of them")
    for option in seen.values():
        says_more = not option.is_flag or option.secondary_opts
        if says_more and (not option.multiple or option.name == "seed") and given.count(option) > 1:
            names = " or ".join([*option.opts[-1:], *option.secondary_opts])
            many = ", or vary it: -m seed=1,2" if option.name == "seed" else ""
            raise click.UsageError(f"{names} is given {given.count(option)} times: leave one of them{many}")


class OrderedGroup(click.Group):
    """A group of such commands, of which one, `usual`, need not be named where something follows."""

    command_class = OrderedCommand
    usual = ""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the usual command in front where none is named."""
        is_named = not args or args[0] in (*self.commands, *ctx.help_option_names)
        return super().parse_args(ctx, args if is_named or not self.usual else [self.usual, *args])


CommandT = TypeVar("CommandT", bound=Callable[..., Any])


class _Path(click.Path):
    """A path that is not empty, as a variable of the shell without a value is; ~ is the home folder in all of them."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path."""
        if not str(value):
            self.fail("an empty path: is a variable of the shell not set?", param, ctx)
        return super().convert(os.path.expanduser(value), param, ctx)


FOLDER = _Path(path_type=Path, file_okay=False)
FILE = _Path(path_type=Path)


def all_of(*decorators: Callable[[Any], Any]) -> Callable[[CommandT], CommandT]:
    """Return what adds several options; the help shows the last of them first."""

    def decorate(command: CommandT) -> CommandT:
        for add in decorators:
            command = add(command)
        return command

    return decorate


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout.")
cache_option = click.option("--cache-dir", type=FOLDER, help="Where artifacts are kept.  [env: S2VFLOW_CACHE_DIR]")
override_options = all_of(  # change values of a recipe
    *(
        click.option(
            f"--{kind}",
            multiple=True,
            metavar=metavar,
            help=text,
            shell_complete=None if kind in ("unset", "seed") else complete_set,
        )
        for kind, metavar, text in _CHANGES
    )
)
change_options = all_of(  # change a recipe
    json_option,
    click.option("-f", "override_files", type=FILE, multiple=True, metavar="FILE", help="Lay a file over it."),
    click.option(
        "-p",
        "--profile",
        "profiles",
        multiple=True,
        metavar="NAMES",
        shell_complete=complete_profile,
        help="Profiles of the recipe: -p quality,bf16.",
    ),
    override_options,
)
recipe_options = all_of(change_options, click.argument("recipe", type=FILE))  # the recipe, and what changes it
folder_options = all_of(  # where things are
    click.option(
        "--vram", metavar="SIZE|auto", help="How much memory a run may hold where it computes, such as 12GiB."
    ),
    click.option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N."),
    cache_option,
    click.option("--output-dir", type=FOLDER, help="Where relative outputs go."),
    click.option("--input-dir", "input_dirs", type=FOLDER, multiple=True, help="Where inputs are looked for too."),
    click.option(
        "--extra-model-paths",
        type=FILE,
        multiple=True,
        metavar="FILE",
        help="ComfyUI's extra_model_paths.yaml.  [env: S2VFLOW_EXTRA_MODEL_PATHS]",
    ),
    click.option(
        "--models-dir",
        "models_dirs",
        type=FOLDER,
        multiple=True,
        help="A models folder in ComfyUI's layout; repeatable.  [env: S2VFLOW_MODELS_DIR]",
    ),
)
gpus_option = click.option(
    "--gpus",
    type=click.IntRange(min=1),
    default=1,
    metavar="N",
    help="How many GPUs share one video: --gpus 2. With --device cpu, N processes.",
)
selection_options = all_of(  # a part of the plan
    click.option("--fail-fast", is_flag=True, help="In a matrix: one cell that fails stops the others."),
    click.option("-m", "axes", multiple=True, metavar="PATH=VALUES", help="Vary a value: -m seed=1..8."),
    click.option("--cache-only", "is_cached_only", is_flag=True, help="Fail instead of computing anything."),
    click.option("--no-cache", "is_fresh", is_flag=True, help="Compute everything anew."),
    click.option(
        "--force",
        multiple=True,
        metavar="NODE[+]",
        help="Compute it anew; with + all after it.",
        shell_complete=complete_node,
    ),
    click.option(
        "--only", multiple=True, metavar="NODE", help="Run it alone, from stored inputs.", shell_complete=complete_node
    ),
    click.option("--from", "start", metavar="NODE", help="Compute nothing before it.", shell_complete=complete_node),
    click.option("--until", multiple=True, metavar="NODE", help="Run nothing after it.", shell_complete=complete_node),
)
output_options = all_of(  # what becomes of outputs
    click.option("--overwrite", is_flag=True, help="Replace other files instead of numbering the new ones."),
    click.option("-o", "--output", type=FILE, metavar="FILE", help="Where the only output goes."),
)
remote_option = click.option(
    "--cache-remote",
    metavar="URL",
    envvar="S2VFLOW_CACHE_REMOTE",
    help="A store that machines share, behind the cache: file:, s3:, gs:, http:.  [env: S2VFLOW_CACHE_REMOTE]",
)
record_options = all_of(  # what is kept of a run, and what it is held to
    click.option("--share-gpu", is_flag=True, help="Do not wait for another run that uses the same GPU."),
    click.option("--record-host", is_flag=True, help="Name the host and the user in the run's manifest."),
    click.option("--locked", is_flag=True, help="Refuse to run unless every file is as in <recipe>.lock.yaml."),
    click.option("--events", metavar="FILE|-", help="Write the run's events there, one JSON object a line."),
    click.option(
        "--cache-limit",
        metavar="SIZE|none",
        help="How large the cache may become, such as 20G; unless given, 50G or a fifth of the disk."
        "  [env: S2VFLOW_CACHE_LIMIT]",
    ),
    remote_option,
)
view_options = all_of(  # what is shown of a run beside its results
    click.option("--report", "has_report", is_flag=True, help="Write NAME.html too, a page about the run."),
    click.option("--first-look", is_flag=True, help="Write NAME.first.mp4 as soon as the first chunk is sampled."),
    click.option(
        "--previews/--no-previews",
        default=True,
        show_default=True,
        help="Pictures of what is sampled, in the run's folder; a terminal shows one a chunk.",
    ),
)
level_options = all_of(  # how much is told, as `level`
    click.option(
        "-v", "--verbose", "level", flag_value="verbose", help="Tell also what is stored already, every file, details."
    ),
    click.option("-q", "--quiet", "level", flag_value="quiet", default="normal", help="Tell errors and results only."),
)


def take_overrides(given: dict[str, Any]) -> list[Override]:
    """Take the options of `override_options` out of a command's values, and return them in the order given.

    Raises:
        RuntimeError: The command is no `OrderedCommand`, so that their order is not known.
    """
    from s2v_flow.recipe.argument import Override

    kinds = {kind.replace("-", "_"): kind for kind, _, _ in _CHANGES}
    texts = {name: list(given.pop(name, ())) for name in kinds}
    order: Sequence[str] = click.get_current_context().meta.get(_ORDER, ())
    found = [Override(kinds[name], texts[name].pop(0)) for name in order if name in kinds]
    if any(texts.values()):
        raise RuntimeError("a command that takes --set and its like has to be an OrderedCommand")
    return found


def make_options(**given: Any) -> Options:
    """Make `Options` from the command line's values."""
    from s2v_flow.api import Options
    from s2v_flow.cache.budget import parse_size
    from s2v_flow.cli.defaults import with_defaults
    from s2v_flow.graph.status import Selection

    given["selection"] = Selection(
        **{each.name: given.pop(each.name) for each in fields(Selection) if each.name in given}
    )
    given["profiles"] = [name for names in given.get("profiles", ()) for name in names.split(",") if name]
    given["overrides"] = take_overrides(given)
    if "device" in given:  # the commands that look for files
        given = with_defaults({"cache_limit": None, **given})
        given["device"] = given["device"] or "auto"
        if isinstance(given["cache_limit"], str):
            given["cache_limit"] = parse_size(given["cache_limit"], "--cache-limit")
    stop = click.get_current_context().find_object(StopRequest)
    if stop is not None:
        given["should_stop"] = stop
    return Options(**given)


class Like(click.Choice[str]):
    """A name of settings, or a recipe, or a video that has one inside."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Take a file's name as it is."""
        is_file = Path(value).suffix in (".mp4", ".mov", ".mkv", ".yaml", ".yml")
        return value if is_file else super().convert(value, param, ctx)


class TextFile(click.Path):
    """A file to write a text to; "-" is none: stdout."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path."""
        return None if value == "-" else Path(value)


start_options = all_of(  # of commands that write a first recipe
    click.option("--force", is_flag=True, help="Overwrite the recipe that is there."),
    click.option(
        "--like",
        type=Like(["lightning", "quality", "bf16", "official", "demo"]),
        default="lightning",
        help="Which settings to begin with; make: or those of an mp4 or a recipe.",
        show_default=True,
    ),
)
