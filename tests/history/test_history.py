"""Looking back at runs: the list, one of them, and what differs between two."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import pytest
from faults_for_tests import as_a_user
from recipes_for_tests import call
from runs_for_tests import Place, copied


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, quick_run: Place) -> Place:
    """Three runs: the first, the same again, and one with another seed for the last chunk."""
    made = copied(quick_run, tmp_path_factory.mktemp("history"))
    made.run()
    code, _, err = made.run("--set", "nodes.talk.seed=[1,9]", "--output-dir", made.folder / "other")
    assert code == 0, err
    return made


@pytest.fixture(scope="module")
def ids(done: Place) -> list[str]:
    """The runs' ids, the oldest first."""
    return [path.parent.name for path in done.manifests()]


def test_runs_are_listed_the_newest_first(done: Place, ids: list[str]) -> None:
    code, out, err = done.call("runs")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(ids, reverse=True)
    assert {line.split()[1] for line in lines} == {"finished"}
    assert all(re.search(r"recipe\.yaml +out/talk\.mp4", line) for line in lines)
    assert [line.partition("talk.mp4")[2].strip() for line in lines] == ["talk.seed [1, 2] -> [1, 9]", "", ""]
    listed = json.loads(done.call("runs", "--json")[1])
    assert [run["id"] for run in listed["runs"]] == [line.split()[0] for line in lines]
    assert listed["runs"][0]["outputs"] == ["out/talk.mp4"]
    assert [run["status"] for run in listed["runs"]] == ["finished"] * 3
    assert [run["before"] for run in listed["runs"]] == [listed["runs"][1]["id"], None, None], "the first was a copy"
    change = {"section": "nodes", "name": "nodes.talk.seed", "a": [1, 2], "b": [1, 9]}
    assert [run["changes"] for run in listed["runs"]] == [[change], [], []]


def test_without_runs_the_list_says_so(tmp_path: Path) -> None:
    assert call("runs", "--cache-dir", tmp_path) == (0, "no runs\n", "")
    assert json.loads(call("runs", "--cache-dir", tmp_path, "--json")[1]) == {"runs": [], "skipped": []}


