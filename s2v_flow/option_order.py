"""Options that change a recipe, of several kinds, in the order in which they stand on the command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from s2v_flow.completion import complete_set

if TYPE_CHECKING:
    from s2v_flow.recipe.argument import Override

_Function = TypeVar("_Function", bound=Callable[..., Any])
_ORDER = "s2v_flow.option_order"
_KINDS: dict[str, Literal["set", "set-json", "set-file", "unset"]] = {
    "sets": "set",
    "json_sets": "set-json",
    "file_sets": "set-file",
    "unsets": "unset",
}


class OrderedCommand(click.Command):
    """A command that remembers the order of its options, which click by itself tells for each kind alone."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse as usual, and note the options' order beside."""
        order = self.make_parser(ctx).parse_args(args=list(args))[2]
        ctx.meta[_ORDER] = [parameter.name for parameter in order]
        return super().parse_args(ctx, args)


class OrderedGroup(click.Group):
    """A group of such commands."""

    command_class = OrderedCommand


def override_options(command: _Function) -> _Function:
    """Add the options that change values of a recipe."""
    for option, name, metavar, text in (
        ("--unset", "unsets", "PATH", "Go back to the default; remove an item of a list."),
        ("--set-file", "file_sets", "PATH=FILE", "Set a text to a file's: prompt=prompt.txt."),
        ("--set-json", "json_sets", "PATH=JSON", "Set a value of any shape: nodes.dit.loras=[]."),
        ("--set", "sets", "PATH=VALUE", "Set a value: steps=20."),
    ):
        complete = None if option == "--unset" else complete_set
        add = click.option(option, name, multiple=True, metavar=metavar, shell_complete=complete, help=text)
        command = add(command)
    return command


def take_overrides(given: dict[str, Any]) -> list[Override]:
    """Take the options of `override_options` out of a command's values, and return them in the order given.

    Raises:
        RuntimeError: The command is no `OrderedCommand`, so that their order is not known.
    """
    from s2v_flow.recipe.argument import Override

    texts = {name: list(given.pop(name, ())) for name in _KINDS}
    context = click.get_current_context(silent=True)
    order: Sequence[str] = () if context is None else context.meta.get(_ORDER, ())
    found = [Override(_KINDS[name], texts[name].pop(0)) for name in order if name in _KINDS]
    if any(texts.values()):
        raise RuntimeError("a command that takes --set and its like has to be an OrderedCommand")
    return found
