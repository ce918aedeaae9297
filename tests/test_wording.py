from __future__ import annotations

import re
from pathlib import Path

import pytest

import s2v_flow
from s2v_flow.errors import Diagnostic, Place
from s2v_flow.wording import duration_text, format_diagnostic, listed, nearest, shown, size_text, visible


def test_a_diagnostic_has_the_form_of_the_design_page() -> None:
    """Place, code, message; source line and caret; where in the recipe; what to do."""
    diagnostic = Diagnostic(
        code="R013",
        message="steps: must be at least 1, got 0",
        place=Place("recipes/talk.yaml", 14, 12),
        excerpt="    steps: 0",
        inside="nodes.first.steps (kind: sample)",
        fix="...",
    )
    assert format_diagnostic(diagnostic) == (
        "recipes/talk.yaml:14:12: error[R013]: steps: must be at least 1, got 0\n"
        "   14 |     steps: 0\n"
        "      |            ^\n"
        "  in:  nodes.first.steps (kind: sample)\n"
        "  fix: ..."
    )


def test_a_diagnostic_may_have_no_place_and_no_excerpt() -> None:
    """What is not known is left out."""
    assert format_diagnostic(Diagnostic("R001", "wrong")) == "error[R001]: wrong"
    assert format_diagnostic(Diagnostic("R001", "wrong", Place("a.yaml"))) == "a.yaml:1:1: error[R001]: wrong"


def test_carets_stand_under_the_value_whatever_stands_before_it() -> None:
    """Chinese characters take two columns, tabs and control characters are written out, accents take none."""
    excerpt = "提示:\t\x1b[31mé e\u0301: xy # more"
    column = excerpt.index("xy") + 1
    lines = format_diagnostic(Diagnostic("R001", "m", Place("f", 7, column), excerpt, width=2)).splitlines()
    assert lines[1] == "    7 | 提示:\\t\\x1b[31mé e\u0301: xy # more"
    assert lines[2].index("^^") == lines[1].index("xy") + 2 - 1  # two wide characters more, one combining mark less


@pytest.mark.parametrize("column", [1, 50, 61, 62, 1000, 199_999, 200_000, 300_000])
def test_a_long_line_is_cut_around_the_carets(column: int) -> None:
    """The carets stay under their value, and no line is longer than a terminal is wide."""
    excerpt = ("abcdefghi " * 20_000)[:200_000]
    lines = format_diagnostic(Diagnostic("R001", "m", Place("f", 123456, column), excerpt, width=3)).splitlines()
    assert len(lines[1]) < 140
    marked = lines[1][lines[2].index("^") : lines[2].rindex("^") + 1]
    assert excerpt[column - 1 : column + 2].startswith(marked.rstrip())


def test_nothing_that_a_terminal_obeys_is_printed() -> None:
    """Escape sequences, line breaks and changes of direction are escaped in every part."""
    evil = "\x1b]0;title\x07\n\r\u202e\u2066\u200b\x9b\ufeff\U000e0041"
    text = format_diagnostic(Diagnostic("R001", evil, Place(evil, 1, 1), evil, 3, evil, evil))
    assert all(character.isprintable() for character in text.replace("\n", ""))
    assert text.count("\n") == 4
    assert visible("Grüße, 你好 🎸") == "Grüße, 你好 🎸"
    assert visible("\ud800 \xa0") == "\\ud800 \\xa0"


def test_values_are_shown_as_yaml_writes_them() -> None:
    """Short, whatever they are."""
    values = [None, True, 0, 1e-4, "a", "x" * 100, [1], {"a": 1}]
    expected = ["null", "true", "0", "0.0001", "'a'", f"'{'x' * 57}...'", "a list", "a map"]
    assert list(map(shown, values)) == expected


def test_the_nearest_name_is_found_or_none() -> None:
    """Case does not matter; what is like nothing gets no advice; huge names are not compared."""
    assert nearest("dtyp", ["width", "dtype"]) == "dtype"
    assert nearest("Latent", ["latent", "pixels"]) == "latent"
    assert nearest("zzz", ["width", "dtype"]) is None
    assert nearest("x" * 1_000_000, ["x" * 1_000_000]) is None
    assert listed([str(number) for number in range(30)], 3) == "0, 1, 2 and 27 more"


def test_a_size_on_disk_counts_in_thousands_and_memory_in_1024() -> None:
    """As disks are sold, and as memory is: one text for each, in every message."""
    assert [size_text(size) for size in (1_500_000_000, 2**30, 20_000, 7)] == ["1.5 GB", "1.1 GB", "20.0 kB", "7 B"]
    assert [size_text(size, is_memory=True) for size in (3 * 2**29, 10**9, 2048)] == ["1.5 GiB", "953.7 MiB", "2.0 KiB"]


def test_no_module_but_wording_makes_a_text_of_a_size() -> None:
    """Who divides bytes by hand ends with a GB that is none."""
    package = Path(s2v_flow.__file__).parent
    by_hand = re.compile(r"/ (?:2\*\*[123]0|10\*\*[369]|1e[369]|\(?1 ?<< ?[123]0):")
    found = [path for path in package.rglob("*.py") if by_hand.search(path.read_text(encoding="utf-8"))]
    assert [path.name for path in found] == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0.0 s"),
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1 min 0 s"),
        (189, "3 min 9 s"),
        (3599.7, "1 h 0 min"),
        (7530, "2 h 5 min"),
    ],
)
def test_lengths_of_time_are_for_people(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text
