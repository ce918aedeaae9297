"""What a run will cost, from what is stored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from s2v_flow.api import Options, plan
from s2v_flow.cache.store import Entry
from s2v_flow.graph.estimate import Memory, Needs, estimate
from s2v_flow.graph.numerics import Numerics

DEMO = Path(__file__).parents[1] / "untrained.yaml"


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
            size = {side: node.facts[side] for side in ("width", "height") if side in node.facts}
            entries += [
                Entry("0" * 64, image, {}, {"seconds": seconds, "peak_bytes": 7, **size}) for seconds in (1.0, 2.0, 9.0)
            ]
    assert estimate(made.plan, made.statuses, entries, numerics).seconds == 2.0 * sum(
        node.node.is_stored for node in made.plan.nodes
    )
    more_steps = plan(DEMO, Options(cache_dir=tmp_path, device="cpu", sets=["steps=9"]))
    assert estimate(more_steps.plan, more_steps.statuses, entries, numerics).unknown == ("sample", "extend")


def test_what_was_measured_here_goes_before_what_is_computed(tmp_path: Path) -> None:
    """On a CPU the process's memory, on a GPU the device's, where a past run says it; the plan says which it is."""
    made = plan(DEMO, Options(cache_dir=tmp_path, device="cpu"))
    computed = {name: Needs(5_000, 10) for name in ("first", "reference")}
    fields = made.plan.node("first").node.identity({}, Numerics("cpu").precision)
    entry = Entry("0" * 64, {"kind": "chunk", "fields": fields}, {}, {"seconds": 1.0, "peak_bytes": 7_000})
    found = estimate(made.plan, made.statuses, [entry], Numerics("cpu"), computed)
    assert found.memory["first"] == Memory(7_000, "measured")
    assert found.memory["reference"] == Memory(5_000, "computed")
    assert found.memory["video"] == Memory(None, "unknown")
    assert found.largest == ("first", Memory(7_000, "measured"))  # the first of those that are alike
    assert found.peak_bytes is None
    assert found.known_disk_bytes == 20
    on_gpu = estimate(made.plan, made.statuses, [entry], Numerics("cuda"), computed)
    assert on_gpu.memory["first"] == Memory(5_000, "computed")
    entry = replace(entry, facts={**entry.facts, "peak_device_bytes": 3_000})
    on_gpu = estimate(made.plan, made.statuses, [entry], Numerics("cuda"), computed)
    assert on_gpu.memory["first"] == Memory(3_000, "measured")


def test_a_film_of_another_size_tells_nothing(tmp_path: Path) -> None:
    """Its node's fields are the same, but not what it decodes; frames of the same size scale."""
    made = plan(DEMO, Options(cache_dir=tmp_path, device="cpu"))
    node = made.plan.node("video")
    image = {"kind": "save_video", "fields": node.node.identity({}, Numerics("cpu").precision)}
    facts = {"seconds": 10.0, "peak_bytes": 7, "width": 192, "height": 192, "frames": node.facts["frames"] * 2}
    found = estimate(made.plan, made.statuses, [Entry("0" * 64, image, {}, facts)], Numerics("cpu"))
    assert found.nodes["video"].seconds == 5.0
    other = Entry("0" * 64, image, {}, {**facts, "width": 320})
    assert "video" not in estimate(made.plan, made.statuses, [other], Numerics("cpu")).nodes
