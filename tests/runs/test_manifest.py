"""What a run leaves behind: a manifest of what went in, what was done and what came out, however it ended."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from recipes_for_tests import call, options, write_recipe
from runs_for_tests import QUICK, Place, copied, place

from s2v_flow import __version__, api
from s2v_flow.cli.describe import schema_text
from s2v_flow.errors import S2VFlowError
from s2v_flow.graph.events import Delivered, Event, NodeStarted, Noted, RunFinished
from s2v_flow.history.find import read_manifest
from s2v_flow.runs.environment import git_state
from s2v_flow.runs.record import new_run_id

SCHEMA = Path(__file__).parents[2] / "schemas" / "manifest.schema.json"
LORA = {"id": "light", "file": "tiny_lightning_lora.safetensors", "allow_partial": True}
CHANGES = {**QUICK, "dit": {"loras": [LORA]}}
EXTRA = "params: {seed: 20}\nprofiles:\n  other: {nodes: {first: {seed: $params.seed}}}"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> Place:
    """A recipe with a LoRA, run with a profile and an override."""
    made = place(tmp_path_factory.mktemp("manifest"), tiny_models, CHANGES, extra=EXTRA)
    code, _, err = made.run("-p", "other", "--set", "seed=7")
    assert code == 0, err
    return made


@pytest.fixture(scope="module")
def manifest(done: Place) -> dict[str, Any]:
    return checked(done.manifests()[0])


def checked(path: Path) -> dict[str, Any]:
    """Return a manifest, valid by the stored schema."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    jsonschema.validate(found, json.loads(SCHEMA.read_text(encoding="utf-8")))
    return found


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_stored_schema_is_the_generated_one() -> None:
    """schemas/manifest.schema.json is never edited by hand."""
    assert SCHEMA.read_text(encoding="utf-8") == schema_text("manifest")
    assert call("schema", "--of", "manifest") == (0, schema_text("manifest"), "")
    jsonschema.Draft202012Validator.check_schema(json.loads(schema_text("manifest")))


def test_a_run_is_named_by_its_time_and_kept_alone_in_its_folder(done: Place, manifest: dict[str, Any]) -> None:
    (path,) = done.cache.glob("runs/*/*.json")
    assert path.name == "manifest.json"
    assert manifest["id"] == path.parent.name
    assert re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{4}", manifest["id"])
    assert manifest["started"][:19].translate(str.maketrans("T", "-", "-:")) == manifest["id"][:15]
    assert manifest["started"] < manifest["ended"]
    assert (manifest["status"], manifest["error"]) == ("finished", None)


def test_the_recipe_is_kept_with_where_each_value_was_written(done: Place, manifest: dict[str, Any]) -> None:
    recipe = manifest["recipe"]
    assert recipe["files"] == [{"name": str(done.recipe), "sha256": sha256(done.recipe)}]
    assert recipe["values"]["nodes.first.seed"] == 7
    assert recipe["values"]["nodes.dit.loras[light].strength"] == 1.0
    assert recipe["values"]["nodes.video.crf"] == 18
    assert recipe["origins"]["nodes.first.seed"].startswith("--set")
    assert re.fullmatch(rf"{re.escape(str(done.recipe))}:\d+", recipe["origins"]["nodes.first.steps"])
    assert "nodes.video.crf" not in recipe["origins"]
    assert manifest["given"] == {"profiles": ["other"], "files": [], "overrides": ["--set seed=7"]}


def test_the_kept_recipe_can_be_run_as_it_is(done: Place, manifest: dict[str, Any], tiny_models: Path) -> None:
    """Beside the one it came from it finds everything stored."""
    again = done.folder / "again.yaml"
    again.write_text(manifest["recipe"]["text"], encoding="utf-8")
    planned = api.plan(again, options(done.folder, tiny_models))
    assert not planned.has_work


def test_models_and_inputs_are_kept_with_their_digests(
    done: Place, manifest: dict[str, Any], tiny_models: Path
) -> None:
    files = {item["at"]: item for item in manifest["files"]}
    model = tiny_models / "diffusion_models" / "tiny_s2v.safetensors"
    voice = done.folder / "voice.wav"
    expected = {"role": "model", "name": model.name, "sha256": sha256(model), "size": model.stat().st_size}
    assert files["nodes.dit.checkpoint"] == {"at": "nodes.dit.checkpoint", **expected}
    assert files["nodes.voice.file"] == {
        "at": "nodes.voice.file",
        "role": "input",
        "name": "voice.wav",
        "sha256": sha256(voice),
        "size": voice.stat().st_size,
    }
    assert files["nodes.dit.loras[light].file"]["name"] == LORA["file"]
    assert len(files) == 7


def test_seeds_are_those_of_every_chunk(manifest: dict[str, Any]) -> None:
    assert manifest["seeds"] == {"first": 7, "talk[1]": 1, "talk[2]": 2}


