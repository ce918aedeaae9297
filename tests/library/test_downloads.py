"""Downloads from a server on this machine that misbehaves as servers do."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from serving import serving

from s2v_flow.errors import ExitCode, MissingError, RefusedError, S2VFlowError
from s2v_flow.library import downloads
from s2v_flow.library.downloads import RemoteFile, at_endpoint, check_space, fetch, look_up, part_path

BODY = bytes(range(256)) * 20_000  # 5 MB: several blocks
SHA256 = hashlib.sha256(BODY).hexdigest()


@dataclass
class Server:
    """What the server does, and what it was asked."""

    address: str = ""
    body: bytes = BODY
    sha256: str = SHA256
    cuts: list[int] = field(default_factory=list)  # after so many bytes of an answer it hangs up, once each
    has_ranges: bool = True
    status: int = 0  # answer every GET so
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Range


def handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *given: Any) -> None:
            """Say nothing."""

        def note(self) -> None:
            server.asked.append((self.command, self.path, self.headers.get("Range")))
            assert self.headers.get("Authorization") is None

        def do_HEAD(self) -> None:
            """Answer as the hub does: a redirect that carries the file's digest and size."""
            self.note()
            if self.path.startswith("/gone"):
                self.send_error(404)
            elif self.path.startswith("/old/"):
                self.send_response(307)
                self.send_header("Location", self.path.replace("/old/", "/new/"))
                self.send_header("Content-Length", "11")
                self.end_headers()
            elif self.path.startswith("/plain"):
                self.send_response(200)
                self.send_header("ETag", '"a-git-blob"')
                self.end_headers()
            else:
                self.send_response(302)
                self.send_header("X-Linked-Etag", f'"{server.sha256}"')
                self.send_header("X-Linked-Size", str(len(BODY)))
                self.send_header("Location", f"{server.address}/cdn")
                self.end_headers()

        def do_GET(self) -> None:
            self.note()
            if self.path != "/cdn":
                self.send_response(302)
                self.send_header("Location", f"{server.address}/cdn")
                self.end_headers()
                return
            if server.status:
                self.send_error(server.status)
                return
            match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")) if server.has_ranges else None
            first = int(match[1]) if match else 0
            self.send_response(206 if match else 200)
            if match:
                self.send_header("Content-Range", f"bytes {first}-{len(server.body) - 1}/{len(server.body)}")
            self.send_header("Content-Length", str(len(server.body) - first))
            self.end_headers()
            end = first + server.cuts.pop(0) if server.cuts else len(server.body)
            self.wfile.write(server.body[first:end])

    return Handler


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    state = Server()
    with serving(handler(state)) as state.address:
        yield state


