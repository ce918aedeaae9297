"""`s2vflow import`: a ComfyUI workflow becomes a recipe."""

from __future__ import annotations

import json
import re
import tempfile
import textwrap
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from s2v_flow.comfy.catalog import PREVIEWS, SAVERS, WITHOUT_RESULT, classes
from s2v_flow.comfy.editor import inactive_parts, is_editor, read_editor
from s2v_flow.comfy.finish import (
    Kinds,
    Reference,
    Sections,
    annotate,
    difference,
    finish,
    meanings,
    profile_name,
    unique,
)
from s2v_flow.comfy.graph import ComfyNode, Graph, Link, Mistakes, is_prompt, needed_order, read_prompt
from s2v_flow.comfy.meaning import AtNode, Draft, SkipError
from s2v_flow.comfy.sampling import SAMPLING
from s2v_flow.comfy.scaling import SCALING
from s2v_flow.comfy.source import bad_file, parse, read_workflow
from s2v_flow.comfy.sources import SOURCES
from s2v_flow.comfy.values import VALUES
from s2v_flow.errors import Place, RecipeError
from s2v_flow.recipe.argument import Changes
from s2v_flow.recipe.emit import flow_text, to_yaml
from s2v_flow.recipe.load import Recipe, load_recipe
from s2v_flow.recipe.params import escaped
from s2v_flow.recipe.reader import FORBIDDEN
from s2v_flow.wording import shortened

_MAX_PROFILES = 8
_MAX_WRAPPERS = 8
_OF_SERVERS = ("history", "queue_running", "queue_pending", "extra_data", "extra_pnginfo", "input", "output")
_TRANSLATORS = {**SOURCES, **VALUES, **SCALING, **SAMPLING}
_PLAIN_NAME = re.compile("[A-Za-z_]{2,}")  # not one of a row, such as lora_1 or values.a
_VALUES = {"INT", "FLOAT", "STRING", "BOOLEAN"}
_BYPASS = "bypass it (Ctrl+B) or replace it by a node that s2vflow knows, and save the workflow again"
_LOADERS = {
    "MODEL": "UNETLoader or UnetLoaderGGUF",
    "CLIP": "CLIPLoader",
    "VAE": "VAELoader",
    "AUDIO_ENCODER": "AudioEncoderLoader",
    "IMAGE": "LoadImage or LoadVideo",
    "VIDEO": "LoadVideo",
    "AUDIO": "LoadAudio",
}


@dataclass(frozen=True)
class Imported:
    """A recipe's text, what a person should know about it, and what was modernised."""

    text: str
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    changes: tuple[str, ...]


def import_workflow(path: Path, kinds: Kinds, *, modernises: bool = False, as_of: int | None = None) -> Imported:
    """Read a workflow, in ComfyUI's editor or API format or hidden in a picture or a video, as a recipe.

    Args:
        modernises: Rewrite it to exact time instead of reproducing ComfyUI's numbers.
        as_of: 2025: reproduce how ComfyUI rounded fp8-scaled files then; unless given, ComfyUI of today counts.

    Raises:
        RecipeError: With everything in it that cannot be said in a recipe.
        S2VFlowError: There is no workflow in the file.
    """
    mistakes = Mistakes(path.name)
    document = _unwrapped(read_workflow(path), path, mistakes)
    graph = read_editor(document, mistakes) if is_editor(document) else read_prompt(document, mistakes)
    if not graph.nodes:
        raise bad_file(path, "it has no nodes")
    finished = partial(finish, modernises=modernises, as_of=as_of)
    sections = finished(translate(graph, mistakes, path.parent))
    annotate(sections, graph)
    origins = {
        name: ", ".join(graph.nodes[key].described() for key in keys if key in graph.nodes)
        for name, keys in sections.made_from.items()
    }
    description = f"Imported from ComfyUI's workflow {path.name}" + (", modernised." if modernises else ".")
    checked(recipe_text(sections, description, {}), kinds, origins=origins)
    profiles: dict[str, Mapping[str, Any]] = {}
    parts = inactive_parts(document, SAVERS) if is_editor(document) else []
    if len(parts) > _MAX_PROFILES:
        mistakes.note(f"{len(parts)} parts are switched off; the first {_MAX_PROFILES} of them may become profiles")
    for part in parts[:_MAX_PROFILES]:
        profile = _profile(document, part, sections, kinds, path, finished)
        if profile is None:
            mistakes.note("a part that is switched off cannot be a profile of this recipe and is left out")
        elif profile:
            name = unique(profile_name(profile), profiles)
            profiles[name] = profile
            mistakes.note(f"a part that is switched off became the profile {name}: -p {name}")
    text = recipe_text(sections, description, profiles)
    checked(text, kinds)
    return Imported(text, tuple(mistakes.warnings), tuple(mistakes.notes), tuple(sections.changes))