def test_all_runs_but_the_last_ones_are_forgotten(done: Place, tmp_path: Path) -> None:
    """Damaged manifests too; whatever else lies in a run's folder stays, and a dry run changes nothing."""
    root = tmp_path / "runs"
    shutil.copytree(done.cache / "runs", root)
    (root / "19990101-000000-dead").mkdir()
    (root / "19990101-000000-dead" / "manifest.json").write_text("{")
    kept = max(path.name for path in root.iterdir())
    (root / min(path.name for path in root.iterdir() if path.name > "2") / "notes.txt").write_text("mine")
    where = ["--cache-dir", tmp_path]
    assert "3 runs would be forgotten: " in call("runs", "--keep-last", 1, "--dry-run", *where)[2]
    assert len(json.loads(call("runs", "--json", *where)[1])["runs"]) == 3
    code, out, err = call("runs", "--keep-last", 1, *where)
    assert (code, len(out.splitlines()), "3 runs forgotten: " in err) == (0, 1, True)
    assert out.startswith(kept)
    assert [path.name for path in root.glob("*/*") if path.parent.name != kept] == ["notes.txt"]
    assert call("runs", "--keep-last", "-1", *where)[0] == 2


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"manifest": 2}', b"\xff\xfe", b'{"a":' * 100_000])
def test_a_damaged_manifest_is_skipped_and_named(done: Place, ids: list[str], content: bytes) -> None:
    broken = done.cache / "runs" / "20000101-000000-dead" / "manifest.json"
    broken.parent.mkdir(exist_ok=True)
    broken.write_bytes(content)
    try:
        code, out, err = done.call("runs")
        assert code == 0
        assert len(out.splitlines()) == len(ids)
        assert err == f"note: skipped: {broken}: is damaged, or of another version of s2vflow\n"
        assert done.call("show", "20000101")[0] == 4
    finally:
        broken.unlink()
        broken.parent.rmdir()


def test_a_run_that_may_not_be_read_is_named_beside_the_others(done: Place, ids: list[str]) -> None:
    """Nor is it forgotten; and where the folder of all runs may not be read, that is said."""
    done.call("runs")  # imports what the child may not be able to read
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "cache" / "runs"
        shutil.copytree(done.cache / "runs", root)
        (root / "19990101-000000-dead").mkdir(mode=0)
        (root / "19990102-000000-dead" / "manifest.json").mkdir(parents=True)
        (root / "19990103-000000-dead").mkdir()
        (root / "19990104-000000-dead").touch()
        where = ["--cache-dir", root.parent]

        def act() -> None:
            code, out, err = call("runs", *where)
            assert (code, [line.split()[0] for line in out.splitlines()]) == (0, sorted(ids, reverse=True)), err
            assert [line.rpartition(": ")[2] for line in err.splitlines()] == ["Is a directory", "Permission denied"]
            assert call("runs", "--keep-last", len(ids), *where)[2].startswith("0 runs forgotten\n")
            root.chmod(0)
            code, out, err = call("runs", *where)
            assert (code, out, err.partition("\n")[0]) == (4, "", f"error: {root}: cannot be read: Permission denied")

        for path in (root, *root.iterdir()):
            os.chown(path, 65534 if os.geteuid() == 0 else -1, -1)
        as_a_user(act, Path(name))
        root.chmod(0o755)
        (root / "19990101-000000-dead").chmod(0o755)


def test_a_run_is_shown_by_its_id_its_beginning_or_its_file(done: Place, ids: list[str]) -> None:
    code, text, _ = done.call("show", ids[0])
    assert code == 0
    assert text.startswith(f"run {ids[0]}: finished")
    assert re.search(r"^  extend +\d.* s +\d+ % +2 computed$", text, re.M)
    assert re.search(r"^  together +\d.* s +100 % +\d computed$", text, re.M)
    assert re.search(
        r"^  tiny_vae\.safetensors +\d+\.\d [Mk]B +sha256 [0-9a-f]{12} +nodes\.vae\.checkpoint$", text, re.M
    )
    assert "\nseeds: 20, 1..2\n" in text
    assert "talk[2]" not in text
    assert "\n  talk (extend): chunks 2, seed [1, 2]\n" in text
    path = done.cache / "runs" / ids[0] / "manifest.json"
    for name in (str(path), str(path.parent)):
        assert done.call("show", name)[1] == text
    moved = done.folder / "moved.json"
    changed = path.read_text().replace('"finished"', '"running"', 1).replace(ids[0], "a**b")
    moved.write_text(changed.replace('"path": "', '"path": "/no utf-8: \\udcff', 1))
    text = done.call("show", moved)[1]
    assert text.startswith("run a**b: killed")
    assert "\nrecipe: /no utf-8: \\udcff" in text
    assert json.loads(done.call("show", ids[0], "--json")[1]) == json.loads(path.read_text())
    for number in ("NaN", "1e999"):  # --json, and the page, could not tell them
        moved.write_text(changed.replace('"values": {', f'"values": {{"params.x": [{number}],', 1))
        assert done.call("show", moved)[0] == 4
    assert done.call("show", "last")[1].startswith("run 2")


def test_a_video_is_shown_with_what_it_was_made_of(done: Place) -> None:
    code, text, _ = done.call("show", done.video)
    assert code == 0
    assert text.startswith("made by the node video on cpu with s2vflow ")
    assert re.search(r"^of stored results: .*1 sample, 2 extend, 1 save_video$", text, re.M)
    assert "frames: 20, sha256 " in text
    found = json.loads(done.call("show", done.video, "--json")[1])
    assert (found["essence"], found["node"]) == (1, "video")


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("20991231", 2, "there is no run '20991231', and no such file"),
        ("2", 2, "3 runs begin with 2"),
        ("a" * 300, 2, "there is no run 'aaaa"),
        ("voice.wav", 4, "is not a whole mp4"),
        ("recipe.yaml", 4, "is not a whole mp4"),
    ],
)
def test_what_is_no_run_is_refused(
    done: Place, name: str, code: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(done.folder)
    got, out, err = done.call("show", name)
    assert (got, out) == (code, "")
    assert words in err


def test_two_equal_runs_differ_in_times_only(done: Place, ids: list[str]) -> None:
    code, text, _ = done.call("diff", "--exit-code", ids[0], ids[1])
    assert code == 0
    lines = text.splitlines()
    assert lines[0] == f"a: {ids[0]}"
    assert lines[-1] == "the same"
    assert {line.split(":")[0] for line in lines[2:-1]} == {"time", "latent", "video"}
    assert all(line.endswith("identical") for line in lines if line.startswith(("latent", "video")))


def test_two_runs_differ_from_the_changed_value_on(done: Place, ids: list[str]) -> None:
    """The first chunks stay the same to the bit; the last one and the video are measured."""
    found = json.loads(done.call("diff", ids[0], ids[2], "--json")[1])
    assert found["same"] is False
    assert found["differences"] == [
        {"section": "nodes", "name": "nodes.talk.seed", "a": [1, 2], "b": [1, 9]},
    ]
    measures = {item["node"]: item for item in found["measures"]}
    assert [measures[name]["is_identical"] for name in ("first", "talk[1]", "talk[2]", "video")] == [
        True,
        True,
        False,
        False,
    ]
    assert measures["talk[2]"]["max_abs"] > 0.1
    assert 0 < measures["video"]["max_abs"] <= 255
    assert 5 < measures["video"]["psnr_db"] < 60
    assert {"the whole run", "talk[2]", "video"} <= {item["name"] for item in found["times"]}
    assert 0 < measures["talk[2]"]["relative"] < 10
    code, text, _ = done.call("diff", "--exit-code", ids[0], ids[2])
    assert code == 1
    assert re.search(r"^latent: talk\[2\]: differs by [\d.]+ % of its root mean square, at most [\d.]+$", text, re.M)
    assert "\nlatent: first, talk[1]: identical\n" in text
    assert "nodes: nodes.talk.seed: [1, 2] -> [1, 9]" in text
    assert re.search(r"^video: video: differs by at most \d+, PSNR \d+\.\d\d dB$", text, re.M)


def test_two_videos_are_compared_as_their_runs_are(done: Place, ids: list[str]) -> None:
    other = done.folder / "other" / "out" / "talk.mp4"
    runs = json.loads(done.call("diff", ids[0], ids[2], "--json")[1])
    videos = json.loads(done.call("diff", done.video, other, "--json")[1])
    assert videos["differences"] == runs["differences"]
    assert videos["measures"] == runs["measures"]


def test_a_result_that_is_gone_is_not_measured(done: Place, ids: list[str], tmp_path: Path) -> None:
    (tmp_path / "runs").symlink_to(done.cache / "runs")
    code, text, _ = call("diff", ids[0], ids[2], "--cache-dir", tmp_path)
    assert code == 0
    assert "latent: talk[2]: differs; not both are in the cache any more" in text
    assert "video: video: differs; not both are in the cache any more" in text


def test_another_input_and_another_environment_are_named(done: Place, ids: list[str], tmp_path: Path) -> None:
    manifest = json.loads((done.cache / "runs" / ids[0] / "manifest.json").read_text())
    manifest["environment"]["torch"] = "1.0"
    manifest["git"] = {"commit": "c" * 40, "is_dirty": True}
    (voice,) = [item for item in manifest["files"] if item["at"] == "nodes.voice.file"]
    voice["sha256"] = "0" * 64
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    text = done.call("diff", ids[0], tmp_path / "manifest.json")[1]
    assert re.search(
        r"^inputs: nodes\.voice\.file: voice\.wav \([0-9a-f]{12}\) -> voice\.wav \(000000000000\)$", text, re.M
    )
    assert re.search(r"^environment: torch: '2.*' -> '1\.0'$", text, re.M)
    assert text.endswith("not the same\n")


def test_a_strangers_manifest_moves_no_file(done: Place, ids: list[str], tmp_path: Path) -> None:
    """What it calls a stored result may be the path of a file of the user's, which is no damaged result."""
    kept = (done.cache / "runs" / ids[0] / "manifest.json").read_text()
    mine = [tmp_path / "lora.safetensors", tmp_path / "film.mp4", tmp_path / "notes.json"]
    for path in mine:
        path.write_text("mine")
    for node, change in (
        ("first", {"outputs": {"latent": str(mine[0].with_suffix(""))}}),
        ("video", {"outputs": {"file": str(mine[1].with_suffix(""))}}),
        ("video", {"fingerprint": str(mine[2].with_suffix(""))}),
        ("video", {"name": "nobody's, though it has an output"}),
    ):
        manifest = json.loads(kept)
        next(item for item in manifest["nodes"] if item["name"] == node).update(change)
        (tmp_path / "run.json").write_text(json.dumps({**manifest, "quality": None}))
        for command in (["diff", "last", tmp_path / "run.json"], ["quality", tmp_path / "run.json"]):
            code, _, err = done.call(*command)
            assert (code, "run.json: is damaged, or of another version" in err) == (4, True)
    assert [path.read_text() for path in mine] == ["mine"] * 3
    assert not (done.cache / "quarantine").exists()


def test_recipes_are_compared_after_their_layers_without_running(done: Place, tmp_path: Path) -> None:
    """Defaults count: writing one down is no difference."""
    base = done.recipe.read_text()
    one, other = tmp_path / "one.yaml", tmp_path / "other.yaml"
    one.write_text(base + "params: {steps: 3}\n")
    other.write_text(base.replace('"steps": 2', '"steps": 4').replace('"seed": 20', '"seed": 20, "sampler": "uni_pc"'))
    code, text, err = call("diff", one, other)
    assert (code, err) == (0, "")
    assert text.splitlines()[2:] == [
        "params: params.steps: 3 -> nothing",
        "nodes: nodes.first.steps: 2 -> 4",
        "not the same",
    ]
    other.write_text(base)
    one.write_text(base.replace('"seed": 20', '"seed": 20, "sampler": "uni_pc"'))
    assert call("diff", one, other)[1].endswith("\nthe same\n")
    one.write_text(base.replace('"steps": 2', '"steps": 0'))
    assert call("diff", one, other)[0] == 3


def test_a_change_is_told_once(done: Place, tmp_path: Path) -> None:
    """A parameter names the fields that it is put into; a field that has changed by itself is told by itself."""
    text = done.recipe.read_text().replace('"steps": 2', '"steps": "$params.steps"')
    one, other = tmp_path / "one.yaml", tmp_path / "other.yaml"
    one.write_text(text + "params: {steps: 3}\n")
    other.write_text(text.replace('"seed": 20', '"seed": 21') + "params: {steps: 4}\n")
    assert call("diff", one, other)[1].splitlines()[2:] == [
        "params: params.steps: 3 -> 4 (and nodes.first.steps)",
        "nodes: nodes.first.seed: 20 -> 21",
        "not the same",
    ]


def test_a_run_is_compared_with_a_recipe_by_its_values(done: Place, ids: list[str]) -> None:
    assert done.call("diff", ids[2], done.recipe)[1].splitlines()[2:] == [
        "nodes: nodes.talk.seed: [1, 9] -> [1, 2]",
        "not the same",
    ]
