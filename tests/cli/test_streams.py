"""What stands behind stdout and stderr decides neither the exit code nor ends a command; each is a real process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from recipes_for_tests import RECIPES

from s2v_flow.api import check

DEMO = RECIPES / "demo.yaml"
QUICK = (("--help",),)
MORE = (
    ("plan", DEMO, "--device", "cpu"),
    ("check", DEMO),
    *(("--version",), ("schema",), ("nodes",), ("config", DEMO, "--json"), ("graph", DEMO)),
    *(("cache", "ls", "--json"), ("runs",)),
)
COMMANDS = [*QUICK, *(pytest.param(words, marks=pytest.mark.slow) for words in MORE)]
ENDS = ((">&-", 0), (">/dev/full", 6), ("2>&-", 0), ("2>/dev/full", 0))
CASES = [
    *((words, *end) for words in QUICK for end in ENDS),
    *(
        pytest.param(words, *end, marks=pytest.mark.slow)
        for words in MORE
        for end in (ENDS if "plan" in words else ENDS[1:2])
    ),
]
NOWHERE = (">&- 2>&-", ">/dev/full 2>/dev/full")
WRONG = (("no-such-command",), 2, NOWHERE[0]), (("check", DEMO, "--set", "steps=0"), 3, NOWHERE[1])


def run(words: tuple[object, ...], folder: Path, tail: str = "", **environment: str) -> tuple[int, bytes, bytes]:
    """Run the program under a shell, whose redirections `tail` holds."""
    command = " ".join(["exec", sys.executable, "-m", "s2v_flow", *map(str, words), tail])
    given = {**os.environ, "S2VFLOW_CACHE_DIR": str(folder / "cache"), **environment}
    done = subprocess.run(["bash", "-c", command], capture_output=True, env=given, check=False, timeout=120)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("words", "tail", "code"), CASES, ids=lambda part: part[0] if isinstance(part, tuple) else None
)
def test_closed_and_full_streams_make_no_traceback(
    words: tuple[object, ...], tail: str, code: int, tmp_path: Path
) -> None:
    """A result that cannot be written is an error; messages that nobody reads are none."""
    found, out, err = run(words, tmp_path, tail)
    assert (found, b"Traceback" in out + err, b"Exception" in out + err) == (code, False, False)
    assert (b"stdout cannot be written" in err) == (code == 6)
    assert bool(out) == ("2>" in tail)


@pytest.mark.slow
def test_a_full_stdout_is_told_of_by_commands_that_end_with_another_code(tmp_path: Path) -> None:
    """What is missing stands in the plan, which nobody has then."""
    recipe = RECIPES / "s2v_lightning.yaml"
    code, _, err = run(("plan", recipe, "--models-dir", tmp_path), tmp_path, ">/dev/full")
    assert (code, b"stdout cannot be written" in err) == (6, True)
    assert run(("plan", recipe, "--models-dir", tmp_path), tmp_path)[0] == 4


@pytest.mark.slow
@pytest.mark.parametrize(("words", "code", "tail"), WRONG)
def test_an_errors_code_stays_where_nobody_reads_it(
    words: tuple[object, ...], code: int, tail: str, tmp_path: Path
) -> None:
    found, out, err = run(words, tmp_path, tail)
    assert (found, b"Traceback" in out + err) == (code, False)


@pytest.mark.parametrize("words", COMMANDS[:4], ids=lambda words: words[0])
def test_a_reader_that_leaves_early_changes_nothing(words: tuple[object, ...], tmp_path: Path) -> None:
    code, _, err = run(words, tmp_path, "| head -c 1 >/dev/null; exit ${PIPESTATUS[0]}")
    assert (code, err.count(b"Traceback"), err.count(b"BrokenPipe")) == (0, 0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["cp1252", "ascii:strict", ""])
def test_a_recipe_comes_out_of_any_encoding_as_utf_8(encoding: str, tmp_path: Path) -> None:
    """What is written into a file is a recipe again; errors with signs that a terminal lacks come as escapes."""
    recipe = tmp_path / "recipe.yaml"
    text = DEMO.read_text(encoding="utf-8").replace("description:", "#")
    recipe.write_text(f'description: "café 色调 😀"\n{text}', encoding="utf-8")
    locale = {"PYTHONIOENCODING": encoding} if encoding else {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    code, out, err = run(("config", recipe, "--references"), tmp_path, **locale)
    assert (code, b"Traceback" in err) == (0, False)
    (tmp_path / "again.yaml").write_bytes(out)
    assert check(tmp_path / "again.yaml").description == "café 色调 😀"
    code, _, err = run(("check", recipe, "--set", "'色调=1'"), tmp_path, **locale)
    assert (code, b"Traceback" in err, b"error[R050]" in err.replace(b"\0", b"")) == (3, False, True)
