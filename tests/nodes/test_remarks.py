"""What goes on with another result than the user may think is said by `plan` and `run`, by the setting's name."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes_for_tests import call, options, tiny, write_recipe, write_voice
from safetensors.torch import load_file, save_file

from s2v_flow import api
from s2v_flow.errors import CheckpointError
from s2v_flow.graph.events import Event, Noted
from s2v_flow.graph.status import Selection
from s2v_flow.media.video import VideoReader
from s2v_flow.models.encoders import TextEncoder
from s2v_flow.nodes.remarks import is_distilled
from s2v_flow.weights.tokenizer import MAX_TOKENS, is_surely_short, measure, read_tokenizer

LONG = " ".join(f"sentence {number} of a long prompt." for number in range(200))
GUIDED = {"steps": 20, "cfg": 6.0}


@pytest.fixture
def models(tmp_path: Path, tiny_models: Path) -> Path:
    """Return a models folder of one's own: the demo's models, and a LoRA for two of its layers."""
    root = tmp_path / "models"
    for path in tiny_models.rglob("*.safetensors"):
        target = root / path.relative_to(tiny_models)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path)
    (root / "loras").mkdir(exist_ok=True)
    write_lora(root, "style.safetensors")
    return root


def write_lora(models: Path, name: str, *, num_foreign: int = 0, metadata: dict[str, str] | None = None) -> None:
    """Write a LoRA for two of the tiny model's layers, and `num_foreign` ones of no model."""
    shapes = {key: value.shape for key, value in load_file(models / "diffusion_models/tiny_s2v.safetensors").items()}
    layers = ["blocks.0.self_attn.q", "blocks.0.self_attn.k"]
    sizes = [shapes[f"{layer}.weight"] for layer in layers] + [torch.Size((8, 8))] * num_foreign
    tensors = {}
    for layer, (rows, columns) in zip([*layers, *(f"else.{n}" for n in range(num_foreign))], sizes, strict=True):
        tensors[f"diffusion_model.{layer}.lora_A.weight"] = torch.zeros(2, columns)
        tensors[f"diffusion_model.{layer}.lora_B.weight"] = torch.zeros(rows, 2)
    save_file(tensors, models / "loras" / name, metadata)


def notes(folder: Path, models: Path, seconds: float = 1.0, **changes: Mapping[str, Any] | None) -> list[str]:
    """Plan a recipe and return what it notes, but for the demo's model."""
    write_voice(folder / "voice.wav", seconds)
    made = api.plan(write_recipe(folder, tiny(**changes)), options(folder, models))
    return [note for note in made.notes if "the demo's model" not in note]


def about(setting: str, found: list[str]) -> list[str]:
    return [note for note in found if note.removeprefix("warning: ").startswith(f"{setting}: ")]


def test_plan_and_run_print_notes_and_warnings_by_their_first_word(tmp_path: Path, models: Path) -> None:
    write_voice(tmp_path / "voice.wav", 0.3)
    recipe = write_recipe(tmp_path, tiny(video={"fps": 25.0}))
    place = ["--models-dir", models, "--cache-dir", tmp_path / "cache", "--device", "cpu"]
    _, out, _ = call("plan", recipe, *place)
    _, told, _ = call("plan", recipe, *place, "--json")
    code, _, err = call("run", recipe, *place)
    assert code == 0
    for lines in (out.splitlines(), err.splitlines()):
        assert any(line.startswith("note: negative: ") for line in lines)
        assert any(line.startswith("warning: fps: video plays 25 frames a second") for line in lines)
    assert {note.split()[0] for note in json.loads(told)["notes"]} >= {"negative:", "warning:"}


@pytest.mark.parametrize("motion", ["latent", "pixels"])
@pytest.mark.parametrize(("asked", "left_out"), [(0, 0), (1, 0), (2, 1), (4, 3)])
def test_chunks_past_the_voices_end_are_left_out(
    motion: str, asked: int, left_out: int, tmp_path: Path, models: Path
) -> None:
    """Chunks of 8 frames, a voice of 10 and 3 of warm-up: 13 frames, so 2 chunks."""
    write_voice(tmp_path / "voice.wav", 10 / 16)
    recipe = write_recipe(tmp_path, tiny(first={"motion": motion}, talk={"chunks": asked}))
    made = api.plan(recipe, options(tmp_path, models))
    assert made.num_chunks == made.to_json()["chunks"] == 1 + asked - left_out
    expected = [f"chunks: {left_out} of {1 + asked} lie past the end of the voice and are left out of frames"]
    assert [note.partition(" (trim")[0] for note in about("chunks", list(made.notes))] == expected * bool(left_out)
    assert made.num_frames == (10 if asked else 5)


