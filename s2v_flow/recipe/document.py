"""A recipe that is right: nodes with their validated fields, and where each value was written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from s2v_flow.errors import Diagnostic, ExitCode, Place, S2VFlowError
from s2v_flow.graph.node import Node
from s2v_flow.graph.ports import FieldPath
from s2v_flow.recipe.matrix import Matrix
from s2v_flow.recipe.tree import MapValue, Origin
from s2v_flow.wording import shortened, shown


@dataclass(frozen=True)
class NodeSpec:
    """A node of a recipe. `origins` says where each field's value was written; `()` is the node's name itself."""

    name: str
    kind: str
    node: Node
    place: Place
    origins: Mapping[FieldPath, Origin]

    def origin(self, field: str | FieldPath) -> Origin:
        """Return where a field's value was written, or the nearest thing around it: the node, for a default.

        A value that came from a parameter was written where the parameter's value was: in a recipe, a profile, or on
        the command line.
        """
        path = (field,) if isinstance(field, str) else field
        while path not in self.origins:
            path = path[:-1]
        return self.origins[path]

    def base_dir(self, field: str | FieldPath) -> Path:
        """Return the absolute directory at which a relative path in this field starts."""
        return self.origin(field).base_dir

    def diagnostic(self, field: str | FieldPath, code: str, message: str, fix: str | None = None) -> Diagnostic:
        """Return a mistake that was found later (in planning, say), marked at a field's value."""
        path = (field,) if isinstance(field, str) else field
        text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
        inside = f"nodes.{self.name}{text} (kind: {self.kind})"
        return self.origin(path).diagnostic(code, message, inside=inside, fix=fix)


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
        raise S2VFlowError(f"-o names one file, the recipe writes {len(sinks)}", fix, exit_code=ExitCode.USAGE)
    node = sinks[0].node
    try:
        type(node).model_validate({**dict(node), "file": given.name})
    except ValidationError as error:
        about = type(node).model_fields["file"].description
        message = f"-o {given}: {sinks[0].name} ({node.kind}) cannot write a file of this name"
        raise S2VFlowError(message, f"its file is: {about}", exit_code=ExitCode.USAGE) from error
    return given
