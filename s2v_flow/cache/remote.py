"""A store that others share, behind the local one: read through, written behind, by fsspec (file, s3, gs, http).

It has the same two folders. A record goes there after its objects, so that one without them, or cut off, is a miss;
whatever comes from there is checked against its digest before it enters the local store. It never decides whether a run
succeeds: the first failure is told, and the run goes on without it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

from s2v_flow.cache.store import Entry, Store, entry_place, entry_text, file_sha256, parse_entry
from s2v_flow.errors import UsageError
from s2v_flow.files.atomic import CannotWriteError, cannot_write

ResultT = TypeVar("ResultT")


class RemoteStore(Store):
    """A local store with a remote one behind it; `close` waits for what is still to be written there.

    `url`: file:///mnt/cache, s3://bucket/cache, https://host/cache (which is only read). `warn` is told, at most once
    for reading and once for writing, that the remote store does not work.

    Raises:
        S2VFlowError: fsspec, or what it needs for such a URL, is not installed; or the URL is none.
    """

    def __init__(self, root: Path, url: str, warn: Callable[[str], None]) -> None:
        super().__init__(root)
        try:
            import fsspec

            path = unquote(url) if url.startswith("file:") else url  # fsspec takes %20 as it stands there
            self._files, self._folder = fsspec.core.url_to_fs(path)
        except (ImportError, ValueError) as error:
            fix = "pip install 's2vflow[remote]', and name a folder by its URL: file:///mnt/cache, s3://bucket/cache"
            raise UsageError(f"--cache-remote {url}: {error}", fix) from error
        self._url, self._warn = url, warn
        self._absent: set[str] = set()
        self._damaged: set[str] = set()  # objects over there that are to be written again
        self._can_read = True
        self._failure = ""
        self._waiting: queue.Queue[Entry | None] = queue.Queue()
        self._writer: threading.Thread | None = None

    def lookup(self, fingerprint: str) -> Entry | None:
        """Return an entry that is here, or is fetched now; see `Store.lookup`."""
        found = super().lookup(fingerprint)
        if found is None and self._can_read and fingerprint not in self._absent:
            self._absent.add(fingerprint)
            found, failure = _attempt(lambda: self._fetch(fingerprint))
            if failure:
                self._can_read = False
                self._warn(f"warning: {self._url} cannot be read, the run goes on without it: {failure}")
        return found

    def publish(self, *what: Any, **options: Any) -> Entry:
        """Store a node's outputs here, and write them behind; see `Store.publish`."""
        made = super().publish(*what, **options)
        if "http" in self._files.protocol:  # fsspec would post to whatever answers there
            return made
        if self._writer is None:
            self._writer = threading.Thread(target=self._write, daemon=True)
            self._writer.start()
        self._waiting.put(made)
        return made

    def close(self) -> None:
        """Wait until all is written, or is known not to be."""
        if self._writer is not None:
            self._waiting.put(None)
            self._writer.join()
            self._writer = None
        if self._failure:
            self._warn(f"warning: {self._url} cannot be written, what was computed is here only: {self._failure}")

    def _fetch(self, fingerprint: str) -> Entry | None:
        try:
            entry = parse_entry(self._files.cat_file(f"{self._folder}/{entry_place(fingerprint)}"), fingerprint)
            if entry is None:
                return None
            with self.scratch() as folder:
                paths: dict[str, bytes | Path] = {}
                for port, item in entry.outputs.items():
                    paths[port] = folder / item.file_name
                    if not self._has(item):
                        self._files.get_file(f"{self._folder}/{item.place}", str(paths[port]))
                        if file_sha256(folder / item.file_name) != item.sha256:
                            self._damaged.add(item.file_name)
                            return None
                found = super().publish(fingerprint, entry.preimage, paths, entry.facts, items=entry.outputs)
                self.on_fetched(sum(item.size for item in set(entry.outputs.values())))
                return found
        except (FileNotFoundError, CannotWriteError):
            return None
        except OSError as error:
            if cannot_write(self.root, error).is_full:  # the disk here, of which the run will tell
                return None
            raise

    def _write(self) -> None:
        while (entry := self._waiting.get()) is not None:
            if not self._failure:
                failure = _attempt(partial(self._send, entry))[1]
                is_here = all(map(self._has, entry.outputs.values()))  # else it has been evicted meanwhile
                self._failure = failure if is_here else ""

    def _send(self, entry: Entry) -> None:
        for item in entry.outputs.values():
            there = f"{self._folder}/{item.place}"
            is_damaged = item.file_name in self._damaged
            if is_damaged or not self._files.exists(there) or self._files.size(there) != item.size:
                self._files.makedirs(self._files._parent(there), exist_ok=True)
                self._files.put_file(str(self.object_path(item)), there)
        there = f"{self._folder}/{entry_place(entry.fingerprint)}"
        self._files.makedirs(self._files._parent(there), exist_ok=True)
        self._files.pipe_file(there, entry_text(entry))


def _attempt(action: Callable[[], ResultT]) -> tuple[ResultT | None, str]:
    """Do something; return its result, and why it failed."""
    try:
        return action(), ""
    except Exception as error:  # every file system of fsspec has errors of its own
        return None, (str(error).strip() or type(error).__name__).partition("\n")[0]
