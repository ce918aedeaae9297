"""The lock: digests of models and inputs beside the recipe, and a run that refuses any others."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
from recipes_for_tests import call, without_notes, write_voice
from runs_for_tests import QUICK, Place, place

EXTRA = "profiles:\n  fp8: {nodes: {dit: {checkpoint: tiny_s2v_fp8_scaled.safetensors}}}"


@pytest.fixture
def here(tmp_path: Path, tiny_models: Path) -> Place:
    """A recipe with its lock; nothing has run."""
    made = place(tmp_path, tiny_models, QUICK, extra=EXTRA)
    assert call("lock", made.recipe, *made.where) == (0, f"{tmp_path / 'recipe.lock.yaml'}\n", "")
    return made


def lock_of(made: Place) -> Path:
    return made.folder / "recipe.lock.yaml"


def test_a_lock_names_every_model_and_input_with_its_digest(here: Place, tiny_models: Path) -> None:
    text = lock_of(here).read_text(encoding="utf-8")
    lines = text.splitlines()
    assert lines[0].startswith("# The models and inputs of recipe.yaml; `s2vflow run --locked` refuses any others.")
    assert "lock: 1" in lines
    voice = hashlib.sha256((here.folder / "voice.wav").read_bytes()).hexdigest()
    model = hashlib.sha256((tiny_models / "vae" / "tiny_vae.safetensors").read_bytes()).hexdigest()
    assert f"  voice.wav: sha256:{voice}" in lines
    assert f"  vae/tiny_vae.safetensors: sha256:{model}" in lines
    assert len(re.findall(r"sha256:[0-9a-f]{64}", text)) == 6


def test_writing_the_lock_again_changes_nothing(here: Place) -> None:
    before = lock_of(here).read_bytes()
    assert call("lock", here.recipe, *here.where, "--json")[:2] == (
        0,
        json.dumps({"lock": str(lock_of(here))}, indent=2) + "\n",
    )
    assert lock_of(here).read_bytes() == before


def test_a_run_with_the_files_that_were_locked_goes_through(here: Place, quick_run: Place) -> None:
    shutil.copytree(quick_run.cache, here.cache, dirs_exist_ok=True)
    code, out, err = here.run("--locked")
    assert (code, out) == (0, f"{here.video}\n"), err


def test_another_input_is_refused_before_anything_runs(here: Place) -> None:
    """Both digests are shown, at their place in the lock."""
    was = hashlib.sha256((here.folder / "voice.wav").read_bytes()).hexdigest()
    write_voice(here.folder / "voice.wav", 0.9)
    now = hashlib.sha256((here.folder / "voice.wav").read_bytes()).hexdigest()
    code, out, err = here.run("--locked")
    assert (code, out) == (4, "")
    number = 1 + lock_of(here).read_text().splitlines().index(f"  voice.wav: sha256:{was}")
    message = f"voice.wav is not the file that was locked: expected sha256:{was}, got sha256:{now}"
    assert without_notes(err).splitlines() == [
        f"{lock_of(here)}:{number}:14: error[L003]: {message}",
        f"{number:>5} |   voice.wav: sha256:{was}",
        f"      |              {'^' * 71}",
        "  in:  nodes.voice.file",
        f"  fix: put the locked file back; or, if this one is meant, `s2vflow lock {here.recipe}`",
        "",
        "1 mistake; nothing was run",
    ]
    assert not list(here.cache.glob("objects/??/*"))
    assert here.manifests() == []


def test_one_flipped_byte_of_a_model_is_refused(here: Place, tiny_models: Path) -> None:
    shutil.copytree(tiny_models, here.folder / "models")
    vae = here.folder / "models" / "vae" / "tiny_vae.safetensors"
    vae.chmod(0o644)
    content = bytearray(vae.read_bytes())
    content[-1] ^= 1
    vae.write_bytes(content)
    where = ["--models-dir", here.folder / "models", "--cache-dir", here.cache, "--device", "cpu"]
    code, out, err = call("run", here.recipe, *where, "--locked")
    assert (code, out) == (4, "")
    assert "error[L003]: tiny_vae.safetensors is not the file that was locked" in err
    assert "in:  nodes.vae.checkpoint" in err


def test_a_file_that_the_lock_does_not_know_is_refused_at_its_place_in_the_recipe(here: Place) -> None:
    """Every such file at once, together with changed ones."""
    write_voice(here.folder / "voice.wav", 0.9)
    code, out, err = here.run("--locked", "-p", "fp8")
    assert (code, out) == (4, "")
    found = r"recipe\.yaml:\d+:\d+: error\[L002\]: tiny_s2v_fp8_scaled\.safetensors is not in recipe\.lock\.yaml"
    assert re.search(found, err)
    assert "error[L003]: voice.wav" in err
    assert err.endswith("2 mistakes; nothing was run\n")


def test_one_lock_holds_several_profiles_files(here: Place) -> None:
    before = lock_of(here).read_text()
    assert call("lock", here.recipe, *here.where, "-p", "fp8")[0] == 0
    after = lock_of(here).read_text()
    assert set(before.splitlines()) < set(after.splitlines())
    assert "diffusion_models/tiny_s2v_fp8_scaled.safetensors" in after
    assert call("lock", here.recipe, *here.where)[0] == 0
    assert lock_of(here).read_text() == before, "without a profile the lock is written anew"


def test_without_a_lock_a_locked_run_is_refused(here: Place) -> None:
    lock_of(here).unlink()
    code, out, err = here.run("--locked")
    assert (code, out) == (4, "")
    assert "recipe.lock.yaml: there is no lock" in err
    assert f"`s2vflow lock {here.recipe}` writes one" in err


def test_a_lock_may_stand_elsewhere_but_must_be_writable(here: Place) -> None:
    assert call("lock", here.recipe, *here.where, "-o", here.folder / "b.yaml")[0] == 0
    assert (here.folder / "b.yaml").read_bytes() == lock_of(here).read_bytes()
    code, _, err = call("lock", here.recipe, *here.where, "-o", here.folder / "b.yaml" / "c.yaml")
    assert code == 2
    assert "cannot be written" in err


def test_a_lock_elsewhere_replaces_an_older_lock_and_no_other_file(here: Place) -> None:
    recipe = here.recipe.read_bytes()
    code, _, err = call("lock", here.recipe, *here.where, "-o", here.recipe)
    assert code == 2
    assert "recipe.yaml is there already, and says something else" in err
    assert here.recipe.read_bytes() == recipe
    other = here.folder / "b.yaml"
    other.write_text("# ours\nlock: 1\nmodels: {}\n")
    assert call("lock", here.recipe, *here.where, "-o", other)[0] == 0
    assert other.read_bytes() == lock_of(here).read_bytes()
    other.write_text("mine")
    assert call("lock", here.recipe, *here.where, "-o", other, "--force")[0] == 0
    assert other.read_bytes() == lock_of(here).read_bytes()


@pytest.mark.parametrize(
    ("text", "is_lock"),
    [
        ("<<<<<<< HEAD\n# The models\nlock: 1\nmodels: {}\n=======\nlock: 1\n>>>>>>> other\n", True),
        ("lock: 2\n", True),
        ("# my own notes\nmodels: [a, b]\n", False),
        ("", False),
    ],
)
def test_a_damaged_lock_is_written_anew_and_anything_else_stays(text: str, is_lock: bool, here: Place) -> None:
    """As docs/troubleshooting.md says at L001."""
    sound = lock_of(here).read_text(encoding="utf-8")
    lock_of(here).write_text(text, encoding="utf-8")
    code, _, err = call("lock", here.recipe, *here.where)
    assert (code, lock_of(here).read_text(encoding="utf-8")) == ((0, sound) if is_lock else (2, text))
    assert ("is there already" in err, "overwrite it with --force" in err) == (not is_lock, not is_lock)
    assert call("lock", here.recipe, *here.where, "--force")[0] == 0
    assert lock_of(here).read_text(encoding="utf-8") == sound


def test_a_missing_file_cannot_be_locked(here: Place) -> None:
    (here.folder / "voice.wav").unlink()
    code, out, err = call("lock", here.recipe, *here.where)
    assert (code, out) == (4, "")
    assert "a file is missing: voice.wav" in err


DIGEST = "sha256:" + "0" * 64


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("", "1:1", "a lock is a map, got null"),
        ("- 1", "1:1", "a lock is a map, got a list"),
        ("lock: 2", "1:7", "expected `lock: 1`"),
        ("lock: true", "1:7", "expected `lock: 1`"),
        ("models: {}", "1:1", "expected `lock: 1`"),
        ("lock: 1\nmodles: {}", "2:1", "a lock has models, inputs and packages, not 'modles'"),
        ("lock: 1\nmodels: []", "2:9", "models: expected a map"),
        ("lock: 1\nmodels: {a: abc}", "2:13", "a: expected its digest"),
        ("lock: 1\ninputs: {a: {sha256: abc}}", "2:13", "a: expected its digest"),
        (f"lock: 1\ninputs: {{a: {DIGEST}0}}", "2:13", "a: expected its digest"),
        (f"lock: 1\ninputs:\n  a: {DIGEST}\n  a: {DIGEST}", "4:3", "R006"),
        ("lock: 1\nmodels: {a: &x !!python/name:os.system y}", "2:", "R005"),
        ("a: [" * 60, "1:", "R004"),
    ],
)
def test_a_lock_that_is_no_lock_is_told_by_place(here: Place, text: str, place: str, words: str) -> None:
    lock_of(here).write_text(text, encoding="utf-8")
    code, out, err = here.run("--locked")
    assert (code, out) == (3, "")
    assert f"{lock_of(here)}:{place}" in err
    assert words in err
    assert call("lock", here.recipe, *here.where, "-p", "fp8")[0] == 3, "nor is it added to"
