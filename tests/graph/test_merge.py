"""A matrix's plans as one plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from s2v_flow.api import Options, plan
from s2v_flow.graph.build import merge_plans
from s2v_flow.graph.node import Plan

DEMO = Path(__file__).parents[1] / "untrained.yaml"


def planned(folder: Path, *axes: str, **more: Any) -> Plan:
    return plan(DEMO, Options(axes=axes, cache_dir=folder, device="cpu", **more)).plan


def test_what_cells_have_in_common_stands_there_once(tmp_path: Path) -> None:
    """Models, prompts and the voice are shared; chunks and files are each cell's own, named after it."""
    names = [node.name for node in planned(tmp_path, "seed=1,2").nodes]
    assert names.count("dit") == names.count("speech") == 1
    assert {"seed=1/first", "seed=2/first", "seed=1/video", "seed=2/video"} <= set(names)
    assert len(names) == len(set(names))


def test_equal_chunks_of_different_cells_are_computed_once(tmp_path: Path) -> None:
    """Cells that differ only in how the file is written share every chunk and the decoder."""
    names = {node.name for node in planned(tmp_path, "nodes.video.crf=18,30").nodes}
    assert "talk[4]" in names
    assert not any(name.endswith("/talk[4]") for name in names)


def test_cells_write_to_files_of_their_own(tmp_path: Path) -> None:
    """The label stands before the suffix."""
    merged = planned(tmp_path, "seed=1,2")
    files = {merged.node(f"seed={seed}/video").files["file",].name for seed in (1, 2)}
    assert files == {"demo.seed=1.mp4", "demo.seed=2.mp4"}


def test_a_cells_file_comes_behind_its_own_chunks(tmp_path: Path) -> None:
    """Every encoder runs before any chunk, so that the encoders are gone by then; then one cell after the other."""
    nodes = [node for node in planned(tmp_path, "seed=1,2", "cfg=1.0,2.0").nodes if node.node.is_stored]
    assert [node.node.stage for node in nodes] == [0] * 4 + [1, 1, 1, 1, 1, 2] * 4
    labels = [node.name.partition("/")[0] for node in nodes if node.node.stage]
    assert labels == sorted(labels)


def test_stages_come_in_order_where_memory_is_short(
    tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the models do not fit side by side every chunk runs before any file, and a note says so."""
    monkeypatch.setattr("s2v_flow.api.free_memory_bytes", lambda device: 1)
    made = planned(tmp_path, "seed=1,2", models_dirs=[tiny_models])
    stages = [node.node.stage for node in made.nodes if node.node.is_stored]
    assert stages == sorted(stages)
    assert any("after all sampling" in note for note in made.notes)


def test_one_plan_alone_keeps_its_nodes(tmp_path: Path) -> None:
    """Merging a single plan only labels what is written."""
    alone = planned(tmp_path)
    merged, labels = merge_plans([("only", alone)])
    assert len(merged.nodes) == len(alone.nodes)
    assert set(labels.values()) == {"only"}