def test_the_loras_coverage_is_kept_for_every_chunk(manifest: dict[str, Any]) -> None:
    assert [item["node"] for item in manifest["loras"]] == ["first", "talk[1]", "talk[2]"]
    assert all(item["id"] == "light" and 0 < item["matched"] < item["total"] for item in manifest["loras"])
    assert {block.isdigit() for block in manifest["loras"][0]["blocks"]} >= {True}
    assert 0 < sum(manifest["loras"][0]["blocks"].values()) <= manifest["loras"][0]["matched"]


def test_a_lora_is_shown_once_with_its_share(done: Place, manifest: dict[str, Any]) -> None:
    matched, total = (manifest["loras"][0][key] for key in ("matched", "total"))
    shown = f"LoRA light: {matched} of {total} keys ({matched / total:.0%})".replace("%", " %")
    lines = done.call("show", manifest["id"])[1].splitlines()
    assert [line for line in lines if "LoRA" in line] == [f"{shown}, in 3 nodes"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kills a process")
@pytest.mark.parametrize("axes", [[], pytest.param(["nodes.first.seed=7,8"], marks=pytest.mark.slow)])
def test_a_run_is_listed_from_its_start_and_as_killed_once_it_is(
    done: Place, tmp_path: Path, tiny_models: Path, axes: list[str]
) -> None:
    """A real process; its marker is removed by the next run, and it stays killed."""
    made = copied(done, tmp_path)
    program = (
        "import json, sys, time\n"
        "from s2v_flow import api\n"
        "def wait(event):\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
        "given = json.loads(sys.argv[1])\n"
        "api.run(given.pop('recipe'), on_event=wait, **given)\n"
    )
    given = {"recipe": str(made.recipe), "models_dirs": [str(tiny_models)], "cache_dir": str(made.cache)}
    given |= {"device": "cpu", "axes": axes, "profiles": ["other"]}
    command = [sys.executable, "-c", program, json.dumps(given)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        newest = checked(made.manifests()[-1])
        assert (newest["status"], newest["ended"], newest["seconds"]) == ("running", None, None)
        listed = json.loads(made.call("runs", "--json")[1])["runs"]
        assert [run["status"] for run in listed if run["id"] == newest["id"]] == ["running"]
        assert " so far" in made.call("show", newest["id"])[1]
        child.kill()
    for _ in range(2):
        lines = made.call("runs")[1].splitlines()
        assert [line.split()[1] for line in lines if newest["id"] in line] == ["killed"]
        assert made.call("show", newest["id"])[1].startswith(f"run {newest['id']}: killed, -, started 2")
        assert made.run("-p", "other", "--set", "seed=7")[0] == 0
    assert not list((made.cache / "live").iterdir())


def test_a_manifest_of_before_is_read(done: Place, manifest: dict[str, Any], tmp_path: Path) -> None:
    """Whatever `running` says of a run that nothing is known of, it does not run."""
    for status in ("finished", "running"):
        (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "status": status}))
        assert read_manifest(tmp_path / "manifest.json").status == {"running": "killed"}.get(status, status)


def test_every_node_has_its_state_and_what_it_cost(done: Place, manifest: dict[str, Any]) -> None:
    nodes = {node["name"]: node for node in manifest["nodes"]}
    states = {name: node["status"] for name, node in nodes.items()}
    assert states["dit"] == states["frames"] == "live"
    assert states["first"] == states["talk[2]"] == states["video"] == "computed"
    assert all(
        node["fingerprint"] for node in nodes.values() if node["status"] == "computed" or node["kind"][:4] == "load"
    )
    assert nodes["first"]["seconds"] > 0
    assert nodes["first"]["peak_bytes"] > 1 << 20
    (object_,) = done.cache.glob(f"objects/??/{nodes['first']['outputs']['latent']}.safetensors")
    assert object_.is_file()


def test_outputs_are_kept_as_they_are_on_the_disk(done: Place, manifest: dict[str, Any]) -> None:
    (output,) = manifest["outputs"]
    assert (output["name"], output["changed"], output["frames"]) == ("out/talk.mp4", True, 20)
    assert re.fullmatch("[0-9a-f]{64}", output["frames_sha256"])


def test_the_environment_names_versions_and_no_person(manifest: dict[str, Any]) -> None:
    environment = manifest["environment"]
    assert (environment["s2vflow"], environment["device"]) == (__version__, "cpu")
    assert environment["torch"].startswith("2.")
    assert environment["host"] is environment["user"] is environment["gpu"] is None


