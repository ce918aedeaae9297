"""What the pages say is so: links lead somewhere, generated pages are up to date, commands parse, and run."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from pages import PAGES, ROOT, Command, anchors, blocks, commands, links, prose, text_of
from recipes_for_tests import RECIPES, call
from sandbox import make_inputs, make_models

from s2v_flow.cli.defaults import read_defaults
from s2v_flow.cli.main import cli
from s2v_flow.comfy.catalog import VIRTUAL, classes
from s2v_flow.errors import ExitCode
from s2v_flow.nodes.table import NODE_KINDS

COMMANDS = list(commands())
NEEDS_MORE = (
    "s2vflow make",
    "models convert",
    "'recipes/*.yaml'",
    "--device cuda",
    "--devices cuda",
    "--engine ",
    "s3://",
    "s2vflow ui",
)
"""Commands with these words need full size, the authors' release, a GPU, a cluster or a bucket,
or end only when they are told to."""


def test_links_lead_somewhere() -> None:
    """Files of the repository, and headings in them."""
    broken = []
    for page in PAGES:
        for link in links(page.read_text(encoding="utf-8")):
            if re.match(r"https?://", link):
                continue
            file, _, anchor = link.partition("#")
            target = (page.parent / file).resolve() if file else page
            if not target.is_file() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
                broken.append((page.name, link))
    assert broken == []


def test_every_page_is_reached_from_the_readme() -> None:
    seen, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page not in seen and page.suffix == ".md":
            seen.add(page)
            found = links(page.read_text(encoding="utf-8"))
            waiting += [(page.parent / link.partition("#")[0]).resolve() for link in found if "://" not in link]
    assert {page for page in PAGES if ".github" not in page.parts} <= seen


def test_the_readme_is_short_and_says_first_what_has_run() -> None:
    """700 words without code blocks, 900 with them and whatever else counts; the status is on the first screen."""
    words = prose(text_of("README.md")).split()
    assert len([word for word in words if re.search(r"\w", word)]) >= 700
    assert len(text_of("README.md").split()) <= 900
    assert "Nothing has run on a GPU" in "\n".join(text_of("README.md").splitlines()[:12])


def test_generated_pages_are_up_to_date() -> None:
    """`make docs` writes them."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    for page, write in generate.PAGES.items():
        assert text_of(f"docs/{page}") == write(), f"docs/{page}: run `make docs`"


def test_every_error_and_exit_code_has_a_paragraph() -> None:
    """Under a heading of its own, in order, to be looked up; and none for a code that is not there."""
    text = text_of("docs/troubleshooting.md")
    used = {
        code
        for path in (ROOT / "s2v_flow").rglob("*.py")
        for code in re.findall(r'"([A-Z]\d{3})"', path.read_text(encoding="utf-8"))
    }
    in_order = sorted(used, key=lambda code: ("RLW".index(code[0]), code))
    assert re.findall(r"^### ([A-Z]\d+)$", text, re.MULTILINE) == in_order
    exits = [int(code) for code in re.findall(r"^### exit (\d+)$", text, re.MULTILINE)]
    assert exits == [code for code in ExitCode if code != ExitCode.OK]
    for code in in_order:
        assert len(text.partition(f"### {code}\n")[2].partition("###")[0].split()) > 12, code


def test_what_the_table_of_comfyui_names_exists() -> None:
    """Its classes are those that `import` knows; the kinds and fields are the recipe's."""
    rows = re.findall(r"^\| (`[^|]+) \| ([^|]+) \|[^|]*\|$", text_of("docs/from-comfyui.md"), re.MULTILINE)
    kinds = {kind.kind for kind in NODE_KINDS}
    known = {kind.kind for kind in NODE_KINDS} | {field for kind in NODE_KINDS for field in kind.model_fields}
    assert len(rows) > 20
    for ours, theirs in ((row[1], row[0]) for row in rows):
        assert set(re.findall(r"`(\w+)`", theirs)) <= classes().keys() | VIRTUAL, theirs
        assert set(re.findall(r"`(\w+)`", ours)) <= known | {"params"}, ours
    named = set(re.findall(r"`(\w+)`", " ".join(row[1] for row in rows)))
    assert kinds - named <= {"frames_delay"}, "every kind stands in the table"


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_command_lines_parse(command: Command) -> None:
    """Commands, options and arguments are there; a sentence may name a command without its arguments."""
    assert command.calls
    for words in command.calls:
        name, *rest = words
        found = cli.commands[name]
        if isinstance(found, click.Group):
            usual = "list" if "list" in found.commands else "run"
            name, *rest = rest if rest and rest[0] in found.commands else [usual, *rest]
            found = found.commands[name]
        try:
            found.make_context(name, [*rest], resilient_parsing=False)
        except click.MissingParameter:
            assert command.is_inline
            assert not rest


