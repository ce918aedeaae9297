"""`s2vflow cache`: the commands on a real run's results."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from recipes_for_tests import call, tiny, write_recipe, write_voice
from runs_for_tests import Place, copied

from s2v_flow.cache.store import Store


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> tuple[Path, list[str]]:
    """Return the folder of a recipe that has run, and the run's command."""
    folder = tmp_path_factory.mktemp("kept")
    write_voice(folder / "voice.wav", 0.2)
    recipe = write_recipe(folder, tiny(talk=None, frames={"latent": "$first"}, video={"preset": "ultrafast"}))
    command = ["run", str(recipe), "--models-dir", str(tiny_models), "--device", "cpu", "--cache-dir"]
    assert call(*command, folder / "cache")[0] == 0
    return folder, command


def asked(*arguments: Any) -> dict[str, Any]:
    code, out, err = call("cache", *arguments, "--json")
    assert code == 0, err
    answer: dict[str, Any] = json.loads(out)
    return answer


@pytest.mark.slow
def test_a_run_taken_to_another_cache_computes_nothing_there(done: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, command = done
    bundle, other = tmp_path / "run.tar", tmp_path / "other"
    written = asked("export", bundle, "--run", "last", "--cache-dir", folder / "cache")
    taken = asked("import", bundle, "--cache-dir", other)
    assert len(taken["entries"]) == len(written["entries"]) == 5
    report = json.loads(call(*command, other, "--json")[1])
    assert report["computed"] == []


@pytest.mark.slow
def test_the_commands_agree_about_what_is_there(done: tuple[Path, list[str]]) -> None:
    """ls, stats, verify, pin, gc and rm; dry runs change nothing."""
    where = ["--cache-dir", done[0] / "cache"]
    listed = asked("ls", *where)["entries"]
    assert {row["node"] for row in listed} == {"positive", "speech", "reference", "first", "frames", "video"}
    assert asked("stats", *where)["entries"] == len(listed) == asked("verify", *where)["sound"]
    assert [row["node"] for row in asked("pin", "--node", "first", *where)["entries"]] == ["first"]
    assert [row["node"] for row in asked("ls", *where)["entries"] if row["pinned"]] == ["first"]
    gone = asked("gc", "--limit", "0", *where)["removed"]
    assert [row["node"] for row in gone] == ["frames"], "all else is younger than an hour"
    (video,) = (row["fingerprint"] for row in listed if row["node"] == "video")
    assert len(asked("rm", video[:10], "--dry-run", *where)["entries"]) == 1
    assert Store(done[0] / "cache").lookup(video) is not None
    code, out, _ = call("cache", "rm", video[:10], *where)
    assert (code, out.split()[0]) == (0, video[:12])
    assert Store(done[0] / "cache").lookup(video) is None


@pytest.mark.parametrize("arguments", [["rm"], ["rm", "zz"], ["pin", "--node", "nobody"], ["gc", "--limit", "lots"]])
def test_what_means_nothing_is_a_usage_error(arguments: list[str], done: tuple[Path, list[str]]) -> None:
    assert call("cache", *arguments, "--cache-dir", done[0] / "cache")[0] == 2


def test_damage_makes_verify_fail_until_it_is_repaired(done: tuple[Path, list[str]]) -> None:
    """And the same run command mends it."""
    folder, command = done
    where = ["--cache-dir", folder / "cache"]
    (first,) = (row["fingerprint"] for row in asked("ls", *where)["entries"] if row["node"] == "first")
    entry = Store(folder / "cache").lookup(first)
    assert entry is not None
    path = folder / "cache/objects" / entry.outputs["latent"].sha256[:2] / entry.outputs["latent"].file_name
    path.chmod(0o644)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    code, out, _ = call("cache", "verify", *where)
    assert code == 1
    assert f"damaged: {first[:12]}" in out
    assert call("cache", "verify", "--repair", "--dry-run", *where)[0] == 1
    assert path.exists(), "nothing was changed"
    assert call("cache", "verify", "--repair", *where)[0] == 0
    assert call("cache", "verify", *where)[0] == 0
    assert call(*command, folder / "cache")[0] == 0
    mended = Store(folder / "cache").lookup(first)
    assert mended is not None
    assert mended.outputs == entry.outputs, "the same bits again"


def test_the_commands_tell_the_limit_and_the_reserve(
    done: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment's limit counts for gc, too; none means that nothing goes."""
    where = ["--cache-dir", done[0] / "cache"]
    found = asked("stats", *where)
    assert 0 < found["limit_bytes"] <= 50 * 10**9
    assert 0 < found["reserve_bytes"] <= 50 * 10**9
    assert found["free_bytes"] > 0
    monkeypatch.setenv("S2VFLOW_CACHE_LIMIT", "2k")
    assert asked("stats", *where)["limit_bytes"] == asked("gc", *where)["limit_bytes"] == 2000
    monkeypatch.setenv("S2VFLOW_CACHE_LIMIT", "none")
    assert asked("stats", *where)["limit_bytes"] is None
    monkeypatch.setenv("S2VFLOW_CACHE_LIMIT", "2x")
    code, _, err = call("cache", "stats", *where)
    assert (code, "S2VFLOW_CACHE_LIMIT: '2x' is no size" in err) == (2, True)


def test_a_run_keeps_its_cache_within_the_limit(quick_run: Place, tmp_path: Path) -> None:
    """What it needs stays; what else is old goes, which is said."""
    made = copied(quick_run, tmp_path / "copy")
    for path in made.cache.glob("[eo]*/??/*"):
        os.utime(path, (time.time() - 86400,) * 2)
    store = Store(made.cache)
    other = store.publish("ab" * 32, {"kind": "toy"}, {"out": b"old"}, {"seconds": 100.0})
    for path in made.cache.glob("entries/ab/*"):
        os.utime(path, (time.time() - 86400,) * 2)
    code, _, err = made.run("--set", "nodes.video.crf=30", "--cache-limit", "1k")
    assert code == 0, err
    assert "to keep the cache within its limit" in err
    assert store.lookup(other.fingerprint) is None
    code, out, err = made.run("--set", "nodes.video.crf=30", "--cache-limit", "none", "--json")
    assert (code, json.loads(out)["computed"]) == (0, []), "everything that the run needed was kept"
    assert made.run("--cache-limit", "lots")[0] == 2
