"""The editor's format: subgraphs, what is switched off, and nodes that only the editor knows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from comfy_workflows import editor, golden, imported, node_of, recipe_of

from s2v_flow.errors import RecipeError

Workflow = dict[str, Any]


@pytest.fixture(scope="module")
def plain_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the recipe of the golden workflow."""
    return imported(editor(), tmp_path_factory.mktemp("plain")).text


def input_of(node: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(item for item in node["inputs"] if item["name"] == name)
    return found


def link(document: Workflow, link_id: int) -> list[Any]:
    found: list[Any] = next(item for item in document["links"] if item[0] == link_id)
    return found


def put_between(document: Workflow, node: dict[str, Any], name: str, new: dict[str, Any]) -> None:
    """Put a node with one input and one output on the link that feeds an input."""
    old = link(document, input_of(node, name)["link"])
    new_id, link_id = 900 + len(document["nodes"]), 9000 + len(document["links"])
    document["nodes"].append({"mode": 0, "inputs": [{"name": "", "type": old[5], "link": link_id}], **new})
    document["nodes"][-1]["id"] = new_id
    document["nodes"][-1].setdefault("outputs", [{"name": "", "type": old[5], "links": [old[0]]}])
    document["links"].append([link_id, old[1], old[2], new_id, 0, old[5]])
    old[1:3] = [new_id, 0]


def as_subgraph(document: Workflow, types: list[str], name: str) -> Workflow:
    """Move nodes into a subgraph, by class: the second of each, for this workflow's extend."""
    document = copy.deepcopy(document)
    chosen = [node_of(document, type_, -1 if type_ != "LatentConcat" else 0) for type_ in types]
    inside = {node["id"] for node in chosen}
    definition: Workflow = {"id": f"{name}-0000-0000-0000-0000", "name": name, "nodes": chosen, "links": []}
    instance: Workflow = {"id": 800, "type": definition["id"], "mode": 0, "inputs": [], "outputs": []}
    definition["inputs"], definition["outputs"] = [], []
    links = []
    for item in document["links"]:
        key, origin, slot, target, target_slot, type_ = item
        inner: Workflow = {"id": key, "target_slot": target_slot, "origin_slot": slot, "type": type_}
        if origin in inside and target in inside:
            definition["links"].append(inner | {"origin_id": origin, "target_id": target})
        elif target in inside:
            number = len(definition["inputs"])
            node = next(node for node in chosen if node["id"] == target)
            port: Workflow = {"name": f"in{number}", "type": type_, "link": key}
            port |= {"widget": {"name": f"in{number}"}} if "widget" in node["inputs"][target_slot] else {}
            instance["inputs"].append(port)
            definition["inputs"].append({"name": f"in{number}", "type": type_, "linkIds": [key]})
            definition["links"].append(inner | {"origin_id": -10, "origin_slot": number, "target_id": target})
            links.append([key, origin, slot, 800, number, type_])
        elif origin in inside:
            if not definition["outputs"]:
                instance["outputs"].append({"name": "out", "type": type_, "links": []})
                definition["outputs"].append({"name": "out", "type": type_, "linkIds": [7000]})
                end = {"id": 7000, "origin_id": origin, "origin_slot": slot, "target_id": -20, "target_slot": 0}
                definition["links"].append(end | {"type": type_})
            links.append([key, 800, 0, target, target_slot, type_])
        else:
            links.append(item)
    document["links"] = links
    document["nodes"] = [node for node in document["nodes"] if node["id"] not in inside] + [instance]
    document.setdefault("definitions", {"subgraphs": []})["subgraphs"].append(definition)
    return document


EXTEND = ["WanSoundImageToVideoExtend", "KSampler", "LatentConcat"]


def test_a_subgraph_is_unfolded(tmp_path: Path, plain_text: str) -> None:
    """Extend, KSampler and LatentConcat inside a subgraph, as in the official template."""
    assert imported(as_subgraph(editor(), EXTEND, "a"), tmp_path).text == plain_text


def nested() -> Workflow:
    """Return the workflow with its extend in a subgraph, and the extend's sampler in another inside."""
    document = as_subgraph(editor(), EXTEND, "outer")
    outer = document["definitions"]["subgraphs"][0]
    keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    inner_root: Workflow = {"nodes": outer["nodes"], "links": [[item[key] for key in keys] for item in outer["links"]]}
    moved = as_subgraph(inner_root, ["KSampler"], "inner")
    outer["nodes"], outer["links"] = moved["nodes"], [dict(zip(keys, item, strict=True)) for item in moved["links"]]
    document["definitions"]["subgraphs"] += moved["definitions"]["subgraphs"]
    return document


def test_a_subgraph_in_a_subgraph_is_unfolded(tmp_path: Path, plain_text: str) -> None:
    """The sampler in a subgraph of its own, inside the other."""
    assert imported(nested(), tmp_path).text == plain_text


def promote(node: dict[str, Any], pairs: list[list[str]], values: list[Any]) -> None:
    node["properties"], node["widgets_values"] = {"proxyWidgets": pairs}, values


@pytest.mark.parametrize(
    ("names", "values"),
    [
        (["seed"], [4711]),
        (["seed"], [4711, "fixed"]),
        (["seed", "control_after_generate"], [4711, "randomize"]),
        (["sampler_name", "seed"], [None, "4711"]),
    ],
)
def test_each_copy_of_a_subgraph_has_its_own_promoted_values(
    names: list[str], values: list[Any], tmp_path: Path
) -> None:
    """The value on the subgraph's node wins over the one inside; a hole leaves the one inside."""
    document = as_subgraph(editor(), EXTEND, "a")
    inside = document["definitions"]["subgraphs"][0]["nodes"]
    sampler = str(next(node["id"] for node in inside if node["type"] == "KSampler"))
    before = recipe_of(document, tmp_path).nodes["talk"].node.model_dump()
    promote(document["nodes"][-1], [[sampler, name] for name in names], values)
    assert recipe_of(document, tmp_path).nodes["talk"].node.model_dump() == before | {"seed": 4711}


@pytest.mark.parametrize("form", [["800", "seed"], ["800", "SAMPLER: seed"], ["800", "seed", "SAMPLER"]])
def test_promoted_values_reach_through_nested_subgraphs(form: list[str], tmp_path: Path) -> None:
    """By the widget's name, by its node's and its own, or by a third word; the outermost value wins."""
    document = nested()
    outer, inner = document["definitions"]["subgraphs"]
    sampler = str(inner["nodes"][0]["id"])
    promote(outer["nodes"][-1], [[sampler, "seed"], [sampler, "steps"]], [11, 3])
    talk = recipe_of(document, tmp_path).nodes["talk"].node.model_dump()
    assert (talk["seed"], talk["steps"]) == (11, None)  # steps is linked: what is promoted does not count
    promote(document["nodes"][-1], [[part.replace("SAMPLER", sampler) for part in form]], [12])
    assert recipe_of(document, tmp_path).nodes["talk"].node.model_dump()["seed"] == 12


def test_a_promoted_primitive_has_the_value_of_its_copy(tmp_path: Path) -> None:
    """A PrimitiveNode inside a subgraph, its value on the subgraph's node."""
    document = as_subgraph(editor(), EXTEND, "a")
    definition = document["definitions"]["subgraphs"][0]
    sampler = next(node for node in definition["nodes"] if node["type"] == "KSampler")
    definition["nodes"].append({"id": 950, "type": "PrimitiveNode", "widgets_values": [1, "fixed"], "outputs": []})
    end = {"id": 9500, "origin_id": 950, "origin_slot": 0, "target_id": sampler["id"], "type": "INT"}
    definition["links"].append(end | {"target_slot": len(sampler["inputs"])})
    sampler["inputs"].append({"name": "seed", "type": "INT", "widget": {"name": "seed"}, "link": 9500})
    promote(document["nodes"][-1], [["950", "value"], ["950", "control_after_generate"]], [4712, "fixed"])
    assert recipe_of(document, tmp_path).nodes["talk"].node.model_dump()["seed"] == 4712


def test_a_subgraphs_own_widget_counts_unless_it_is_linked(tmp_path: Path) -> None:
    """The value on the subgraph's node wins over the one inside; a link wins over both."""
    document = as_subgraph(editor(), EXTEND, "a")
    definition, instance = document["definitions"]["subgraphs"][0], document["nodes"][-1]
    sampler = next(node for node in definition["nodes"] if node["type"] == "KSampler")
    sampler["inputs"].append({"name": "seed", "type": "INT", "widget": {"name": "seed"}, "link": 7777})
    definition["inputs"].append({"name": "seed", "type": "INT", "linkIds": [7777]})
    slots = {"origin_slot": len(definition["inputs"]) - 1, "target_slot": len(sampler["inputs"]) - 1}
    definition["links"].append({"id": 7777, "origin_id": -10, "target_id": sampler["id"], "type": "INT", **slots})
    linked = sum("widget" in item for item in instance["inputs"])
    for values in ([99] * linked + [77], [99] * linked + [77, "randomize"]):
        instance["widgets_values"] = values
        recipe = recipe_of(document, tmp_path)
        assert recipe.nodes["talk"].node.model_dump()["seed"] == 77
        assert recipe.params["steps"] == 4
    instance["properties"] = {"proxyWidgets": [["-1", "seed"], ["5", "cfg"]]}
    instance["widgets_values"] = [55, 3.0]
    assert recipe_of(document, tmp_path).nodes["talk"].node.model_dump()["seed"] == 55


def test_a_bypassed_node_passes_on_what_has_its_outputs_type(tmp_path: Path) -> None:
    """A bypassed LoRA leaves the model as it is, a bypassed subgraph the video."""
    document = editor(golden("lightning"))
    node_of(document, "LoraLoaderModelOnly")["mode"] = 4
    assert recipe_of(document, tmp_path).nodes["dit"].node.model_dump()["loras"] == []
    document = as_subgraph(editor(), EXTEND, "a")
    document["nodes"][-1]["mode"] = 4
    assert "talk" not in recipe_of(document, tmp_path).nodes


def test_a_bypassed_node_passes_on_an_input_of_any_type(tmp_path: Path, plain_text: str) -> None:
    """Where no input has the output's type; one that has it comes first."""
    document = editor()
    put_between(document, node_of(document, "VAEDecode"), "vae", {"type": "FreeMemory", "mode": 4})
    taken = node_of(document, "FreeMemory")["inputs"]
    taken[0]["type"] = "*"
    assert imported(document, tmp_path).text == plain_text
    image = input_of(node_of(document, "WanSoundImageToVideo"), "ref_image")["link"]
    taken[:0] = [{"name": "image", "type": "IMAGE", "link": image}, {"name": "more", "type": "*", "link": image}]
    taken[2]["type"] = "VAE"
    assert imported(document, tmp_path).text == plain_text


def test_what_a_muted_node_gives_is_absent(tmp_path: Path) -> None:
    """A muted LoadImage takes the reference away, with a note; a muted prompt is a mistake."""
    document = editor()
    node_of(document, "LoadImage")["mode"] = 2
    assert "reference" not in recipe_of(document, tmp_path).nodes
    assert "ref_image is left out: it comes from a node that is switched off" in imported(document, tmp_path).notes[0]
    node_of(document, "CLIPTextEncode")["mode"] = 2
    with pytest.raises(RecipeError) as caught:
        imported(document, tmp_path)
    assert "positive comes from a node that is switched off" in caught.value.diagnostics[0].message


@pytest.mark.parametrize("type_", ["Reroute", "SetNode"])
def test_reroutes_and_set_nodes_on_the_way_do_not_count(type_: str, tmp_path: Path, plain_text: str) -> None:
    """In front of the sampler's model."""
    document = editor()
    put_between(document, node_of(document, "KSampler"), "model", {"type": type_, "widgets_values": ["m"]})
    assert imported(document, tmp_path).text == plain_text


@pytest.mark.parametrize("types", [("SetNode", "GetNode"), ("easy setNode", "easy getNode")])
@pytest.mark.parametrize("mode", [0, 4])
def test_a_get_node_gives_what_the_set_node_of_its_name_takes(
    types: tuple[str, str], mode: int, tmp_path: Path, plain_text: str
) -> None:
    """The pair stands in for a link, whether the Set node is bypassed or not."""
    document = editor()
    model = input_of(node_of(document, "KSampler"), "model")
    old = link(document, model["link"])
    origin = old[1:3]
    setter, getter = types
    document["nodes"] += [
        {"id": 901, "type": setter, "mode": mode, "widgets_values": ["m"], "inputs": [{"name": "", "link": 9001}]},
        {"id": 902, "type": getter, "widgets_values": ["m"], "outputs": [{"name": "MODEL", "type": "MODEL"}]},
    ]
    document["links"].append([9001, *origin, 901, 0, "MODEL"])
    old[1:3] = [902, 0]
    assert imported(document, tmp_path).text == plain_text
    node_of(document, getter)["widgets_values"] = ["other"]
    with pytest.raises(RecipeError, match="cannot become") as caught:
        imported(document, tmp_path)
    assert "model is linked to node Set other, which is not there" in caught.value.diagnostics[0].message


def test_a_primitive_of_the_editor_is_a_parameter_where_several_share_it(tmp_path: Path) -> None:
    """One PrimitiveNode that feeds both seeds: `seed` is turned in one place."""
    document = editor()
    document["nodes"].append({"id": 950, "type": "PrimitiveNode", "widgets_values": [1234, "fixed"], "outputs": []})
    for number in (0, 1):
        sampler, key = node_of(document, "KSampler", number), 9500 + number
        document["links"].append([key, 950, 0, sampler["id"], len(sampler["inputs"]), "INT"])
        sampler["inputs"].append({"name": "seed", "type": "INT", "widget": {"name": "seed"}, "link": key})
    text = imported(document, tmp_path).text
    assert "  seed: 1234\n" in text
    assert text.count("seed: $params.seed") == 2


def test_titles_become_names(tmp_path: Path) -> None:
    """A person's title is the node's name; what ComfyUI calls a node anyway is not."""
    document = editor()
    node_of(document, "LoadImage")["title"] = "My Face! (2)"
    node_of(document, "LoadAudio")["title"] = "Load Audio"
    node_of(document, "VAELoader")["title"] = "变分自编码器"
    assert {"my_face_2", "voice", "vae"} <= recipe_of(document, tmp_path).nodes.keys()


def test_notes_become_comments(tmp_path: Path) -> None:
    """A short one stands above what it stands beside in the editor, a long one at the end; both only once."""
    document = editor()
    place = node_of(document, "VAELoader")["pos"]
    note = {"id": 970, "type": "Note", "pos": [place[0] + 5, place[1] + 5], "size": [10, 10]}
    note["widgets_values"] = ["the good VAE\u0007"]
    long = {"id": 971, "type": "MarkdownNote", "title": "Read me", "widgets_values": ["line\n" * 3 + "x " * 300]}
    document["nodes"] += [note, {**note, "id": 972}, long]
    lines = imported(document, tmp_path).text.splitlines()
    above = next(index for index, line in enumerate(lines) if line.startswith("  vae:"))
    assert lines[above - 1] == "  # the good VAE"
    assert lines.count("  # the good VAE") == 1
    assert lines.index("# Read me") > above


def test_a_part_that_is_switched_off_becomes_a_profile(tmp_path: Path) -> None:
    """A bypassed SaveLatent adds its node when the profile is chosen."""
    document = editor()
    node_of(document, "SaveLatent")["mode"] = 4
    made = imported(document, tmp_path)
    assert "profiles:\n  bypassed: {nodes: {latents: {kind: save_latent, latent: $talk, " in made.text
    assert any("-p bypassed" in note for note in made.notes)


def test_a_switched_off_part_that_cannot_be_said_is_left_out_with_a_note(tmp_path: Path, plain_text: str) -> None:
    """An unknown node in it does not keep the rest from being imported."""
    document = editor()
    upscaler = {"id": 960, "type": "Upscale4x", "mode": 4, "inputs": [], "outputs": [{"name": "I", "type": "IMAGE"}]}
    saver = {"id": 961, "type": "SaveImage", "mode": 4, "widgets_values": ["big"], "outputs": []}
    saver["inputs"] = [{"name": "images", "type": "IMAGE", "link": 9600}]
    document["nodes"] += [upscaler, saver]
    document["links"].append([9600, 960, 0, 961, 0, "IMAGE"])
    made = imported(document, tmp_path)
    assert made.text == plain_text
    assert made.notes == ("a part that is switched off cannot be a profile of this recipe and is left out",)


def test_anything_everywhere_links_what_its_list_names(tmp_path: Path, plain_text: str) -> None:
    """A portrait without a link; without the list, the portrait would be lost in silence."""
    document = editor()
    video = node_of(document, "WanSoundImageToVideo")
    portrait = input_of(video, "ref_image")
    old = link(document, portrait["link"])
    portrait["link"] = None
    old[3:5] = [901, 0]
    broadcast = {"id": 901, "type": "Anything Everywhere", "mode": 0, "outputs": []}
    document["nodes"].append({**broadcast, "inputs": [{"name": "anything", "type": "IMAGE", "link": old[0]}]})
    with pytest.raises(RecipeError) as caught:
        imported(document, tmp_path)
    assert "Anything Everywhere feeds nodes without links" in caught.value.diagnostics[0].message
    ends = {"downstream": video["id"], "downstream_slot": video["inputs"].index(portrait), "type": "IMAGE"}
    told = {**ends, "upstream": str(old[1]), "upstream_slot": old[2], "controller": 901}
    document["extra"] = {"ue_links": [told, {"downstream": "gone"}, {}]}
    assert imported(document, tmp_path).text == plain_text


def test_a_broken_link_beside_the_video_does_not_matter(tmp_path: Path, plain_text: str) -> None:
    """A link that is not there, and a Get node without its Set node; in the video they are mistakes."""
    document = editor()
    lost = {"id": 901, "type": "GetNode", "widgets_values": ["lost"], "outputs": [{"name": "VAE", "type": "VAE"}]}
    inputs = [{"name": "vae", "type": "VAE", "link": 9001}, {"name": "image", "type": "IMAGE", "link": 9002}]
    document["nodes"] += [lost, {"id": 902, "type": "Show", "inputs": inputs}]
    document["links"].append([9001, 901, 0, 902, 0, "VAE"])
    assert imported(document, tmp_path).text == plain_text
    for number, place in ((9001, "Set lost"), (9002, "at the other end of link 9002")):
        input_of(node_of(document, "VAEDecode"), "vae")["link"] = number
        with pytest.raises(RecipeError) as caught:
            imported(document, tmp_path)
        assert f"vae is linked to node {place}, which is not there" in caught.value.diagnostics[0].message


@pytest.mark.parametrize(
    ("type_", "advice"),
    [
        ("WanVideoNAG", "bypass it"),
        ("workflow>Model", "turn it back into its nodes"),
        ("workflow/Model", "turn it back into its nodes"),
    ],
)
def test_the_advice_fits_the_unknown_node(type_: str, advice: str, tmp_path: Path) -> None:
    """A node pack's that takes a model and gives one; a group node of older versions."""
    document = editor()
    put_between(document, node_of(document, "KSampler"), "model", {"type": type_})
    with pytest.raises(RecipeError) as caught:
        imported(document, tmp_path)
    assert advice in (caught.value.diagnostics[0].fix or "")


def test_unknown_nodes_that_feed_nothing_are_dropped_with_a_note(tmp_path: Path, plain_text: str) -> None:
    """A gadget beside the graph changes nothing."""
    document = editor()
    document["nodes"].append({"id": 990, "type": "ShowText|pysssss", "title": "gadget", "inputs": [], "outputs": []})
    made = imported(document, tmp_path)
    assert made.text == plain_text
    assert made.notes == (
        "node 990 (ShowText|pysssss 'gadget') is left out: it is unknown, and feeds nothing that is saved",
    )


def test_every_unknown_node_that_feeds_the_video_is_listed(tmp_path: Path) -> None:
    """With title, id and what to do, all at once."""
    document = editor()
    put_between(document, node_of(document, "KSampler"), "model", {"type": "TeaCache", "title": "Faster"})
    put_between(document, node_of(document, "VAEDecode"), "samples", {"type": "LatentBlur"})
    with pytest.raises(RecipeError) as caught:
        imported(document, tmp_path)
    found = {(item.message, item.inside, item.fix) for item in caught.value.diagnostics}
    places = sorted(item.inside or "" for item in caught.value.diagnostics)
    assert len(found) == 2
    assert [place.split(", ")[1].split(" ", 2)[2] for place in places] == ["(TeaCache 'Faster')", "(LatentBlur)"]
    assert all("bypass it" in (item.fix or "") for item in caught.value.diagnostics)


@pytest.mark.parametrize("first", ["cfg", "scheduler", "denoise"])
def test_widgets_have_the_classs_order_whatever_that_of_the_inputs(first: str, tmp_path: Path, plain_text: str) -> None:
    """A person who made inputs of all widgets before 2025's frontends did, in any order; values stay in the class's."""
    document = editor()
    for node in document["nodes"]:
        if node["type"] == "KSampler":
            inputs = node["inputs"]
            given = {item["name"] for item in inputs}
            names = ["seed", "steps", "cfg", "sampler_name", "scheduler", "denoise"]
            inputs += [{"name": name, "widget": {"name": name}, "link": None} for name in names if name not in given]
            order = ["seed", first, *sorted(names)]  # a converted seed is first in published files
            inputs.sort(key=lambda item: order.index(item["name"]) if item["name"] in names else -1)
            for place, item in enumerate(inputs):
                if item["link"] is not None:
                    link(document, item["link"])[4] = place
    assert imported(document, tmp_path).text == plain_text
