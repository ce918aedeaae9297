"""A matrix's plans as one plan."""

from __future__ import annotations

from pathlib import Path

from s2v_flow.api import Options, plan
from s2v_flow.graph.build import merge_plans
from s2v_flow.graph.plan import Plan

DEMO = Path(__file__).parents[1] / "untrained.yaml"


def planned(folder: Path, *axes: str) -> Plan:
    return plan(DEMO, Options(axes=axes, cache_dir=folder, device="cpu")).plan


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


def test_stages_come_in_order_across_cells(tmp_path: Path) -> None:
    """Every encoder runs before any chunk, every chunk before any file: a model is loaded once for all cells."""
    stages = [node.node.stage for node in planned(tmp_path, "seed=1,2", "cfg=1.0,2.0").nodes]
    chunks = [index for index, stage in enumerate(stages) if stage == 1]
    assert stages[chunks[0] : chunks[-1] + 1] == [1] * len(chunks)


def test_one_plan_alone_keeps_its_nodes(tmp_path: Path) -> None:
    """Merging a single plan only labels what is written."""
    alone = planned(tmp_path)
    merged, labels = merge_plans([("only", alone)])
    assert len(merged.nodes) == len(alone.nodes)
    assert set(labels.values()) == {"only"}
