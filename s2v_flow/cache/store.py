"""The store of artifacts: entries (what was computed, from what) that point at objects (bytes, named by their sha256).

Everything is written beside its place, flushed and then put there whole; entries after their objects. What is read is
checked against its digest; what does not match is moved to quarantine/ and counts as not there. Nothing here ever has
to be repaired by hand: any file may be deleted at any time.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from s2v_flow.cache.resume_point import quarantine
from s2v_flow.errors import S2VFlowError
from s2v_flow.files.atomic import finish, flush_folder, make_root, put_new, temporary, temporary_prefix, writing

_BLOCK = 8 << 20
_SCHEMA = 1
_MAX_ENTRY_BYTES = 4 << 20
_OBJECT_NAME = re.compile(r"[0-9a-f]{64}(\.[^./\\\0]{1,32})?")
_COUNTS = (
    *("seconds", "load_seconds", "sampling_seconds", "steps_taken", "peak_bytes", "peak_device_bytes"),
    *("frames", "num_samples", "width", "height"),
)
_LARGEST = 1e30
_BOXES = (b"udta", b"uuid")  # what may stand behind a film: its note
_CHANGED = "its bytes have changed"
# what says nothing about a file: it may be read another time
_PASSING = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.EAGAIN, errno.ESTALE})


class DamagedObjectError(S2VFlowError):
    """An object is gone or its bytes are not what they were; its node is to be computed again."""

    @classmethod
    def at(cls, path: Path, reason: str) -> DamagedObjectError:
        """Make the error of one object."""
        fix = "run again: it is computed anew; if this comes back, check the disk and the memory"
        return cls(f"a stored result is damaged: {path}: {reason}", fix=fix)


@dataclass(frozen=True)
class StoredObject:
    """One object: its sha256, its size in bytes and its file's suffix (".safetensors", ".mp4", ...).

    Raises:
        DamagedObjectError: The sha256 or the suffix is none: strangers write them too, and they make a file's name.
    """

    sha256: str
    size: int
    suffix: str

    def __post_init__(self) -> None:
        if not _OBJECT_NAME.fullmatch(self.file_name) or not 0 <= self.size < 2**63:
            raise DamagedObjectError(f"{self.file_name!r} names no stored result")

    @property
    def file_name(self) -> str:
        """The name of its file."""
        return f"{self.sha256}{self.suffix}"

    @property
    def place(self) -> str:
        """Where it stands below a cache's folder."""
        return f"objects/{self.sha256[:2]}/{self.file_name}"


@dataclass(frozen=True)
class Entry:
    """What the store knows of one fingerprint: the pre-image, an object per output port, small facts for people."""

    fingerprint: str
    preimage: Mapping[str, Any]
    outputs: Mapping[str, StoredObject]
    facts: Mapping[str, Any]

    def output_digests(self) -> dict[str, str]:
        """Return the outputs' sha256 by port."""
        return {port: item.sha256 for port, item in self.outputs.items()}