def test_what_asks_for_all_chunks_gets_them(tmp_path: Path, models: Path) -> None:
    """A latent that is saved, and frames that are not cut to the voice."""
    save = {"kind": "save_latent", "latent": "$talk", "file": "out/all.latent"}
    for changes in ({"all": save}, {"frames": {"trim": "none"}}):
        write_voice(tmp_path / "voice.wav", 0.3)
        recipe = write_recipe(tmp_path, tiny(talk={"chunks": 3}, **changes))
        assert api.plan(recipe, options(tmp_path, models)).num_chunks == 4


@pytest.mark.slow
def test_chunks_are_left_out_of_the_video_without_a_change_to_its_frames(tmp_path: Path, models: Path) -> None:
    write_voice(tmp_path / "voice.wav", 10 / 16)
    digests = set()
    for count in ("auto", 3):
        recipe = write_recipe(tmp_path, tiny(talk={"chunks": count}, video={"preset": "ultrafast"}))
        result = api.run(recipe, options(tmp_path, models))
        assert result.failures == {}
        with VideoReader(tmp_path / "out/talk.mp4", 16) as reader:
            digests.add(reader.read(0, 99).tobytes())
    assert len(digests) == 1


@pytest.mark.parametrize("rate", [12.0, 16.5, 24.0, 25.0, 60.0])
def test_another_rate_than_the_models_is_warned_of(rate: float, tmp_path: Path, models: Path) -> None:
    (note,) = about("fps", notes(tmp_path, models, video={"fps": rate}))
    assert note.startswith(f"warning: fps: video plays {rate:g} frames a second")
    assert "lips" in note
    assert about("fps", notes(tmp_path, models)) == []
    assert "lips" not in about("fps", notes(tmp_path, models, video={"fps": rate, "audio": None}))[0]


def test_a_prompt_that_is_cut_is_noted_with_the_last_words_that_count(tmp_path: Path, models: Path) -> None:
    """In an encode_text node, and in a timeline; a negative prompt too, where it is used."""
    (note,) = about("prompt", notes(tmp_path, models, positive={"text": LONG}))
    assert note.startswith("prompt: the text of positive has ")
    words = note.partition('the last words that count: "')[2].removesuffix('"')
    assert len(words.split()) == 6
    encoder = models / "text_encoders/tiny_umt5.safetensors"
    tokenizer = read_tokenizer(load_file(encoder)["spiece_model"].numpy().tobytes(), "tiny")
    tokenize = TextEncoder(torch.nn.Identity(), tokenizer).tokenize
    kept = LONG[: LONG.index(words) + len(words)]
    assert tokenize(kept)[: MAX_TOKENS - 1] == tokenize(LONG)[: MAX_TOKENS - 1]
    assert len(tokenize(kept)) == MAX_TOKENS

    timeline = {"timeline": [{"at": 0.1, "prompt": LONG, "negative_prompt": LONG}], "cfg": 2.0, "chunks": "auto"}
    found = about("prompt", notes(tmp_path, models, 1.0, talk=timeline))
    assert [note.split()[4] for note in found] == ["talk.positive[1]", "talk.negative[1]"]
    assert about("prompt", notes(tmp_path, models, negative={"text": LONG})) == []  # cfg 1
    assert len(about("prompt", notes(tmp_path, models, negative={"text": LONG}, first=GUIDED))) == 1


@pytest.mark.parametrize("text", ["", "short", "a" * 509, "é" * 255, "\ufdfa" * 10, "日本" * 80, "\u3000" * 100])
def test_a_prompt_that_is_surely_short_has_at_most_512_tokens(text: str, tiny_models: Path) -> None:
    count, _ = measure(tiny_models / "text_encoders/tiny_umt5.safetensors", text)
    assert count <= MAX_TOKENS or not is_surely_short(text)


def test_a_negative_prompt_without_guidance_is_noted_where_it_is_given(tmp_path: Path, models: Path) -> None:
    (note,) = about("negative", notes(tmp_path, models))
    assert note == "negative: the negative prompt is not used in first: with cfg 1 there is no guidance"
    assert about("negative", notes(tmp_path, models, first=GUIDED)) == []
    assert about("negative", notes(tmp_path, models, first={"negative": None})) == []
    (note,) = about("negative", notes(tmp_path, models, first=GUIDED, talk={"cfg": 1.0}))
    assert "in talk" in note


