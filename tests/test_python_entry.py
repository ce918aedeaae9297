"""The package as a library: `import s2v_flow` and its few names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import s2v_flow
from s2v_flow.errors import RecipeError
from s2v_flow.recipe import layers, reader

DEMO = Path(__file__).parents[1] / "recipes" / "demo.yaml"


def test_importing_the_package_imports_nothing_else() -> None:
    """Neither torch nor pydantic are loaded before a name is used."""
    code = "import sys, s2v_flow; print({'torch', 'pydantic', 's2v_flow.api'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_a_plan_takes_the_options_as_keywords(tmp_path: Path) -> None:
    """The same overrides as on the command line; the result is an object."""
    planned = s2v_flow.plan(str(DEMO), sets=["steps=2"], cache_dir=str(tmp_path), device="cpu")
    assert (planned.num_chunks, planned.num_frames) == (3, 95)
    assert planned.plan.node("first").facts["steps"] == 2


def test_load_and_check_return_the_recipe(tmp_path: Path) -> None:
    """Both give the validated nodes."""
    assert s2v_flow.load(DEMO).nodes.keys() == s2v_flow.check(DEMO).nodes.keys()


def test_an_unknown_option_or_name_is_refused() -> None:
    """A misspelt keyword is a TypeError, a misspelt name an AttributeError, a wrong recipe a RecipeError."""
    with pytest.raises(TypeError, match="step"):
        s2v_flow.plan(DEMO, step=3)
    with pytest.raises(AttributeError, match="plam"):
        s2v_flow.plam  # noqa: B018
    with pytest.raises(RecipeError):
        s2v_flow.check(DEMO, sets=["stepz=3"])


def test_every_path_among_the_options_may_be_text_and_stand_alone(tmp_path: Path) -> None:
    """ComfyUI's extra_model_paths.yaml, override files and folders: in a list or by themselves."""
    extra, over = tmp_path / "extra.yaml", tmp_path / "over.yaml"
    extra.write_text("comfyui: {base_path: models, vae: vae}\n", encoding="utf-8")
    over.write_text("params: {steps: 2}\n", encoding="utf-8")
    for several in (lambda path: [str(path)], str):
        planned = s2v_flow.plan(
            DEMO,
            extra_model_paths=several(extra),
            override_files=several(over),
            models_dirs=several(tmp_path),
            input_dirs=several(tmp_path),
            output_dir=str(tmp_path),
            cache_dir=str(tmp_path / "cache"),
            sets="seed=3",
            device="cpu",
        )
        assert (planned.recipe.params["steps"], planned.recipe.params["seed"]) == (2, 3)


def test_a_recipe_with_a_matrix_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layers, and the recipe itself; the cells are made of them."""
    opened: list[str] = []
    given = reader.read_file

    def read(path: Path, *more: Any, **options: Any) -> Any:
        opened.append(str(path))
        return given(path, *more, **options)

    monkeypatch.setattr(layers, "read_file", read)
    planned = s2v_flow.plan(DEMO, axes="seed=1..3", cache_dir=tmp_path, device="cpu")
    assert (opened, planned.labels) == ([str(DEMO)], ("seed=1", "seed=2", "seed=3"))