class Store:
    """Artifacts in one folder, made on first writing."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.on_fetched: Callable[[int], None] = lambda size: None  # told how many bytes came from another store
        self._unusable: set[str] = set()  # bad objects that cannot be moved away: they count as not there

    def lookup(self, fingerprint: str) -> Entry | None:
        """Return the entry of a fingerprint if it is sound and its objects are there with the right sizes."""
        path = self._entry_path(fingerprint)
        try:
            with path.open("rb") as file:
                text = file.read(_MAX_ENTRY_BYTES + 1)
        except OSError:
            return None
        entry = parse_entry(text, fingerprint)
        if entry is None:
            quarantine(self.root, path)
            return None
        return entry if all(self._has(item) for item in entry.outputs.values()) else None

    def recent(self, limit: int) -> list[Entry]:
        """Return the sound entries that were written last, the newest first; their objects may be gone."""
        found: list[tuple[int, Path]] = []
        with suppress(OSError):  # the folder is forbidden
            for path in (self.root / "entries").glob("??/*.json"):
                with suppress(OSError):
                    found.append((path.stat().st_mtime_ns, path))
        entries = (read_entry(path) for _, path in sorted(found, reverse=True)[:limit])
        return [entry for entry in entries if entry is not None]

    def read(self, item: StoredObject) -> bytes:
        """Return an object's bytes, verified.

        Raises:
            DamagedObjectError: It is gone or damaged.
        """
        path = self.object_path(item)
        try:
            payload = path.read_bytes()
        except OSError as error:
            raise self._unreadable(item, error) from error
        if hashlib.sha256(payload).hexdigest() != item.sha256:
            raise self._lost(item, _CHANGED)
        return payload

    def copy_to(self, item: StoredObject, target: Path, trailer: bytes = b"", replaces: bool = True) -> bool:
        """Put an object's bytes and a trailer at `target`, whole or not at all; tell whether the file had to change.

        `replaces`: put them in the place of any file that is there, not only of the object with another trailer.

        Raises:
            DamagedObjectError: The object is gone or damaged; `target` is as it was.
            TakenError: Another file is there, and stays.
            S2VFlowError: `target` cannot be written.
        """
        try:
            return put_copy(self._blocks(item), item, target, trailer, replaces)
        except ChangedBytesError as error:
            raise self._lost(item, _CHANGED) from error

    def publish(
        self,
        fingerprint: str,
        preimage: Mapping[str, Any],
        outputs: Mapping[str, bytes | Path],
        facts: Mapping[str, Any],
        *,
        replaces: bool = False,
        items: Mapping[str, StoredObject] | None = None,
    ) -> Entry:
        """Store a node's outputs and say so in an entry; where another process was first, its entry counts.

        Args:
            preimage: What the fingerprint was made from, as JSON values.
            outputs: Per port the bytes of a safetensors file, or a finished file, moved or, from another disk, copied.
            facts: Small JSON values for people; they are no part of the identity.
            replaces: Put this entry in the place of one that is there.
            items: What `described` returns for the outputs, if the caller has it already.

        Raises:
            CannotWriteError: The store cannot be written. A finished file that is not in its place any more is an
            object.
        """
        with writing(self.root):
            self._make_root()
            stored = {port: described(payload) for port, payload in outputs.items()} if items is None else dict(items)
            for port, item in stored.items():
                self._put(outputs[port], item)
            text = entry_text(Entry(fingerprint, preimage, stored, facts))
            path = self._entry_path(fingerprint)
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary(self.root / "tmp", ".json") as (file, name):
                file.write(text)
                finish(file)
                if replaces:
                    os.replace(name, path)
                elif self.lookup(fingerprint) is not None or not _link(name, path):
                    winner = self.lookup(fingerprint)
                    if winner is not None:
                        return winner
                    os.replace(name, path)
            flush_folder(path.parent)
        return Entry(fingerprint, preimage, stored, facts)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Lend a folder in the store's filesystem, removed afterwards, for files that `publish` is to move.

        Raises:
            CannotWriteError: The store cannot be written.
        """
        folder = self.make_scratch()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def make_scratch(self) -> Path:
        """Make a folder in the store's filesystem; the caller removes it.

        Raises:
            CannotWriteError: The store cannot be written.
        """
        with writing(self.root):
            self._make_root()
            return Path(tempfile.mkdtemp(dir=self.root / "tmp", prefix=temporary_prefix()))

    def touch(self, fingerprint: str) -> None:
        """Say that an entry is used now: what was used last is evicted last, and not while a run lives that used it."""
        with suppress(OSError):
            os.utime(self._entry_path(fingerprint))

    def check(self, item: StoredObject) -> None:
        """Read an object and compare it with its digest; nothing is moved.

        Raises:
            DamagedObjectError: It is gone or damaged.
        """
        path = self.object_path(item)
        try:
            is_sound = file_sha256(path) == item.sha256
        except OSError as error:
            raise DamagedObjectError.at(path, error.strerror or str(error)) from error
        if not is_sound:
            raise DamagedObjectError.at(path, _CHANGED)

    def quarantine(self, item: StoredObject) -> None:
        """Move a damaged object to quarantine."""
        quarantine(self.root, self.object_path(item))

    def _put(self, payload: bytes | Path, item: StoredObject) -> None:
        if self._has(item):
            with suppress(OSError):
                os.utime(self.object_path(item))  # an eviction under way spares what is younger than itself
        elif isinstance(payload, Path) and payload.stat().st_dev == os.stat(self.root / "tmp").st_dev:
            with payload.open("r+b") as file:  # Windows flushes only what is open for writing
                os.fsync(file.fileno())
            self._place(str(payload), item)
        else:
            with temporary(self.root / "tmp", item.suffix) as (file, name):
                if isinstance(payload, Path):  # on another disk, for there was no space on this one
                    with payload.open("rb") as source:
                        shutil.copyfileobj(source, file, _BLOCK)
                else:
                    file.write(payload)
                finish(file)
                self._place(name, item)

    def _place(self, name: str, item: StoredObject) -> None:
        path = self.object_path(item)
        path.parent.mkdir(parents=True, exist_ok=True)
        os.chmod(name, 0o444)
        os.replace(name, path)
        self._unusable.discard(item.file_name)
        flush_folder(path.parent)

    def _make_root(self) -> None:
        make_root(self.root)
        for folder in ("entries", "objects", "tmp"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        tag = self.root / "CACHEDIR.TAG"
        if not tag.exists():
            tag.write_text("Signature: 8a477f597d28d172789f06886806bc55\n# Artifacts of s2vflow; safe to delete.\n")

    def has_copy(self, path: Path) -> bool:
        """Tell whether a file's bytes are stored too."""
        with suppress(OSError):
            return self._has(described(path))
        return False

    def _has(self, item: StoredObject) -> bool:
        with suppress(OSError):
            return item.file_name not in self._unusable and self.object_path(item).stat().st_size == item.size
        return False

    def _blocks(self, item: StoredObject) -> Iterator[bytes]:
        """Yield an object's bytes; its read errors differ in type from the caller's write errors."""
        path = self.object_path(item)
        try:
            with path.open("rb") as file:
                while block := file.read(_BLOCK):
                    yield block
        except OSError as error:
            raise self._unreadable(item, error) from error

    def _lost(self, item: StoredObject, reason: str, *, is_passing: bool = False) -> DamagedObjectError:
        """Return the error for an object that is gone or damaged, which must not stand in the way of a new one."""
        path = self.object_path(item)
        if is_passing or not quarantine(self.root, path):
            self._unusable.add(item.file_name)
        return DamagedObjectError.at(path, reason)

    def _unreadable(self, item: StoredObject, error: OSError) -> DamagedObjectError:
        return self._lost(item, error.strerror or str(error), is_passing=error.errno in _PASSING)

    def _entry_path(self, fingerprint: str) -> Path:
        return self.root / entry_place(fingerprint)

    def object_path(self, item: StoredObject) -> Path:
        """Return where an object's file is."""
        return self.root / item.place


def entry_place(fingerprint: str) -> str:
    """Return where an entry stands below a cache's folder."""
    return f"entries/{fingerprint[:2]}/{fingerprint}.json"


def read_entry(path: Path) -> Entry | None:
    """Read an entry's file; None where it is not sound. Its objects may be gone."""
    try:
        return parse_entry(path.read_bytes(), path.stem)
    except OSError:
        return None


def parse_entry(text: bytes, fingerprint: str) -> Entry | None:
    """Return the entry of a file's text; None where it is not sound, or another's."""
    try:
        record = json.loads(text)
        body = record["entry"]
        sound = record["sha256"] == hashlib.sha256(_canonical(body)).hexdigest()
        if not sound or body["schema"] != _SCHEMA or body["fingerprint"] != fingerprint:
            return None
        outputs = {port: StoredObject(**item) for port, item in body["outputs"].items()}
        preimage, facts = dict(body["preimage"]), dict(body["facts"])
        if not _is_usable(preimage, facts):
            return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, DamagedObjectError):
        return None
    return Entry(fingerprint, preimage, outputs, facts)


