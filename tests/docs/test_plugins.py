"""Kinds and samplers of other packages: that of docs/write-a-node.md, laid out as installed, in a child process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pages import ROOT, blocks, text_of
from recipes_for_tests import tiny, write_recipe
from runs_for_tests import place

MIRRORED = tiny(
    **dict.fromkeys(("wav2vec2", "portrait", "voice", "speech", "reference", "negative", "talk")),
    first={"sampler": "midpoint", "width": 64, "height": 64, "speech": None, "reference": None, "negative": None},
    frames={"latent": "$first"},
    mirrored={"kind": "frames_mirror", "frames": "$frames"},
    video={"frames": "$mirrored", "audio": None, "preset": "ultrafast"},
)
# runs commands in one process; prints the code, stdout and stderr of each as JSON, and whether torch was imported
CHILD = """
import json, sys
from recipes_for_tests import call
for words in json.loads(sys.argv[1]):
    print(json.dumps([*call(*words), "torch" in sys.modules]))
"""


def install(folder: Path, name: str, version: str, entries: str, **modules: str) -> Path:
    """Lay a package out as pip would: its modules, and its metadata in a dist-info folder."""
    package = name.replace("-", "_")
    (folder / package).mkdir(parents=True, exist_ok=True)
    for module, text in {"__init__": "", **modules}.items():
        (folder / package / f"{module}.py").write_text(text, encoding="utf-8")
    info = folder / f"{package}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(entries, encoding="utf-8")
    return folder


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    """The page's package: its code, its name, its version and its entry points."""
    text = text_of("docs/write-a-node.md")
    (project,) = blocks(text, "toml")
    entries = re.sub(r'"', "", re.sub(r"\[project.entry-points.(.*)\]", r"[\1]", project.partition("\n\n")[2]))
    name, version = (re.search(rf'^{key} = "(.*)"$', project, re.MULTILINE)[1] for key in ("name", "version"))
    nodes, steps = blocks(text, "python")
    return install(tmp_path / "site", name, version, entries, nodes=nodes, steps=steps)


