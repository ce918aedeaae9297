"""The way in: from a recipe's path to validated nodes, or to all of its mistakes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from s2v_flow.graph.link import link
from s2v_flow.graph.node import Node
from s2v_flow.recipe.document import NodeSpec, Recipe
from s2v_flow.recipe.layers import merge_layers
from s2v_flow.recipe.overrides import apply_overrides
from s2v_flow.recipe.params import Parameters
from s2v_flow.recipe.problems import Problems, StopReadingError
from s2v_flow.recipe.sections import Body
from s2v_flow.recipe.tree import Entry, MapValue, plain
from s2v_flow.recipe.validate import CheckedNode, check_node, check_profile


def load_recipe(
    path: Path,
    *,
    kinds: Mapping[str, type[Node]],
    profiles: Sequence[str] = (),
    override_files: Sequence[Path] = (),
    sets: Sequence[str] = (),
    base_dir_for_sets: Path | None = None,
) -> Recipe:
    """Read a recipe, lay profiles, override files and `--set` arguments over it, and validate the result.

    Args:
        path: The recipe.
        kinds: The kinds of nodes by name.
        profiles: Names of profiles, applied in this order.
        override_files: Files of a recipe's shape, each part optional, applied after the profiles.
        sets: `PATH=VALUE` arguments, applied last.
        base_dir_for_sets: Where relative paths in `sets` start; the current directory unless given.

    Raises:
        RecipeError: With every mistake, sorted by place. Only what makes a file unreadable hides the rest.
    """
    problems = Problems()
    base_dir = Path.cwd() if base_dir_for_sets is None else base_dir_for_sets.absolute()
    try:
        merged = merge_layers(path, profiles, override_files, base_dir, problems)
        body = apply_overrides(merged.body, sets, kinds, base_dir, problems)
        params = Parameters(body.params, problems)
        values = {name: plain(tree) for name, tree in params.resolve_all().items()}
        checked = _check_nodes(body.nodes, kinds, params, problems)
        for name, profile in merged.profiles.items():
            check_profile(name, profile.nodes, body.nodes, kinds, problems)
    except StopReadingError:
        problems.raise_any(str(path))
        raise AssertionError("stopped without a reason") from None
    problems.raise_any(str(path))
    assert all(node.is_valid for node in checked.values()), "a node is wrong, but nothing was said of it"
    return Recipe(
        path=path,
        description=merged.description,
        params=values,
        nodes={name: _spec(name, node) for name, node in checked.items()},
        files=tuple(Path(file) for file in merged.files),
        document=_document(body),
    )


def _check_nodes(
    nodes: MapValue, kinds: Mapping[str, type[Node]], params: Parameters, problems: Problems
) -> dict[str, CheckedNode]:
    """Validate every node, and the links between them even where some nodes are wrong."""
    checked: dict[str, CheckedNode] = {}
    for name, entry in nodes.entries.items():
        node = check_node(name, entry, kinds, params, nodes.entries, problems)
        if node is not None:
            checked[name] = node
    if not nodes.entries and not problems.has("R017"):  # none, not even a badly named one
        fix = "a recipe has `nodes:` with at least one node"
        problems.add("R015", "the recipe has no nodes", nodes.origin, fix=fix)
    unchecked = nodes.entries.keys() - checked.keys()
    _, faults = link({name: node.node for name, node in checked.items()}, unchecked)
    for fault in faults:
        node = checked[fault.node]
        inside = f"nodes.{fault.node}.{fault.field} (kind: {node.node.kind})"
        problems.add(fault.code, fault.message, node.origins[fault.field,], inside=inside, fix=fault.fix)
    return checked


def _spec(name: str, checked: CheckedNode) -> NodeSpec:
    origins = checked.origins
    return NodeSpec(name, checked.node.kind, checked.node, origins[()].place, origins)


def _document(body: Body) -> MapValue:
    """Return the merged text as one map."""
    sections = {"params": body.params, "nodes": body.nodes}
    return MapValue({key: Entry(tree.origin, tree) for key, tree in sections.items()}, body.nodes.origin)
