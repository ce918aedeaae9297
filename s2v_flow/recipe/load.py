"""The way in: from a recipe's path to validated nodes, or to all of its mistakes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from s2v_flow.graph.link import link, sort
from s2v_flow.graph.node import Node
from s2v_flow.recipe.argument import NO_CHANGES, Argument, Changes, parse_overrides
from s2v_flow.recipe.document import NodeSpec, Recipe
from s2v_flow.recipe.layers import Body, Written, merge_layers, name_of
from s2v_flow.recipe.matrix import Cell, Matrix, expand, parse_axes, read_matrix, with_axes
from s2v_flow.recipe.overrides import apply_overrides
from s2v_flow.recipe.params import Parameters
from s2v_flow.recipe.problems import Problems, collecting
from s2v_flow.recipe.tree import Entry, MapValue, plain
from s2v_flow.recipe.validate import check_node, check_profile
from s2v_flow.wording import shortened

_UNSAID = "a node is wrong, but nothing was said of it"


@dataclass(frozen=True)
class Variant:
    """One cell of a matrix, and the recipe that it makes."""

    cell: Cell
    recipe: Recipe


def load_recipe(path: Written, *, kinds: Mapping[str, type[Node]], changes: Changes = NO_CHANGES) -> Recipe:
    """Read a recipe, lay changes over it, and validate the result.

    What the recipe's matrix varies is checked as well, but not combined: see `load_cells`.

    Raises:
        RecipeError: With every mistake, sorted by place. Only what makes a file unreadable hides the rest.
    """
    with collecting(name_of(path)) as problems:
        recipe = _Reader(path, kinds, changes, problems).checked()
    assert recipe is not None, _UNSAID
    return recipe


def load_cells(
    path: Written, *, kinds: Mapping[str, type[Node]], changes: Changes = NO_CHANGES, axes: Sequence[str] = ()
) -> tuple[Recipe, tuple[Variant, ...]]:
    """Read a recipe, and make one more of it for each cell of its matrix, in order; see `load_recipe`.

    `axes` are `-m PATH=VALUES` arguments: added to the recipe's, or in the place of those of the same path. No override
    may set what varies.

    Raises:
        RecipeError: With the mistakes of the recipe and of all its cells.
    """
    with collecting(name_of(path)) as problems:
        reader = _Reader(path, kinds, changes, problems)
        recipe = reader.checked()
        matrix = with_axes(reader.matrix, parse_axes(axes, changes.start, problems), problems)
        reader.check_matrix(matrix)
        reader.check_conflicts(matrix)
        made = [(cell, reader.recipe(reader.changed(cell.arguments))) for cell in expand(matrix, problems)]
    assert recipe is not None, _UNSAID
    return recipe, tuple(Variant(cell, varied) for cell, varied in made if varied is not None)


class _Reader:
    """A recipe's layers, merged, with the command line's changes; from which one recipe or many are made."""

    def __init__(self, path: Written, kinds: Mapping[str, type[Node]], changes: Changes, problems: Problems) -> None:
        self.path = Path(name_of(path))
        self.folder = None if changes.inside is None else changes.inside[1]
        self.kinds = kinds
        self.problems = problems
        self.merged = merge_layers(path, changes, problems)
        self.arguments = parse_overrides(changes.overrides, changes.start, problems)
        self.body = self.merged.body
        self.body = self.changed(self.arguments)
        self.matrix = read_matrix(self.merged.matrix, problems)

    def checked(self) -> Recipe | None:
        """Return the recipe itself, after a check of all that it says; None where a node is wrong."""
        recipe = self.recipe(self.body)
        self.check_matrix(self.matrix)
        require = self.merged.require
        if recipe is not None and require.entries and all(spec.kind != "save_video" for spec in recipe.nodes.values()):
            message = "require is about videos, and the recipe writes none"
            self.problems.add("R015", message, require.origin, inside="require", fix="add a save_video node")
        for name, profile in self.merged.profiles.items():
            check_profile(name, profile.nodes, self.body.nodes, self.kinds, self.problems)
        return recipe

    def changed(self, arguments: Iterable[Argument]) -> Body:
        """Return the merged body with changes applied."""
        return apply_overrides(self.body, arguments, self.merged.recipe_params, self.kinds, self.problems)

    def recipe(self, body: Body) -> Recipe | None:
        """Check a body and return its recipe, or None where a node is wrong; mistakes are collected."""
        params = Parameters(body.params, self.problems)
        values = {name: plain(tree) for name, tree in params.resolve_all().items()}
        specs, are_valid, order = _check_nodes(body.nodes, self.kinds, params, self.problems)
        if not are_valid:
            return None
        sections = {"params": Entry(body.params.origin, body.params), "nodes": Entry(body.nodes.origin, body.nodes)}
        files = (*self.merged.files, *(argument.file for argument in self.arguments if argument.file is not None))
        return Recipe(
            path=self.path,
            description=self.merged.description,
            params=values,
            nodes=specs,
            order=order,
            files=tuple(Path(file) for file in dict.fromkeys(files)),
            document=MapValue(sections, body.nodes.origin),
            profile_places=self.merged.profile_places,
            matrix=self.matrix,
            matrix_text=self.merged.matrix if self.merged.matrix.entries else None,
            folder=self.folder,
            require=plain(self.merged.require),
        )

    def check_matrix(self, matrix: Matrix) -> None:
        """Check each value of a matrix by itself: whether there is such a place, and whether it takes the value."""
        for argument in matrix.arguments():
            self.changed([argument])

    def check_conflicts(self, matrix: Matrix) -> None:
        """Refuse changes of what varies: every cell would undo them."""
        for argument in self.arguments:
            if argument.key in matrix.axes:
                message = f"{shortened(argument.path)} varies in the matrix, so it cannot be changed here"
                fix = f"write -m {shortened(argument.path)}=VALUE to vary it over this value alone"
                self.problems.add("R064", message, argument.path_origin, fix=fix)


def _check_nodes(
    nodes: MapValue, kinds: Mapping[str, type[Node]], params: Parameters, problems: Problems
) -> tuple[dict[str, NodeSpec], bool, tuple[str, ...]]:
    """Validate every node, and the links between them even where some are wrong; return whether all are valid too.

    Last comes their order, where the links are right.
    """
    specs: dict[str, NodeSpec] = {}
    are_valid = True
    for name, entry in nodes.entries.items():
        found = check_node(name, entry, kinds, params, nodes.entries, problems)
        if found is not None:
            specs[name], is_valid = found
            are_valid = are_valid and is_valid
    if not nodes.entries and not problems.has("R017"):  # none, not even a badly named one
        fix = "a recipe has `nodes:` with at least one node"
        problems.add("R015", "the recipe has no nodes", nodes.origin, fix=fix)
    graph, faults = link({name: spec.node for name, spec in specs.items()}, nodes.entries.keys() - specs.keys())
    for fault in faults:
        inside = f"nodes.{fault.node}.{fault.field} (kind: {specs[fault.node].kind})"
        problems.add(fault.code, fault.message, specs[fault.node].origins[fault.field,], inside=inside, fix=fault.fix)
    return specs, are_valid, () if faults else tuple(sort(graph))
