"""What a run will cost, from what is stored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from s2v_flow.api import Options, calibrated, plan
from s2v_flow.cache.store import Entry
from s2v_flow.graph.context import Numerics
from s2v_flow.graph.estimate import Estimate, Memory, Needs, NodeCost, estimate

DEMO = Path(__file__).parents[1] / "untrained.yaml"


def test_without_past_runs_there_is_no_estimate_of_time(tmp_path: Path) -> None:
    """It says which kinds never ran; the files to be read are known all the same."""
    made = plan(DEMO, Options(cache_dir=tmp_path, device="cpu"))
    assert made.estimate.seconds is None
    assert "sample" in made.estimate.unknown
    assert made.estimate.num_files == 2  # portrait and voice; the demo's models are not made yet
    assert made.estimate.bytes_to_read > 400_000


def test_like_nodes_that_ran_give_the_time(tmp_path: Path) -> None:
    """The median of equal settings counts whatever the seed; frames scale."""
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


MODEL = {"weights": "100/4", "hardware": "here"}


def chunk_entry(fields: dict[str, Any], flops: float, **facts: Any) -> Entry:
    """Return the result of a chunk of 4 steps that took 1 s to begin, 5 s to load the model, and 2 s a step."""
    took = {"seconds": 14.0, "load_seconds": 5.0, "sampling_seconds": 8.0, "steps_taken": 4, "peak_bytes": 7_000}
    facts = {**MODEL, **took, "flops": [flops, 0, 0], **facts}
    return Entry("0" * 64, {"kind": "chunk", "fields": {**fields, "steps": 4}}, {}, facts)


def estimated(tmp_path: Path, flops: float, entries: list[Entry], needs: Needs | None = None, **more: Any) -> Estimate:
    """Estimate the first chunk of 20 steps, which computes as much as is said."""
    made = plan(DEMO, Options(cache_dir=tmp_path, device="cpu", sets=["steps=20"]))
    alone = replace(made.plan, nodes=tuple(node for node in made.plan.nodes if node.name == "first"))
    computed = needs or Needs(5_000, 10, (flops, 0.0, 0.0), "100/4")
    return estimate(alone, made.statuses, entries, Numerics("cpu"), {"first": computed}, "here", **more)


def fields_of_first(tmp_path: Path) -> dict[str, Any]:
    made = plan(DEMO, Options(cache_dir=tmp_path, device="cpu"))
    return dict(made.plan.node("first").node.identity({}, Numerics("cpu").precision))


def test_steps_scale_and_what_comes_before_them_does_not(tmp_path: Path) -> None:
    """The model is loaded once; memory of another shape is not called measured."""
    found = estimated(tmp_path, 5e9, [chunk_entry(fields_of_first(tmp_path), 1e9)])
    assert found.seconds == 5 + 1 + 5 * 8
    assert found.basis is not None
    assert (found.basis.source, found.basis.scaled_from) == ("scaled", "192x192, 4 steps")
    assert found.memory["first"] == Memory(5_000, "computed")
    assert found.known_disk_bytes == found.disk_bytes == 10


def test_a_resumed_chunk_tells_what_a_step_takes(tmp_path: Path) -> None:
    """Not what all of its steps took."""
    resumed = chunk_entry(fields_of_first(tmp_path), 1e9, sampling_seconds=2.0, steps_taken=1, seconds=8.0)
    assert estimated(tmp_path, 5e9, [resumed]).seconds == 5 + 1 + 5 * 8


def test_the_nearest_run_is_scaled(tmp_path: Path) -> None:
    """By what is computed, whatever the size; other hardware, model or precision, or reused steps, tell nothing."""
    fields = fields_of_first(tmp_path)
    near = chunk_entry({**fields, "width": 96}, 4e9, sampling_seconds=40.0, seconds=46.0)
    far = chunk_entry({**fields, "width": 64}, 1e9)
    assert estimated(tmp_path, 5e9, [far, near]).seconds == 5 + 1 + 50
    for other in ({"hardware": "elsewhere"}, {"weights": "50/2"}, {"weights": "100/2"}):
        assert estimated(tmp_path, 5e9, [chunk_entry(fields, 5e9, **other)]).unknown == ("sample",)
    cached = chunk_entry({**fields, "step_cache": "easy", "step_cache_threshold": 0.2}, 5e9)
    assert estimated(tmp_path, 5e9, [cached]).unknown == ("sample",)


def test_what_never_ran_is_estimated_by_the_speed_of_the_machine(tmp_path: Path) -> None:
    """Each part of the arithmetic by its own, and of the dtype that it is computed in; a past run goes before it."""
    speeds = {4: (1e9, 2e9, 4e9), 2: (1.0, 1.0, 1.0)}
    needs = Needs(5_000, 10, (3e9, 4e9, 4e9), "100/4")
    found = estimated(tmp_path, 0, [], needs, speeds=speeds)
    assert found.nodes["first"] == NodeCost(3 + 2 + 1, 10, 0, "calibrated")
    assert found.memory["first"] == Memory(5_000, "computed")
    past = estimated(tmp_path, 0, [chunk_entry(fields_of_first(tmp_path), 11e9)], needs, speeds=speeds)
    assert past.nodes["first"].source == "scaled"
    assert estimated(tmp_path, 0, [], needs, speeds={2: (1.0, 1.0, 1.0)}).unknown == ("sample",)
    missing = Needs(None, 10, None, "")
    assert estimated(tmp_path, 0, [], missing, speeds=speeds).unknown == ("sample",)


def test_the_arithmetic_of_the_models_grows_as_their_layers_do(tiny_models: Path, tmp_path: Path) -> None:
    """Steps evenly, but for heun's last; two branches twice; pictures by area and more, for attention; the VAE by area.

    The count at full size is in `tests/models/test_footprint.py`.
    """

    def flops(**params: Any) -> dict[str, tuple[float, ...]]:
        sets = [f"{name}={value}" for name, value in {"cfg": 1.0, **params}.items() if name != "sampler"]
        sets += [f"nodes.first.sampler={params.get('sampler', 'euler')}"]
        made = plan(DEMO, Options(cache_dir=tmp_path, device="cpu", sets=sets, models_dirs=[tiny_models]))
        return {name: needs.flops for name, needs in made.needs.items() if needs.flops is not None}

    base, twice = flops(), flops(width=384)
    assert flops(steps=20)["first"] == tuple(5 * count for count in base["first"])
    assert flops(cfg=2.0)["first"] == tuple(2 * count for count in base["first"])
    assert flops(sampler="heun")["first"] == tuple(7 / 4 * count for count in base["first"])
    assert twice["first"][0] == pytest.approx(2 * base["first"][0])
    assert 2 * base["first"][1] < twice["first"][1] < 4 * base["first"][1]
    assert twice["reference"] == pytest.approx(tuple(2 * count for count in base["reference"]))
    assert twice["video"] == pytest.approx(tuple(2 * count for count in base["video"]))
    assert base["video"][2] > 100 * base["reference"][2] > 0
    assert min(base["positive"][0], base["speech"][0]) > 0


def test_a_device_is_measured_once(tmp_path: Path, tiny_models: Path) -> None:
    options = Options(cache_dir=tmp_path, device="cpu", models_dirs=[tiny_models])
    before = plan(DEMO, options)
    assert before.to_json()["estimate"]["source"] is None
    after = calibrated(before, options)
    assert after.to_json()["estimate"]["source"] == "calibrated"
    assert plan(DEMO, options).estimate.seconds == after.estimate.seconds == calibrated(after, options).estimate.seconds


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
