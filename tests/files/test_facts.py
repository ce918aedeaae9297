"""What is remembered of files' contents."""

from __future__ import annotations

from pathlib import Path

from s2v_flow.files.facts import remembered


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
