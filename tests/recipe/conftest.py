from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from s2v_flow.graph.node import Node
from s2v_flow.nodes.table import NODE_KINDS
from s2v_flow.options import Options
from s2v_flow.recipe.load import Recipe, load_recipe


@pytest.fixture(scope="session")
def kinds() -> Mapping[str, type[Node]]:
    return {kind.kind: kind for kind in NODE_KINDS}


@pytest.fixture
def load(tmp_path: Path, kinds: Mapping[str, type[Node]]) -> Callable[..., Recipe]:
    """Return a function that writes a recipe's text to a file and loads it."""

    def load_text(text: str, base_dir: Path | None = None, **options: Any) -> Recipe:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return load_recipe(path, kinds=kinds, changes=replace(Options(**options).changes, base_dir=base_dir))

    return load_text
