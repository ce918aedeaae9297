"""From a workflow's graph to a recipe's draft."""

from __future__ import annotations

from collections.abc import Collection

from s2v_flow.comfy.catalog import PREVIEWS, SAVERS, WITHOUT_RESULT, classes
from s2v_flow.comfy.draft import Draft
from s2v_flow.comfy.graph import ComfyNode, Graph, Link, Mistakes, needed_order
from s2v_flow.comfy.meaning import Context, SkipError
from s2v_flow.comfy.sampling import SAMPLING
from s2v_flow.comfy.sources import SOURCES


def translate(graph: Graph, mistakes: Mistakes, wanted: Collection[str] | None = None) -> Draft:
    """Translate what the nodes that save something need.

    Args:
        graph: The workflow.
        mistakes: Takes what is wrong, and what a person should know.
        wanted: Ids of the saving nodes that count; all of them unless given.

    Raises:
        RecipeError: With everything that recipes cannot express.
    """
    targets = _targets(graph, mistakes, wanted)
    order = needed_order(graph, targets, mistakes)
    unknown = [graph.nodes[name] for name in order if graph.nodes[name].type not in classes()]
    for node in unknown:
        mistakes.add("W003", f"there is no such node here: {node.type}", node, _advice(node))
    mistakes.raise_any()
    if wanted is None:
        _note_dropped(graph, set(order), mistakes)
    context = Context(graph, Draft(), mistakes)
    for name in order:
        node = graph.nodes[name]
        translator = SOURCES.get(node.type) or SAMPLING[node.type]
        try:
            for slot, meaning in enumerate(translator(context, node)):
                context.meanings[Link(name, slot)] = meaning
        except SkipError:
            continue
    mistakes.raise_any()
    return context.draft


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


def _advice(node: ComfyNode) -> str:
    if node.type.startswith("WanVideo"):
        return "build this part with ComfyUI's own nodes (WanSoundImageToVideo, KSampler); the wrapper's are not known"
    if node.type.count("-") == 4:
        return "its subgraph is not in the file: open the workflow in ComfyUI and save it again"
    return "bypass it (Ctrl+B) or replace it by a node that s2vflow knows, and save the workflow again"


def _note_dropped(graph: Graph, used: set[str], mistakes: Mistakes) -> None:
    for name, node in graph.nodes.items():
        if name in used:
            continue
        if node.type in PREVIEWS or node.type in WITHOUT_RESULT:
            mistakes.note(f"{node.described()} is left out: it shows or saves what recipes do not")
        elif node.type not in classes():
            mistakes.note(f"{node.described()} is left out: it is unknown, and feeds nothing that is saved")
