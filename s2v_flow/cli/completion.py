"""What a shell may complete: of a recipe, which is not checked, and of the runs that are kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem, get_completion_class

if TYPE_CHECKING:
    from s2v_flow.recipe.fields import Accepts
    from s2v_flow.recipe.layers import Merged
    from s2v_flow.recipe.tree import Tree

SHELLS = ("bash", "zsh", "fish")


def completion_script(shell: str, command: click.Command, name: str) -> str:
    """Return the script that teaches a shell to complete a command, as click writes it."""
    complete = get_completion_class(shell)
    assert complete is not None, shell
    shell_complete = complete(command, {}, name, f"_{name.upper()}_COMPLETE")
    # not source(), which starts a bash to ask for its version
    return shell_complete.source_template % shell_complete.source_vars()


def complete_set(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Complete PATH of --set PATH=VALUE, and VALUE where the field takes certain words."""
    merged = _merged(ctx)
    if merged is None:
        return []
    path, sign, _ = incomplete.partition("=")
    found = (f"{path}={word}" for word in _words(merged, path)) if sign else _paths(merged, incomplete)
    return [text for text in found if text.startswith(incomplete)]


def complete_profile(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Complete the last of the profiles in -p NAME,NAME."""
    merged = _merged(ctx)
    before, comma, last = incomplete.rpartition(",")
    names = [] if merged is None else merged.profiles
    return [f"{before}{comma}{name}" for name in names if name.startswith(last) and name not in before.split(",")]


def complete_kind(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Complete the kind of a node."""
    from s2v_flow.nodes.table import KINDS

    return [kind for kind in KINDS if kind.startswith(incomplete)]


def complete_node(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Complete the name of a recipe's node."""
    merged = _merged(ctx)
    return [] if merged is None else [name for name in merged.body.nodes.entries if name.startswith(incomplete)]


def complete_run(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete a run's id, the newest first, `last`, or a file."""
    from s2v_flow.api import Options
    from s2v_flow.cli.defaults import with_defaults
    from s2v_flow.history.find import LAST, run_ids
    from s2v_flow.runs.record import runs_root

    root = runs_root(Options(**with_defaults({"cache_dir": ctx.params.get("cache_dir")})).cache_root)
    names = [name for name in (LAST, *run_ids(root)) if name.startswith(incomplete)]
    return [*map(CompletionItem, names), CompletionItem(incomplete, type="file")]


def _merged(ctx: click.Context) -> Merged | None:
    """Return the recipe on the command line with what it extends, or None where it cannot be read."""
    # click sorts no arguments out while the last option has no value yet
    given = ctx.params.get("recipe") or next(iter(ctx.args), None)
    if given is None:
        return None
    from s2v_flow.recipe.argument import NO_CHANGES
    from s2v_flow.recipe.layers import merge_layers
    from s2v_flow.recipe.problems import Problems, StopReadingError

    try:
        return merge_layers(Path(given), NO_CHANGES, Problems())
    except StopReadingError:
        return None


def _paths(merged: Merged, incomplete: str) -> Iterator[str]:
    params, nodes = merged.body.params, merged.body.nodes
    section, dot, rest = incomplete.partition(".")
    if not dot:
        yield from (f"{name}=" for name in params.entries)
        yield from ("params.", "nodes.")
    elif section == "params":
        yield from (f"params.{name}=" for name in params.entries)
    elif section == "nodes":
        name, dot, _ = rest.partition(".")
        if not dot:
            yield from (f"nodes.{name}." for name in nodes.entries)
        elif (node := nodes.get(name)) is not None:
            yield from (f"nodes.{name}.{field}=" for field in _fields(node))


def _words(merged: Merged, path: str) -> list[str]:
    """Return the words that a field or a parameter takes."""
    from s2v_flow.nodes.table import KINDS
    from s2v_flow.recipe.fields import field_at
    from s2v_flow.recipe.params import param_takes
    from s2v_flow.recipe.tree import kind_of

    body, parts = merged.body, path.split(".")
    takes: list[Accepts | None] = []
    if parts[0] == "nodes" and len(parts) == 3:
        known = KINDS.get(kind_of(body.nodes.get(parts[1])))
        takes = [] if known is None else [field_at(known, (parts[2],))]
    elif len(parts) == 1 or (parts[0] == "params" and len(parts) == 2):
        value = body.params.get(parts[-1])
        takes = [] if value is None else list(param_takes(parts[-1], value, body, KINDS))
    sets = [{*given.words, *(("true", "false") if bool in given.scalars else ())} for given in takes if given]
    return sorted(set[str].intersection(*sets)) if sets else []


def _fields(node: Tree) -> Iterator[str]:
    """Yield the fields that a node can have, and those of list items that it has."""
    from s2v_flow.nodes.table import KINDS
    from s2v_flow.recipe.tree import ListValue, MapValue, kind_of, path_text

    if not isinstance(node, MapValue):
        return
    known = KINDS.get(kind_of(node))
    yield from known.model_fields if known else ()
    for key, entry in node.entries.items():
        items = entry.value.items if isinstance(entry.value, ListValue) else ()
        for index, item in enumerate(items):
            if isinstance(item, MapValue):
                yield from (path_text(node, (key, index, field)) for field in item.entries)
