"""Shorter ways to say what has a long one, and to ask."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from recipes_for_tests import call, write_recipe

from s2v_flow import __version__
from s2v_flow.cli.main import cli
from s2v_flow.cli.options import OrderedCommand

PARAMS = "params: {seed: 1}"


@pytest.mark.parametrize(
    ("code", "begins"),
    [
        ("R051", "R051: An override names something that does not exist."),
        ("error[r051]", "R051: An override names something that does not exist."),
        ("7", "exit 7: Memory ran out"),
    ],
)
def test_a_code_is_explained_on_stdout(code: str, begins: str) -> None:
    """With the paragraph of docs/troubleshooting.md; tests of the pages hold the two together."""
    found, out, err = call("explain", code)
    assert (found, err) == (0, "")
    assert out.startswith(begins)
    assert "](" not in out
    assert max(map(len, out.splitlines())) <= 100


def test_an_unknown_code_is_a_mistake_of_the_command_line() -> None:
    code, out, err = call("explain", "R0511")
    assert (code, out) == (2, "")
    assert "there is no code 'R0511': did you mean R051?" in err


def test_help_and_version_are_commands_too() -> None:
    assert call("version") == (0, f"s2vflow, version {__version__}\n", "")
    assert call("help")[1] == call("--help")[1]
    assert call("help", "models", "list")[1] == call("models", "list", "--help")[1]
    assert call("help", "dance")[0] == 2


def seed_of(recipe: Path, *options: str, node: str = "first") -> int:
    code, out, err = call("config", recipe, "--json", *options)
    assert code == 0, err
    return int(json.loads(out)["nodes"][node]["seed"])


def test_a_seed_is_set_wherever_the_recipe_has_it(tmp_path: Path) -> None:
    """As --set's: a parameter; else every sample node's, and no extend's. The last one given counts."""
    plain = write_recipe(tmp_path, {"second": {"kind": "sample", "model": "$dit", "positive": "$positive"}})
    assert seed_of(plain, "--seed", "7") == seed_of(plain, "--seed", "7", node="second") == 7
    assert "seed" not in json.loads(call("config", plain, "--json", "--seed", "7")[1])["nodes"]["talk"]
    assert seed_of(plain, "--seed", "7", "--set", "nodes.first.seed=8") == 8
    assert seed_of(plain, "--set", "nodes.first.seed=8", "--seed", "7") == 7
    with_param = write_recipe(tmp_path, {"first": {"seed": "$params.seed"}}, extra=PARAMS)
    assert seed_of(with_param, "--seed", "9") == 9
    code, _, err = call("check", with_param, "--seed", "nine")
    assert code == 3
    assert "--seed:1:6: error[R052]: seed: expected a whole number, got 'nine'" in err


def test_a_seed_that_varies_is_not_set_beside_it(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, {"first": {"seed": "$params.seed"}}, extra=f"{PARAMS}\nmatrix: {{seed: [1, 2]}}")
    code, _, err = call("plan", recipe, "--seed", "4")
    assert code == 3
    assert "error[R064]" in err


def test_a_recipe_without_a_seed_has_none_to_set(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("s2vflow: 1\nnodes: {vae: {kind: load_vae, checkpoint: a.safetensors}}\n", encoding="utf-8")
    code, _, err = call("check", recipe, "--seed", "4")
    assert code == 3
    assert "error[R051]: seed: there is no such parameter" in err


def test_a_range_with_a_dash_is_told_how_it_is_written(tmp_path: Path) -> None:
    code, _, err = call("plan", write_recipe(tmp_path), "-m", "nodes.first.seed=1-8")
    assert code == 3
    assert "fix: a range is written with two dots: -m nodes.first.seed=1..8" in err


def test_several_recipes_at_once_are_told_how_to_run_each(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    code, _, err = call("check", recipe, recipe)
    assert code == 2
    assert "One recipe at a time: `s2vflow batch 'recipes/*.yaml'` runs many" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["\u2013set", "steps=4"], "An option begins with hyphens: --set"),
        (["\u2014seed", "4"], "An option begins with hyphens: --seed"),
        (["-seed", "4"], "Did you mean --seed?"),
        (["--steps", "4"], "A value of the recipe is changed with --set steps=VALUE"),
        (["--set", "steps", "4"], "--set takes PATH=VALUE, without blanks: --set steps=4"),
    ],
)
def test_an_option_that_is_written_wrong_is_told_how_it_is_written(words: list[str], said: str, tmp_path: Path) -> None:
    """As word processors write hyphens, as other programs take values."""
    code, _, err = call("check", write_recipe(tmp_path), *words)
    assert (code, said in err, "One recipe" in err) == (2, True, False), err


