"""A store behind the cache that machines share: a folder by its URL, and a real S3 server on this machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from runs_for_tests import Place, copied

from s2v_flow.errors import S2VFlowError

pytest.importorskip("fsspec", reason="the extra remote is not installed")

from s2v_flow.cache.remote import RemoteStore
from s2v_flow.cache.store import Entry, StoredObject, entry_text

KEY = "ab" * 32
IMAGE: Mapping[str, Any] = {"kind": "chunk"}


def stored(root: Path, url: str, payload: bytes = b"latent") -> list[str]:
    """Publish one result, and return what was told."""
    told: list[str] = []
    store = RemoteStore(root, url, told.append)
    store.publish(KEY, IMAGE, {"latent": payload}, {"seconds": 1})
    store.close()
    return told


def test_another_machine_reads_what_one_has_written(tmp_path: Path) -> None:
    """The entry with its facts, and the object, which is here from then on."""
    url = (tmp_path / "shared").as_uri()
    assert stored(tmp_path / "a", url) == []
    other = RemoteStore(tmp_path / "b", url, pytest.fail)
    found = other.lookup(KEY)
    assert found is not None
    assert (other.read(found.outputs["latent"]), dict(found.facts), dict(found.preimage)) == (
        *(b"latent", {"seconds": 1}),
        dict(IMAGE),
    )
    other.close()
    assert RemoteStore(tmp_path / "b", (tmp_path / "empty").as_uri(), pytest.fail).lookup(KEY) == found


@pytest.mark.parametrize(
    "fault", ["no object", "object cut off", "object changed", "record cut off", "another's record"]
)
def test_what_is_not_whole_over_there_is_a_miss(tmp_path: Path, fault: str) -> None:
    """Nothing unverified enters the local store, and nothing is told: it is computed, and written there again."""
    url = (tmp_path / "shared").as_uri()
    stored(tmp_path / "a", url)
    (blob,) = (tmp_path / "shared" / "objects").glob("??/*")
    (record,) = (tmp_path / "shared" / "entries").glob("??/*")
    blob.chmod(0o644)
    match fault:
        case "no object":
            blob.unlink()
        case "object cut off":
            blob.write_bytes(b"lat")
        case "object changed":
            blob.write_bytes(b"LATENT")
        case "record cut off":
            record.write_bytes(record.read_bytes()[:-20])
        case _:
            record.write_bytes(record.read_bytes().replace(b"abab", b"cdcd"))
    store = RemoteStore(tmp_path / "b", url, pytest.fail)
    assert store.lookup(KEY) is None
    assert not list((tmp_path / "b").glob("objects/??/*"))
    if fault not in ("object changed",):
        assert stored(tmp_path / "c", url) == []
        assert RemoteStore(tmp_path / "b", url, pytest.fail).lookup(KEY) is not None


@pytest.mark.parametrize("sha256", ["{folder}/mine", "AB" * 32])
def test_a_record_names_no_file_outside_of_the_cache(sha256: str, tmp_path: Path) -> None:
    """Whoever may write to the shared folder cannot write into others' homes: such a record is a miss."""
    mine, shared, sha256 = tmp_path / "mine", tmp_path / "shared", sha256.format(folder=tmp_path)
    mine.write_text("my own")
    record = entry_text(Entry(KEY, IMAGE, {"latent": StoredObject("0" * 64, 4, "")}, {})).decode()
    body = json.loads(record)["entry"]
    body["outputs"]["latent"]["sha256"] = sha256
    text = json.dumps({"sha256": hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest(), "entry": body})
    for name, content in ((f"entries/{KEY[:2]}/{KEY}.json", text), (f"objects/{sha256[:2]}/{sha256}", "evil")):
        path = Path(f"{shared}/{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    assert RemoteStore(tmp_path / "b", shared.as_uri(), pytest.fail).lookup(KEY) is None
    assert mine.read_text() == "my own"


def test_a_remote_that_cannot_be_written_costs_a_warning(tmp_path: Path) -> None:
    """Told once; the local store has everything."""
    (tmp_path / "shared").write_text("a file", encoding="utf-8")
    told = stored(tmp_path / "a", (tmp_path / "shared" / "below").as_uri())
    assert [text.partition(" cannot be ")[2].split(",")[0] for text in told] == ["read", "written"]
    assert told[1].startswith("warning: file://")
    assert RemoteStore(tmp_path / "a", (tmp_path / "empty").as_uri(), pytest.fail).lookup(KEY) is not None


@pytest.mark.slow
def test_a_run_takes_what_is_there_and_gives_what_it_makes(quick_run: Place, tmp_path: Path) -> None:
    """A machine with an empty cache computes nothing; the video is the same."""
    url = (tmp_path / "shared").as_uri()
    first = copied(quick_run, tmp_path / "first")
    for entry in list(first.cache.glob("entries/??/*.json")):
        entry.unlink()
    assert first.run("--cache-remote", url)[0] == 0
    second = copied(quick_run, tmp_path / "second")
    second.video.unlink()
    for entry in [*second.cache.glob("entries/??/*.json"), *second.cache.glob("objects/??/*")]:
        entry.unlink()
    code, _, err = second.run("--cache-remote", url)
    assert code == 0, err
    assert " 0 computed, 7 stored " in err
    assert second.video.read_bytes() == first.video.read_bytes()


def test_an_unknown_kind_of_url_is_a_mistake_of_the_command_line(quick_run: Place, tmp_path: Path) -> None:
    """Exit code 2, before anything is computed."""
    with pytest.raises(S2VFlowError, match="nosuch"):
        RemoteStore(tmp_path, "nosuch://bucket/cache", pytest.fail)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Yield a real S3 server on this machine, with a bucket."""
    server_of = pytest.importorskip("moto.server", reason="moto[server] is not installed").ThreadedMotoServer
    s3fs = pytest.importorskip("s3fs", reason="the extra remote is not installed")
    server = server_of(port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in (
        ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
        ("AWS_ACCESS_KEY_ID", "x"),
        ("AWS_SECRET_ACCESS_KEY", "x"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("s2vflow")
    yield server
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_s3_is_read_and_written_and_may_go_in_the_middle(s3: Any, tmp_path: Path) -> None:
    """A server that is gone costs a warning for each way, and nothing of what is computed."""
    url = "s3://s2vflow/cache"
    assert stored(tmp_path / "a", url, bytes(9_000_000)) == []
    other = RemoteStore(tmp_path / "b", url, pytest.fail)
    found = other.lookup(KEY)
    assert found is not None
    assert other.read(found.outputs["latent"]) == bytes(9_000_000)
    told: list[str] = []
    third = RemoteStore(tmp_path / "c", url, told.append)
    assert third.lookup("cd" * 32) is None
    s3.stop()
    assert third.lookup(KEY) is None
    third.publish(KEY, IMAGE, {"latent": b"own"}, {})
    third.close()
    assert [text.partition(": ")[2].split(", ")[0] for text in told] == [
        f"{url} cannot be read",
        f"{url} cannot be written",
    ]
    kept = third.lookup(KEY)
    assert kept is not None
    assert third.read(kept.outputs["latent"]) == b"own"