def _is_usable(preimage: Mapping[str, Any], facts: Mapping[str, Any]) -> bool:
    """Tell whether what is counted with are counts, and so on: a digest shows no more than that a writer meant it."""
    fields = preimage.get("fields", {})
    maps = [fields, preimage.get("inputs", {}), *(facts.get(name) or {} for name in ("degraded", "step_cache", "way"))]
    counts = [facts[name] for name in _COUNTS if facts.get(name) is not None]
    counts += [*(facts.get("flops") or ()), *(facts.get("chunk_starts") or ()), fields.get("steps", 1)]
    is_counted = all(isinstance(count, (int, float)) and abs(count) < _LARGEST for count in counts)
    is_named = all(isinstance(facts.get(name, ""), str) for name in ("node", "weights"))
    return is_counted and is_named and all(isinstance(each, dict) for each in maps)


def entry_text(entry: Entry) -> bytes:
    """Return an entry's file."""
    outputs = {port: vars(item) for port, item in entry.outputs.items()}
    body = {"schema": _SCHEMA, "fingerprint": entry.fingerprint, "preimage": entry.preimage}
    body |= {"outputs": outputs, "facts": entry.facts}
    canonical = _canonical(body)
    return b'{"sha256": "' + hashlib.sha256(canonical).hexdigest().encode() + b'",\n "entry": ' + canonical + b"}\n"


