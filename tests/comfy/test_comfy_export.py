"""Export: what ComfyUI gets, what is said where it differs, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from comfy_workflows import golden, imported, load_text

from s2v_flow import api
from s2v_flow.comfy.catalog import classes
from s2v_flow.comfy.exporter import export_workflow
from s2v_flow.errors import RecipeError

RECIPES = Path(__file__).parents[2] / "recipes"


def exported(path: Path, folder: Path, form: Any = "api", **options: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    planned = api.plan(path, api.Options(models_dirs=[folder], cache_dir=folder / "cache", device="cpu", **options))
    text, notes = export_workflow(planned.recipe, planned.plan, form)
    return json.loads(text), notes


def golden_recipe(folder: Path) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(imported(golden("lightning"), folder).text)
    return file


def test_the_api_format_has_every_input_of_every_node(tmp_path: Path) -> None:
    """Links to nodes that are there, to outputs that they have; all required inputs given."""
    document, notes = exported(golden_recipe(tmp_path), tmp_path)
    assert notes == ()
    for node in document.values():
        known = classes()[node["class_type"]]
        needed = {item.name for item in known.inputs if not item.is_optional and item.type not in ("ANY", "READ")}
        assert needed <= node["inputs"].keys() <= {item.name for item in known.inputs}
        for name, value in node["inputs"].items():
            if isinstance(value, list):
                source = classes()[document[value[0]]["class_type"]]
                assert source.outputs[value[1]][1] == known.input(name).type


def test_the_exported_workflow_is_the_golden_one(tmp_path: Path) -> None:
    """The same classes, as often, with the same values; shared numbers in primitives with their names."""
    document, _ = exported(golden_recipe(tmp_path), tmp_path)

    def summary(workflow: dict[str, Any]) -> list[tuple[str, list[tuple[str, Any]]]]:
        def value(given: Any) -> Any:
            return workflow[given[0]]["inputs"].get("value", "link") if isinstance(given, list) else given

        nodes = [node for node in workflow.values() if not node["class_type"].startswith("Primitive")]
        rows = ((node["class_type"], {key: value(item) for key, item in node["inputs"].items()}) for node in nodes)
        return sorted((type_, sorted((key, str(item)) for key, item in inputs.items())) for type_, inputs in rows)

    assert summary(document) == summary(golden("lightning"))
    titles = {node["_meta"]["title"] for node in document.values() if node["class_type"].startswith("Primitive")}
    assert titles == {"steps", "cfg", "length"}


def test_the_editors_layout_can_be_read(tmp_path: Path) -> None:
    """No two nodes overlap, and every link leads to the right."""
    document, _ = exported(golden_recipe(tmp_path), tmp_path, "editor")
    places = {node["id"]: (*node["pos"], *node["size"]) for node in document["nodes"]}
    for one, (left, top, width, height) in places.items():
        for other, (left2, top2, width2, height2) in places.items():
            apart = left + width <= left2 or left2 + width2 <= left or top + height <= top2 or top2 + height2 <= top
            assert one == other or apart
    assert all(places[item[1]][0] < places[item[3]][0] for item in document["links"])
    for item in document["links"]:
        target = next(node for node in document["nodes"] if node["id"] == item[3])
        origin = next(node for node in document["nodes"] if node["id"] == item[1])
        assert target["inputs"][item[4]]["link"] == item[0]
        assert item[0] in origin["outputs"][item[2]]["links"]


def test_chunks_auto_are_counted_from_the_voice(tmp_path: Path) -> None:
    """As many extends as the plan has; what ComfyUI does not do is said."""
    document, notes = exported(RECIPES / "demo.yaml", tmp_path)
    planned = api.plan(RECIPES / "demo.yaml", api.Options(models_dirs=[tmp_path], cache_dir=tmp_path, device="cpu"))
    types = [node["class_type"] for node in document.values()]
    assert types.count("KSampler") == planned.num_chunks
    assert types.count("WanSoundImageToVideoExtend") == planned.num_chunks - 1
    for said in ("conditioning: official", "warmup_frames", "prefix: reference", "background"):
        assert any(said in note for note in notes), said
    cut = next(node["inputs"] for node in document.values() if node["class_type"] == "ImageFromBatch")
    assert (cut["batch_index"], cut["length"]) == (1, planned.num_frames)


def test_chunks_auto_without_the_voices_file_are_refused(tmp_path: Path) -> None:
    """The error stands at `chunks`, and says what helps."""
    text = (RECIPES / "demo.yaml").read_text()
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        exported(file, tmp_path)
    item = caught.value.diagnostics[0]
    assert "needs the voice's length" in item.message
    assert item.place is not None
    assert "chunks: auto" in text.splitlines()[item.place.line - 1]


def test_what_comfyui_has_nothing_for_is_refused_at_its_place() -> None:
    """The authors' sampler and pixel motion."""
    planned = api.plan(RECIPES / "s2v_official.yaml", api.Options(device="cpu"))
    with pytest.raises(RecipeError) as caught:
        export_workflow(planned.recipe, planned.plan, "api")
    assert {item.inside for item in caught.value.diagnostics} == {
        "nodes.first.motion (kind: sample)",
        "nodes.first.sampler (kind: sample)",
    }


def test_a_recipe_without_outputs_is_refused(tmp_path: Path) -> None:
    """ComfyUI would do nothing."""
    recipe = load_text("s2vflow: 1\nnodes: {vae: {kind: load_vae, checkpoint: x}}", tmp_path)
    planned = api.plan(recipe.path, api.Options(device="cpu"))
    with pytest.raises(RecipeError) as caught:
        export_workflow(planned.recipe, planned.plan, "api")
    assert "writes no file" in caught.value.diagnostics[0].message


def test_seeds_that_javascript_cannot_hold_are_noted(tmp_path: Path) -> None:
    """In the editor's format only."""
    recipe = golden_recipe(tmp_path)
    recipe.write_text(recipe.read_text().replace("seed: 20", "seed: 9007199254740993"))
    assert exported(recipe, tmp_path, "api")[1] == ()
    assert "larger than ComfyUI's editor can hold" in exported(recipe, tmp_path, "editor")[1][0]
