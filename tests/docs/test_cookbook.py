"""Every recipe of the cookbook is checked and planned as it stands, and run in a small size."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pages import blocks, text_of
from recipes_for_tests import call
from sandbox import make_inputs, make_models

FILES = {
    re.match(r"# (\S+\.yaml)\n", block)[1]: block  # type: ignore[index]
    for block in blocks(text_of("docs/cookbook.md"), "yaml")
}
SMALL = ("--set", "width=64", "--set", "height=64", "--set", "steps=2", "--set", "nodes.first.length=5")


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> Path:
    """Return a folder with the cookbook's recipes and models; inputs are the test's."""
    folder = tmp_path_factory.mktemp("kitchen")
    make_models(folder / "models", tiny_models)
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def cook(command: str, kitchen: Path, name: str, *more: str) -> tuple[int, str, str]:
    where = ("--models-dir", kitchen / "models", "--cache-dir", kitchen / "cache", "--device", "cpu")
    return call(command, kitchen / name, *where, *more)


def test_there_are_ten_recipes() -> None:
    headings = re.findall(r"^## \d+\. ", text_of("docs/cookbook.md"), re.MULTILINE)
    assert len(headings) == 10
    assert len(FILES) == 11, "one of them comes in two files"


def test_every_recipe_is_right_and_can_be_planned(kitchen: Path) -> None:
    """As it stands, with a voice of 30 seconds and all files there; its profiles too."""
    make_inputs(kitchen, 30.0)
    for name, text in FILES.items():
        for profile in ("", *re.findall(r"^  (\w+): +\{params", text.partition("\nprofiles:")[2], re.MULTILINE)):
            chosen = ("-p", profile) if profile else ()
            assert call("check", kitchen / name, *chosen)[0] == 0, (name, profile)
            code, out, err = cook("plan", kitchen, name, *chosen)
            assert code == 0, (name, profile, out, err)
            assert "no effect" not in out + err, (name, out, err)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FILES if name != "base.yaml"])
def test_every_recipe_runs(kitchen: Path, name: str) -> None:
    """On tiny models, 64x64, two steps, chunks of two latent frames; what it says it wrote is there."""
    make_inputs(kitchen, 0.6)
    change = ("--set", "nodes.voice.start=0", "--set", "nodes.voice.end=0.6") if name == "verse.yaml" else ()
    code, out, err = cook("run", kitchen, name, *SMALL, *change)
    assert code == 0, err
    written = out.splitlines()
    assert written
    assert all(Path(line).stat().st_size > 1000 for line in written)
