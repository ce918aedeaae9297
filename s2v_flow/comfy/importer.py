"""`s2vflow import`: a ComfyUI workflow becomes a recipe."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from s2v_flow.comfy.catalog import SAVERS
from s2v_flow.comfy.draft import Draft
from s2v_flow.comfy.editor import inactive_parts, is_editor, read_editor
from s2v_flow.comfy.finish import Sections, annotate, finish
from s2v_flow.comfy.graph import Graph, Mistakes
from s2v_flow.comfy.modernise import modernise
from s2v_flow.comfy.names import unique
from s2v_flow.comfy.profile import Kinds, difference, meanings, profile_name
from s2v_flow.comfy.prompt import is_prompt, read_prompt
from s2v_flow.comfy.source import bad_file, parse, read_workflow
from s2v_flow.comfy.translate import translate
from s2v_flow.comfy.yaml_text import recipe_text
from s2v_flow.errors import Place, RecipeError
from s2v_flow.recipe.argument import Changes
from s2v_flow.recipe.document import Recipe
from s2v_flow.recipe.load import load_recipe

_MAX_PROFILES = 8


@dataclass(frozen=True)
class Imported:
    """A recipe's text, what a person should know about it, and what was modernised."""

    text: str
    notes: tuple[str, ...]
    changes: tuple[str, ...]


def import_workflow(path: Path, kinds: Kinds, *, modernises: bool = False) -> Imported:
    """Read a workflow, in ComfyUI's editor or API format or hidden in a picture or a video, as a recipe.

    Args:
        path: The file.
        kinds: The kinds of nodes by name.
        modernises: Rewrite it to exact time instead of reproducing ComfyUI's numbers.

    Raises:
        RecipeError: With everything in it that cannot be said in a recipe.
        S2VFlowError: There is no workflow in the file.
    """
    document = _unwrapped(read_workflow(path), path)
    mistakes = Mistakes(path.name)
    graph, draft = _drafted(document, mistakes, path)
    changes = modernise(draft) if modernises else []
    sections = finish(draft)
    annotate(sections, draft, graph)
    description = f"Imported from ComfyUI's workflow {path.name}" + (", modernised." if modernises else ".")
    checked(recipe_text(sections, description, {}), kinds)
    profiles: dict[str, Mapping[str, Any]] = {}
    parts = inactive_parts(document, SAVERS) if is_editor(document) else []
    if len(parts) > _MAX_PROFILES:
        mistakes.note(f"{len(parts)} parts are switched off; the first {_MAX_PROFILES} of them may become profiles")
    for part in parts[:_MAX_PROFILES]:
        profile = _profile(document, part, sections, kinds, path, modernises=modernises)
        if profile is None:
            mistakes.note("a part that is switched off cannot be a profile of this recipe and is left out")
        elif profile:
            name = unique(profile_name(profile), profiles)
            profiles[name] = profile
            mistakes.note(f"a part that is switched off became the profile {name}: -p {name}")
    text = recipe_text(sections, description, profiles)
    checked(text, kinds)
    return Imported(text, tuple(mistakes.notes), tuple(changes))


def _unwrapped(document: Any, path: Path) -> Any:
    """Step into what ComfyUI's server takes ({"prompt": ...}), and texts that hold JSON once more."""
    for _ in range(4):
        if isinstance(document, str):
            document = parse(document, path)
        elif is_editor(document) or is_prompt(document):
            return document
        elif isinstance(document, Mapping) and ("prompt" in document or "workflow" in document):
            document = document.get("workflow") or document.get("prompt")
        else:
            break
    raise bad_file(path, "neither the editor's nor the API's format")


def _drafted(document: Any, mistakes: Mistakes, path: Path) -> tuple[Graph, Draft]:
    graph = read_editor(document, mistakes) if is_editor(document) else read_prompt(document, mistakes)
    if not graph.nodes:
        raise bad_file(path, "it has no nodes")
    return graph, translate(graph, mistakes)


def _profile(
    document: Any, part: frozenset[str], base: Sections, kinds: Kinds, path: Path, *, modernises: bool
) -> dict[str, Any] | None:
    """Return a switched-off part as a profile; None where that cannot be; empty where it changes nothing."""
    mistakes = Mistakes(path.name)
    try:
        graph = read_editor(document, mistakes, part)
        savers = {name for name, node in graph.nodes.items() if node.type in SAVERS and name.split(":")[0] in part}
        draft = translate(graph, mistakes, savers)
        if modernises:
            modernise(draft)
        other = finish(draft)
        profile = difference(base, other, kinds)
        if not profile:
            return {}
        alone = checked(recipe_text(other, "", {}), kinds)
        together = checked(recipe_text(base, "", {"it": profile}), kinds, "it")
    except RecipeError:
        return None
    wanted, got = meanings(alone), meanings(together)
    return profile if all(got.get(name) == digest for name, digest in wanted.items()) else None


def checked(text: str, kinds: Kinds, profile: str | None = None) -> Recipe:
    """Check a recipe's text as `s2vflow check` would.

    Raises:
        RecipeError: With every mistake, at its place in the text.
    """
    with tempfile.TemporaryDirectory(prefix="s2vflow-") as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(text, encoding="utf-8")
        try:
            return load_recipe(file, kinds=kinds, changes=Changes(() if profile is None else (profile,)))
        except RecipeError as error:
            placed = [_renamed(item) for item in error.diagnostics]
            raise RecipeError("the workflow's values do not make a recipe", diagnostics=placed) from None


def _renamed(item: Any) -> Any:
    place = item.place
    return item if place is None else replace(item, place=Place("(imported recipe)", place.line, place.column))
