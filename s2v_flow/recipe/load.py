"""The way in: from a recipe's path to validated nodes, or to all of its mistakes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from s2v_flow.graph.link import link
from s2v_flow.graph.node import Node
from s2v_flow.recipe.argument import Argument, Override, parse_overrides
from s2v_flow.recipe.document import NodeSpec, Recipe
from s2v_flow.recipe.layers import Body, merge_layers
from s2v_flow.recipe.matrix import Cell, Matrix, expand, parse_axes, read_matrix, with_axes
from s2v_flow.recipe.overrides import apply_overrides
from s2v_flow.recipe.params import Parameters
from s2v_flow.recipe.problems import Problems, StopReadingError
from s2v_flow.recipe.tree import Entry, MapValue, plain
from s2v_flow.recipe.validate import CheckedNode, check_node, check_profile
from s2v_flow.wording import shortened


@dataclass(frozen=True)
class Variant:
    """One cell of a matrix, and the recipe that it makes."""

    cell: Cell
    recipe: Recipe


def load_recipe(
    path: Path,
    *,
    kinds: Mapping[str, type[Node]],
    profiles: Sequence[str] = (),
    override_files: Sequence[Path] = (),
    sets: Sequence[str] = (),
    overrides: Sequence[Override] = (),
    base_dir_for_sets: Path | None = None,
) -> Recipe:
    """Read a recipe, lay profiles, override files and changes over it, and validate the result.

    What the recipe's matrix varies is checked as well, but not combined: see `load_matrix`.

    Args:
        path: The recipe.
        kinds: The kinds of nodes by name.
        profiles: Names of profiles, applied in this order.
        override_files: Files of a recipe's shape, each part optional, applied after the profiles.
        sets: `PATH=VALUE` arguments, applied after these.
        overrides: Changes of any kind, applied last, in order.
        base_dir_for_sets: Where relative paths in `sets` and `overrides` start; the current directory unless given.

    Raises:
        RecipeError: With every mistake, sorted by place. Only what makes a file unreadable hides the rest.
    """
    problems = Problems()
    recipe: Recipe | None = None
    with _collecting(problems, path):
        reader = _Reader(path, kinds, problems, profiles, override_files, sets, overrides, base_dir_for_sets)
        recipe = reader.recipe(reader.body)
        reader.check_matrix(reader.matrix)
        for name, profile in reader.merged.profiles.items():
            check_profile(name, profile.nodes, reader.body.nodes, kinds, problems)
    assert recipe is not None, "a node is wrong, but nothing was said of it"
    return recipe


def load_matrix(
    path: Path,
    *,
    kinds: Mapping[str, type[Node]],
    profiles: Sequence[str] = (),
    override_files: Sequence[Path] = (),
    sets: Sequence[str] = (),
    overrides: Sequence[Override] = (),
    axes: Sequence[str] = (),
    base_dir_for_sets: Path | None = None,
) -> tuple[Variant, ...]:
    """Read a recipe once for each cell of its matrix; see `load_recipe`.

    Args:
        path: The recipe.
        kinds: The kinds of nodes by name.
        profiles: Names of profiles.
        override_files: Files to lay over it.
        sets: `PATH=VALUE` arguments.
        overrides: Changes of any kind. Neither these nor `sets` may change what varies.
        axes: `-m PATH=VALUES` arguments: axes that are added to the recipe's, or replace those of the same path.
        base_dir_for_sets: Where relative paths in all these start; the current directory unless given.

    Returns:
        The cells in order, each with its recipe; none where nothing varies.

    Raises:
        RecipeError: With the mistakes of all cells.
    """
    problems = Problems()
    found: list[tuple[Cell, Recipe | None]] = []
    with _collecting(problems, path):
        reader = _Reader(path, kinds, problems, profiles, override_files, sets, overrides, base_dir_for_sets)
        matrix = with_axes(reader.matrix, parse_axes(axes, reader.base_dir, problems), problems)
        reader.check_matrix(matrix)
        reader.check_conflicts(matrix)
        found = [(cell, reader.recipe(reader.changed(cell.arguments))) for cell in expand(matrix, problems)]
    variants = tuple(Variant(cell, recipe) for cell, recipe in found if recipe is not None)
    assert len(variants) == len(found), "a node is wrong, but nothing was said of it"
    return variants


@contextmanager
def _collecting(problems: Problems, path: Path) -> Iterator[None]:
    """Raise at the end what was collected on the way, or what stopped it."""
    try:
        yield
    except StopReadingError:
        problems.raise_any(str(path))
        raise AssertionError("stopped without a reason") from None
    problems.raise_any(str(path))


class _Reader:
    """A recipe's layers, merged, with the command line's changes; from which one recipe or many are made."""

    def __init__(
        self,
        path: Path,
        kinds: Mapping[str, type[Node]],
        problems: Problems,
        profiles: Sequence[str],
        override_files: Sequence[Path],
        sets: Sequence[str],
        overrides: Sequence[Override],
        base_dir: Path | None,
    ) -> None:
        self.path = path
        self.kinds = kinds
        self.problems = problems
        self.base_dir = Path.cwd() if base_dir is None else base_dir.absolute()
        self.merged = merge_layers(path, profiles, override_files, self.base_dir, problems)
        changes = [*(Override("set", text) for text in sets), *overrides]
        self.arguments = parse_overrides(changes, self.base_dir, problems)
        self.body = self.merged.body
        self.body = self.changed(self.arguments)
        self.matrix = read_matrix(self.merged.matrix, problems)

    def changed(self, arguments: Iterable[Argument]) -> Body:
        """Return the merged body with changes applied."""
        return apply_overrides(self.body, arguments, self.merged.recipe_params, self.kinds, self.problems)

    def recipe(self, body: Body) -> Recipe | None:
        """Check a body and return its recipe, or None where a node is wrong; mistakes are collected."""
        params = Parameters(body.params, self.problems)
        values = {name: plain(tree) for name, tree in params.resolve_all().items()}
        checked = _check_nodes(body.nodes, self.kinds, params, self.problems)
        if not all(node.is_valid for node in checked.values()):
            return None
        files = (*self.merged.files, *(argument.file for argument in self.arguments if argument.file is not None))
        return Recipe(
            path=self.path,
            description=self.merged.description,
            params=values,
            nodes={name: _spec(name, node) for name, node in checked.items()},
            files=tuple(Path(file) for file in dict.fromkeys(files)),
            document=_document(body),
            profile_places=self.merged.profile_places,
            matrix=self.matrix,
            matrix_text=self.merged.matrix if self.merged.matrix.entries else None,
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
