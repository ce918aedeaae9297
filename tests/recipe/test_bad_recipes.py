"""Every recipe in bad/ prints exactly the text stored beside it. A first line `# run: ...` holds its options.

`python tests/recipe/test_bad_recipes.py` writes the texts anew.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import s2v_flow
from s2v_flow.cli import report
from s2v_flow.errors import ExitCode, RecipeError
from s2v_flow.graph.node import Node
from s2v_flow.nodes.table import NODE_KINDS
from s2v_flow.options import Options
from s2v_flow.recipe.argument import Override
from s2v_flow.recipe.load import load_cells

BAD = Path(__file__).parent / "bad"
KINDS: Mapping[str, Any] = {f"--{kind}": kind for kind in ("set", "set-json", "set-file", "unset")}
NAMES = sorted(path.stem for path in BAD.glob("*.yaml"))


def printed(name: str, kinds: Mapping[str, type[Node]]) -> str:
    """Return what the mistakes of a bad recipe look like."""
    path = Path(f"{name}.yaml")
    first_line = path.read_bytes().partition(b"\n")[0].decode("utf-8", "replace")
    words = shlex.split(first_line.removeprefix("# run:")) if first_line.startswith("# run:") else []
    options = list(zip(words[::2], words[1::2], strict=True))
    changes = Options(
        profiles=[value for option, value in options if option == "-p"],
        override_files=[Path(value) for option, value in options if option == "-f"],
        overrides=[Override(KINDS[option], value) for option, value in options if option in KINDS],
    ).changes
    axes = [value for option, value in options if option == "-m"]
    said = io.StringIO()
    with pytest.raises(RecipeError) as caught:
        load_cells(path, kinds=kinds, changes=changes, axes=axes)
    assert caught.value.exit_code is ExitCode.RECIPE
    with contextlib.redirect_stderr(said):
        report.print_error(caught.value)
    return said.getvalue()


@pytest.mark.parametrize("name", NAMES)
def test_a_bad_recipe_prints_the_text_stored_beside_it(
    name: str, kinds: Mapping[str, type[Node]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All mistakes are shown at once, in order of place, each with its code, excerpt and advice."""
    monkeypatch.chdir(BAD)
    assert printed(name, kinds) == (BAD / f"{name}.txt").read_text(encoding="utf-8")


def test_every_code_of_the_reading_layers_is_shown_by_some_bad_recipe() -> None:
    """No code is without an example of its text."""
    texts = "".join(path.read_text(encoding="utf-8") for path in BAD.glob("*.txt"))
    root = Path(s2v_flow.__file__).parent
    sources = root.glob("recipe/*.py")
    used = {code for path in sources for code in re.findall(r'"(R\d{3})"', path.read_text(encoding="utf-8"))}
    assert set(re.findall(r"error\[(R\d+)\]", texts)) == used


def test_stored_texts_hold_no_escape_sequences() -> None:
    """What a recipe holds reaches the terminal only in printable form."""
    for path in BAD.glob("*.txt"):
        assert all(character.isprintable() or character == "\n" for character in path.read_text(encoding="utf-8"))


def write_all() -> None:
    """Store what is printed now; read the difference before you commit it."""
    os.chdir(BAD)
    for name in NAMES:
        Path(f"{name}.txt").write_text(printed(name, {kind.kind: kind for kind in NODE_KINDS}), encoding="utf-8")


if __name__ == "__main__":
    write_all()
