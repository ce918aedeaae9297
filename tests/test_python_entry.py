"""The package as a library: `import s2v_flow` and its few names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import s2v_flow
from s2v_flow.errors import RecipeError

DEMO = Path(__file__).parents[1] / "recipes" / "demo.yaml"


def test_importing_the_package_imports_nothing_else() -> None:
    """Neither torch nor pydantic are loaded before a name is used."""
    code = "import sys, s2v_flow; print({'torch', 'pydantic', 's2v_flow.api'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_a_plan_takes_the_options_as_keywords(tmp_path: Path) -> None:
    """The same overrides as on the command line; the result is an object."""
    planned = s2v_flow.plan(str(DEMO), sets=["steps=2"], cache_dir=str(tmp_path), device="cpu")
    assert (planned.num_chunks, planned.num_frames) == (5, 95)
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
