"""What `try` runs instead of a whole: the first chunk, at half size, in few steps; by changes of the recipe."""

from __future__ import annotations

import os
from collections.abc import Iterator, Set
from dataclasses import replace
from pathlib import Path

from s2v_flow import api
from s2v_flow.api import Options, Planned
from s2v_flow.errors import ExitCode, RecipeError, S2VFlowError
from s2v_flow.graph.selection import Selection
from s2v_flow.nodes.chunk import Chunk
from s2v_flow.recipe.argument import Override
from s2v_flow.recipe.document import Recipe
from s2v_flow.recipe.tree import MapValue, plain

STEPS = 4
_MULTIPLE, _LEAST = 16, 64  # of a side, in pixels; below, the motion's coarsest bucket is empty


def trial(whole: Planned, options: Options, *, is_smaller: bool = True) -> tuple[Planned, Options]:
    """Plan a trial of a planned recipe.

    `is_smaller`: at half the size in few steps, as NAME.try.mp4; else as the whole has it, as NAME.first.mp4.

    Returns:
        The trial's plan, and its options. Where the recipe cannot take fewer steps or half the size (another film of
        the full size is joined to it, say), it keeps them.

    Raises:
        S2VFlowError: There is no first chunk, or no video that shows it; exit code 3.
    """
    of, plan = whole.recipe, whole.plan
    samples = {name for name, spec in of.nodes.items() if spec.kind == "sample"}
    firsts = [node for node in plan.nodes if isinstance(node.node, Chunk) and node.recipe_node in samples]
    names = {node.name for node in firsts}
    shown = {node.recipe_node for node in plan.nodes if plan.before([node.name]) & names}
    videos = [name for name, spec in of.nodes.items() if spec.kind == "save_video" and name in shown]
    if not videos:
        lacks = "save_video node that shows what is sampled" if samples else "sample node"
        text = f"{of.path}: there is nothing to try: the recipe has no {lacks}"
        raise S2VFlowError(text, fix=f"add one, or run it as it is: s2vflow run {of.path}", exit_code=ExitCode.RECIPE)
    sizes = {(node.node.width, node.node.height) for node in firsts if isinstance(node.node, Chunk)}
    failure: RecipeError | None = None
    smaller: list[tuple[Set[tuple[int, int]], int | None]] = [(sizes, STEPS), (sizes, None), (set(), STEPS)]
    for halved, steps in (*(smaller if is_smaller else []), (set(), None)):
        suffix = ".try.mp4" if is_smaller else ".first.mp4"
        changes = [*_changes(of, halved, steps), *(_file(of, name, options.output_dir, suffix) for name in videos)]
        changes = [item for item in changes if item.text.partition("=")[0] not in of.matrix.axes]
        overrides = (*options.overrides, *changes)
        given = replace(options, overrides=overrides, selection=Selection(until=tuple(videos)))
        try:
            trial = api.plan(of.path, given)
            return replace(trial, recipe=replace(trial.recipe, require={})), given  # which is about the whole
        except RecipeError as error:
            failure = failure or error
    assert failure is not None
    raise failure


def _changes(recipe: Recipe, halved: Set[tuple[int, int]], steps: int | None) -> Iterator[Override]:
    """Yield what leaves the further chunks out, and makes the first one of these sizes smaller, and its steps fewer."""
    for name, spec in recipe.nodes.items():
        node = spec.node
        if spec.kind == "extend":
            yield Override("set", f"nodes.{name}.chunks=0")
            given = {"seed": isinstance(getattr(node, "seed", None), list), "timeline": getattr(node, "timeline", None)}
            yield from (Override("unset", f"nodes.{name}.{field}") for field, is_given in given.items() if is_given)
        if spec.kind == "sample" and steps is not None and getattr(node, "steps", 0) > steps:
            yield Override("set", f"nodes.{name}.steps={steps}")
        size = getattr(node, "width", None), getattr(node, "height", None)
        if spec.kind in ("sample", "encode_image") and size in halved:
            for side, pixels in zip(("width", "height"), size, strict=True):
                half = max(_MULTIPLE * round((pixels or 0) / 2 / _MULTIPLE), _LEAST)
                yield Override("set", f"nodes.{name}.{side}={min(half, pixels or half)}")


def _file(recipe: Recipe, name: str, output_dir: Path | None, suffix: str) -> Override:
    """Name a trial's video, beside that of the whole: with the parameters that its name is written with."""
    spec, nodes = recipe.nodes[name], recipe.document.get("nodes")
    fields = nodes.get(name) if isinstance(nodes, MapValue) else None
    written = str(plain(fields).get("file")) if isinstance(fields, MapValue) else ""
    file = written if written.endswith(".mp4") else str(getattr(spec.node, "file", ""))
    path = (output_dir or spec.base_dir("file")).absolute() / os.path.expanduser(file)
    return Override("set", f"nodes.{name}.file={path.with_suffix(suffix)}")