def child(*commands: list[object], site: Path, folder: Path) -> list[tuple[int, str, str, bool]]:
    """Run commands in a process that has the packages of `site`."""
    given = json.dumps([list(map(str, words)) for words in commands])
    path = os.pathsep.join(map(str, (site, ROOT, ROOT / "tests")))
    environ = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "error", "S2VFLOW_DEFAULTS": ""}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, given], env=environ, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_a_package_is_listed_checked_run_recorded_and_locked(mirror: Path, tiny_models: Path, tmp_path: Path) -> None:
    here = place(tmp_path, tiny_models, MIRRORED)
    run = ["run", here.recipe, *here.where]
    nodes, check, lock, first, again = child(
        ["nodes", "--json"],
        ["check", here.recipe],
        ["lock", here.recipe, *here.where],
        run,
        [*run, "--locked"],
        site=mirror,
        folder=tmp_path,
    )
    packages = {item["kind"]: item["package"] for item in json.loads(nodes[1])}
    assert (packages["frames_mirror"], packages["sample"]) == ("s2v-mirror 1.2", None)
    assert (check[0], check[3], lock[0], lock[3]) == (0, False, 0, False), (check, lock)
    assert [done[:2] for done in (first, again)] == [(0, f"{here.video}\n")] * 2, first[2]
    assert [json.loads(path.read_text())["packages"] for path in here.manifests()] == [{"s2v-mirror": "1.2"}] * 2
    written = (tmp_path / "recipe.lock.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(written)["packages"] == {"s2v-mirror": "1.2"}
    (mirror / "s2v_mirror-1.2.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: s2v-mirror\nVersion: 2\n"
    )
    (other,) = child([*run, "--locked"], site=mirror, folder=tmp_path)
    assert other[0] == 4
    assert re.search(r"recipe.lock.yaml:\d+:15: error\[L004\]: s2v-mirror 2 is installed, 1.2 was locked", other[2])
    assert "pip install 's2v-mirror==1.2'" in other[2]
    (tmp_path / "recipe.lock.yaml").write_text(written.partition("packages:")[0], encoding="utf-8")
    (unknown,) = child([*run, "--locked"], site=mirror, folder=tmp_path)
    assert (unknown[0], "s2v-mirror 2 is installed, no version of it was locked" in unknown[2]) == (4, True)


@pytest.mark.slow
def test_the_schema_and_near_names_know_a_package(mirror: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "wrong.yaml"
    recipe.write_text("s2vflow: 1\nnodes: {a: {kind: frames_miror}, b: {kind: frames_mirror, also_vertica: true}}\n")
    theirs = write_recipe(tmp_path, MIRRORED)
    schema, check, export = child(
        ["schema"], ["check", recipe], ["export", theirs, "-o", "w.json"], site=mirror, folder=tmp_path
    )
    definitions = json.loads(schema[1])["definitions"]
    assert definitions["frames_mirror"]["properties"].keys() == {"kind", "frames", "also_vertical"}
    assert "midpoint" in json.dumps(definitions["sample"]["properties"]["sampler"])
    assert (check[0], "did you mean frames_mirror?" in check[2]) == (3, True)
    assert "did you mean also_vertical?" in check[2]
    assert export[0] == 3, export
    for name in ("frames_mirror", "midpoint"):
        assert f"ComfyUI has no {name}: it is another package's" in export[2]


@pytest.mark.slow
def test_a_package_that_cannot_be_imported_breaks_only_what_uses_it(tiny_models: Path, tmp_path: Path) -> None:
    """It is named with its error, before anything is computed."""
    entries = "[s2vflow.nodes]\nbroken = s2v_broken.nodes:Broken\nodd = s2v_broken:__name__\n"
    entries += "[s2vflow.samplers]\nstep = s2v_broken.nodes:step\n"
    site = install(tmp_path / "site", "s2v-broken", "0.1", entries, nodes="import nowhere")
    here = place(tmp_path, tiny_models)
    uses = tmp_path / "uses.yaml"
    uses.write_text("s2vflow: 1\nnodes: {a: {kind: broken}}\n")
    sampler = ["--set", "nodes.first.sampler=step"]
    plain, listed, schema, used, odd, stepped = child(
        ["plan", here.recipe, *here.where],
        ["nodes"],
        ["schema"],
        ["check", uses],
        ["nodes", "odd"],
        ["run", here.recipe, *here.where, *sampler],
        site=site,
        folder=tmp_path,
    )
    assert (plain[0], schema[0], "broken" in json.loads(schema[1])["definitions"]) == (0, 0, False)
    text = "of the installed package s2v-broken 0.1, cannot be imported: ModuleNotFoundError: No module named 'nowhere'"
    assert f"cannot be used: broken, {text} [s2v-broken 0.1]" in listed[1]
    assert (used[0], f"error: broken, {text}" in used[2]) == (4, True)
    assert (odd[0], "odd, of the installed package s2v-broken 0.1, is no subclass of" in odd[2]) == (4, True)
    assert (stepped[0], f"error: step, {text}" in stepped[2]) == (4, True)
    assert not list(here.cache.glob("objects/**/*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("one", "two", "text"),
    [
        ("[s2vflow.nodes]\nsample = a:b", "", "sample (s2vflow.nodes) is declared twice: by s2v-one 1 and by s2vflow"),
        ("[s2vflow.samplers]\neuler = a:b", "", "(s2vflow.samplers) is declared twice: by s2v-one 1 and by s2vflow"),
        ("[s2vflow.nodes]\nx = a:b", "[s2vflow.nodes]\nx = c:d", "x (s2vflow.nodes) is declared twice: by s2v-"),
    ],
)
def test_a_name_that_is_taken_is_an_error_that_names_both(one: str, two: str, text: str, tmp_path: Path) -> None:
    site = install(tmp_path / "site", "s2v-one", "1", one)
    install(site, "s2v-two", "2", two)
    (check,) = child(["check", ROOT / "recipes" / "demo.yaml"], site=site, folder=tmp_path)
    assert (check[0], text in check[2]) == (4, True), check[2]
    assert not two or ("s2v-one 1" in check[2] and "s2v-two 2" in check[2])


@pytest.mark.slow
def test_a_package_in_the_current_folder_is_not_installed(mirror: Path) -> None:
    """A downloaded folder with a recipe in it brings no code along, though `python -m` searches it."""
    done = subprocess.run(
        [sys.executable, "-m", "s2v_flow", "nodes"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=mirror, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert ("frames_mirror" in done.stdout, "frames_slice" in done.stdout) == (False, True)