def test_a_second_run_is_kept_too(done: Place, manifest: dict[str, Any]) -> None:
    """It names the host and the user, because it is asked to; the file on the disk is what the manifest says."""
    code, out, _ = done.run("-p", "other", "--set", "seed=7", "--json", "--record-host")
    again = checked(done.manifests()[-1])
    assert code == 0
    assert json.loads(out)["run"] == again["id"] != manifest["id"]
    states = {node["name"]: node["status"] for node in again["nodes"]}
    assert states["first"] == states["video"] == "stored"
    assert states["dit"] == states["frames"] == "skipped"
    assert {node["seconds"] for node in again["nodes"]} == {None}
    assert again["outputs"] == [{**manifest["outputs"][0], "changed": False}]
    assert (again["outputs"][0]["sha256"], again["outputs"][0]["size"]) == (
        sha256(done.video),
        done.video.stat().st_size,
    )
    assert again["loras"] == manifest["loras"]
    assert again["environment"]["host"]
    assert again["environment"]["user"]


def test_a_failed_run_says_which_node_and_why(done: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise S2VFlowError("the film tore")

    monkeypatch.setattr("s2v_flow.nodes.save.require_frames", fail)
    assert done.run("--set", "nodes.video.crf=30")[0] == 1
    failed = checked(done.manifests()[-1])
    assert (failed["status"], failed["error"], failed["outputs"]) == ("failed", "the film tore", [])
    states = {node["name"]: node["status"] for node in failed["nodes"]}
    assert states["video"] == "failed"
    assert states["talk[2]"] in ("computed", "stored")


def test_an_interrupted_run_is_kept_with_what_it_did_not_reach(done: Place, tiny_models: Path) -> None:
    seen: list[Event] = []

    def stop(event: Event) -> None:
        seen.append(event)
        if isinstance(event, NodeStarted) and event.node == "talk[1]":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.run(done.recipe, options(done.folder, tiny_models, sets=["nodes.talk.seed=[8,9]"]), stop)
    stopped = checked(done.manifests()[-1])
    assert (stopped["status"], stopped["error"]) == ("interrupted", None)
    states = {node["name"]: node["status"] for node in stopped["nodes"]}
    assert (states["talk[1]"], states["talk[2]"], states["video"]) == ("interrupted", "not_reached", "not_reached")
    assert seen[-1] == RunFinished(stopped["id"], "interrupted")


def test_a_manifest_that_cannot_be_written_is_a_warning(tmp_path: Path, done: Place, tiny_models: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "runs").write_text("a file is in the way")
    for name in ("entries", "objects", "digests.json"):
        (cache / name).symlink_to(done.cache / name)
    seen: list[Event] = []
    chosen = options(done.folder, tiny_models, cache, profiles=["other"], sets=["seed=7"], output_dir=tmp_path)
    result = api.run(done.recipe, chosen, seen.append)
    assert result.outputs["video"][0].is_file()
    (warning,) = [event for event in seen if isinstance(event, Noted) and event.is_warning]
    assert "the run's manifest cannot be written" in warning.text


@pytest.mark.slow
def test_a_video_that_is_moved_at_once_loses_no_manifest(done: Place, tmp_path: Path, tiny_models: Path) -> None:
    """As by a program that watches the folder; its digest is known all the same."""
    made = copied(done, tmp_path)

    def take(event: Event) -> None:
        if isinstance(event, Delivered):
            made.video.unlink()

    result = api.run(made.recipe, options(tmp_path, tiny_models, made.cache, overwrite=True), on_event=take)
    kept = read_manifest(made.cache / "runs" / result.run_id / "manifest.json")
    (output,) = kept.outputs
    assert (kept.status, output.name, output.size) == ("finished", "out/talk.mp4", None)
    assert output.sha256 == kept.nodes[-1].outputs["file"]


def test_ids_sort_as_runs_began_also_where_the_clock_was_set_back(tmp_path: Path) -> None:
    """The next after the newest there; what only looks like an id, or like a time, counts for nothing."""
    assert new_run_id(tmp_path / "none")[:2] == "20"
    for name, following in (
        ("20990101-000000-0000", "20990101-000000-0001"),
        ("20990101-000000-fffe", "20990101-000000-ffff"),
        ("20991231-235959-ffff", "21000101-000000-0000"),
        ("99991231-235959-ffff", "20"),
        ("99999999-000000-0000", "20"),
        ("zz", "20"),
    ):
        folder = tmp_path / following / name
        folder.mkdir(parents=True)
        assert new_run_id(folder.parent).startswith(following)


def test_the_last_run_is_the_one_that_began_last(quick_run: Place, tmp_path: Path) -> None:
    made = copied(quick_run, tmp_path)
    (path,) = made.manifests()
    path.parent.rename(path.parents[1] / "20990101-000000-0000")
    ran = json.loads(made.run("--json")[1])["run"]
    assert ran == "20990101-000000-0001"
    assert json.loads(made.call("show", "last", "--json")[1])["id"] == ran


def test_two_runs_of_one_name_do_not_meet(done: Place, tiny_models: Path) -> None:
    chosen, name = options(done.folder, tiny_models, profiles=["other"], sets=["seed=7"]), "20261122-161502-aaaa"
    planned = api.plan(done.recipe, chosen)
    ids = [api.run_planned(planned, chosen, run_id=name).run_id for _ in range(2)]
    assert ids[0] == name != ids[1]
    assert [checked(done.cache / "runs" / name / "manifest.json")["id"] for name in ids] == ids


def test_the_home_folder_is_written_as_a_tilde(
    tmp_path: Path, quick_run: Place, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody's name stands in a manifest or a video because of where files are."""
    home = tmp_path / "home" / "maria"
    monkeypatch.setenv("HOME", str(home))
    made, voice = copied(quick_run, home), home / "voice.wav"
    shutil.rmtree(made.cache / "runs")
    write_recipe(home, {**QUICK, "voice": {"file": str(voice)}})
    assert made.run()[0] == 0
    text = made.manifests()[0].read_text(encoding="utf-8")
    assert "maria" not in text
    assert b"maria" not in made.video.read_bytes()
    found = json.loads(text)
    assert found["recipe"]["path"] == "~/recipe.yaml"
    assert "file: '~/voice.wav'" in found["recipe"]["text"]
    assert made.run("--set", f"nodes.voice.file={voice}")[0] == 0
    size = made.video.stat().st_size
    made.video.unlink()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, before[1]))
    try:
        assert made.run()[0] == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    again, failed = (json.loads(path.read_text(encoding="utf-8")) for path in made.manifests()[1:])
    assert again["given"]["overrides"] == ["--set nodes.voice.file=~/voice.wav"]
    assert failed["error"].startswith("cannot write under ~/out/talk.mp4")


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "init.defaultBranch=main"]
    subprocess.run(["git", *identity, "-C", str(folder), *arguments], check=True, capture_output=True)


