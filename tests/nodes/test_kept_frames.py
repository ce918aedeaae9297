"""Frames are decoded once: for all sinks of a run, and for another crf, preset or format later."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes_for_tests import options, write_recipe
from runs_for_tests import QUICK, Place, copied, place

from s2v_flow import api
from s2v_flow.cache.housekeeping import Kept, inventory, remove
from s2v_flow.graph.events import Event, NodeCached, Noted
from s2v_flow.graph.status import Selection
from s2v_flow.media import writer
from s2v_flow.models.vae import WanVAE

ALSO: dict[str, Any] = {
    "again": {"kind": "save_video", "frames": "$frames", "file": "out/again.mp4", "preset": "ultrafast", "crf": 30},
    "images": {"kind": "save_images", "frames": "$frames", "file": "out/frame.png"},
}


@pytest.fixture
def made(quick_run: Place, tmp_path: Path) -> Place:
    """A recipe that has run."""
    return copied(quick_run, tmp_path)


@pytest.fixture
def sampled(made: Place) -> Place:
    """Three sinks of a video whose chunks are stored, but nothing of what they decode to."""
    write_recipe(made.folder, {**QUICK, **ALSO})
    kinds = ("decode_frames", "save_video")
    remove(made.cache, [item.entry.fingerprint for item in inventory(made.cache) if item.to_json()["kind"] in kinds])
    return made


class Decoder:
    """Counts the calls of the VAE's decoder; has memory for `room` latent frames at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, self.room = 0, 99
        original = WanVAE.decode_next

        def decode_next(vae: WanVAE, latent: torch.Tensor, state: Any) -> Any:
            self.calls += 1
            if latent.shape[2] > self.room:
                raise torch.OutOfMemoryError("tried to allocate 20 GiB")
            return original(vae, latent, state)

        monkeypatch.setattr(WanVAE, "decode_next", decode_next)


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> Decoder:
    return Decoder(monkeypatch)


def run(made: Place, models: Path, *sets: str, cache: Path | None = None, **more: Any) -> list[Event]:
    events: list[Event] = []
    api.run(made.recipe, options(made.folder, models, cache, sets=sets, **more), events.append)
    return events


def kept(made: Place) -> list[Kept]:
    return [item for item in inventory(made.cache) if item.is_spare]


def notes(events: list[Event], node: str = "frames") -> list[str]:
    return [event.text for event in events if isinstance(event, Noted) and event.node == node]


def status(made: Place, models: Path, *sets: str, **more: Any) -> dict[str, str]:
    planned = api.plan(made.recipe, options(made.folder, models, sets=sets, **more))
    return {name: planned.statuses[name].status for name in ("vae", "frames", "video")}


def test_another_crf_decodes_nothing_and_gives_the_bytes_of_a_run_that_does(
    made: Place, tiny_models: Path, decoder: Decoder
) -> None:
    """The plan says so, the events say so, and the manifest; there is nothing to count on the VAE."""
    crf = "nodes.video.crf=30"
    assert status(made, tiny_models, crf) == {"vae": "SKIP", "frames": "HIT", "video": "RUN"}
    events = run(made, tiny_models, crf)
    assert (decoder.calls, NodeCached("frames") in events) == (0, True)
    nodes = {node["name"]: node["status"] for node in json.loads(made.manifests()[-1].read_text())["nodes"]}
    assert (nodes["frames"], nodes["video"]) == ("stored", "computed")
    film = made.video.read_bytes()
    run(made, tiny_models, crf, selection=Selection(force=("frames+",)))
    assert decoder.calls > 0
    assert made.video.read_bytes() == film
    assert len(kept(made)) == 1


@pytest.mark.slow
def test_what_is_forced_is_decoded_anew(made: Place, tiny_models: Path, decoder: Decoder) -> None:
    """A node alone is forced where something needs it; --no-cache forces it too."""
    crf, forced = "nodes.video.crf=30", Selection(force=("frames",))
    assert status(made, tiny_models, selection=forced)["frames"] == "SKIP"
    assert status(made, tiny_models, crf, selection=Selection(is_fresh=True))["frames"] == "RUN"
    assert status(made, tiny_models, crf, selection=forced)["frames"] == "RUN"
    run(made, tiny_models, crf, selection=forced)
    assert decoder.calls > 0
    assert len(kept(made)) == 1