@pytest.mark.parametrize("words", [["", "--set", "steps=4"], ["talk.yaml", "-f", ""]])
def test_an_empty_path_is_a_mistake(words: list[str]) -> None:
    """It is that of a variable of the shell that is not set, and not the current folder."""
    code, _, err = call("check", *words)
    assert (code, "an empty path: is a variable of the shell not set?" in err) == (2, True)


def test_a_recipe_is_read_from_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its relative paths start in the current folder."""
    text = write_recipe(tmp_path).read_bytes()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text)))
    assert call("check", "-") == (0, "-: 14 nodes, no mistakes\n", "")


def test_profile_has_a_long_form(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, extra="profiles: {fast: {nodes: {first: {steps: 3}}}}")
    out = call("config", recipe, "--json", "--profile", "fast")[1]
    assert json.loads(out)["nodes"]["first"]["steps"] == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "r.yaml", "-o", "a.mp4", "--output=b.mp4"], "--output is given 2 times: leave one of them"),
        (
            ["plan", "r.yaml", "--seed", "1", "--seed", "2"],
            "--seed is given 2 times: leave one of them, or vary it",
        ),
        (["run", "r.yaml", "--previews", "--no-previews"], "--previews or --no-previews is given 2 times"),
        (["run", "r.yaml", "-q", "-v"], "--quiet and --verbose contradict each other"),
        (["show", "last", "--cache-dir", "a", "--cache-dir", "b"], "--cache-dir is given 2 times"),
        (["runs", "--dry-run"], "--dry-run says what --keep-last would forget"),
        (["cache", "export", "a.tar", "--run", "last", "--node", "first"], "--run takes all results of a run"),
        (["batch", "r.yaml", "--slurm", "slurm_partition=gpu"], "--slurm is for --engine slurm; the engine is local"),
        (["batch", "r.yaml", "--engine", "slurm", "--address", "auto"], "--address is for --engine ray"),
        (["batch", "export", "r.yaml", "--image", "me/it"], "--image is for --format k8s"),
        (["plan", "r.yaml", "--only", "first", "--from", "next"], "--only and --from are both given"),
    ],
)
def test_options_that_say_two_things_or_nothing_are_refused(words: list[str], said: str) -> None:
    code, out, err = call(*words)
    assert (code, out) == (2, "")
    assert said in err


def test_a_flag_may_be_said_again(tmp_path: Path) -> None:
    """And options that take several values: what scripts put together stays allowed."""
    recipe = write_recipe(tmp_path, extra=PARAMS)
    code, out, _ = call("check", recipe, "--json", "--json", "--set", "seed=2", "--set", "seed=3")
    assert (code, json.loads(out)["ok"]) == (0, True)


def test_every_command_knows_what_is_given_twice() -> None:
    def commands(command: click.Command) -> Iterator[click.Command]:
        if not isinstance(command, click.Group):
            yield command
        for part in getattr(command, "commands", {}).values():
            yield from commands(part)

    assert {type(command) for command in commands(cli)} == {OrderedCommand}


def test_a_schema_replaces_an_older_one_and_no_other_file(tmp_path: Path) -> None:
    other, schema = tmp_path / "other.yaml", tmp_path / "s.json"
    other.write_text("precious")
    code, _, err = call("schema", "-o", other)
    assert (code, other.read_text()) == (2, "precious")
    assert "other.yaml is there already, and says something else" in err
    for of in ("events", "recipe"):
        assert call("schema", "-o", schema, "--of", of)[0] == 0
    assert call("schema", "-o", other, "--force")[0] == 0
    assert other.read_text() == schema.read_text()
