"""The way in: from a recipe's path to a recipe that is right, nodes validated and linked, or to all of its mistakes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import networkx as nx
from pydantic import ValidationError

from s2v_flow.errors import Place, UsageError
from s2v_flow.graph.build import sort
from s2v_flow.graph.node import Node, NodeSpec
from s2v_flow.graph.ports import Port, Ref
from s2v_flow.recipe.argument import NO_CHANGES, Argument, Changes, parse_overrides
from s2v_flow.recipe.layers import Body, Written, merge_layers, name_of
from s2v_flow.recipe.matrix import Cell, Matrix, expand, parse_axes, read_matrix, with_axes
from s2v_flow.recipe.overrides import apply_overrides
from s2v_flow.recipe.params import Parameters
from s2v_flow.recipe.problems import Problems, collecting
from s2v_flow.recipe.tree import Entry, MapValue, plain
from s2v_flow.recipe.validate import check_node, check_profile
from s2v_flow.wording import did_you_mean, nearest, shortened, shown


@dataclass(frozen=True)
class Recipe:
    """A recipe with all its layers applied and all references to parameters resolved.

    `nodes` is in the order of the file, `order` has each after those that it uses; `files` are all that were read, the
    innermost base first, then what --set-file named; `document` is the merged text (`params` and `nodes`), with
    `$params.x` still in it and every origin; `profile_places` says which profile a value at a place belongs to;
    `matrix` is what the recipe varies, `matrix_text` the same as it is written; `folder` is where relative paths start,
    if not beside `path`; `require` is what the figures of videos must be, by their names in `quality`.
    """

    path: Path
    description: str | None
    params: Mapping[str, Any]
    nodes: Mapping[str, NodeSpec]
    order: tuple[str, ...]
    files: tuple[Path, ...]
    document: MapValue
    profile_places: Mapping[Place, str] = field(default_factory=dict)
    matrix: Matrix = field(default_factory=Matrix)
    matrix_text: MapValue | None = None
    folder: Path | None = None
    require: Mapping[str, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        params = ", ".join(f"{name}={shown(value)}" for name, value in self.params.items())
        return f"<Recipe {self.path}: {len(self.nodes)} nodes{f'; {shortened(params, 200)}' if params else ''}>"


def only_output(recipe: Recipe, given: Path | None) -> Path | None:
    """Check a name given for the recipe's only output, and return it.

    Raises:
        S2VFlowError: The recipe has no output or several, or this one's files are called otherwise.
    """
    if given is None:
        return None
    sinks = [spec for spec in recipe.nodes.values() if spec.node.is_sink]
    names = ", ".join(f"nodes.{spec.name}.file" for spec in sinks) or "the recipe writes no file"
    if len(sinks) != 1:
        fix = f"give each its own with --set: {names}" if sinks else "add a save_video node"
        raise UsageError(f"-o names one file, the recipe writes {len(sinks)}", fix)
    node = sinks[0].node
    try:
        type(node).model_validate({**dict(node), "file": given.name})
    except ValidationError as error:
        about = type(node).model_fields["file"].description
        message = f"-o {given}: {sinks[0].name} ({node.kind}) cannot write a file of this name"
        raise UsageError(message, f"its file is: {about}") from error
    return given


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


_MAX_ADVISED = 100  # looking for the nearest name among hundreds takes milliseconds


@dataclass(frozen=True)
class LinkProblem:
    """A reference that leads nowhere, to the wrong thing, or back to where it stands."""

    node: str
    field: str
    code: str
    message: str
    fix: str | None = None


def link(nodes: Mapping[str, Node], unchecked: Collection[str] = ()) -> tuple[nx.DiGraph[str], list[LinkProblem]]:
    """Link nodes to a graph.

    `unchecked`: names of nodes that exist but are too wrong to be linked: references to them are left alone.

    Returns the graph, an edge from each node to those that use it, by the first `field` that does; and what is wrong.
    Faulty references make no edges, except those that close a cycle.
    """
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(nodes)
    problems: list[LinkProblem] = []
    linker = _Linker(nodes)
    for name, node in nodes.items():
        ports = node.input_ports()
        for key, ref in node.refs().items():
            if ref.node in unchecked:
                continue
            found = linker.check(name, key, ports[key][0], ref, advises=len(problems) < _MAX_ADVISED)
            if found is not None:
                problems.append(found)
            elif not graph.has_edge(ref.node, name):
                graph.add_edge(ref.node, name, field=key)
    problems += _cycles(graph)
    return graph, problems


class _Linker:
    """Finds what a reference means among the nodes, and advises on those that mean nothing."""

    def __init__(self, nodes: Mapping[str, Node]) -> None:
        self._nodes = nodes
        self._givers: dict[str, list[str]] = {}  # port type -> nodes that give it
        for name, node in nodes.items():
            for port_type in dict.fromkeys(node.outputs.values()):
                self._givers.setdefault(port_type, []).append(name)

    def check(self, name: str, field: str, wanted: Port, ref: Ref, *, advises: bool) -> LinkProblem | None:
        """Return what is wrong with a reference, if anything."""
        if ref.node not in self._nodes:
            fix = self._advise_node(name, wanted, ref) if advises else None
            return LinkProblem(name, field, "R020", f"{field}: there is no node {shortened(ref.node)}", fix)
        node = self._nodes[ref.node]
        fitting = self._fitting(name, wanted) if advises else None
        if not node.outputs:
            message = f"{field}: ${ref.node} ({node.kind}) writes a file and has no output"
            return LinkProblem(name, field, "R021", message, fitting)
        port = next(iter(node.outputs)) if ref.port is None else ref.port
        if port not in node.outputs:
            fix = did_you_mean(port, node.outputs, "its ports")
            return LinkProblem(name, field, "R021", f"{field}: ${ref.node} has no port {shortened(port)}", fix)
        if node.outputs[port] != wanted.type:
            message = f"{field}: {_words(wanted.type)} expected, {ref} is {_with_article(node.outputs[port])}"
            return LinkProblem(name, field, "R022", message, fitting)
        if ref.node == name:
            return LinkProblem(name, field, "R023", f"{field}: {name} refers to itself", fitting)
        return None

    def _advise_node(self, name: str, wanted: Port, ref: Ref) -> str:
        """Suggest a node of the right type: one with a similar name, or all."""
        givers = [other for other in self._givers.get(wanted.type, ()) if other != name]
        match = nearest(ref.node, givers)
        return f"did you mean ${match}?" if match is not None else self._fitting(name, wanted)

    def _fitting(self, name: str, wanted: Port) -> str:
        fitting = [f"${other}" for other in self._givers.get(wanted.type, ())[:6] if other != name]
        what = _words(wanted.type)
        return f"nodes that give {what}: {', '.join(fitting[:5])}" if fitting else f"no other node gives {what}"


def _words(port_type: str) -> str:
    return port_type.replace("_", " ")


def _with_article(port_type: str) -> str:
    words = _words(port_type)
    if port_type in ("frames", "audio", "speech", "conditioning"):  # not counted in English
        return words
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _cycles(graph: nx.DiGraph[str]) -> Iterator[LinkProblem]:
    """Yield one problem per knot of nodes that depend on each other: a shortest way round, from its first node."""
    order = {name: index for index, name in enumerate(graph)}
    knots = [knot for knot in nx.strongly_connected_components(graph) if len(knot) > 1]
    for knot in sorted(knots, key=lambda names: min(order[name] for name in names)):
        first = min(knot, key=order.__getitem__)
        inner = graph.subgraph(knot)
        ways = nx.single_source_shortest_path(inner, first)
        last = min(inner.predecessors(first), key=lambda name: (len(ways[name]), order[name]))
        path = [*ways[last], first]
        field = graph.edges[last, first]["field"]
        names = " -> ".join(path if len(path) <= 20 else [*path[:10], "...", *path[-10:]])
        fix = "give one of these inputs another node"
        yield LinkProblem(first, field, "R023", f"{field}: nodes depend on themselves: {names}", fix)
