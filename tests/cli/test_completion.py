"""What shells complete: asked as their scripts ask, by environment variables."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import BashComplete
from recipes_for_tests import RECIPES, call, quoted

from s2v_flow.api import KINDS
from s2v_flow.cli.completion import SHELLS
from s2v_flow.cli.main import cli

DEMO, QUALITY = RECIPES / "demo.yaml", RECIPES / "s2v_quality.yaml"


def complete(*words: object) -> list[str]:
    """Return what follows the last word."""
    *given, incomplete = map(str, words)
    shell = BashComplete(cli, {}, "s2vflow", "_S2VFLOW_COMPLETE")
    return [item.value for item in shell.get_completions(given, incomplete)]


def test_a_parameter_is_completed_without_torch() -> None:
    """In a process of its own, as the shell does it."""
    words = f"s2vflow run {quoted(DEMO)} --set st"
    code = (
        "import sys; from s2v_flow.cli.main import main\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'numpy', 'transformers', 'networkx'} & sys.modules.keys()), file=sys.stderr)"
    )
    environment = {**os.environ, "_S2VFLOW_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": "4"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "plain,steps=\n", "[]\n")


def test_paths_grow_part_by_part() -> None:
    """Parameters and sections, nodes, and the fields that a node's kind has, given or not."""
    assert complete("run", DEMO, "--set", "") == [
        *("image=", "audio=", "prompt=", "width=", "height=", "length=", "steps=", "cfg=", "seed="),
        *("params.", "nodes."),
    ]
    assert complete("plan", DEMO, "--set", "params.s") == ["params.steps=", "params.seed="]
    assert complete("plan", DEMO, "--set", "nodes.v") == ["nodes.vae.", "nodes.voice.", "nodes.video."]
    assert complete("check", DEMO, "--set", "nodes.voice.") == [
        f"nodes.voice.{field}=" for field in KINDS["load_audio"].model_fields
    ]


def test_items_of_lists_go_by_their_ids() -> None:
    paths = complete("run", RECIPES / "s2v_lightning.yaml", "--set", "nodes.dit.loras[")
    assert "nodes.dit.loras[lightning].strength=" in paths


def test_what_a_recipe_extends_counts() -> None:
    """Its parameters, its nodes and its profiles."""
    assert complete("run", QUALITY, "--set", "st") == ["steps="]
    assert complete("run", QUALITY, "--set", "nodes.dit.che") == ["nodes.dit.checkpoint="]
    assert complete("run", QUALITY, "-p", "") == ["quality", "bf16"]


def test_profiles_are_completed_after_a_comma() -> None:
    """Each once."""
    assert complete("run", QUALITY, "-p", "quality,") == ["quality,bf16"]
    assert complete("run", QUALITY, "-p", "qu") == ["quality"]


def test_kinds_and_commands_are_completed() -> None:
    assert complete("nodes", "load_v") == ["load_vae", "load_video"]
    assert "doctor" in complete("d")


def test_nodes_are_completed() -> None:
    for option in ("--until", "--from", "--only", "--force"):
        assert complete("run", DEMO, option, "vo") == ["voice"]


def test_runs_are_completed_by_their_ids(tmp_path: Path) -> None:
    """The newest first; a file may be meant, too."""
    for name in ("20261122-161502-7f3a", "20261123-080000-0001"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "manifest.json").touch()
    ids = ["20261123-080000-0001", "20261122-161502-7f3a"]
    for command in (["show"], ["diff"], ["diff", "last"]):
        assert complete(command[0], "--cache-dir", tmp_path, *command[1:], "") == ["last", *ids, ""]
    assert complete("show", "--cache-dir", tmp_path, "20261122") == [ids[1], "20261122"]


@pytest.mark.parametrize("recipe", ["no-such.yaml", "bad.yaml", None])
def test_without_a_readable_recipe_nothing_is_proposed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str | None
) -> None:
    """And nothing is said."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text("nodes: [")
    words = [] if recipe is None else [recipe]
    assert complete("run", *words, "--set", "st") == []
    assert complete("run", *words, "-p", "q") == []


def test_words_that_a_field_takes_are_completed() -> None:
    """Samplers, switches; of a parameter, what every field takes that it is put into."""
    assert complete("run", DEMO, "--set", "nodes.first.sampler=uni")[0] == "nodes.first.sampler=uni_pc"
    assert complete("run", DEMO, "--set", "nodes.first.init_first_frame=") == [
        f"nodes.first.init_first_frame={word}" for word in ("false", "true")
    ]
    assert complete("run", DEMO, "--set", "nodes.first.motion=p") == ["nodes.first.motion=pixels"]


def test_words_that_a_parameter_takes_are_completed(tmp_path: Path) -> None:
    """Those that all the fields take."""
    path = tmp_path / "r.yaml"
    path.write_text(
        "params: {how: official, solver: euler}\nnodes: {a: {kind: encode_audio, conditioning: $params.how}, "
        "b: {kind: sample, conditioning: $params.how, sampler: $params.solver}}\n"
    )
    assert complete("run", path, "--set", "how=") == ["how=comfyui", "how=official"]
    assert complete("run", path, "--set", "params.how=c") == ["params.how=comfyui"]
    assert complete("run", path, "--set", "solver=euler_") == ["solver=euler_ancestral"]


@pytest.mark.parametrize(
    "words",
    [
        "nodes.none.",
        "nodes.dit.kind.x",
        "steps=4",
        "steps=",
        "nodes.none.x=",
        "nodes.vae.none=",
        "no=",
        "other.",
        "params.x.y",
    ],
)
def test_where_no_path_leads_nothing_is_proposed(words: str) -> None:
    assert complete("run", DEMO, "--set", words) == []


def test_recipes_of_odd_shape_are_no_obstacle(tmp_path: Path) -> None:
    """Whatever a person has typed so far."""
    path = tmp_path / "r.yaml"
    path.write_text("params: 3\nnodes: {a: 3, b: {kind: [x]}, c: {kind: sample, loras: [1, {x: 1}]}}\n")
    assert complete("run", path, "--set", "s") == []
    assert complete("run", path, "--set", "nodes.a.") == []
    assert complete("run", path, "--set", "nodes.b.") == []
    assert "nodes.c.steps=" in complete("run", path, "--set", "nodes.c.")
    assert complete("run", path, "--set", "nodes.c.loras[1") == ["nodes.c.loras[1].x="]


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_is_printed_for_each_shell(shell: str) -> None:
    """It asks s2vflow itself."""
    code, out, err = call("completion", shell)
    assert (code, err) == (0, "")
    assert f"_S2VFLOW_COMPLETE={shell}_complete" in out


def test_bash_takes_the_script(tmp_path: Path) -> None:
    """Run in bash, where the program's own answer fills COMPREPLY."""
    path, program = tmp_path / "script", tmp_path / "s2vflow"
    path.write_text(call("completion", "bash")[1])
    program.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'from s2v_flow.cli.main import main; main()'\n")
    program.chmod(0o755)
    code = (
        f"source {quoted(path)}; COMP_WORDS=(s2vflow run {shlex.quote(quoted(DEMO))} --set nodes.first.sched);"
        " COMP_CWORD=4;"
        f" _s2vflow_completion {quoted(program)}; echo ${{COMPREPLY[@]}}"
    )
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout.strip(), done.stderr) == ("nodes.first.scheduler=", "")


def test_another_shell_is_exit_code_2() -> None:
    assert call("completion", "cmd")[0] == 2
