"""Where weights rest is no part of a result: streamed or resident, a recipe gives the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from recipes_for_tests import options, write_recipe, write_voice
from runs_for_tests import QUICK, Place, ran

from s2v_flow import api


def stored(place: Place, kind: str) -> dict[str, tuple[Any, Any]]:
    """Return what is stored of a kind: fingerprint -> (digests of its outputs, where the weights rested)."""
    entries = [json.loads(path.read_text())["entry"] for path in place.cache.glob("entries/*/*.json")]
    return {
        entry["fingerprint"]: (entry["outputs"], entry["facts"].get("placement"))
        for entry in entries
        if entry["preimage"]["kind"] == kind
    }


@pytest.mark.slow
def test_streamed_weights_give_the_same_bytes_under_the_same_fingerprint(
    tmp_path: Path, tiny_models: Path, quick_run: Place
) -> None:
    """In a whole run on the CPU, where weights are resident unless it is asked otherwise."""
    streamed = ran(tmp_path, tiny_models, {**QUICK, "dit": {"placement": "streamed"}})
    ours, theirs = stored(streamed, "chunk"), stored(quick_run, "chunk")
    assert {key: digests for key, (digests, _) in ours.items()} == {
        key: digests for key, (digests, _) in theirs.items()
    }
    assert {place for _, place in ours.values()} == {"streamed"}
    assert {place for _, place in theirs.values()} == {"resident"}


def test_tiles_are_part_of_a_result_and_frames_per_call_are_not(tmp_path: Path) -> None:
    """Tiles change pixels."""
    write_voice(tmp_path / "voice.wav", 1)

    def identity(**fields: int) -> dict[str, Any]:
        plan = api.plan(write_recipe(tmp_path, {"frames": fields}), options(tmp_path, tmp_path / "models"))
        return plan.plan.node("frames").node.identity({}, lambda kind, asked: asked)

    assert identity()["tiles"] == 1
    assert identity(tiles=2) != identity()
    assert identity(frames_per_call=4) == identity()