class Pauses(list[float]):
    """Counts the pauses between attempts instead of making them."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


def gets(server: Server) -> list[str | None]:
    """Return the ranges of the requests that reached the file itself."""
    return [span for method, path, span in server.asked if (method, path) == ("GET", "/cdn")]


def test_head_gives_the_digest_and_the_size_and_follows_a_renamed_repository(server: Server) -> None:
    for start in ("model", "old/model"):
        url = f"{server.address}/{start}"
        assert look_up(url) == RemoteFile(url, SHA256, len(BODY))


def test_a_file_that_is_not_there_or_has_no_digest_is_an_error(server: Server) -> None:
    with pytest.raises(MissingError, match="404"):
        look_up(f"{server.address}/gone")
    with pytest.raises(RefusedError, match="does not say the file's sha256"):
        look_up(f"{server.address}/plain")
    with pytest.raises(RefusedError, match="only http and https"):
        look_up("file:///etc/passwd")


def test_a_server_that_does_not_answer_is_an_error_with_advice(server: Server) -> None:
    """A port on which nothing listens."""
    with pytest.raises(S2VFlowError, match="cannot be reached") as caught:
        look_up("http://127.0.0.1:1/model")
    assert caught.value.fix is not None
    assert "network" in caught.value.fix


def test_a_download_stands_whole_under_its_name_and_reports_its_progress(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "models" / "vae" / "model.safetensors"
    seen: list[tuple[int, int]] = []
    fetch(look_up(f"{server.address}/model"), target, lambda done, total: seen.append((done, total)))
    assert target.read_bytes() == BODY
    assert [file.name for file in target.parent.iterdir()] == ["model.safetensors"]
    assert seen[-1] == (len(BODY), len(BODY))
    assert seen == sorted(seen)
    assert len(seen) > 3


def test_a_connection_that_breaks_is_taken_up_where_it_broke(server: Server, tmp_path: Path) -> None:
    """Within one command: each answer goes on from the bytes that are there."""
    server.cuts = [1_000_000, 2_000_000]
    pauses = Pauses()
    fetch(look_up(f"{server.address}/model"), tmp_path / "m", pause=pauses)
    assert (tmp_path / "m").read_bytes() == BODY
    assert gets(server) == [None, "bytes=1000000-", "bytes=3000000-"]
    assert pauses == [1.0, 1.0]


def test_an_interrupted_download_is_taken_up_by_the_next_command(server: Server, tmp_path: Path) -> None:
    """Ctrl-C leaves a part file; what stands under the name is never half a file."""
    remote = look_up(f"{server.address}/model")

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(remote, tmp_path / "m", interrupt)
    part = part_path(remote, tmp_path / "m")
    size = part.stat().st_size
    assert 0 < size < len(BODY)
    assert not (tmp_path / "m").exists()
    fetch(remote, tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == BODY
    assert gets(server) == [None, f"bytes={size}-"]
    assert not part.exists()


def test_a_server_without_ranges_sends_all_of_it_again(server: Server, tmp_path: Path) -> None:
    server.has_ranges, server.cuts = False, [3_000_000]
    fetch(look_up(f"{server.address}/model"), tmp_path / "m", pause=Pauses())
    assert (tmp_path / "m").read_bytes() == BODY


def test_a_file_with_another_digest_is_refused_and_removed(server: Server, tmp_path: Path) -> None:
    """One changed byte is enough, and so is a damaged part of an earlier attempt."""
    server.body = BODY[:-1] + b"!"
    remote = look_up(f"{server.address}/model")
    with pytest.raises(RefusedError, match="another sha256"):
        fetch(remote, tmp_path / "m")
    server.body = BODY
    part_path(remote, tmp_path / "m").write_bytes(b"damaged")
    with pytest.raises(RefusedError, match="another sha256"):
        fetch(remote, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_more_bytes_than_promised_are_refused(server: Server, tmp_path: Path) -> None:
    server.body = BODY + b"more"
    with pytest.raises(RefusedError, match="more bytes"):
        fetch(look_up(f"{server.address}/model"), tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(("status", "kind", "attempts"), [(404, MissingError, 1), (503, S2VFlowError, 5)])
def test_a_final_answer_ends_at_once_and_others_are_asked_again(
    server: Server, tmp_path: Path, status: int, kind: type[S2VFlowError], attempts: int
) -> None:
    remote = look_up(f"{server.address}/model")
    server.status = status
    pauses = Pauses()
    with pytest.raises(kind, match=str(status)):
        fetch(remote, tmp_path / "m", pause=pauses)
    assert len(gets(server)) == attempts
    assert pauses == [2.0**number for number in range(1, attempts)]
    assert not (tmp_path / "m").exists()


def test_a_second_process_is_told_that_a_first_one_is_at_it(server: Server, tmp_path: Path) -> None:
    remote = look_up(f"{server.address}/model")

    def fetch_too(done: int, total: int) -> None:
        with pytest.raises(S2VFlowError, match="another process"):
            fetch(remote, tmp_path / "m")

    fetch(remote, tmp_path / "m", fetch_too)
    assert (tmp_path / "m").read_bytes() == BODY


def test_what_the_disk_cannot_hold_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that are there already count."""
    remote = RemoteFile("http://127.0.0.1/m", SHA256, 2**60)
    with pytest.raises(S2VFlowError, match=r"1152921504\.6 GB are to be downloaded") as caught:
        check_space([(remote, tmp_path / "models" / "m")])
    assert caught.value.exit_code == ExitCode.DISK_FULL
    small = RemoteFile("http://127.0.0.1/m", SHA256, 10)
    part_path(small, tmp_path / "m").write_bytes(bytes(8))
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 2}))
    check_space([(small, tmp_path / "m")])


def test_a_folder_that_cannot_be_written_is_an_error_with_advice(server: Server, tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file")
    with pytest.raises(S2VFlowError, match="cannot be written") as caught:
        fetch(look_up(f"{server.address}/model"), tmp_path / "models" / "m")
    assert caught.value.fix is not None
    assert "--models-dir" in caught.value.fix


def test_hf_endpoint_names_a_mirror_for_the_hub_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert at_endpoint("https://huggingface.co/a/b") == "https://huggingface.co/a/b"
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    assert at_endpoint("https://huggingface.co/a/b") == "https://mirror.example/a/b"
    assert at_endpoint("https://elsewhere.example/a") == "https://elsewhere.example/a"
