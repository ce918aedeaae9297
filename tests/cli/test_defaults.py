from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from s2v_flow import api
from s2v_flow.cache.budget import NO_LIMIT
from s2v_flow.cli import main, report
from s2v_flow.cli.defaults import defaults_path, read_defaults, with_defaults
from s2v_flow.cli.options import make_options
from s2v_flow.errors import ExitCode, RecipeError, S2VFlowError

RECIPE = """
s2vflow: 1
params: {steps: 4}
nodes:
  clip: {kind: load_latent, file: clip.latent}
  out: {kind: save_latent, latent: $clip, file: "out-${params.steps}.latent"}
"""


KNOWN = "models_dirs, extra_model_paths, input_dirs, output_dir, cache_dir, cache_limit, device, vram"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the defaults file that the environment names; it is still to be written."""
    for name in ("S2VFLOW_MODELS_DIR", "S2VFLOW_CACHE_DIR", "S2VFLOW_EXTRA_MODEL_PATHS"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "config" / "defaults.yaml"
    path.parent.mkdir()
    monkeypatch.setenv("S2VFLOW_DEFAULTS", str(path))
    return path


def test_defaults_hold_for_options_that_are_not_given(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line wins over the environment, which wins over the file; folders start at the file's own."""
    file.write_text("models_dirs: [models, ~/models]\ninput_dirs: in\ncache_dir: /cache\ndevice: cuda:1\n")
    given = {"models_dirs": (), "input_dirs": (Path("mine"),), "output_dir": None, "cache_dir": None, "device": None}
    assert with_defaults(given) == {
        "models_dirs": [file.parent / "models", Path.home() / "models"],
        "input_dirs": (Path("mine"),),
        "output_dir": None,
        "cache_dir": Path("/cache"),
        "device": "cuda:1",
    }
    monkeypatch.setenv("S2VFLOW_CACHE_DIR", "/elsewhere")
    assert with_defaults(given)["cache_dir"] is None
    assert with_defaults({"profiles": ["a"]}) == {"profiles": ["a"]}


def test_without_a_file_there_are_no_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The usual file may be missing, an empty variable switches it off, but a file that is named must be there."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("S2VFLOW_DEFAULTS", "")
    assert defaults_path() is None
    assert read_defaults() == {}
    monkeypatch.setenv("S2VFLOW_DEFAULTS", str(tmp_path / "nothing.yaml"))
    with pytest.raises(RecipeError, match="nothing was run"):
        read_defaults()
    monkeypatch.delenv("S2VFLOW_DEFAULTS")
    monkeypatch.setattr("platformdirs.user_config_path", lambda name: tmp_path / name)
    assert defaults_path() == tmp_path / "s2vflow" / "defaults.yaml"
    assert read_defaults() == {}


def test_an_empty_file_has_no_defaults(file: Path) -> None:
    """A file of comments alone is right."""
    file.write_text("# device: cuda\n")
    assert read_defaults() == {}


