"""The command line: what it prints where, its exit codes, and what a second run computes."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from recipes_for_tests import call, tiny, without_notes, write_recipe, write_voice

from s2v_flow import __version__
from s2v_flow.cli.progress import Progress
from s2v_flow.graph.events import Event, NodeFinished, NodeStarted, Noted, RunStarted, StepDone

QUICK = tiny(talk={"chunks": 2, "seed": [1, 2]}, video={"preset": "ultrafast"})


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> tuple[Path, list[str]]:
    """Return a recipe that has run already, and the options that say where everything is."""
    folder = tmp_path_factory.mktemp("done")
    write_voice(folder / "voice.wav", 1.2)
    recipe = write_recipe(folder, QUICK)
    where = ["--models-dir", str(tiny_models), "--cache-dir", str(folder / "cache"), "--device", "cpu"]
    code, out, err = call("run", recipe, *where)
    assert (code, out) == (0, f"{folder / 'out' / 'talk.mp4'}\n"), err
    lines = err.splitlines()
    clock = r"\d\d:\d\d:\d\d recipe: "
    assert all(re.match(f"{clock}|note: |warning: ", line) for line in lines)
    assert any(re.match(clock + "begin: ", line) for line in lines)
    assert any(re.fullmatch(clock + r"first: sampling chunk 1 of 3", line) for line in lines)
    assert any(re.fullmatch(clock + r"talk\[2\]: done, \d+\.\d s, peak \d+\.\d [GM]iB", line) for line in lines)
    end = r"end: talk\.mp4  1\.2 s · 64x64 · 3 chunks · 7 computed, 0 stored · \d.* s · seed 20"
    assert re.fullmatch(clock + end, lines[-1]), lines[-1]
    assert "\x1b" not in err
    return recipe, where


def nodes_to_run(plan: dict[str, Any]) -> list[str]:
    return [node["name"] for node in plan["nodes"] if node["status"] == "RUN"]


def test_help_and_version() -> None:
    code, text, _ = call("--help")
    assert code == 0
    for command in ("run", "plan", "check", "nodes", "schema"):
        assert re.search(rf"^  {command} ", text, re.MULTILINE)
    for number in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 130, 143):
        assert re.search(rf"^\s+{number}  ", text, re.MULTILINE)
    assert call("--version") == (0, f"s2vflow, version {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["dance"], "dance"),
        (["run"], "RECIPE"),
        (["run", "x.yaml", "--fast"], "--fast"),
        (["nodes", "smple"], "did you mean sample?"),
        (["plan", "recipe.yaml", "--device", "tpu"], "use auto, cpu, cuda"),
        (["schema", "-o", "recipe.yaml/x.json"], "recipe.yaml/x.json: cannot be written"),
    ],
)
def test_a_wrong_command_line_is_exit_code_2(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path)
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert words in err


def test_a_right_recipe_is_checked_without_models_or_inputs(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    assert call("check", recipe) == (0, f"{recipe}: 14 nodes, no mistakes\n", "")
    code, out, _ = call("check", recipe, "--json")
    assert code == 0
    assert json.loads(out)["ok"] is True


@pytest.mark.parametrize("command", ["check", "plan", "run"])
def test_a_wrong_recipe_is_exit_code_3_with_its_mistakes_on_stderr(command: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, {"first": {"steps": 0, "smapler": "euler"}})
    code, out, err = call(command, recipe)
    assert (code, out) == (3, "")
    assert re.search(rf"^{re.escape(str(recipe))}:\d+:\d+: error\[R013\]: steps: must be at least 1, got 0$", err, re.M)
    assert "did you mean sampler?" in err
    assert err.endswith("2 mistakes; nothing was run\n")


def test_a_plan_as_json_names_chunks_frames_and_every_node(done: tuple[Path, list[str]]) -> None:
    recipe, where = done
    code, out, err = call("plan", recipe, *where, "--json")
    plan = json.loads(out)
    assert (code, err) == (0, "")
    assert (plan["chunks"], plan["frames"], plan["seconds"], plan["missing"]) == (3, 20, 1.25, [])
    assert all(
        {"name", "kind", "version", "status", "reason", "fingerprint", "facts"} == node.keys() for node in plan["nodes"]
    )
    found = {node["name"]: (node["kind"], node["status"]) for node in plan["nodes"]}
    assert found["talk[2]"] == ("extend", "HIT")
    assert found["video"] == ("save_video", "HIT")
    assert found["dit"] == ("load_diffusion_model", "SKIP")


@pytest.mark.parametrize("command", ["plan", "run"])
def test_missing_files_are_exit_code_4_after_the_plan(command: str, tmp_path: Path) -> None:
    name = "wan2.2_s2v_14B_fp8_scaled.safetensors"
    write_voice(tmp_path / "voice.wav", 14)
    recipe = write_recipe(tmp_path, {"dit": {"checkpoint": name}})
    where = ["--models-dir", tmp_path / "models", "--cache-dir", tmp_path / "cache"]
    code, out, err = call(command, recipe, *where)
    assert code == 4
    assert out.startswith(f"plan of {recipe}")
    assert "3 chunks, 224 frames, 14.00 s" in out
    assert f"missing: {name} (diffusion_models), looked for in {tmp_path / 'models' / 'diffusion_models'}" in out
    assert command == "plan" or err.startswith(f"error: a file is missing: {name}\n")
    code, out, _ = call(command, recipe, *where, "--json")
    plan = json.loads(out)
    assert (code, plan["chunks"], plan["frames"]) == (4, 3, 224)
    (missing,) = plan["missing"]
    assert (missing["file"], missing["kind"]) == (name, "diffusion_models")
    assert [home.rpartition("/")[2] for home in missing["homes"]] == [name]
    assert not (tmp_path / "cache" / "objects").exists()


def test_the_kinds_and_their_fields_can_be_listed() -> None:
    code, out, _ = call("nodes")
    assert code == 0
    assert re.search(r"^save_video +Write an mp4", out, re.M)
    assert "  steps: a whole number, default 20\n" in call("nodes", "sample")[1]
    (kind,) = json.loads(call("nodes", "sample", "--json")[1])
    fields = {field["name"]: field for field in kind["fields"]}
    assert (fields["steps"]["default"], fields["model"]["type"], fields["model"]["required"]) == (
        20,
        "$diffusion_model",
        True,
    )


def test_the_schema_is_printed_or_written(tmp_path: Path) -> None:
    code, out, _ = call("schema")
    schema = json.loads(out)
    assert code == 0
    jsonschema.Draft202012Validator.check_schema(schema)
    assert call("schema", "-o", tmp_path / "schema.json") == (0, "", "")
    assert (tmp_path / "schema.json").read_text() == out


def test_a_second_run_computes_nothing_and_never_imports_torch(done: tuple[Path, list[str]]) -> None:
    recipe, where = done
    code = (
        "import sys; from s2v_flow.cli import main as cli; sys.argv[0] = 's2vflow'\n"
        "try: cli.main()\n"
        "finally: print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    command = [sys.executable, "-c", code, "run", recipe, *where, "--json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    body, _, imported = result.stdout.rstrip("\n").rpartition("\n")
    report = json.loads(body)
    assert report["computed"] == []
    assert {"first", "talk[1]", "talk[2]", "video"} <= set(report["stored"])
    assert report["outputs"] == {"video": [str(recipe.parent / "out" / "talk.mp4")]}
    assert imported == "False False"
    told = f"recipe: video: {recipe.parent / 'out' / 'talk.mp4'} is up to date"
    assert [line.partition(" ")[2] for line in without_notes(result.stderr).splitlines()] == [told]


def test_another_seed_for_the_last_chunk_runs_that_chunk_and_what_follows(
    done: tuple[Path, list[str]], tmp_path: Path
) -> None:
    recipe, where = done
    change = ["--set", "nodes.talk.seed=[1,3]", "--output-dir", tmp_path]
    assert nodes_to_run(json.loads(call("plan", recipe, *where, *change, "--json")[1])) == [
        "talk[2]",
        "frames",
        "video",
    ]
    report = json.loads(call("run", recipe, *where, *change, "--json")[1])
    assert report["computed"] == ["talk[2]", "video"]
    assert (tmp_path / "out" / "talk.mp4").read_bytes() != (recipe.parent / "out" / "talk.mp4").read_bytes()


def test_an_output_that_was_removed_is_put_back_from_the_cache(done: tuple[Path, list[str]]) -> None:
    recipe, where = done
    video = recipe.parent / "out" / "talk.mp4"
    content = video.read_bytes()
    video.unlink()
    code, out, err = call("run", recipe, *where)
    assert (code, out, without_notes(err)) == (0, f"{video}\n", "")
    assert video.read_bytes() == content


def test_profiles_override_files_and_set_reach_the_plan_in_this_order(tmp_path: Path) -> None:
    write_voice(tmp_path / "voice.wav", 1)
    extra = "profiles:\n  quick: {nodes: {first: {steps: 3, length: 9}}}\n  long: {nodes: {talk: {chunks: 2}}}"
    recipe = write_recipe(tmp_path, {"frames": {"trim": "none"}}, extra=extra)
    (tmp_path / "over.yaml").write_text("nodes: {first: {length: 13, seed: 77}}\n")

    def plan(*options: object) -> list[tuple[int, int, int]]:
        out = call("plan", recipe, "--cache-dir", tmp_path / "cache", *options, "--json")[1]
        facts = [node["facts"] for node in json.loads(out)["nodes"] if "chunk" in node["facts"]]
        return [(item["steps"], item["latent_frames"], item["seed"]) for item in facts]

    assert plan() == [(20, 20, 20)]
    assert plan("-p", "quick,long") == [(3, 3, 20), (3, 3, 21), (3, 3, 22)]
    assert plan("-p", "quick", "-p", "long", "-f", tmp_path / "over.yaml") == [(3, 4, 77), (3, 4, 78), (3, 4, 79)]
    given = ["-p", "quick,long", "-f", tmp_path / "over.yaml", "--set", "nodes.first.steps=5"]
    assert plan(*given, "--set", "nodes.talk.chunks=0") == [(5, 4, 77)]


@pytest.mark.parametrize("file", ["../out.mp4", "/tmp/out.mp4", "out/../../out.mp4"])
def test_a_recipe_may_not_write_outside_its_folder_but_its_user_may(file: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    write_voice(tmp_path / "folder" / "voice.wav", 1)
    where = ["--cache-dir", tmp_path / "cache"]
    code, out, err = call("plan", write_recipe(tmp_path / "folder", {"video": {"file": file}}), *where)
    assert (code, out) == (5, "")
    assert file in err
    assert "fix: " in err
    harmless = write_recipe(tmp_path / "folder")
    assert call("plan", harmless, *where, "--set", f"nodes.video.file={file}")[0] == 0


def test_notes_are_told_before_the_run(done: tuple[Path, list[str]], tmp_path: Path) -> None:
    recipe, where = done
    options = ["--set", "nodes.talk.chunks=0", "--set", "nodes.talk.seed=null", "--output-dir", tmp_path]
    code, _, err = call("run", recipe, *where, *options)
    assert code == 0
    assert "note: frames: the chunks cover 0.31 s of 1.25 s of sound" in err.partition("video: decoding")[0]


def assert_goes_on(recipe: Path, where: list[str], change: list[str]) -> None:
    """Make sure that the next run computes all but the first chunk, which was stored before the stop."""
    statuses = json.loads(call("plan", recipe, *where, *change, "--json")[1])
    assert nodes_to_run(statuses) == ["talk[1]", "talk[2]", "frames", "video"]
    report = json.loads(call("run", recipe, *where, *change, "--json")[1])
    assert report["computed"] == ["talk[1]", "talk[2]", "video"]


@pytest.mark.slow
def test_after_ctrl_c_the_next_run_goes_on_from_the_stored_chunks(tmp_path: Path, done: tuple[Path, list[str]]) -> None:
    recipe, where = done
    change = ["--set", "nodes.first.seed=130", "--output-dir", str(tmp_path / "out")]
    endless = ["--set", "nodes.talk.steps=400"]
    command = [sys.executable, "-m", "s2v_flow", "run", str(recipe), *where, *change, *endless]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        assert any(" talk[1]: sampling" in line for line in running.stderr)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=60)
    assert (running.returncode, out) == (130, "")
    assert re.fullmatch(r"interrupted(: talk.*)?; what was finished is stored, and .*", err.splitlines()[-1])
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
    assert_goes_on(recipe, where, change)


@pytest.mark.slow
def test_after_sigterm_the_next_run_goes_on_from_the_stored_chunks(
    tmp_path: Path, done: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, where = done
    change = ["--set", "nodes.first.seed=143", "--output-dir", str(tmp_path / "out")]
    shows = Progress.__call__

    def terminate_at_talk(progress: Progress, event: Event) -> None:
        shows(progress, event)
        if isinstance(event, NodeStarted) and event.node == "talk[1]":
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Progress, "__call__", terminate_at_talk)
        code, out, err = call("run", recipe, *where, *change)
    assert (code, out) == (143, "")
    assert err.splitlines()[-1].startswith("terminated; what was finished is stored")
    assert not (tmp_path / "out").exists()
    assert_goes_on(recipe, where, change)


def test_a_reader_that_goes_away_makes_no_noise() -> None:
    command = f"{sys.executable} -m s2v_flow schema | head -c 10"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert (len(result.stdout), result.stderr) == (10, "")


def test_a_defect_is_exit_code_9_with_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("boom")

    monkeypatch.setattr("s2v_flow.api.check", fail)
    code, out, err = call("check", write_recipe(tmp_path))
    assert (code, out) == (9, "")
    assert "ZeroDivisionError: boom" in err
    assert err.endswith("please report it with the lines above\n")


def test_out_of_memory_is_exit_code_7(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("12 GB wanted")

    monkeypatch.setattr("s2v_flow.api.check", fail)
    code, _, err = call("check", write_recipe(tmp_path))
    assert code == 7
    assert "Traceback" not in err
    assert "fix: a smaller width and height" in err


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def shown(stream: io.StringIO) -> str:
    progress = Progress(stream=stream)
    events = (
        RunStarted(("first", "video"), 9),
        NodeStarted("first", "sample"),
        StepDone("first", 1, 2, "step"),
        Noted("first", "odd [red]text[/red] \x1b[31m", is_warning=True),
        NodeFinished("first", 1.5, 2**30),
    )
    for event in events:
        progress(event)
    progress.close()
    return stream.getvalue()


def test_in_a_terminal_progress_is_a_table_without_colours_where_no_color_is_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    text = shown(Terminal())
    assert re.search(r"done +first +sampling +1\.5 s +1\.0 GiB", text)
    assert "1 more" in text
    assert "warning: first: odd [red]text[/red] \\x1b[31m" in text
    assert not re.search(r"\x1b\[[0-9;]*[34][0-9;]*m", text)


def test_elsewhere_progress_is_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in shown(io.StringIO()).splitlines()] == [
        "begin: 2 of 9 nodes to compute",
        "first: sampling",
        "warning: first: odd [red]text[/red] \\x1b[31m",
        "first: done, 1.5 s, peak 1.0 GiB",
    ]


def test_the_cache_folder_is_taken_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S2VFLOW_CACHE_DIR", str(tmp_path / "from-environment"))
    monkeypatch.setenv("S2VFLOW_MODELS_DIR", os.pathsep.join([str(tmp_path / "a"), str(tmp_path / "b")]))
    write_voice(tmp_path / "voice.wav", 1)
    code, out, _ = call("plan", write_recipe(tmp_path, {"dit": {"checkpoint": "gone.safetensors"}}), "--json")
    (missing,) = json.loads(out)["missing"]
    assert code == 4
    assert missing["looked_in"] == [
        str(tmp_path / root / folder) for root in "ab" for folder in ("diffusion_models", "unet")
    ]
