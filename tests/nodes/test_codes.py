"""The codes of planning's mistakes."""

from __future__ import annotations

import re
from pathlib import Path

import s2v_flow
from s2v_flow.nodes.table import PLANNING_CODES
from s2v_flow.recipe.problems import CODES


def test_every_code_in_use_is_explained_and_every_explained_one_is_in_use() -> None:
    """The table is what planning can say."""
    root = Path(s2v_flow.__file__).parent
    sources = [*root.glob("nodes/*.py"), root / "graph" / "node.py"]
    found = [re.findall(r'"(R\d{3})"', path.read_text(encoding="utf-8")) for path in sources if path.stem != "codes"]
    assert {code for codes in found for code in codes} == PLANNING_CODES.keys()


def test_no_code_means_two_things() -> None:
    """Planning's codes are not the recipe reader's."""
    assert not PLANNING_CODES.keys() & CODES.keys()