def _unwrapped(document: Any, path: Path, mistakes: Mistakes) -> Any:
    """Step into what ComfyUI's server takes and what its history gives, and texts that hold JSON once more."""
    found = list(_workflows(document, path, _MAX_WRAPPERS))
    if not found:
        raise bad_file(path, "neither the editor's nor the API's format")
    made_for = [item for item in found if "WanSoundImageToVideo" in json.dumps(item[2])] or found
    newest = max(made_for, key=lambda item: item[0])
    if len(found) > 1:
        others = ", ".join(shortened(name) for _, name, _ in found if name != newest[1])
        mistakes.note(f"{len(found)} workflows are in it; this is the newest, {shortened(newest[1])}, of: {others}")
    return newest[2]


def _workflows(value: Any, path: Path, depth: int, name: str = "") -> Iterator[tuple[float, str, Any]]:
    """Yield the workflows in a document, each with its number in the server's queue and its name there."""
    if isinstance(value, str):
        value = parse(value, path) if value.lstrip()[:1] in ("{", "[") else None
    if is_editor(value) or is_prompt(value):
        yield 0.0, name, value
    elif depth and isinstance(value, list):
        if len(value) > 2 and isinstance(value[0], (int, float)) and (is_prompt(value[2]) or isinstance(value[2], str)):
            yield from ((float(value[0]), str(value[1]), item) for _, _, item in _workflows(value[2], path, depth - 1))
            return
        for item in value:
            if isinstance(item, (Mapping, list)):
                yield from _workflows(item, path, depth - 1, name)
    elif depth and isinstance(value, Mapping):
        inner = next((value[key] for key in ("workflow", "prompt") if value.get(key)), None)
        if inner is not None:
            yield from _workflows(inner, path, depth - 1, name)
            return
        for key, item in value.items():
            if (isinstance(item, Mapping) and "prompt" in item) or key in _OF_SERVERS:
                yield from _workflows(item, path, depth - 1, str(key))


def _profile(
    document: Any,
    part: frozenset[str],
    base: Sections,
    kinds: Kinds,
    path: Path,
    finished: Callable[[Draft], Sections],
) -> dict[str, Any] | None:
    """Return a switched-off part as a profile; None where that cannot be; empty where it changes nothing."""
    mistakes = Mistakes(path.name)
    try:
        graph = read_editor(document, mistakes, part)
        savers = {name for name, node in graph.nodes.items() if node.type in SAVERS and name.split(":")[0] in part}
        other = finished(translate(graph, mistakes, path.parent, savers))
        profile = difference(base, other, kinds)
        if not profile:
            return {}
        alone = checked(recipe_text(other, "", {}), kinds)
        together = checked(recipe_text(base, "", {"it": profile}), kinds, "it")
    except RecipeError:
        return None
    wanted, got = meanings(alone), meanings(together)
    return profile if all(got.get(name) == digest for name, digest in wanted.items()) else None


