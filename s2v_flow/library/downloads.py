"""Download a file over HTTP: resumable, checked by its sha256, and put in its place whole or not at all.

Written on urllib: huggingface_hub's own `hf_hub_download` (2.x) throws a half-done file away when it is interrupted,
which is no way to get 33 GB; its `http_get`, which could go on from there, is not exported, prints its own progress and
has changed with each major version. All that is needed of the hub is in two headers of its answer to HEAD. No
credentials are ever sent: the models are public.
"""

from __future__ import annotations

import errno
import http.client
import os
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any, BinaryIO

from s2v_flow.errors import ExitCode, MissingError, RefusedError, S2VFlowError
from s2v_flow.files.facts import file_digest
from s2v_flow.files.lock import try_lock
from s2v_flow.wording import size_text

HUB = "https://huggingface.co"
_TIMEOUT_SECONDS = 30.0
_BLOCK_BYTES = 1 << 20
_ATTEMPTS = 5  # in a row that bring nothing
_REDIRECTS = 5
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FINAL = frozenset({400, 401, 403, 404, 410, 451})  # asking again does not help
_FIX_NETWORK = "check the network, and run the same command again"
_FIX_DISK = "free some space, or name another folder with --models-dir"
_NETWORK_ERRORS = (OSError, http.client.HTTPException)  # URLError, timeouts and TLS errors are OSErrors

Progress = Callable[[int, int], None]  # bytes that are there, bytes in all


@dataclass(frozen=True)
class RemoteFile:
    """A file on a server: its address, sha256 and size in bytes."""

    url: str
    sha256: str
    size: int


def at_endpoint(home: str) -> str:
    """Return a home's address at the server that HF_ENDPOINT names (a mirror), or as it is."""
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/")
    return endpoint + home.removeprefix(HUB) if endpoint and home.startswith(f"{HUB}/") else home


def look_up(url: str) -> RemoteFile:
    """Ask a hub for a file's sha256 and size, without downloading it.

    Raises:
        MissingError: It is not there.
        S2VFlowError: The server cannot be reached.
        RefusedError: It does not say the file's sha256, so what it sends could not be checked.

    Source: huggingface_hub, src/huggingface_hub/file_download.py, get_hf_file_metadata
    """
    address = url
    for _ in range(_REDIRECTS):
        headers, is_redirect = _head(address)
        # a redirect's own ETag and length are not the file's
        etag = headers.get("X-Linked-Etag") or ("" if is_redirect else headers.get("ETag")) or ""
        size = headers.get("X-Linked-Size") or ("" if is_redirect else headers.get("Content-Length")) or ""
        sha256 = etag.removeprefix("W/").strip('"')
        if _SHA256.fullmatch(sha256) and size.isdecimal():
            return RemoteFile(url, sha256, int(size))
        if not headers.get("Location"):
            break
        address = urllib.parse.urljoin(address, headers["Location"])
    fix = "download it by hand, or set HF_ENDPOINT to another mirror of the hub"
    raise RefusedError(f"{url}: the server does not say the file's sha256 and size, so it could not be checked", fix)


def part_path(remote: RemoteFile, target: Path) -> Path:
    """Return where a file stands while it is incomplete: beside its place, under a name that holds its digest."""
    return target.with_name(f"{target.name}.{remote.sha256[:16]}.part")


def check_space(files: list[tuple[RemoteFile, Path]]) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        S2VFlowError: With what is needed and what is free.
    """
    if not files:
        return
    needed = 0
    for remote, target in files:
        part = part_path(remote, target)
        needed += remote.size - (part.stat().st_size if part.is_file() else 0)
    folder = files[0][1].parent
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        text = f"{folder}: {size_text(needed)} are to be downloaded, {size_text(free)} are free"
        raise S2VFlowError(text, _FIX_DISK, exit_code=ExitCode.DISK_FULL)


def fetch(
    remote: RemoteFile,
    target: Path,
    on_progress: Progress = lambda done, total: None,
    *,
    pause: Callable[[float], None] = time.sleep,
) -> None:
    """Download a file, going on where an earlier attempt ended; `pause`: waits between attempts.

    Raises:
        MissingError: The server does not have it any more.
        RefusedError: What came is not what was promised; it has been removed.
        S2VFlowError: The network or the disk failed for good; what came is kept.
    """
    part = part_path(remote, target)
    with _writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(part) as file:
            _fill(file, remote, on_progress, pause)
            file.flush()
            os.fsync(file.fileno())
    if file_digest(part) != remote.sha256:
        part.unlink()
        raise RefusedError(
            f"{remote.url}: what came has another sha256 than the server promised; it was removed",
            fix="run the same command again; if this comes back, the server or the way to it is faulty",
        )
    with _writing(target):
        os.replace(part, target)


def _fill(file: BinaryIO, remote: RemoteFile, on_progress: Progress, pause: Callable[[float], None]) -> None:
    """Append to a file until it has the remote one's size."""
    failures = 0
    while (have := file.seek(0, os.SEEK_END)) < remote.size:
        reason = "the connection ended early"
        try:
            with _get(remote, have) as response:
                if response.status == 200 and have:  # it cannot send a part: all of it comes again
                    file.truncate(0)
                _copy(response, file, remote, on_progress)
        except _ServerError as error:
            reason = str(error)
            if error.is_final:
                raise MissingError(f"{remote.url}: {reason}", "see whether the file has another home now") from error
        except _NETWORK_ERRORS as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            reason = _reason(error)
        failures = 0 if file.seek(0, os.SEEK_END) > have else failures + 1
        if failures == _ATTEMPTS:
            kept = f"{size_text(have)} of {size_text(remote.size)}; the same command goes on from there"
            raise S2VFlowError(f"{remote.url}: {reason}", _FIX_NETWORK, kept)
        if file.tell() < remote.size:
            pause(2.0**failures)
    if have > remote.size:
        file.truncate(0)
        raise RefusedError(f"{remote.url}: more bytes came than were promised; they were removed", _FIX_NETWORK)


