"""What is remembered of files' contents."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from s2v_flow.files import facts
from s2v_flow.files.facts import per_file, recalled, remembered

DEEP: Any = functools.reduce(lambda at, _: [at], range(900), [])


def test_a_fact_is_computed_once(tmp_path: Path) -> None:
    """The second question is answered from the table, also by another process that reads the same file."""
    asked: list[int] = []

    def compute() -> dict[str, int]:
        asked.append(1)
        return {"num_samples": 5}

    table = tmp_path / "deep" / "facts.json"
    assert remembered(table, "audio:a", compute) == remembered(table, "audio:a", compute) == {"num_samples": 5}
    assert len(asked) == 1


def test_a_damaged_or_unwritable_table_costs_only_time(tmp_path: Path) -> None:
    """A table of garbage, or in a place that is a file, is as good as none."""
    table = tmp_path / "facts.json"
    table.write_text("[1, 2")
    assert remembered(table, "k", lambda: {"x": 1}) == {"x": 1}
    assert remembered(table / "under-a-file.json", "k", lambda: {"x": 2}) == {"x": 2}


def test_what_is_found_in_a_file_at_rest_is_kept_in_memory(tmp_path: Path) -> None:
    """One that was written a moment ago is read again: a change within the clock's granularity would go unseen."""
    asked: list[str] = []

    @per_file
    def length(path: Path, unit: str) -> int:
        asked.append(unit)
        return len(path.read_bytes())

    resting = Path(facts.__file__)
    assert length(resting, "bytes") == length(resting, "bytes") == length(resting, "other") > 0
    assert asked == ["bytes", "other"]
    (tmp_path / "new").write_text("abc")
    assert length(tmp_path / "new", "bytes") == 3
    (tmp_path / "new").write_text("abd!")
    assert length(tmp_path / "new", "bytes") == 4


@pytest.mark.parametrize("damage", [5, None, [], {"x": 2}, "text", DEEP])
def test_a_fact_that_is_not_as_it_was_written_is_found_out_again(tmp_path: Path, damage: Any) -> None:
    """A changed number is as good as none; so is a fact that stands under another file's name, or has no digest."""
    table = tmp_path / "facts.json"
    remembered(table, "one", lambda: {"x": 1, "notes": ["n"]})
    whole = json.loads(table.read_text())
    for found in (
        {"one": {**whole["one"], "x": damage}},
        {"one": damage},
        {"two": whole["one"]},
        {"one": {"x": 1}},
    ):
        table.write_text(json.dumps(found))
        assert recalled(table, "one") is recalled(table, "two") is None
    assert remembered(table, "one", lambda: {"x": 7}) == recalled(table, "one") == {"x": 7}