def checked(
    text: str, kinds: Kinds, profile: str | None = None, origins: Mapping[str, str] = MappingProxyType({})
) -> Recipe:
    """Check a recipe's text as `s2vflow check` would; `origins` says what its nodes were in ComfyUI.

    Raises:
        RecipeError: With every mistake, at its place in the text.
    """
    with tempfile.TemporaryDirectory(prefix="s2vflow-") as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(text, encoding="utf-8")
        try:
            return load_recipe(file, kinds=kinds, changes=Changes(() if profile is None else (profile,)))
        except RecipeError as error:
            placed = []
            for item in error.diagnostics:
                node = re.match(r"nodes\.(\w+)", item.inside or "")
                origin = origins.get(node[1]) if node else None
                place = item.place and Place("(imported recipe)", item.place.line, item.place.column)
                inside = f"{item.inside}; in ComfyUI {origin}" if origin else item.inside
                placed.append(replace(item, place=place, inside=inside))
            raise RecipeError("the workflow's values do not make a recipe", diagnostics=placed) from None


def translate(graph: Graph, mistakes: Mistakes, folder: Path, wanted: Collection[str] | None = None) -> Draft:
    """Translate what the nodes that save something need, or those of them whose ids are `wanted`.

    `mistakes` takes what is wrong, and what a person should know; `folder`: where the workflow's pictures may lie, if
    their size matters.

    Raises:
        RecipeError: With everything that recipes cannot express.
    """
    targets = _targets(graph, mistakes, wanted)
    order = needed_order(graph, targets, mistakes)
    fed: dict[str, set[str]] = {}
    for name in order:
        for key, link in graph.nodes[name].links():
            fed.setdefault(link.node, set()).add(_type_of(graph.nodes[name].type, key))
    for node in (graph.nodes[name] for name in order if graph.nodes[name].type not in classes()):
        takes = {_type_of(graph.nodes[link.node].type, link.slot) for _, link in node.links()}
        mistakes.add("W003", f"there is no such node here: {node.type}", node, _advice(node, fed[node.id], takes))
    mistakes.raise_any()
    if wanted is None:
        _note_dropped(graph, set(order), mistakes)
    draft, meanings, skipped = Draft(), dict[Link, Any](), set[str]()
    shared = (graph, mistakes, folder, draft, meanings, skipped, Counter[str]())
    for name in order:
        node = graph.nodes[name]
        known = {item.name for item in classes()[node.type].inputs}
        for key in (key for key, _ in node.links() if key not in known and _PLAIN_NAME.fullmatch(key)):
            mistakes.warn(f"{key}: {node.described()}: this input is not known here, and what is linked to it left out")
        try:
            made = _TRANSLATORS[node.type](AtNode(node, *shared))
            for slot, meaning in enumerate(made if isinstance(made, tuple) else (made,)):
                meanings[Link(name, slot)] = meaning
        except SkipError:
            skipped.add(name)
    mistakes.raise_any()
    return draft


def _targets(graph: Graph, mistakes: Mistakes, wanted: Collection[str] | None) -> list[str]:
    """Return the ids of the nodes that save something; where there are none, those that show frames."""
    for types in (SAVERS, PREVIEWS):
        found = [
            name for name, node in graph.nodes.items() if node.type in types and (wanted is None or name in wanted)
        ]
        if found:
            return sorted(found, key=lambda name: (types.index(graph.nodes[name].type), _by_number(name)))
    fix = "add a SaveVideo node, or switch the one that is there on"
    raise mistakes.stop("W001", "nothing in it saves a video, images or a latent", fix=fix)


