"""`s2vflow models`: with and without a command, `convert`, and where the way to it is shown."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.shell_completion import BashComplete
from pickles_for_tests import Calls, forge
from recipes_for_tests import RECIPES, call, quoted, write_recipe
from safetensors.torch import load_file

from s2v_flow.cli.main import cli
from s2v_flow.library.needs import HOMES

VAE, ENCODER, DIT = "wan_2.1_vae.safetensors", "umt5_xxl_fp16.safetensors", "wan2.2_s2v_14B_fp8_scaled.safetensors"
ALL = {"vae": {"checkpoint": VAE}, "umt5": {"checkpoint": ENCODER}, "dit": {"checkpoint": DIT}}


def complete(*words: object) -> list[str]:
    *given, incomplete = map(str, words)
    shell = BashComplete(cli, {}, "s2vflow", "_S2VFLOW_COMPLETE")
    return [item.value for item in shell.get_completions(given, incomplete)]


def source(folder: Path, models: Path) -> Path:
    return Path(shutil.copy(models / "vae/tiny_vae.safetensors", folder / "source.safetensors"))


def test_list_need_not_be_named(tmp_path: Path) -> None:
    """With a recipe, options before it or nothing at all: the same output to the letter."""
    recipe = write_recipe(tmp_path)
    where = ["--models-dir", tmp_path, "--cache-dir", tmp_path / "cache"]
    for words in ([recipe, *where], [*where, recipe, "--json"], ["--only", VAE, *where], where):
        assert call("models", *words) == call("models", "list", *words)
    assert call("models", "--no-such-option")[0] == 2


def test_help_shows_both_ways() -> None:
    _, out, _ = call("models", "--help")
    assert out.startswith("Usage: s2vflow models [RECIPE] [OPTIONS] | COMMAND [ARGS]...\n")
    assert "short for" in out
    assert "convert" in out
    _, listing, _ = call("models", "recipe.yaml", "--help")
    assert "--download" in listing


def test_commands_and_what_follows_list_are_completed() -> None:
    """A recipe's values too, as before."""
    assert complete("models", "con") == ["convert", "con"]  # the last one stands for files
    assert complete("models", "convert", "x", "--dtype", "b") == ["bf16"]
    assert complete("models", RECIPES / "demo.yaml", "--set", "st") == ["steps="]
    assert complete("models", RECIPES / "s2v_quality.yaml", "-p", "") == ["quality", "bf16"]


def test_a_file_is_converted(tmp_path: Path, tiny_models: Path) -> None:
    """Its name on stdout, progress on stderr; or one object."""
    target = tmp_path / "a.safetensors"
    code, out, err = call("models", "convert", source(tmp_path, tiny_models), "-o", target, "--dtype", "fp16")
    assert (code, out) == (0, f"{target}\n")
    assert "a.safetensors: 1.8 MB of 1.8 MB" in err
    again = ("models", "convert", tmp_path / "source.safetensors", "-o", target, "--kind", "vae", "--json")
    assert call(*again)[0] == 2
    code, out, _ = call(*again, "--force")
    told = json.loads(out)
    assert (code, told["target"], told["kind"], told["tensors"]) == (0, str(target), "vae", len(load_file(target)))
    assert (told["bytes"], list(told["source_sha256"]), told["notes"]) == (
        target.stat().st_size,
        ["source.safetensors"],
        [],
    )


@pytest.mark.slow
def test_a_hostile_file_is_exit_code_5_and_calls_nothing(tmp_path: Path) -> None:
    path = forge(tmp_path / "a.pth", {"x": Calls(tmp_path / "trace")})
    code, out, err = call("models", "convert", path, "-o", tmp_path / "out" / "a.safetensors")
    assert (code, out) == (5, "")
    assert f"error: {path}: holds more than plain tensors" in err
    assert "fix: use a file that holds a plain state dict" in err
    assert not (tmp_path / "trace").exists()
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("name", ["no.pth", "."])
def test_a_missing_source_is_exit_code_4(tmp_path: Path, name: str) -> None:
    assert call("models", "convert", tmp_path / name, "-o", tmp_path / "a.safetensors")[0] == 4


@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_recipe_that_names_a_pickle_is_told_the_command(tmp_path: Path, command: str) -> None:
    """It is not opened; names that a shell would misread are quoted."""
    path = tmp_path / "models" / "vae" / "my Wan2.1_VAE.pth"
    path.parent.mkdir(parents=True)
    forge(path, {"x": Calls(tmp_path / "trace")})
    recipe = write_recipe(tmp_path, {"vae": {"checkpoint": path.name}})
    where = ["--models-dir", tmp_path / "models", "--cache-dir", tmp_path / "cache"]
    code, _, err = call(command, recipe, *where)
    assert code == 5
    assert f"fix: convert it first: s2vflow models convert '{path}' -o '{path.with_suffix('.safetensors')}'" in err
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("place", ["", "Wan2.2-S2V-14B", "folders"])
def test_the_authors_own_files_are_seen_and_the_command_is_shown(tmp_path: Path, place: str) -> None:
    """In a models folder, in its folder, or in the release's; the text encoder as fp16, since the recipe says so."""
    release = {
        "vae": "Wan2.1_VAE.pth",
        "text_encoders": "models_t5_umt5-xxl-enc-bf16.pth",
        "diffusion_models": "diffusion_pytorch_model.safetensors.index.json",
    }
    paths = {}
    for folder, name in release.items():
        paths[folder] = tmp_path / (folder if place == "folders" else place) / name
        paths[folder].parent.mkdir(exist_ok=True)
        paths[folder].touch()
    recipe = write_recipe(tmp_path, ALL)
    where = ["--models-dir", tmp_path, "--cache-dir", tmp_path / "cache"]
    told = {item["file"]: item["convert"] for item in json.loads(call("models", recipe, *where, "--json")[1])["models"]}
    bf16 = "wan2.2_s2v_14B_bf16.safetensors"
    for file, folder, target, dtype in (
        (VAE, "vae", VAE, ""),
        (ENCODER, "text_encoders", ENCODER, " --dtype fp16"),
        (DIT, "diffusion_models", bf16, " --dtype bf16"),
    ):
        made = quoted(tmp_path / folder / target)
        assert told[file] == f"s2vflow models convert {quoted(paths[folder])} -o {made}{dtype}"
    assert told["tiny_wav2vec2.safetensors"] is None
    text = call("models", recipe, *where)[1]
    assert f"         can be made by {told[VAE]}\n" in text
    assert f"         can be made in bfloat16, to be named in the recipe instead, by {told[DIT]}\n" in text


def test_only_well_known_files_are_made_of_the_authors_own(tmp_path: Path) -> None:
    """A fine-tune of the same folder is another model."""
    (tmp_path / "Wan2.1_VAE.pth").touch()
    recipe = write_recipe(tmp_path, {"vae": {"checkpoint": "mine.safetensors"}})
    out = call("models", recipe, "--models-dir", tmp_path, "--cache-dir", tmp_path / "cache")[1]
    assert "mine.safetensors" in out
    assert "convert" not in out
    assert VAE in HOMES