def _canonical(body: object) -> bytes:
    return json.dumps(body, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()


class ChangedBytesError(Exception):
    """Bytes are not those of the object that they should be."""


def described(payload: bytes | Path) -> StoredObject:
    """Return what a result is as an object: bytes of a safetensors file, or a finished file."""
    if isinstance(payload, Path):
        return StoredObject(file_sha256(payload), payload.stat().st_size, payload.suffix)
    return StoredObject(hashlib.sha256(payload).hexdigest(), len(payload), ".safetensors")


def put_copy(
    blocks: Iterable[bytes], item: StoredObject, target: Path, trailer: bytes = b"", replaces: bool = True
) -> bool:
    """Put an object's bytes and a trailer at `target`; see `Store.copy_to`.

    Raises:
        ChangedBytesError: The blocks are not the object; `target` is as it was.
        TakenError: Another file is there, and stays.
        CannotWriteError: `target` cannot be written.
    """
    if holds(target, item, trailer):
        return False
    with writing(target), temporary(target.parent, target.suffix) as (file, name):
        digest = hashlib.sha256()
        for block in blocks:
            digest.update(block)
            file.write(block)
        if digest.hexdigest() != item.sha256:
            raise ChangedBytesError
        file.write(trailer)
        finish(file)
        if replaces or holds(target, item):
            os.replace(name, target)
        else:
            put_new(name, target)
    return True


def _link(name: str, path: Path) -> bool:
    """Give a finished file its name if nobody has it yet; tell whether that worked."""
    try:
        os.link(name, path)
    except OSError:
        return False
    return True


def holds(path: Path, item: StoredObject, trailer: bytes | None = None) -> bool:
    """Tell whether a file is there that has an object's bytes, then the trailer (None: any) and nothing else."""
    try:
        size = path.stat().st_size if path.is_file() else -1
        if size < item.size or (trailer is not None and size != item.size + len(trailer)):
            return False
        with path.open("rb") as file:
            if trailer is None and item.suffix == ".mp4" and size > item.size:  # told apart without reading it all
                file.seek(item.size + 4)
                if file.read(4) not in _BOXES:
                    return False
                file.seek(0)
            return _digest(file, item.size) == item.sha256 and trailer in (None, file.read())
    except OSError:
        return False  # what cannot be read is to be replaced


def file_sha256(path: Path) -> str:
    """Return the sha256 of all of a file."""
    with path.open("rb") as file:
        return _digest(file, path.stat().st_size)


def _digest(file: BinaryIO, size: int) -> str:
    """Return the sha256 of the next `size` bytes."""
    digest = hashlib.sha256()
    while size > 0 and (block := file.read(min(_BLOCK, size))):
        digest.update(block)
        size -= len(block)
    return digest.hexdigest()