def test_git_tells_the_commit_and_whether_something_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    recipe, other = tmp_path / "recipes" / "talk.yaml", tmp_path / "other.txt"
    recipe.parent.mkdir()
    recipe.write_text("s2vflow: 1\n")
    other.write_text("1")
    assert git_state([recipe]) is None
    git(tmp_path, "init")
    state = git_state([recipe])
    assert state is not None
    assert (state.commit, state.is_dirty) == (None, True)
    git(tmp_path, "add", "other.txt")
    git(tmp_path, "commit", "-m", "one")
    state = git_state([recipe])
    assert state is not None
    assert re.fullmatch("[0-9a-f]{40}", state.commit or "")
    assert state.is_dirty, "the recipe is not tracked"
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "two")
    state = git_state([recipe])
    assert state is not None
    assert not state.is_dirty
    other.write_text("2")
    state = git_state([recipe])
    assert state is not None
    assert state.is_dirty


def test_without_git_there_is_no_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state([tmp_path / "talk.yaml"]) is None


NONSENSE: list[Any] = [None, [], ["x"], {"x": 1}, "x", -1, 10**400, float("nan"), [[[[1]]]]]
NONSENSE.append(functools.reduce(lambda at, _: [at], range(900), []))


def changed(found: Any, deep: int) -> Iterator[Any]:
    """Yield copies with one value that is none of its kind, or one value less, down to a depth."""
    yield from NONSENSE
    for key in list(found) if isinstance(found, dict) else range(min(len(found), 1)) if isinstance(found, list) else ():
        if isinstance(found, dict):
            yield {name: value for name, value in found.items() if name != key}
        for part in changed(found[key], deep - 1) if deep else ():
            copy = found.copy()
            copy[key] = part
            yield copy


def test_nonsense_in_a_manifest_is_damage_or_nothing_and_never_a_defect(quick_run: Place, tmp_path: Path) -> None:
    """Figures that are none are as good as none; a manifest that makes no sense is left out, and named."""
    made = copied(quick_run, tmp_path)
    (path,) = made.manifests()
    whole = json.loads(path.read_text())
    assert whole["quality"]["sync"]
    blocks = {name: list(changed(whole[name], 1)) for name in ("quality", "nodes", "outputs", "files", "seconds")}
    blocks["quality"] += [{"videos": each} for each in blocks["quality"][::9]]
    for name, values in blocks.items():
        for value in values[:: 1 + len(values) // 25]:
            path.write_text(json.dumps({**whole, name: value}))
            for command in ("runs", "show"):
                code, _, err = made.call(command, *([path.parent.name] if command == "show" else []))
                assert code in (0, 4), (name, value, err)
                assert name != "quality" or code == 0, err
    for value in blocks["quality"][::90]:
        path.write_text(json.dumps({**whole, "quality": value}))
        assert made.call("quality", path.parent.name)[0] in (0, 4)
