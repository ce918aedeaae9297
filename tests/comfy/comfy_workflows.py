"""Workflows for the tests, and what a recipe means once it is planned."""

from __future__ import annotations

import copy
import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from s2v_flow.api import KINDS
from s2v_flow.comfy.exporter import write_editor
from s2v_flow.comfy.graph import Mistakes, read_prompt
from s2v_flow.comfy.importer import Imported, checked, import_workflow
from s2v_flow.errors import RecipeError
from s2v_flow.graph.build import build_plan
from s2v_flow.graph.locations import Locations
from s2v_flow.graph.node import Plan
from s2v_flow.graph.ports import Source
from s2v_flow.recipe.load import Recipe, load_recipe

GOLDEN = Path(__file__).parents[1] / "golden" / "e2e"
Workflow = dict[str, Any]
TEMPLATE = "video_wan2_2_14B_s2v.json"


def golden(name: str = "template") -> dict[str, Any]:
    """Return one of the golden workflows, in the API format."""
    document: dict[str, Any] = json.loads((GOLDEN / f"{name}.json").read_text())
    return document


def template_path() -> Path:
    """Return the official template's path."""
    folder = resources.files("comfyui_workflow_templates_json") / "templates"
    return Path(str(folder / TEMPLATE))


def editor(prompt: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return a workflow in the editor's format; ids count from 1 in the order of what takes from what."""
    graph = read_prompt(prompt or golden(), Mistakes("test"))
    order: list[str] = []

    def visit(name: str) -> None:
        if name not in order:
            for _, link in graph.nodes[name].links():
                visit(link.node)
            order.append(name)

    for name in graph.nodes:
        visit(name)
    numbers = {name: str(index) for index, name in enumerate(order, start=1)}
    renumbered = {}
    for name in order:
        entry = copy.deepcopy((prompt or golden())[name])
        for key, value in entry["inputs"].items():
            if isinstance(value, list):
                entry["inputs"][key] = [numbers[value[0]], value[1]]
        renumbered[numbers[name]] = entry
    return write_editor(list(read_prompt(renumbered, Mistakes("test")).nodes.values()))


def node_of(document: dict[str, Any], type_: str, number: int = 0) -> dict[str, Any]:
    """Return the editor's node of a class, the first or a later one."""
    found: dict[str, Any] = [node for node in document["nodes"] if node["type"] == type_][number]
    return found


def imported(document: Any, folder: Path, *, modernises: bool = False) -> Imported:
    """Import a JSON value."""
    file = folder / "workflow.json"
    file.write_text(document if isinstance(document, str) else json.dumps(document))
    return import_workflow(file, KINDS, modernises=modernises)


def recipe_of(document: Any, folder: Path, *, modernises: bool = False) -> Recipe:
    """Import a JSON value and read the recipe."""
    return checked(imported(document, folder, modernises=modernises).text, KINDS)


def planned(recipe: Recipe) -> Plan:
    """Plan a recipe without any files."""
    done: list[str] = []
    while len(done) < len(recipe.nodes):
        done += [
            name
            for name, spec in recipe.nodes.items()
            if name not in done and all(ref.node in done for ref in spec.node.refs().values())
        ]
    return build_plan(recipe.nodes, done, Locations())


def load_text(text: str, folder: Path) -> Recipe:
    """Read a recipe's text."""
    file = folder / "recipe.yaml"
    file.write_text(text)
    return load_recipe(file, kinds=KINDS)


def plan_meaning(plan: Plan) -> list[str]:
    """Return a digest for every file that a plan writes: of all that its content depends on, and of its name."""
    digests: dict[str, str] = {}
    for item in plan.nodes:
        node = item.node
        inputs = {
            key: [(digests[part.node], part.port) for part in ((given,) if isinstance(given, Source) else given)]
            for key, given in item.inputs.items()
        }
        fields = node.model_dump(mode="json")
        for name in (node.neutral_fields() - node.file_fields().keys()) | node.input_ports().keys():
            fields.pop(name, None)
        for lora in fields.get("loras", []):
            lora.pop("id")
            lora.pop("allow_partial")
        content = json.dumps([node.kind, fields, inputs], sort_keys=True)
        digests[item.name] = hashlib.sha256(content.encode()).hexdigest()
    return sorted(digests[item.name] for item in plan.nodes if item.node.is_sink)


def add(workflow: Workflow, name: str, class_type: str, **inputs: Any) -> list[Any]:
    """Put a node into a workflow in the API format; return the link to its first output."""
    workflow[name] = {"class_type": class_type, "inputs": inputs}
    return [name, 0]


def fields(workflow: Workflow, folder: Path, node: str) -> dict[str, Any]:
    """Import a workflow; return the fields of one of the recipe's nodes."""
    return recipe_of(workflow, folder).nodes[node].node.model_dump(mode="json")


def mistake(workflow: Workflow, folder: Path) -> str:
    """Import a workflow that cannot be one; return where the first mistake is, and what it is."""
    with pytest.raises(RecipeError) as caught:
        imported(workflow, folder)
    item = caught.value.diagnostics[0]
    return f"{item.inside}: {item.message}"
