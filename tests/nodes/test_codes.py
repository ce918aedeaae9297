"""The codes of what planning finds."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import s2v_flow

ROOT = Path(s2v_flow.__file__).parent


def codes_in(paths: Iterable[Path]) -> set[str]:
    return {code for path in paths for code in re.findall(r'"(R\d{3})"', path.read_text(encoding="utf-8"))}


def test_no_code_means_two_things() -> None:
    """Planning's codes are not the recipe reader's; what each means stands in docs/troubleshooting.md."""
    assert not codes_in(ROOT.glob("nodes/*.py")) & codes_in(ROOT.glob("recipe/*.py"))