@pytest.mark.slow
def test_all_sinks_of_a_run_are_served_by_one_decoding(
    sampled: Place, tiny_models: Path, decoder: Decoder, quick_run: Place
) -> None:
    """Where the cache has no room each of them decodes, to the same bytes: said once, and nothing is pushed out."""
    events = run(sampled, tiny_models, cache_limit=100_000)
    (text,) = notes(events)
    assert text.startswith("not kept (the cache has room for 0 B;")
    assert (kept(sampled), list((sampled.cache / "tmp").iterdir())) == ([], [])
    assert {item.entry.facts["node"] for item in inventory(sampled.cache)} >= {"first", "talk[1]", "talk[2]", "video"}
    files = {path.name: path.read_bytes() for path in (sampled.folder / "out").iterdir()}
    assert len(files) == 22
    thrice, decoder.calls = decoder.calls, 0
    assert not notes(run(sampled, tiny_models, selection=Selection(force=("video", "again", "images"))))
    assert thrice == 3 * decoder.calls > 0
    assert {path.name: path.read_bytes() for path in (sampled.folder / "out").iterdir()} == files
    assert sampled.video.read_bytes() == quick_run.video.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["flip", "delete"])
def test_kept_frames_that_are_damaged_or_gone_are_decoded_again(
    how: str, made: Place, tiny_models: Path, decoder: Decoder
) -> None:
    (item,) = kept(made)[0].entry.outputs.values()
    path = made.cache / "objects" / item.sha256[:2] / item.file_name
    film = made.video.read_bytes()
    path.chmod(0o644)
    if how == "delete":
        path.unlink()
    else:
        path.write_bytes(bytes([1]) + path.read_bytes()[1:])
    events = run(made, tiny_models, selection=Selection(force=("video",)))
    assert decoder.calls > 0
    assert made.video.read_bytes() == film
    assert len(notes(events)) == (how == "flip")
    decoder.calls = 0
    run(made, tiny_models, selection=Selection(force=("video",)))
    assert decoder.calls == 0


@pytest.mark.slow
def test_frames_that_are_evicted_while_they_are_read_are_decoded_from_there(
    made: Place, tiny_models: Path, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = writer.read_lossless

    def breaks(path: Path) -> Iterator[Any]:
        for index, frame in enumerate(original(path)):
            if index == 5:
                raise OSError("stale")
            yield frame

    monkeypatch.setattr(writer, "read_lossless", breaks)
    film = made.video.read_bytes()
    run(made, tiny_models, selection=Selection(force=("video",)))
    assert decoder.calls > 0
    assert made.video.read_bytes() == film


@pytest.mark.slow
def test_frames_made_with_less_memory_serve_this_run_and_no_other(
    sampled: Place, tiny_models: Path, decoder: Decoder
) -> None:
    """Kept under what they are; what the second sink makes of them is marked as the first one's."""
    decoder.room, made = 1, sampled
    events = run(made, tiny_models)
    assert len([text for text in notes(events) if "memory ran out" in text]) == 2
    (frames,) = kept(made)
    assert frames.entry.preimage["degraded"] == {"frames_per_call": 1}
    marked = {item.entry.facts["node"] for item in inventory(made.cache) if "degraded" in item.entry.preimage}
    assert marked == {"frames", "video", "again", "images"}
    decoder.room, decoder.calls = 99, 0
    assert status(made, tiny_models)["frames"] == "RUN"
    run(made, tiny_models)
    assert decoder.calls > 0


@pytest.mark.slow
def test_a_run_that_fails_in_between_keeps_nothing(
    made: Place, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove(made.cache, [item.entry.fingerprint for item in kept(made)])
    original, count = writer.LosslessWriter.write, 0

    def write(writer: Any, frames: Any) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        original(writer, frames)

    monkeypatch.setattr(writer.LosslessWriter, "write", write)
    with pytest.raises(KeyboardInterrupt):
        run(made, tiny_models, "nodes.video.crf=30")
    assert (kept(made), list((made.cache / "tmp").iterdir())) == ([], [])
    monkeypatch.undo()
    run(made, tiny_models, "nodes.video.crf=30")
    assert len(kept(made)) == 1


@pytest.mark.slow
def test_frames_that_chunks_hand_over_are_stored_already(tmp_path: Path, tiny_models: Path) -> None:
    """With motion: pixels there is nothing to decode, and nothing is kept twice."""
    first = {**(QUICK["first"] or {}), "motion": "pixels"}
    made = place(tmp_path, tiny_models, {**QUICK, "first": first, "talk": None, "frames": {"latent": "$first"}})
    run(made, tiny_models)
    assert made.video.is_file()
    assert kept(made) == []
