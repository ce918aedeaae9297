"""Looking after a cache folder: what is in it, what of it is sound, what may go.

Every order here is safe at any moment: entries go before their objects, so that what is looked up is there; and
nothing goes that is pinned, younger than an hour, or of a run that lives.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2v_flow.cache.atomic import STALE_SECONDS, is_alive, machine_id, make_root, reap, stale
from s2v_flow.cache.checkpoint import Checkpoints
from s2v_flow.cache.lock import remove_unused
from s2v_flow.cache.store import DamagedObjectError, Entry, Store, read_entry

YOUNG_SECONDS = 3600.0
MAX_LIMIT_BYTES = 50 * 10**9
_SHARE_OF_DISK = 0.2


@dataclass(frozen=True)
class Kept:
    """An entry as housekeeping sees it: `size` is that of its objects; `is_held`: it may not be evicted."""

    entry: Entry
    path: Path
    size: int
    written: float
    is_pinned: bool
    is_held: bool

    @property
    def value(self) -> float:
        """Seconds of computing for each byte: what is lost most cheaply goes first."""
        seconds = self.entry.facts.get("seconds")
        return (seconds if isinstance(seconds, (int, float)) else 0.0) / max(self.size, 1)

    def to_json(self) -> dict[str, Any]:
        """Return the object that `s2vflow cache ls --json` prints for it."""
        facts = self.entry.facts
        return {
            "fingerprint": self.entry.fingerprint,
            "node": facts.get("node"),
            "kind": self.entry.preimage.get("kind"),
            "bytes": self.size,
            "seconds": facts.get("seconds"),
            "written": int(self.written),
            "pinned": self.is_pinned,
        }


def tidy(root: Path) -> int:
    """Remove what dead processes left: temporary files, markers of runs, checkpoints of what is stored by now."""
    removed = reap(root / "tmp")
    store, checkpoints = Store(root), Checkpoints(root)
    for path in root.glob("checkpoints/??/*.safetensors"):
        if store.lookup(path.stem) is not None:
            checkpoints.forget(path.stem)
            removed += 1
    removed += remove_unused(root / "locks")
    for path in root.glob("live/*.json"):
        if not _is_live(path):
            with suppress(OSError):
                path.unlink()
                removed += 1
    return removed


@contextmanager
def live_run(root: Path, fingerprints: Collection[str]) -> Iterator[None]:
    """Say, inside this block, that a run lives which needs these entries; tidy up before.

    Where the marker cannot be written the run goes on: whoever cleans up then keeps only what is young.
    """
    marker = root / "live" / f"{machine_id()}-{os.getpid()}-{time.monotonic_ns()}.json"
    with suppress(OSError):
        make_root(root)
        tidy(root)
        marker.parent.mkdir(exist_ok=True)
        marker.write_text(json.dumps(sorted(fingerprints)), encoding="ascii")
    try:
        yield
    finally:
        with suppress(OSError):
            marker.unlink()


def _is_live(marker: Path) -> bool:
    machine, pid = [*marker.stem.split("-"), "", ""][:2]
    if machine == machine_id() and pid.isdigit():
        return is_alive(int(pid))
    with suppress(OSError):
        return time.time() - marker.stat().st_mtime < STALE_SECONDS
    return False


def inventory(root: Path) -> list[Kept]:
    """List the sound entries, the cheapest to lose first."""
    held, since = _held(root)
    since = min(since, time.time() - YOUNG_SECONDS)
    found = []
    for path in sorted(root.glob("entries/??/*.json")):
        entry = read_entry(path)
        if entry is None:
            continue
        with suppress(OSError):
            written, is_pinned = path.stat().st_mtime, (root / "pins" / path.stem).exists()
            is_held = is_pinned or written > since or path.stem in held
            size = sum(item.size for item in set(entry.outputs.values()))
            found.append(Kept(entry, path, size, written, is_pinned, is_held))
    return sorted(found, key=lambda kept: (kept.value, kept.written))


def _held(root: Path) -> tuple[set[str], float]:
    """Return what live runs said they need, and since when the oldest of them lives."""
    held: set[str] = set()
    since = float("inf")
    for marker in root.glob("live/*.json"):
        with suppress(OSError, ValueError, TypeError):
            if _is_live(marker):
                since = min(since, marker.stat().st_mtime)
                held.update(json.loads(marker.read_bytes()))
    return held, since


def default_limit(root: Path) -> int:
    """Return how large a cache may be unless told otherwise: 50 GB, or a fifth of its disk."""
    folder = next((path for path in (root, *root.parents) if path.exists()), Path("/"))
    return min(MAX_LIMIT_BYTES, int(shutil.disk_usage(folder).total * _SHARE_OF_DISK))


def stats(root: Path) -> dict[str, Any]:
    """Return figures about a cache."""
    kept = inventory(root)
    return {
        "folder": str(root),
        "entries": len(kept),
        "bytes": objects_size(root),
        "limit_bytes": default_limit(root),
        "seconds_to_recompute": round(sum(item.entry.facts.get("seconds") or 0 for item in kept), 1),
        "pinned": sum(item.is_pinned for item in kept),
        "quarantined": len(list(root.glob("quarantine/*"))),
        "checkpoints": len(list(root.glob("checkpoints/??/*.safetensors"))),
        "stale": len(stale(root / "tmp")),
    }


def objects_size(root: Path) -> int:
    """Return how many bytes the objects take."""
    total = 0
    for path in root.glob("objects/??/*"):
        with suppress(OSError):
            total += path.stat().st_size
    return total


def verify(root: Path, *, is_repair: bool = False) -> dict[str, Any]:
    """Read every entry and every object; what is damaged is named, and with `is_repair` moved to quarantine."""
    store, damaged = Store(root), []
    sound = 0
    for path in sorted(root.glob("entries/??/*.json")):
        entry = read_entry(path)
        reason = "" if entry else "the entry is damaged"
        for item in entry.outputs.values() if entry else ():
            try:
                store.check(item)
            except DamagedObjectError as error:
                reason = error.message
                if is_repair:
                    store.put_aside(item)
        if reason:
            damaged.append({"fingerprint": path.stem, "reason": reason})
            if is_repair:
                store.put_entry_aside(path.stem)
        sound += not reason
    return {"sound": sound, "damaged": damaged, "repaired": is_repair}


def collect(root: Path, limit: int | None = None, *, is_dry: bool = False) -> dict[str, Any]:
    """Make a cache smaller than `limit` bytes, as far as what may go allows.

    Args:
        root: The cache folder.
        limit: Bytes; None: `default_limit`.
        is_dry: Only say what would go.
    """
    limit = default_limit(root) if limit is None else limit
    if not is_dry:
        tidy(root)
    before = total = objects_size(root)
    going: list[Kept] = []
    kept = inventory(root)
    users = _users(kept)
    for path, size in _orphans(root, users):
        total -= size
        if not is_dry:
            _remove(path)
    for item in kept:
        if total <= limit:
            break
        if item.is_held:
            continue
        going.append(item)
        total -= _drop(root, item, users, is_dry=is_dry)
    return {
        "bytes_before": before,
        "bytes_after": total,
        "limit_bytes": limit,
        "removed": [item.to_json() for item in going],
        "within_limit": total <= limit,
        "dry_run": is_dry,
    }


def remove(root: Path, chosen: Collection[str], *, is_dry: bool = False) -> list[Kept]:
    """Remove entries by their fingerprints, and the objects that nothing else uses; return what goes."""
    kept = inventory(root)
    users = _users(kept)
    going = [item for item in kept if item.entry.fingerprint in chosen]
    for item in going:
        _drop(root, item, users, is_dry=is_dry)
    return going


def pin(root: Path, chosen: Collection[str], *, is_pinned: bool = True) -> None:
    """Mark entries as never to be evicted, or take the mark away."""
    folder = root / "pins"
    folder.mkdir(parents=True, exist_ok=True)
    for fingerprint in chosen:
        if is_pinned:
            (folder / fingerprint).touch()
        else:
            (folder / fingerprint).unlink(missing_ok=True)


def _users(kept: Collection[Kept]) -> dict[str, set[str]]:
    """Return which entries use each object, by the object's file name."""
    users: dict[str, set[str]] = {}
    for item in kept:
        for output in item.entry.outputs.values():
            users.setdefault(output.file_name, set()).add(item.entry.fingerprint)
    return users


def _drop(root: Path, item: Kept, users: dict[str, set[str]], *, is_dry: bool) -> int:
    """Remove an entry and then what only it used; return how many bytes that frees."""
    if not is_dry:
        _remove(item.path)
    freed = 0
    for output in set(item.entry.outputs.values()):
        users[output.file_name].discard(item.entry.fingerprint)
        if not users[output.file_name]:
            freed += output.size
            if not is_dry:
                _remove(root / "objects" / output.sha256[:2] / output.file_name)
    return freed


def _orphans(root: Path, users: dict[str, set[str]]) -> Iterator[tuple[Path, int]]:
    """Yield the objects that no entry uses and that are not young: whoever publishes writes the object first."""
    for path in root.glob("objects/??/*"):
        with suppress(OSError):
            status = path.stat()
            if path.name not in users and time.time() - status.st_mtime > YOUNG_SECONDS:
                yield path, status.st_size


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