def test_mistakes_in_the_defaults_are_shown_at_their_place(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the form of a recipe's mistakes, with the exit code of a wrong command line."""
    file.write_text(
        "steps: 4\nmodel_dirs: [a]\ndevice: 1\nmodels_dirs: [a, {b: c}]\noutput_dir: [a]\ncache_limit: lots\n"
    )
    with pytest.raises(RecipeError) as caught:
        read_defaults()
    assert caught.value.exit_code is ExitCode.USAGE
    report.print_error(caught.value)
    assert (
        capsys.readouterr().err.replace(str(file), "defaults.yaml").replace(KNOWN, "(all of them)")
        == """\
defaults.yaml:1:1: error[R010]: there is no default steps
    1 | steps: 4
      | ^^^^^
  fix: known: (all of them)

defaults.yaml:2:1: error[R010]: there is no default model_dirs
    2 | model_dirs: [a]
      | ^^^^^^^^^^
  fix: did you mean models_dirs? known: (all of them)

defaults.yaml:3:9: error[R012]: device: expected auto, cpu, cuda or cuda:N, got 1
    3 | device: 1
      |         ^

defaults.yaml:4:18: error[R012]: models_dirs: expected a path, got a map
    4 | models_dirs: [a, {b: c}]
      |                  ^

defaults.yaml:5:13: error[R012]: output_dir: expected a path, got a list
    5 | output_dir: [a]
      |             ^

defaults.yaml:6:14: error[R012]: cache_limit: expected a size like 20G, or none, got 'lots'
    6 | cache_limit: lots
      |              ^^^^

6 mistakes; nothing was run
"""
    )


@pytest.mark.parametrize("text", ["- a", "3", "a: [", "device: cpu\ndevice: cuda", "a" * 2_000_000])
def test_a_file_that_is_no_map_is_refused(file: Path, text: str) -> None:
    """Whatever it holds, and however much."""
    file.write_text(text)
    with pytest.raises(RecipeError):
        read_defaults()


def test_the_command_line_uses_the_defaults(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a command looks for files; the others do not read them."""
    file.write_text("cache_dir: cache\n")
    recipe = file.parent / "recipe.yaml"
    recipe.write_text(RECIPE)
    found: list[api.Options] = []

    def plan(path: Path, options: api.Options) -> None:
        found.append(options)
        raise RecipeError("stop here")

    monkeypatch.setattr(api, "plan", plan)
    result = CliRunner().invoke(main.cli, ["plan", str(recipe)])
    assert isinstance(result.exception, RecipeError)
    assert (found[0].cache_dir, found[0].device) == (file.parent / "cache", "auto")
    file.write_text("cache: cache\n")
    assert CliRunner().invoke(main.cli, ["check", str(recipe)]).exit_code == 0


def test_the_caches_limit_comes_from_the_command_line_the_environment_or_the_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this order; as text, as a number of bytes, or none."""
    monkeypatch.delenv("S2VFLOW_CACHE_LIMIT", raising=False)
    context = click.Context(main.cli)

    def limit(given: str | None = None) -> int | None:
        with context:
            return make_options(device=None, cache_limit=given).size_limit

    file.write_text("")
    assert limit() is None
    for text, size in (("20G", 20 * 10**9), ("500000", 500000), ("none", NO_LIMIT), ("1.5 MB", 1_500_000)):
        file.write_text(f"cache_limit: {text}\n")
        assert limit() == size
    assert limit("1k") == 1000
    monkeypatch.setenv("S2VFLOW_CACHE_LIMIT", "2k")
    assert (limit(), limit("1k")) == (2000, 1000)
    monkeypatch.setenv("S2VFLOW_CACHE_LIMIT", "much")
    with pytest.raises(S2VFlowError, match="S2VFLOW_CACHE_LIMIT: 'much' is no size") as caught:
        limit()
    assert caught.value.exit_code == ExitCode.USAGE


def test_the_budget_of_memory_comes_from_the_command_line_or_the_file(file: Path) -> None:
    """As `--vram auto` says that there is none, whatever the file has."""
    with click.Context(main.cli):
        for text, size in (("12GiB", 12 * 2**30), ("500000", 500000), ("auto", None)):
            file.write_text(f"vram: {text}\n")
            assert make_options(device=None, vram=None).vram == size
        file.write_text("vram: 12GiB\n")
        assert make_options(device=None, vram="auto").vram is None
        assert make_options(device=None, vram="1.5 MiB").vram == 3 * 2**19


def test_changes_keep_the_order_of_the_command_line(file: Path, tmp_path: Path) -> None:
    """Whatever their kinds: the last one wins."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)

    def steps(*arguments: str) -> object:
        result = CliRunner().invoke(main.cli, ["config", str(recipe), "--json", *arguments], catch_exceptions=False)
        return json.loads(result.stdout)["params"]["steps"]

    assert steps() == 4
    assert steps("--set", "steps=5", "--set-json=steps=6", "--set", "steps=7") == 7
    assert steps("--set", "steps=5", "--set", "steps=7", "--set-json", "steps=6") == 6
    assert steps("--set-json", "steps=6", "--unset", "steps") == 4
    assert steps("--unset", "steps", "--set-json", "steps=6") == 6


def test_config_prints_yaml_and_where_it_comes_from(tmp_path: Path) -> None:
    """On stdout, ready for a file."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    arguments = ["config", str(recipe), "--origin", "--set", "steps=5"]
    result = CliRunner().invoke(main.cli, arguments, catch_exceptions=False)
    assert (
        result.stdout.replace(str(recipe), "recipe.yaml")
        == """\
s2vflow: 1

params:
  steps: 5  # --set

nodes:
  clip:
    kind: load_latent  # recipe.yaml:5
    file: clip.latent  # recipe.yaml:5
  out:
    kind: save_latent  # recipe.yaml:6
    latent: $clip  # recipe.yaml:6
    file: out-5.latent  # recipe.yaml:6
"""
    )
    result = CliRunner().invoke(main.cli, ["config", str(recipe), "--references"], catch_exceptions=False)
    assert "out-${params.steps}.latent" in result.stdout
