"""Pictures while a run samples: what they show, where they stand, and that a run is the same without them."""

from __future__ import annotations

import base64
import io
import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from recipes_for_tests import options
from runs_for_tests import Place, place

from s2v_flow import api
from s2v_flow.cli.picture import iterm2, kitty, protocol_of
from s2v_flow.files.facts import file_digest, remembered
from s2v_flow.graph.context import Artifact
from s2v_flow.graph.events import Noted, Preview, StepDone
from s2v_flow.models.vae import denormalise
from s2v_flow.nodes.tensors import pack
from s2v_flow.runs.stream import to_all
from s2v_flow.views.previews import Previews, fitted_colours


@pytest.fixture
def made(tmp_path: Path, tiny_models: Path) -> Place:
    return place(tmp_path, tiny_models)


def test_a_run_shows_every_chunk_as_it_is_sampled(made: Place, tmp_path: Path) -> None:
    """A picture a step, for there are two; in the run's folder, eight times the latent's size."""
    code, out, err = made.run("--events", tmp_path / "events.jsonl")
    assert (code, len(out.splitlines())) == (0, 1)
    assert "\x1b" not in err
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    shown = [line for line in lines if line["type"] == "preview"]
    assert [(line["node"], line["step"], line["total"]) for line in shown] == [
        (node, step, 2) for node in ("first", "talk[1]", "talk[2]") for step in (1, 2)
    ]
    for line in shown:
        assert Path(line["path"]).parent == made.cache / "runs" / line["run"]
        with Image.open(line["path"]) as picture:
            assert (picture.format, picture.size) == ("JPEG", (64, 64))
    assert made.call("runs", "--keep-last", "0")[0] == 0
    assert list((made.cache / "runs").iterdir()) == []


def test_colours_are_remembered_for_a_run_without_a_portrait(made: Place, tmp_path: Path) -> None:
    """By the VAE's sha256."""
    given, told = options(tmp_path, Path(made.where[1])), []
    plan = api.plan(made.recipe, given).plan
    vae = plan.node("vae").files["checkpoint",]
    digest = file_digest(vae, given.cache_root / "digests.json", clock_ns=lambda: time.time_ns() + 10**10)  # at rest
    colours = np.zeros((17, 3)).tolist()
    remembered(given.cache_root / "facts.json", f"preview-colours:{digest}", lambda: {"colours": colours})
    looking = Previews(plan, given.cache_root, tmp_path, told.append)
    looking.watch("first", {}, torch.zeros(1, 16, 2, 8, 8))
    looking(StepDone("first", 1, 4, "step"))
    (event,) = told
    assert np.asarray(Image.open(event.path)).mean() == pytest.approx(127.5, abs=1)


@pytest.mark.slow
def test_a_fitted_map_is_remembered(tmp_path: Path, tiny_models: Path) -> None:
    made = place(tmp_path, tiny_models)
    vae = api.plan(made.recipe, options(tmp_path, tiny_models)).plan.node("vae").files["checkpoint",]
    digest = file_digest(vae, made.cache / "digests.json", clock_ns=lambda: time.time_ns() + 10**10)
    assert made.run("--until", "first")[0] == 0
    known = json.loads((made.cache / "facts.json").read_text())[f"preview-colours:{digest}"]
    assert np.shape(known["colours"]) == (17, 3)


@pytest.mark.slow
def test_without_previews_a_run_gives_the_same_bytes(made: Place) -> None:
    assert made.run("--no-previews")[0] == 0
    before = made.video.read_bytes()
    assert list(made.cache.glob("runs/*/*.jpg")) == []
    assert made.run("--no-cache")[0] == 0
    assert made.video.read_bytes() == before
    assert len(list(made.cache.glob("runs/*/*.jpg"))) == 6


@pytest.mark.slow
def test_a_picture_that_cannot_be_written_costs_a_warning(made: Place, tmp_path: Path) -> None:
    (tmp_path / "shown" / "first-01.jpg").mkdir(parents=True)
    given, told = options(tmp_path, Path(made.where[1])), []
    planned = api.plan(made.recipe, given)
    looking = Previews(planned.plan, given.cache_root, tmp_path / "shown", told.append)
    api.run(made.recipe, given, to_all(told.append, looking), watch=looking.watch)
    assert not any(isinstance(event, Preview) for event in told)
    (text,) = [event.text for event in told if isinstance(event, Noted) and event.is_warning]
    assert "shown/first-01.jpg: previews cannot be written: " in text
    assert made.video.is_file()


def test_colours_that_a_latent_holds_linearly_are_found() -> None:
    """Of a VAE that were a plain mixture of channels, hardly anything is lost."""
    generator = torch.Generator().manual_seed(3)
    channels = torch.randn(1, 16, 1, 24, 24, generator=generator)
    colours = (0.1 * torch.randn(3, 16, generator=generator) @ channels.flatten(2)[0] + 0.2).view(3, 24, 24)
    pixels = colours.repeat_interleave(8, 1).repeat_interleave(8, 2)[None, :, None]
    portrait = Artifact("0", lambda: pack({"latent": denormalise(channels), "pixels": pixels}), lambda *_: False)
    found = fitted_colours(portrait)
    seen = np.einsum("cn,ck->kn", channels.flatten(2)[0].numpy(), found[:16]) + found[16][:, None]
    assert abs(seen - colours.flatten(1).numpy()).max() < 0.1


def test_terminals_are_told_by_what_they_say_of_themselves() -> None:
    assert protocol_of({"TERM": "xterm-kitty"}) == protocol_of({"KITTY_WINDOW_ID": "1"}) == "kitty"
    assert protocol_of({"TERM_PROGRAM": "iTerm.app"}) == protocol_of({"LC_TERMINAL": "iTerm2"}) == "iterm2"
    assert protocol_of({"KITTY_WINDOW_ID": "1", "TERM": "tmux-256color"}) == "blocks"
    assert protocol_of({"TERM": "xterm-256color"}) == "blocks"


def test_the_protocols_carry_the_picture_whole() -> None:
    """Kitty's in parts of 4096 bytes, all but the last saying that more comes."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(noise).save(content, format="PNG")
    parts = list(kitty(content.getvalue()))
    carried = [re.fullmatch(r"\x1b_G(?:[^;]*,)?m=([01]);(.*)\x1b\\", part) for part in parts]
    assert [found and found[1] for found in carried] == ["1"] * (len(parts) - 1) + ["0"]
    assert all(found and len(found[2]) <= 4096 for found in carried)
    assert base64.b64decode("".join(found[2] for found in carried if found)) == content.getvalue()
    (one,) = iterm2(content.getvalue())
    assert base64.b64decode(one.partition(":")[2].rstrip("\x07")) == content.getvalue()
