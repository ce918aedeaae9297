"""What a run will cost, from what is stored."""

from __future__ import annotations

from pathlib import Path

from s2v_flow.api import Options, plan
from s2v_flow.cache.store import Entry
from s2v_flow.graph.estimate import estimate
from s2v_flow.graph.numerics import Numerics

DEMO = Path(__file__).parents[2] / "recipes" / "demo.yaml"


def test_without_past_runs_there_is_no_estimate_of_time(tmp_path: Path) -> None:
    """It says which kinds never ran; the files to be read are known all the same."""
    made = plan(DEMO, Options(cache_dir=tmp_path, device="cpu"))
    assert made.estimate.seconds is None
    assert "sample" in made.estimate.unknown
    assert made.estimate.num_files == 2  # portrait and voice; the demo's models are not made yet
    assert made.estimate.bytes_to_read > 400_000


def test_like_nodes_that_ran_give_the_time(tmp_path: Path) -> None:
    """The median of equal settings counts whatever the seed; another number of steps does not; frames scale."""
    made = plan(DEMO, Options(cache_dir=tmp_path, device="cpu"))
    numerics = Numerics("cpu")
    entries = []
    for node in made.plan.nodes:
        if node.node.is_stored:
            fields = node.node.identity({}, numerics.precision)
            image = {"kind": type(node.node).kind, "fields": {**fields, **({"seed": 1} if "seed" in fields else {})}}
            entries += [
                Entry("0" * 64, image, {}, {"seconds": seconds, "peak_bytes": 7}) for seconds in (1.0, 2.0, 9.0)
            ]
    assert estimate(made.plan, made.statuses, entries, numerics).seconds == 2.0 * sum(
        node.node.is_stored for node in made.plan.nodes
    )
    more_steps = plan(DEMO, Options(cache_dir=tmp_path, device="cpu", sets=["steps=9"]))
    assert estimate(more_steps.plan, more_steps.statuses, entries, numerics).unknown == ("sample", "extend")