def test_yaml_on_the_pages_uses_fields_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes of recipes that are shown in part, and the defaults file."""
    kinds = {kind.kind: kind.model_fields.keys() for kind in NODE_KINDS}
    for page in PAGES:
        for block in blocks(page.read_text(encoding="utf-8"), "yaml"):
            for name, node in (yaml.safe_load(block).get("nodes") or {}).items():
                assert "kind" not in node or node.keys() - {"kind"} <= kinds[node["kind"]], (page, name)
    (defaults,) = blocks(text_of("docs/folders.md"), "yaml")
    (tmp_path / "defaults.yaml").write_text(defaults, encoding="utf-8")
    monkeypatch.setenv("S2VFLOW_DEFAULTS", str(tmp_path / "defaults.yaml"))
    assert len(read_defaults()) == 7
    assert yaml.safe_load(defaults).keys() == read_defaults().keys()


def test_there_are_commands_to_try() -> None:
    assert len(COMMANDS) > 40
    pages = {command.page for command in COMMANDS if not command.is_inline}
    assert pages >= {"README.md", "docs/folders.md", "docs/cookbook.md"}


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> Iterator[Path]:
    """Return a folder in which what the pages name is there; it is the current folder and the home folder."""
    folder = tmp_path_factory.mktemp("sandbox")
    make_models(folder / "ComfyUI" / "models", tiny_models)
    make_inputs(folder, 0.6)
    shutil.copytree(RECIPES, folder / "recipes", ignore=shutil.ignore_patterns("out"))
    write_recipes(folder)
    (folder / "ComfyUI" / "extra_model_paths.yaml").write_text("mine:\n  vae: models/vae\n", encoding="utf-8")
    (folder / "bin").mkdir()
    (folder / "bin" / "s2vflow").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m s2v_flow "$@"\n')
    (folder / "bin" / "s2vflow").chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HOME", str(folder))
        patch.setenv("S2VFLOW_CACHE_DIR", str(folder / "cache"))
        patch.setenv("S2VFLOW_DEFAULTS", "")
        patch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("PYTHONPATH", str(ROOT))
        for variable in ("S2VFLOW_MODELS_DIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
            patch.delenv(variable, raising=False)
        for profile in ((), ("-p", "quality")):
            assert call("run", "talk.yaml", *profile)[0] == 0
        assert call("export", "talk.yaml", "-o", "workflow.json")[0] == 0
        yield folder


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({command.page for command in COMMANDS if not command.is_inline}))
def test_command_lines_run(page: str, sandbox: Path) -> None:
    """As they stand, in the page's order, on tiny models; recipes that a command writes are made small afterwards."""
    write_recipes(sandbox)
    for command in COMMANDS:
        if command.page != page or command.is_inline or any(word in command.line for word in NEEDS_MORE):
            continue
        if command.is_shell:
            done = subprocess.run(
                ["bash", "-c", command.line], capture_output=True, text=True, timeout=600, check=False
            )
            assert done.returncode == 0, (command, done.stderr)
            continue
        (words,) = command.calls
        target = sandbox / words[words.index("-o") + 1] if "-o" in words else None
        if target is not None:
            target.unlink(missing_ok=True)
        code, out, err = call(*(os.path.expanduser(word) for word in words))
        assert code == 0, (command, out, err)
        if target is not None and target.suffix == ".yaml":
            target.write_text(small(target.read_text(encoding="utf-8")), encoding="utf-8")


@pytest.mark.slow
def test_the_python_of_every_day_runs(sandbox: Path) -> None:
    demo = sandbox / "recipes" / "demo.yaml"
    demo.write_text(small(demo.read_text(encoding="utf-8")), encoding="utf-8")
    (code,) = blocks(text_of("docs/every-day.md"), "python")
    exec(compile(code, "every-day.md", "exec"), {})
    assert (sandbox / "recipes" / "out" / "demo.mp4").is_file()


@pytest.mark.slow
def test_the_python_of_the_page_runs(sandbox: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Block after block, in one namespace."""
    demo = sandbox / "recipes" / "demo.yaml"
    demo.write_text(small(demo.read_text(encoding="utf-8")), encoding="utf-8")
    namespace: dict[str, Any] = {}
    for code in blocks(text_of("docs/python.md"), "python"):
        exec(compile(code, "docs/python.md", "exec"), namespace)
    out = capsys.readouterr().out
    assert "<params>:stepz: error[R051]: there is no parameter stepz" in out
    assert "a file is missing: nothing.wav" in out
    assert namespace["planned"].recipe.nodes["first"].node.seed == 5
    assert len(namespace["latents"]) == namespace["planned"].num_chunks


def write_recipes(folder: Path) -> None:
    """Write the recipes that pages name, made small: the cookbook's, and its first one under another name."""
    for block in blocks(text_of("docs/cookbook.md"), "yaml"):
        (folder / block.split()[1]).write_text(small(block), encoding="utf-8")
    shutil.copyfile(folder / "talk.yaml", folder / "recipe.yaml")
    (folder / "night.yaml").write_text("params: {seed: 9}\n", encoding="utf-8")
    (folder / "prompt.txt").write_text("She laughs.", encoding="utf-8")
    (folder / "batch.yaml").write_text("batch: 1\nrecipes: [talk.yaml]\njobs: jobs.csv\n", encoding="utf-8")
    (folder / "jobs.csv").write_text("seed,nodes.video.file\n1,out/one.mp4\n2,out/two.mp4\n", encoding="utf-8")


def small(text: str) -> str:
    """Return a recipe in a small size, with two steps and chunks of two latent frames."""
    return yaml.safe_dump(_small(yaml.safe_load(text)), allow_unicode=True, sort_keys=False)


def _small(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    change = {"width": 64, "height": 64, "steps": 2, "length": 5}
    made = {
        key: change[key] if key in change and isinstance(item, int) else _small(item) for key, item in value.items()
    }
    return {"length": 5, **made} if made.get("kind") == "sample" else made
