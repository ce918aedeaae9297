"""Plans as pictures in text."""

from __future__ import annotations

from pathlib import Path

import pytest

from s2v_flow.api import Options, plan
from s2v_flow.cli.describe import DRAWERS

DEMO = Path(__file__).parents[2] / "recipes" / "demo.yaml"


@pytest.mark.parametrize(
    ("form", "edge"),
    [
        ("ascii", "LOAD  voice\nRUN"),
        ("mermaid", '["speech<br/>encode_audio"]:::RUN'),
        ("dot", '"voice" -> "speech";'),
    ],
)
def test_every_node_and_its_status_is_drawn(tmp_path: Path, form: str, edge: str) -> None:
    """Each form holds every node's name."""
    made = plan(DEMO, Options(cache_dir=tmp_path, device="cpu"))
    text = DRAWERS[form](made.plan, made.statuses)
    assert edge in text
    assert all(node.name in text for node in made.plan.nodes)