def _by_number(name: str) -> list[tuple[int, int, str]]:
    """Order ids as people do: 9 before 10, and parts of subgraphs after what stands around them."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split(":")]


def _type_of(class_type: str, port: str | int) -> str:
    """Return the type of an input, by its name, or of an output, by its place; "*" where it is not known."""
    known = classes().get(class_type)
    if known is None:
        return "*"
    outputs = dict(enumerate(type_ for _, type_ in known.outputs))
    return (outputs | {item.name: item.type for item in known.inputs}).get(port, "*")


def _advice(node: ComfyNode, gives: set[str], takes: set[str]) -> str:
    """Return what to do about a node that is not known: bypass it only where it can hand on what it takes."""
    if node.type.startswith(("workflow>", "workflow/")):
        return "it is a group node: turn it back into its nodes (right-click it), and save the workflow again"
    if takes & gives - {"*"}:
        return _BYPASS
    if node.type.startswith("WanVideo"):
        return "build this part with ComfyUI's own nodes (WanSoundImageToVideo, KSampler); the wrapper's are not known"
    if node.type.count("-") == 4:
        return "its subgraph is not in the file: open the workflow in ComfyUI and save it again"
    if "gguf" in node.type.lower():
        return "load its file with UnetLoaderGGUF or CLIPLoaderGGUF, or use the safetensors file with UNETLoader"
    if takes and "*" in takes | gives:
        return _BYPASS
    if gives <= _VALUES:
        return "type its value into the node that takes it, and save the workflow again"
    known = " and ".join(_LOADERS[type_] for type_ in _LOADERS if type_ in gives and not takes)
    return f"replace it by {known or 'a node that s2vflow knows'}, and save the workflow again"


def _note_dropped(graph: Graph, used: set[str], mistakes: Mistakes) -> None:
    for name, node in graph.nodes.items():
        if name in used:
            continue
        if node.type in PREVIEWS or node.type in WITHOUT_RESULT:
            mistakes.note(f"{node.described()} is left out: it shows or saves what recipes do not")
        elif node.type not in classes():
            mistakes.note(f"{node.described()} is left out: it is unknown, and feeds nothing that is saved")


_WIDTH = 120
_LONGEST_ALIGNED = 12  # longer names do not move the others to the right


def recipe_text(sections: Sections, description: str, profiles: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a recipe's text: short nodes on one line, others as blocks, comments kept; always the same bytes."""
    lines = ["s2vflow: 1", *_yaml({"description": description}), ""]
    if sections.params:
        lines += [*_comments(sections.remarks.get("params", []), ""), *_yaml({"params": sections.params}), ""]
    lines += ["nodes:", *_nodes(sections)]
    if profiles:
        lines += ["", *_comments(sections.remarks.get("profiles", []), "")]
        lines += _yaml({"profiles": profiles}, flow_depth=2, width=102)
    notes = sections.notes + ([] if profiles else sections.remarks.get("profiles", []))
    if notes:
        lines += ["", "# Notes from the workflow"]
        for note in notes:
            lines += ["#", *_comments([note], "")]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _nodes(sections: Sections) -> Iterator[str]:
    flows = {name: flow_text(_plain(node)) for name, node in sections.nodes.items()}
    one_line = {name for name, node in sections.nodes.items() if _fits(name, node, flows[name])}
    width = max((len(name) + 1 for name in one_line if len(name) <= _LONGEST_ALIGNED), default=0)
    for name, node in sections.nodes.items():
        yield from _comments(sections.remarks.get(name, []), "  ")
        if name in one_line:
            yield f"  {name + ':':<{width}} {flows[name]}"
        else:
            yield from (f"  {line}" for line in _yaml({name: node}, flow_depth=3, width=_WIDTH - 2))


def _fits(name: str, node: Mapping[str, Any], flow: str) -> bool:
    has_loras = any(isinstance(value, list) and value for value in node.values())
    has_lines = any(isinstance(value, str) and "\n" in value for value in node.values())
    return not has_loras and not has_lines and max(len(name) + 1, 10) + len(flow) + 3 <= _WIDTH


def _comments(texts: list[str], indent: str) -> Iterator[str]:
    for text in texts:
        clean = re.sub(r"\n\s*\n\s*", "\n\n", FORBIDDEN.sub("", text))
        for line in clean.splitlines():
            parts = textwrap.wrap(line, _WIDTH - len(indent) - 2, break_long_words=False, break_on_hyphens=False)
            yield from (f"{indent}# {part}" for part in parts or [""])


def _yaml(data: Mapping[str, Any], *, flow_depth: int = 2, width: int = _WIDTH) -> list[str]:
    return to_yaml(_plain(data), flow_depth=flow_depth, width=width, folds=False).splitlines()


def _plain(value: Any) -> Any:
    """Return data as YAML takes it: references as text, other text with `${` and `$params.` escaped."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return escaped(FORBIDDEN.sub("", value))
    return value.text if isinstance(value, Reference) else value
