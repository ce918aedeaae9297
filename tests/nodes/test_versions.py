"""A guard against a cache that lies: a kind whose results change must get a new `version`.

Every stored kind computes something tiny from fixed inputs. Of each result a sketch is kept in versions.json: its type
and shape and a few weighted sums. Sums, not digests of bytes: float32 results differ in their last bits between
processors and versions of torch, and a rounded value may lie on either side of its boundary, but a sum moves no more
than its terms do. Without AVX, sums of float32 move by 2e-6 of the result's typical size, those of pixels by 4e-4; here
they may move by 2e-4 and 2e-3. What a change of a formula, an order or a constant does is larger. (Whether bytes are
the same on one machine, tests of runs that are repeated tell.)

After a change on purpose: raise `version` of the kind, then run `python tests/nodes/test_versions.py`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load

sys.path.insert(0, str(Path(__file__).parent.parent))  # as a program it has no conftest's folder
from recipes_for_tests import options, tiny, write_recipe, write_voice

from s2v_flow import api
from s2v_flow.cache.store import Store, StoredObject
from s2v_flow.graph.node import Node, Plan

KEPT = Path(__file__).with_name("versions.json")
TOLERANCES = {"uint8": 2e-3}  # a pixel may be rounded the other way
TOLERANCE = 2e-4
NUM_SUMS = 4
RECIPE: Mapping[str, Any] = tiny(
    first={"cfg": 2.0, "control_video": "$still", "motion_video": "$still", "motion": "pixels"},
    still={"kind": "frames_from_image", "image": "$portrait", "count": 12},
    talk={"chunks": 1, "seed": [1]},
    cut={"kind": "latent_cut", "latent": "$first", "axis": "x", "index": 2, "amount": 4},
    wide={"kind": "latent_concat", "first": "$cut", "second": "$cut", "axis": "x"},
    again={"kind": "load_latent", "file": "latent.safetensors"},
    latent={"kind": "save_latent", "latent": "$wide", "file": "out/latent.safetensors"},
    copy={"kind": "save_latent", "latent": "$again", "file": "out/copy.safetensors"},
    images={"kind": "save_images", "frames": "$frames", "file": "out/frame.png"},
    video={"preset": "ultrafast", "crf": 0},  # lossless: no version of the encoder counts
)


def stored_kinds() -> set[str]:
    """Every kind that is stored, those included that others are planned as."""
    found, pending = set(), [Node]
    while pending:
        kind = pending.pop()
        pending += kind.__subclasses__()
        if kind.__module__.startswith("s2v_flow.") and kind.is_stored and hasattr(kind, "kind"):
            found.add(kind.kind)
    return found


def written(folder: Path) -> Path:
    """Write the recipe and what it reads."""
    write_voice(folder / "voice.wav", 0.8)
    from safetensors.torch import save_file

    ramp = torch.arange(16 * 2 * 8 * 8, dtype=torch.float32).reshape(1, 16, 2, 8, 8).sin()
    save_file({"latent_tensor": ramp}, folder / "latent.safetensors")
    return write_recipe(folder, RECIPE)


def sketches(folder: Path, models: Path) -> dict[str, Any]:
    """Run the recipe and return a record of each kind's first result: what it was made by, and its sketch."""
    recipe, given = written(folder), options(folder, models)
    plan, result = api.plan(recipe, given).plan, api.run(recipe, given)
    store = Store(given.cache_root)
    found: dict[str, Any] = {}
    for node in plan.nodes:
        kind = type(node.node)
        if kind.is_stored and kind.kind not in found:
            outputs = result.entries[node.name].outputs
            found[kind.kind] = {
                "version": kind.version,
                "made_of": made_of(plan, node.name),
                "outputs": {port: dict(arrays(store, item)) for port, item in list(outputs.items())[:2]},
            }
    return found


def made_of(plan: Plan, name: str) -> list[str]:
    """The kinds before a node, with their versions: where one of them has a new one, other results are right."""
    found, pending = set(), [name]
    while pending:
        for source in plan.node(pending.pop()).sources():
            kind = type(plan.node(source.node).node)
            found.add(f"{kind.kind} {kind.version}")
            pending.append(source.node)
    return sorted(found)


