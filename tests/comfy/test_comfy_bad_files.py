"""Files that are no workflows, damaged ones and bombs: a clear error, soon, and never anything else."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from comfy_workflows import editor, golden, imported, mistake, node_of, template_path
from hypothesis import given, settings
from hypothesis import strategies as st

from s2v_flow.api import KINDS
from s2v_flow.comfy.importer import import_workflow
from s2v_flow.comfy.source import MAX_BYTES
from s2v_flow.errors import ExitCode, RecipeError, S2VFlowError


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hello",
        "[1, 2]",
        "{}",
        "null",
        '{"a": 1}',
        '{"nodes": []}',
        "[" * 100_000,
        "1" * 5000,
        '{"1": {"class_type": 3}}',
    ],
)
def test_what_is_no_workflow_is_said_so(text: str, tmp_path: Path) -> None:
    """Exit code 3, the file named."""
    with pytest.raises(S2VFlowError) as caught:
        imported(text, tmp_path)
    assert caught.value.exit_code == ExitCode.RECIPE
    assert "workflow.json" in str(caught.value)


def test_a_missing_file_is_said_so(tmp_path: Path) -> None:
    """Exit code 4."""
    with pytest.raises(S2VFlowError, match="No such file") as caught:
        import_workflow(tmp_path / "none.json", KINDS)
    assert caught.value.exit_code == ExitCode.MISSING


def test_a_file_that_is_too_large_is_refused_unread(tmp_path: Path) -> None:
    """Fifty megabytes and one byte, most of them a hole."""
    file = tmp_path / "big.json"
    with file.open("wb") as out:
        out.write(b'{"nodes": [')
        out.truncate(MAX_BYTES + 1)
    started = time.process_time()
    with pytest.raises(S2VFlowError, match="50 MB") as caught:
        import_workflow(file, KINDS)
    assert caught.value.exit_code == ExitCode.REFUSED
    assert time.process_time() - started < 5


def first_message(document: Any, folder: Path) -> str:
    with pytest.raises(RecipeError) as caught:
        imported(document, folder)
    assert caught.value.exit_code == ExitCode.RECIPE
    return caught.value.diagnostics[0].message


def test_circles_are_found_in_both_formats(tmp_path: Path) -> None:
    """Of nodes that run, and of reroutes."""
    prompt = golden()
    prompt["94"]["inputs"]["samples"] = ["95", 0]
    assert "depends on its own result" in first_message(prompt, tmp_path)
    document = editor()
    document["nodes"].append({"id": 900, "type": "Reroute", "inputs": [{"name": "", "type": "*", "link": 9000}]})
    document["links"].append([9000, 900, 0, 900, 0, "MODEL"])
    sampler = node_of(document, "KSampler")
    sampler["inputs"][0]["link"] = 9000
    assert "circle" in first_message(document, tmp_path)


def test_links_to_nowhere_are_found_in_both_formats(tmp_path: Path) -> None:
    """A node that is gone, and a link that is gone."""
    prompt = golden()
    del prompt["39"]
    assert "linked to node 39, which is not there" in first_message(prompt, tmp_path)
    document = editor()
    document["links"].pop()
    assert "is not there" in first_message(document, tmp_path)
    document = editor()
    document["nodes"] = [node for node in document["nodes"] if node["type"] != "VAELoader"]
    assert "which is not there" in first_message(document, tmp_path)


@pytest.mark.parametrize(("copies", "depth"), [(1, 100), (10, 8), (1000, 2)])
def test_subgraph_bombs_are_refused_quickly(copies: int, depth: int, tmp_path: Path) -> None:
    """Too deep, or each holding several of the next."""
    subgraphs = [
        {"id": f"s{level}", "nodes": [{"id": n, "type": f"s{level + 1}"} for n in range(copies)], "links": []}
        for level in range(depth)
    ]
    subgraphs[-1]["nodes"] = [{"id": n, "type": "s0"} for n in range(copies)]  # and round again
    document = {"nodes": [{"id": 1, "type": "s0"}], "links": [], "definitions": {"subgraphs": subgraphs}}
    started = time.process_time()
    message = first_message(document, tmp_path)
    assert "subgraphs" in message
    assert time.process_time() - started < 10


def test_values_of_the_wrong_type_name_their_node(tmp_path: Path) -> None:
    """In both formats."""
    prompt = golden()
    prompt["3"]["inputs"]["seed"] = "twenty"
    assert "seed: INT expected, got 'twenty'" in first_message(prompt, tmp_path)
    document = editor()
    node_of(document, "KSampler")["widgets_values"][0] = {"a": 1}
    assert "seed: widgets_values has a map where INT is expected" in first_message(document, tmp_path)


def test_a_value_out_of_range_is_a_mistake_in_the_recipe(tmp_path: Path) -> None:
    """What the recipe's own check finds comes out the same way."""
    prompt = golden()
    prompt["103"]["inputs"]["value"] = 0
    assert "steps: must be at least 1" in first_message(prompt, tmp_path)


@pytest.mark.slow
def test_the_template_is_imported_without_torch(tmp_path: Path) -> None:
    """A whole process: Python, the check of the result and of its profile included."""
    code = (
        "import sys; from pathlib import Path; from s2v_flow.api import KINDS; "
        "from s2v_flow.comfy.importer import import_workflow; import s2v_flow.comfy.exporter; "
        "import_workflow(Path(sys.argv[1]), KINDS); assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", code, str(template_path())]
    subprocess.run(command, capture_output=True, text=True, check=True)


JUNK = [
    None,
    True,
    -1,
    3,
    1e300,
    "",
    "x",
    "$params.x",
    "${",
    [],
    {},
    [1],
    [[1, 2]],
    {"a": 1},
    "\ud800",
    2**70,
    "a\nb: c",
]


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from _paths(item, (*path, key))


DOCUMENTS = [json.loads(template_path().read_text()), golden("lightning"), editor()]
PATHS = [list(_paths(document)) for document in DOCUMENTS]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.booleans())
def test_a_damaged_workflow_is_imported_or_refused(seed: int, modernises: bool) -> None:
    """Whatever is put, taken out or copied anywhere: a recipe or an error of ours, nothing else."""
    chance = random.Random(seed)
    number = chance.randrange(len(DOCUMENTS))
    document = copy.deepcopy(DOCUMENTS[number])
    for _ in range(chance.choice([1, 1, 2, 5])):
        path = chance.choice(PATHS[number])
        try:
            parent = document
            for key in path[:-1]:
                parent = parent[key]
            parent[path[-1]] = copy.deepcopy(
                chance.choice([*JUNK, _at(DOCUMENTS[number], chance.choice(PATHS[number]))])
            )
        except (KeyError, IndexError, TypeError):
            continue  # what stood there is gone already
    code = None
    with tempfile.TemporaryDirectory() as folder:
        try:
            imported(document, Path(folder), modernises=modernises)
        except S2VFlowError as error:
            code = error.exit_code
    assert code in (None, ExitCode.RECIPE, ExitCode.REFUSED)


def _at(document: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        document = document[key]
    return copy.deepcopy(document)


def test_a_value_that_no_recipe_takes_names_the_nodes_it_comes_from(tmp_path: Path) -> None:
    """Their ids and classes, beside the recipe's field."""
    workflow = golden()
    workflow["3"]["inputs"]["seed"] = -1
    where, what = mistake(workflow, tmp_path).split(": must", 1)
    assert "nodes.first.seed" in where
    assert "node 3 (KSampler), node 93 (WanSoundImageToVideo)" in where
    assert "at least 0, got -1" in what
