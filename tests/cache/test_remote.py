"""A store behind the cache that machines share: a folder by its URL, and a real S3 server on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from faults_for_tests import forked, needs_small_disks, small_disk
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
    store.publish(KEY, IMAGE, {"latent": b"latent"}, {})
    store.close()
    assert RemoteStore(tmp_path / "c", url, pytest.fail).lookup(KEY) is not None


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


def test_a_folders_url_may_have_its_blanks_escaped(tmp_path: Path) -> None:
    shared = tmp_path / "a folder, ä"
    shared.mkdir()
    for number, url in enumerate((shared.as_uri(), f"file://{shared}")):
        assert stored(tmp_path / str(number), url) == []
        assert len(list(tmp_path.iterdir())) == 2 + number


def test_a_remote_that_cannot_be_written_costs_a_warning(tmp_path: Path) -> None:
    """Told once; the local store has everything."""
    (tmp_path / "shared").write_text("a file", encoding="utf-8")
    told = stored(tmp_path / "a", (tmp_path / "shared" / "below").as_uri())
    assert [text.partition(" cannot be ")[2].split(",")[0] for text in told] == ["read", "written"]
    assert told[1].startswith("warning: file://")
    assert RemoteStore(tmp_path / "a", (tmp_path / "empty").as_uri(), pytest.fail).lookup(KEY) is not None


def test_what_is_evicted_before_it_is_written_there_is_no_fault_of_the_remote(tmp_path: Path) -> None:
    """What comes after it is written."""
    shared = tmp_path / "shared"
    store = RemoteStore(tmp_path / "a", shared.as_uri(), pytest.fail)
    shared.mkdir()
    os.mkfifo(shared / "gate")  # the writer waits at it, until the second result has been evicted
    record = shared / "entries" / KEY[:2] / f"{KEY}.json"
    record.parent.mkdir(parents=True)
    record.symlink_to(shared / "gate")
    store.publish(KEY, IMAGE, {"latent": b"latent"}, {}, replaces=True)
    evicted = store.publish("cd" * 32, IMAGE, {"latent": b"evicted"}, {})
    store.publish("ef" * 32, IMAGE, {"latent": b"next"}, {})
    store.object_path(evicted.outputs["latent"]).unlink()
    (shared / "gate").read_bytes()
    store.close()
    other = RemoteStore(tmp_path / "b", shared.as_uri(), pytest.fail)
    assert other.lookup("cd" * 32) is None
    assert other.lookup("ef" * 32) is not None


def test_what_is_fetched_counts_against_the_caches_limit(tmp_path: Path) -> None:
    url, fetched = (tmp_path / "shared").as_uri(), list[int]()
    stored(tmp_path / "a", url, bytes(5000))
    store = RemoteStore(tmp_path / "b", url, pytest.fail)
    store.on_fetched = fetched.append
    assert [store.lookup(KEY) is not None for _ in range(2)] == [True, True]
    assert fetched == [5000]


@needs_small_disks()
def test_a_full_disk_here_is_no_fault_of_the_remote(tmp_path: Path) -> None:
    """It is a miss, and the next result is looked for over there again; what a fault cuts off there is written anew."""
    url = (tmp_path / "shared").as_uri()
    stored(tmp_path / "a", url, bytes(500_000))
    (tmp_path / "small").mkdir()

    def act() -> None:
        small_disk(tmp_path / "small")
        store = RemoteStore(tmp_path / "small", url, pytest.fail)
        assert store.lookup(KEY) is None
        assert store.publish("cd" * 32, IMAGE, {"latent": b"small"}, {})
        store.close()
        over_there = tmp_path / "small" / "shared"
        (text,) = stored(tmp_path / "c", over_there.as_uri(), bytes(500_000))
        assert "cannot be written, what was computed is here only: " in text
        assert "No space left" in text
        assert RemoteStore(tmp_path / "d", over_there.as_uri(), pytest.fail).lookup(KEY) is None
        (tmp_path / "small" / "filler").unlink()
        assert stored(tmp_path / "e", over_there.as_uri(), bytes(200_000)) == []
        assert RemoteStore(tmp_path / "d", over_there.as_uri(), pytest.fail).lookup(KEY) is not None

    forked(act)


@pytest.mark.slow
def test_a_web_server_is_only_read_and_may_go_in_the_middle(tmp_path: Path) -> None:
    """Nothing is posted to it; half of an object is a miss, and told where the server said how much is to come."""
    pytest.importorskip("aiohttp", reason="the extra remote is not installed")
    stored(tmp_path / "a", (tmp_path / "shared").as_uri(), bytes(300_000))
    asked: list[str] = []

    class Server(SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            asked.append(self.command)

        def do_GET(self) -> None:
            if fault == "none" or "objects" not in self.path:
                super().do_GET()
                return
            self.send_response(200)
            self.send_header("Content-Length", "300000") if fault == "cut" else None
            self.end_headers()
            with suppress(OSError):
                self.wfile.write(bytes(100_000))
            self.close_connection = True

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, directory=str(tmp_path / "shared"))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for fault, is_there, count in (("short", False, 0), ("cut", False, 1), ("none", True, 0)):
            told: list[str] = []
            store = RemoteStore(tmp_path / fault, f"http://127.0.0.1:{server.server_port}", told.append)
            assert (store.lookup(KEY) is not None) == is_there
            store.publish("cd" * 32, IMAGE, {"latent": b"own"}, {})
            store.close()
            assert [" cannot be read, the run goes on without it" in text for text in told] == [True] * count
            assert list((tmp_path / fault / "tmp").iterdir()) == []
        server.shutdown()
    assert set(asked) == {"GET"}


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


def test_an_unknown_kind_of_url_is_a_mistake_of_the_command_line(tmp_path: Path) -> None:
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