def arrays(store: Store, item: StoredObject) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a sketch of each array in a stored object; a film's and a picture's are its pixels."""
    if item.suffix == ".safetensors":
        for name, tensor in sorted(load(store.read(item)).items()):
            dtype = str(tensor.dtype).removeprefix("torch.")
            yield name, {"dtype": dtype, **sketch(tensor.to(torch.float64).numpy())}
    else:
        plugin = "pyav" if item.suffix == ".mp4" else "pillow"
        pixels = np.asarray(iio.imread(store.read(item), extension=item.suffix, plugin=plugin))
        yield "pixels", {"dtype": str(pixels.dtype), **sketch(pixels.astype(np.float64))}


def sketch(values: NDArray[np.float64]) -> dict[str, Any]:
    """Return an array's shape, its typical size, and sums of it under weights of 1 and -1, each value's its own."""
    flat = values.ravel()
    bits = np.arange(1, NUM_SUMS * flat.size + 1, dtype=np.uint64) * np.uint64(6364136223846793005) >> np.uint64(40)
    signs = (bits & np.uint64(1)).astype(np.float64).reshape(NUM_SUMS, flat.size) * 2 - 1
    sums = signs @ flat / np.sqrt(max(flat.size, 1))
    size = float(np.sqrt((flat**2).mean())) if flat.size else 0.0
    return {"shape": list(values.shape), "size": round(size, 7), "sums": [round(float(x), 7) for x in sums]}


def difference(kept: Any, now: Any) -> str:
    """Say how two records of outputs differ, "" if they do not."""
    if {port: list(held) for port, held in kept.items()} != {port: list(held) for port, held in now.items()}:
        return f"other outputs: {sorted(now)}"
    for port, held in now.items():
        for name, array in held.items():
            old = kept[port][name]
            if (array["shape"], array["dtype"]) != (old["shape"], old["dtype"]):
                return f"{port}.{name} was {old['dtype']} {old['shape']}, is {array['dtype']} {array['shape']}"
            moved = np.abs(np.subtract([array["size"], *array["sums"]], [old["size"], *old["sums"]])).max()
            if moved > TOLERANCES.get(array["dtype"], TOLERANCE) * max(old["size"], 1e-6):
                return f"{port}.{name} has moved by {moved / max(old['size'], 1e-6):.1e} of its size"
    return ""


def verdict(kind: str, kept: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str:
    """Say what is wrong with a kind, "" if nothing is."""
    update = "update the sketches: python tests/nodes/test_versions.py"
    if kept is None or kept["version"] != now["version"]:
        return f"{kind} has version {now['version']}: {update}"
    changed = difference(kept["outputs"], now["outputs"])
    if changed and kept["made_of"] != now["made_of"]:
        return f"{kind} is made of other versions: {update}"
    return changed and f"{changed}: bump `version` of {kind} (it is {now['version']}), then {update}"


@pytest.fixture(scope="module")
def now(tmp_path_factory: pytest.TempPathFactory, demo_models: Path) -> dict[str, Any]:
    return sketches(tmp_path_factory.mktemp("versions"), demo_models)


@pytest.mark.slow
def test_whoever_changes_a_kinds_results_gives_it_a_new_version(now: dict[str, Any]) -> None:
    """Else a cache hands out what the old code computed, as if the new code had."""
    kept = json.loads(KEPT.read_text(encoding="utf-8"))
    assert [text for kind in now if (text := verdict(kind, kept.get(kind), now[kind]))] == []


def test_every_stored_kind_is_watched(tmp_path: Path, tiny_models: Path) -> None:
    """A new one belongs into the recipe above."""
    planned = api.plan(written(tmp_path), options(tmp_path, tiny_models)).plan
    assert {node.node.kind for node in planned.nodes if node.node.is_stored} == stored_kinds()
    assert set(json.loads(KEPT.read_text(encoding="utf-8"))) == stored_kinds()


def test_the_guard_sees_what_a_change_of_code_does() -> None:
    """A hundredth more or less, another order, another type; not the last bits of float32."""
    values = np.random.default_rng(1).normal(size=(4, 100))
    kept = {"version": 1, "made_of": ["x 1"], "outputs": {"out": {"x": {"dtype": "float32", **sketch(values)}}}}

    def told(changed: NDArray[np.float64], version: int = 1, dtype: str = "float32", of: str = "x 1") -> str:
        outputs = {"out": {"x": {"dtype": dtype, **sketch(changed)}}}
        return verdict("toy", kept, {"version": version, "made_of": [of], "outputs": outputs})

    assert told(values * (1 + 1e-6)) == ""
    assert told(values.astype(np.float32).astype(np.float64)) == ""
    for changed in (values * 1.01, values[::-1], values + 0.01, np.roll(values, 1, axis=1), values.T):
        assert "bump `version` of toy (it is 1), then update" in told(changed)
    assert "bump" in told(values, dtype="float16")
    assert told(values * 2, version=2).startswith("toy has version 2: update")
    assert told(values * 2, of="x 2").startswith("toy is made of other versions: update")


if __name__ == "__main__":
    import tempfile

    from s2v_flow.demo.models import make_demo_models

    with tempfile.TemporaryDirectory() as name:
        make_demo_models(Path(name) / "models")
        KEPT.write_text(json.dumps(sketches(Path(name), Path(name) / "models"), indent=1) + "\n", encoding="utf-8")