@pytest.mark.slow
def test_a_lora_that_changes_nothing_is_named_by_the_run(tmp_path: Path, models: Path) -> None:
    """By its values, also where it stands among others, merged; and by its strength."""
    loras = [
        {"id": "trained", "file": "tiny_lightning_lora.safetensors", "allow_partial": True},
        {"id": "new", "file": "style.safetensors"},
        {"id": "off", "file": "tiny_lightning_lora.safetensors", "allow_partial": True, "strength": 0.0},
    ]
    write_voice(tmp_path / "voice.wav", 0.2)
    told: list[Event] = []
    api.run(
        write_recipe(tmp_path, tiny(dit={"loras": loras})),
        options(tmp_path, models, selection=Selection(until=("first",))),
        told.append,
    )
    found = {event.text: event.is_warning for event in told if isinstance(event, Noted) and "LoRA" in event.text}
    assert found.pop("LoRA new changes nothing: the update in style.safetensors is 0 everywhere") is True
    assert found.pop("LoRA off changes nothing: its strength is 0") is False
    assert [text.split(" of ")[0] for text in found if "applied" in text] == ["LoRA trained: 130"]


@pytest.mark.parametrize(
    ("name", "metadata", "is_so"),
    [
        ("wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise.safetensors", {}, True),
        ("Wan2.2-Lightning_T2V.safetensors", {}, True),
        ("my-4-step.safetensors", {}, True),
        ("CausVid_14B_lora.safetensors", {}, True),
        ("wan_LCM.safetensors", {}, True),
        ("style.safetensors", {}, False),
        ("style_14step_dance.safetensors", {}, False),
        ("calcmode.safetensors", {}, False),
        ("lightning/style.safetensors", {}, False),
        ("x.safetensors", {"ss_output_name": "wan_lightx2v_rank64"}, True),
        ("x.safetensors", {"modelspec.title": "Distilled for 4 steps"}, True),
        ("x.safetensors", {"ss_steps": "4 steps"}, False),
    ],
)
def test_a_lora_for_few_steps_is_known_by_its_names(
    name: str, metadata: dict[str, str], is_so: bool, tmp_path: Path
) -> None:
    path = tmp_path / "file.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata)
    assert is_distilled(name, path) is is_so


@pytest.mark.parametrize(
    ("file", "settings", "is_noted"),
    [
        ("lightx2v_4steps.safetensors", {"steps": 4, "cfg": 1.0}, False),
        ("lightx2v_4steps.safetensors", {"steps": 20, "cfg": 1.0}, True),
        ("lightx2v_4steps.safetensors", {"steps": 4, "cfg": 6.0}, True),
        ("style.safetensors", {"steps": 4, "cfg": 1.0}, True),
        ("style.safetensors", {"steps": 8, "cfg": 6.0}, True),
        ("style.safetensors", {"steps": 9, "cfg": 6.0}, False),
        (None, {"steps": 4, "cfg": 1.0}, True),
        (None, {"steps": 20, "cfg": 6.0}, False),
    ],
)
def test_steps_and_cfg_that_do_not_go_with_the_lora_are_noted(
    file: str | None, settings: dict[str, Any], is_noted: bool, tmp_path: Path, models: Path
) -> None:
    write_lora(models, "lightx2v_4steps.safetensors")
    loras = [{"id": "one", "file": file}] if file else []
    found = notes(tmp_path, models, dit={"loras": loras}, first=settings)
    assert len(about("lora", found)) == is_noted


def test_a_lora_that_is_switched_off_is_noted_and_counts_for_nothing(tmp_path: Path, models: Path) -> None:
    write_lora(models, "lightning.safetensors")
    loras = [{"id": "one", "file": "lightning.safetensors", "strength": 0.0}]
    found = about("lora", notes(tmp_path, models, dit={"loras": loras}, first={"steps": 4}))
    assert found[0] == "lora: one has strength 0 and no effect"
    assert "without a LoRA for few steps" in found[1]