def _copy(response: http.client.HTTPResponse, file: BinaryIO, remote: RemoteFile, on_progress: Progress) -> None:
    """Copy an answer's bytes, one more than promised at most."""
    have = file.seek(0, os.SEEK_END)
    while have <= remote.size and (block := response.read(min(_BLOCK_BYTES, remote.size + 1 - have))):
        file.write(block)
        have += len(block)
        on_progress(min(have, remote.size), remote.size)
    file.flush()


class _ServerError(Exception):
    """The server answered, but not with the file."""

    def __init__(self, reason: str, *, is_final: bool) -> None:
        super().__init__(reason)
        self.is_final = is_final


@contextmanager
def _get(remote: RemoteFile, first: int) -> Iterator[http.client.HTTPResponse]:
    """Ask for a file's bytes from `first` on; the answer begins there (206) or at the file's start (200)."""
    try:
        response = _open(remote.url, "GET", {"Range": f"bytes={first}-"} if first else {})
    except urllib.error.HTTPError as error:
        with error:
            raise _ServerError(f"the server says {error.code} {error.reason}", is_final=error.code in _FINAL) from None
    with response:
        if response.status not in (200, 206):
            raise _ServerError(f"the server says {response.status}", is_final=False)
        span = response.headers.get("Content-Range", "")
        if response.status == 206 and not span.startswith(f"bytes {first}-"):
            raise _ServerError(f"the server sends another part than it was asked for ({span})", is_final=False)
        yield response


class _StayHere(urllib.request.HTTPRedirectHandler):
    """Shows redirects instead of following them: the hub's own answer has the headers."""

    def redirect_request(self, *given: Any) -> None:
        return None


def _head(url: str) -> tuple[Message, bool]:
    """Return the headers of the answer to HEAD, and whether it is a redirect."""
    try:
        with _open(url, "HEAD", {}, _StayHere()) as response:
            return response.headers, False
    except urllib.error.HTTPError as error:
        with error:
            if 300 <= error.code < 400:
                return error.headers, True
        reason = f"{url}: the server says {error.code} {error.reason}"
        if error.code in _FINAL:
            raise MissingError(reason, "see whether the file has another home now") from error
        raise S2VFlowError(reason, _FIX_NETWORK) from error
    except _NETWORK_ERRORS as error:
        raise S2VFlowError(f"{url}: the server cannot be reached: {_reason(error)}", _FIX_NETWORK) from error


def _open(
    url: str, method: str, headers: dict[str, str], *handlers: urllib.request.BaseHandler
) -> http.client.HTTPResponse:
    """Send a request, over HTTP or HTTPS and nothing else."""
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise RefusedError(f"{url}: only http and https addresses are used")
    own = {"User-Agent": "s2vflow", "Accept-Encoding": "identity"}
    request = urllib.request.Request(url, headers={**own, **headers}, method=method)
    response: http.client.HTTPResponse = urllib.request.build_opener(*handlers).open(request, timeout=_TIMEOUT_SECONDS)
    return response


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None) or error
    return f"{reason}" or type(error).__name__


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """Open a file to be filled, which no other process may have; where there are no locks, the sha256 will tell."""
    try:
        descriptor = try_lock(path, 0o666)
    except OSError:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    if descriptor is None:
        raise S2VFlowError(f"{path}: another process is downloading this file", fix="wait for it")
    with os.fdopen(descriptor, "r+b") as file:
        yield file


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Turn the operating system's refusals into errors that say what to do."""
    try:
        yield
    except OSError as error:
        code = ExitCode.DISK_FULL if error.errno in (errno.ENOSPC, errno.EDQUOT) else ExitCode.FAILED
        text, kept = (
            f"{target}: cannot be written: {error.strerror or error}",
            "what came so far; the same command goes on from there",
        )
        raise S2VFlowError(text, _FIX_DISK, kept, exit_code=code) from error