@pytest.mark.parametrize(("num_foreign", "is_warned"), [(0, False), (2, False), (3, True), (30, True)])
def test_a_lora_of_which_little_has_a_home_is_warned_of(
    num_foreign: int, is_warned: bool, tmp_path: Path, models: Path
) -> None:
    write_lora(models, "other.safetensors", num_foreign=num_foreign)
    lora = {"id": "one", "file": "other.safetensors", "allow_partial": True}
    found = about("lora", notes(tmp_path, models, dit={"loras": [lora]}, first=GUIDED))
    assert len(found) == is_warned
    assert all(note.startswith(f"warning: lora: 4 of {4 + 2 * num_foreign} tensors") for note in found)
    if num_foreign:
        with pytest.raises(CheckpointError, match="have no home in this model"):
            notes(tmp_path, models, dit={"loras": [{**lora, "allow_partial": False}]}, first=GUIDED)


def test_an_alpha_that_only_the_metadata_has_is_warned_of(tmp_path: Path, models: Path) -> None:
    """As diffusers saves it: ComfyUI does not read it, nor is it applied here."""
    write_lora(models, "other.safetensors")
    told = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 4, "transformer.r": 8})}
    save_file(load_file(models / "loras/other.safetensors"), models / "loras/told.safetensors", told)
    lora = {"id": "one", "file": "told.safetensors", "strength": 0.8}
    (found,) = about("lora", notes(tmp_path, models, dit={"loras": [lora]}, first=GUIDED))
    assert found.startswith("warning: lora: told.safetensors says alpha / rank = 0.5 in metadata")
    assert found.endswith("it is applied with 1; diffusers' result has strength 0.4")


def test_plan_tells_how_much_of_each_lora_has_a_home(tmp_path: Path, models: Path) -> None:
    write_lora(models, "other.safetensors", num_foreign=1)
    names = [("one", "other"), ("off", "style"), ("gone", "gone")]
    loras = [{"id": name, "file": f"{file}.safetensors", "allow_partial": True} for name, file in names]
    loras[1]["strength"] = 0.0
    write_voice(tmp_path / "voice.wav", 0.3)
    recipe = write_recipe(tmp_path, tiny(dit={"loras": loras}))
    command = ["plan", recipe, "--models-dir", models, "--cache-dir", tmp_path / "cache", "--device", "cpu"]
    assert [line for line in call(*command)[1].splitlines() if line.startswith("lora ")] == [
        "lora one: 4 of 6 tensors have a home in the model",
        "lora off: 4 of 4 tensors have a home in the model",
    ]
    unmatched = [f"diffusion_model.else.0.lora_{part}.weight" for part in "AB"]
    assert json.loads(call(*command, "--json")[1])["loras"] == [
        {"id": "one", "file": "other.safetensors", "matched": 4, "total": 6, "unmatched": unmatched},
        {"id": "off", "file": "style.safetensors", "matched": 4, "total": 4, "unmatched": []},
        {"id": "gone", "file": "gone.safetensors", "matched": None, "total": None, "unmatched": None},
    ]


@pytest.mark.parametrize(
    ("file", "rank", "metadata", "is_told"),
    [
        ("causal", 128, {}, True),
        ("causal", 2, {}, False),  # anybody's LoRA on all of these layers
        ("live-avatar_r2", 2, {}, True),
        ("causal", 2, {"modelspec.title": "LiveAvatar, 2 ranks"}, True),
    ],
)
def test_liveavatars_lora_is_out_of_contract(
    tmp_path: Path, models: Path, file: str, rank: int, metadata: dict[str, str], *, is_told: bool
) -> None:
    """It is known by its name, or by its layers, their rank and the lack of alpha."""
    wanted = r"blocks\.\d+\.((self|cross)_attn\.[qkvo]|ffn\.[02])|audio_injector\.injector\.\d+\.[qkvo]"
    tensors = {}
    for key, value in load_file(models / "diffusion_models/tiny_s2v.safetensors").items():
        if re.fullmatch(rf"({wanted})\.weight", key):
            layer = f"base_model.model.{key.removesuffix('.weight')}"
            tensors[f"{layer}.lora_A.default.weight"] = torch.zeros(rank, value.shape[1])
            tensors[f"{layer}.lora_B.default.weight"] = torch.zeros(value.shape[0], rank)
    save_file(tensors, models / "loras" / f"{file}.safetensors", metadata)
    loras = [{"id": "causal", "file": f"{file}.safetensors"}]
    found = [note for note in notes(tmp_path, models, dit={"loras": loras}, first=GUIDED) if "LiveAvatar's" in note]
    assert bool(found) == is_told
    assert all(note.startswith("warning: lora: causal") and note.endswith("out of contract") for note in found)
