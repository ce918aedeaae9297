"""Looking after a cache folder: what is in it, what of it is sound, what may go.

Every order here is safe at any moment: entries go before their objects, so that what is looked up is there; and
nothing goes that is pinned, younger than an hour, or of a run that lives, but what is spare. The folder may be one in
which a user keeps other files: what is not named as the cache names its own is not looked at.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2v_flow.cache.resume_point import ResumePoints, quarantine
from s2v_flow.cache.store import DamagedObjectError, Entry, Store, read_entry
from s2v_flow.files.atomic import STALE_SECONDS, is_alive, machine_id, make_root, reap, stale, writing
from s2v_flow.files.lock import held, is_held, remove_unused

YOUNG_SECONDS = 3600.0
_TICK_SECONDS = 0.02  # a new file may be given a time by as much before what `time` told earlier
_QUARANTINE_SECONDS = 7 * 24 * 3600.0
_RESUME_POINT_SECONDS = 30 * 24 * 3600.0
_KEY = re.compile("[0-9a-f]{64}")
_MARKER = re.compile("[0-9a-f]{8}-[0-9]+-.+")


@dataclass(frozen=True)
class Kept:
    """An entry as housekeeping sees it: `size` is that of its objects; `is_held`: it may not be evicted."""

    entry: Entry
    path: Path
    size: int
    written: float
    is_pinned: bool
    is_held: bool
    is_spare: bool  # made again as it is used: it may go before anything else, at any moment

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
    """Remove what dead processes left: temporary files, markers of runs, resume points of what is stored by now.

    And what nobody comes back for: resume points after 30 days, damaged files in quarantine after a week.
    """
    removed = reap(root / "tmp")
    store, resume_points = Store(root), ResumePoints(root)
    for path in _own(root, "checkpoints/??/*.safetensors"):
        if store.lookup(path.stem) is not None or _age(path) > _RESUME_POINT_SECONDS:
            resume_points.forget(path.stem)
            removed += 1
    for path in _own(root, "quarantine/*"):
        if _age(path) > _QUARANTINE_SECONDS:
            _remove(path)
            removed += 1
    removed += remove_unused(_own(root, "locks/*"))
    for path in _own(root, "live/*.json", _MARKER):
        if not _is_live(path):
            with suppress(OSError):
                path.unlink()
                removed += 1
    return removed


def _own(root: Path, pattern: str, name: re.Pattern[str] = _KEY) -> list[Path]:
    """List the files of a pattern that are named as the cache names its own."""
    return sorted(path for path in root.glob(pattern) if name.fullmatch(path.stem))


def _age(path: Path) -> float:
    """Return for how many seconds nothing was done with a file; 0 or less where it is gone, or a clock was ahead."""
    try:
        status = path.lstat()
    except OSError:
        return 0.0
    return time.time() - max(status.st_mtime, status.st_ctime)


def _seconds_since(when: float) -> float:
    """Return how long ago a file's time is; one that lies ahead, for a clock was wrong, is long ago."""
    seconds = time.time() - when
    return seconds if seconds > -YOUNG_SECONDS else float("inf")


@contextmanager
def live_run(root: Path, fingerprints: Collection[str], run: str = "") -> Iterator[None]:
    """Say, inside this block, that a run lives which needs these entries; tidy up before.

    Where the marker cannot be written the run goes on; a clean-up then keeps only young files. `is_running`
    knows it by the id `run`.
    """
    marker = root / "live" / f"{machine_id()}-{os.getpid()}-{run or time.monotonic_ns()}.json"
    with suppress(OSError):
        reap(Path(tempfile.gettempdir()))  # where runs that cannot write here have their files
        make_root(root)
        tidy(root)
        marker.parent.mkdir(exist_ok=True)
        marker.write_text(json.dumps(sorted(fingerprints)), encoding="ascii")
    try:
        with held(marker):
            yield
    finally:
        with suppress(OSError):
            marker.unlink()


def is_running(root: Path, run: str) -> bool:
    """Tell whether a run is known to live: its marker is locked or, where locks do not work, its process lives here.

    A run on another machine that locks do not reach counts as dead.
    """
    for marker in _own(root, "live/*.json", re.compile(f"[0-9a-f]{{8}}-[0-9]+-{re.escape(run)}")):
        is_known = is_held(marker)
        if is_known or (is_known is None and _is_process(marker)):
            return True
    return False


def _is_process(marker: Path) -> bool | None:
    """Tell whether the process that wrote a marker lives; None where it is another machine's."""
    machine, pid = [*marker.stem.split("-"), "", ""][:2]
    return is_alive(int(pid)) if machine == machine_id() and pid.isdigit() else None


def _is_live(marker: Path) -> bool:
    known = is_held(marker) or _is_process(marker)
    if known is not None:
        return known
    with suppress(OSError):
        return time.time() - marker.stat().st_mtime < STALE_SECONDS
    return False


def inventory(root: Path) -> list[Kept]:
    """List the sound entries, the cheapest to lose first."""
    held, since = _held(root)
    found = []
    for path in _own(root, "entries/??/*.json"):
        entry = read_entry(path)
        if entry is None:
            continue
        with suppress(OSError):
            written, is_pinned = path.stat().st_mtime, (root / "pins" / path.stem).exists()
            age = _seconds_since(written)
            is_used = age < YOUNG_SECONDS or (written >= since and age < float("inf"))
            is_spare = bool(entry.facts.get("is_spare"))
            is_held = is_pinned or ((is_used or path.stem in held) and not is_spare)
            size = sum(item.size for item in set(entry.outputs.values()))
            found.append(Kept(entry, path, size, written, is_pinned, is_held, is_spare))
    return sorted(found, key=lambda kept: (not kept.is_spare, kept.value, kept.written))


def _held(root: Path) -> tuple[set[str], float]:
    """Return what live runs said they need, and since when the oldest of them lives."""
    held: set[str] = set()
    since = float("inf")
    for marker in _own(root, "live/*.json", _MARKER):
        with suppress(OSError, ValueError, TypeError, RecursionError):
            if _is_live(marker):
                since = min(since, marker.stat().st_mtime)
                held.update(json.loads(marker.read_bytes()))
    return held, since


def stats(root: Path) -> dict[str, Any]:
    """Return figures about a cache."""
    kept = inventory(root)
    return {
        "folder": str(root),
        "entries": len(kept),
        "bytes": objects_size(root),
        "seconds_to_recompute": round(sum(item.entry.facts.get("seconds") or 0 for item in kept), 1),
        "pinned": sum(item.is_pinned for item in kept),
        "quarantined": len(_own(root, "quarantine/*")),
        "checkpoints": len(_own(root, "checkpoints/??/*.safetensors")),
        "stale": len(stale(root / "tmp")),
    }


def objects_size(root: Path) -> int:
    """Return how many bytes the objects take."""
    return sum(status.st_size for _, status in _objects(root))


def _objects(root: Path) -> Iterator[tuple[Path, os.stat_result]]:
    with suppress(OSError), os.scandir(root / "objects") as folders:
        for folder in folders:
            with suppress(OSError), os.scandir(folder) as files:
                for file in files:
                    with suppress(OSError):
                        if _KEY.fullmatch(file.name.partition(".")[0]):
                            yield Path(file.path), file.stat(follow_symlinks=False)


def verify(root: Path, *, is_repair: bool = False) -> dict[str, Any]:
    """Read every entry and every object; what is damaged is named, and with `is_repair` moved to quarantine."""
    store, damaged = Store(root), []
    sound = 0
    for path in _own(root, "entries/??/*.json"):
        entry = read_entry(path)
        reason = "" if entry else "the entry is damaged"
        for item in entry.outputs.values() if entry else ():
            try:
                store.check(item)
            except DamagedObjectError as error:
                reason = error.message
                if is_repair:
                    store.quarantine(item)
        if reason and os.path.lexists(path):  # else it has been evicted meanwhile
            damaged.append({"fingerprint": path.stem, "reason": reason})
            if is_repair:
                quarantine(root, path)
        sound += not reason
    return {"sound": sound, "damaged": damaged, "repaired": is_repair}


def collect(root: Path, limit: int, fits: int = 0, *, is_dry: bool = False, is_tidy: bool = False) -> dict[str, Any]:
    """Make a cache smaller than `limit` bytes, as far as what may go allows.

    From `fits` bytes on, what is more than spare stays. `is_dry`: only say what would go; `is_tidy`: the cache has just
    been cleaned.
    """
    if not is_dry and not is_tidy:
        tidy(root)
    started = time.time()
    before = total = objects_size(root)
    going: list[Kept] = []
    kept = inventory(root)
    users = _users(kept)
    for path, status in _objects(root):  # what no entry uses and is not young: publishing writes objects first
        if path.name not in users and _seconds_since(status.st_mtime) > YOUNG_SECONDS:
            total -= status.st_size if is_dry or _goes(path, started) else 0
    for item in kept:
        if total <= (limit if item.is_spare else max(limit, fits)):
            break
        fits = fits if item.is_spare else 0
        is_pinned = os.path.exists(root / "pins" / item.path.stem)  # since the inventory
        if item.is_held or not (is_dry or (not is_pinned and _goes(item.path, started))):
            continue
        going.append(item)
        total -= _free(root, item, users, started, is_dry=is_dry)
    return {
        "bytes_before": before,
        "bytes_after": total,
        "limit_bytes": limit,
        "removed": [item.to_json() for item in going],
        "within_limit": total <= max(limit, fits),
        "dry_run": is_dry,
    }


def remove(root: Path, chosen: Collection[str], *, is_dry: bool = False) -> list[Kept]:
    """Remove entries by their fingerprints, and the objects that nothing else uses; return what goes."""
    started = time.time()
    kept = inventory(root)
    users = _users(kept)
    going = [item for item in kept if item.entry.fingerprint in chosen]
    for item in going:
        if is_dry or _remove(item.path):
            _free(root, item, users, started, is_dry=is_dry)
    return going


def pin(root: Path, chosen: Collection[str], *, is_pinned: bool = True) -> None:
    """Mark entries as never to be evicted, or take the mark away.

    Raises:
        CannotWriteError: The mark cannot be written.
    """
    folder = root / "pins"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for fingerprint in chosen:
            if is_pinned:
                (folder / fingerprint).touch()
            else:
                (folder / fingerprint).unlink(missing_ok=True)


def _users(kept: Collection[Kept]) -> dict[str, set[str]]:
    users: dict[str, set[str]] = {}
    for item in kept:
        for output in item.entry.outputs.values():
            users.setdefault(output.file_name, set()).add(item.entry.fingerprint)
    return users


def _free(root: Path, item: Kept, users: dict[str, set[str]], started: float, *, is_dry: bool) -> int:
    """Remove what only a removed entry used; return how many bytes that frees.

    What was touched since `started` stays: a result that is being stored may use it.
    """
    freed = 0
    for output in set(item.entry.outputs.values()):
        users[output.file_name].discard(item.entry.fingerprint)
        if not users[output.file_name]:
            path, size = root / output.place, 0
            with suppress(OSError):
                size = path.stat().st_size  # not the entry's word: it may be damaged, or gone
            freed += size if is_dry or _goes(path, started) else 0
    return freed


def _goes(path: Path, started: float) -> bool:
    """Remove a file unless it was touched since; tell whether this removed it."""
    try:
        touched = path.stat().st_mtime
        return not (touched >= started - _TICK_SECONDS and _seconds_since(touched) < YOUNG_SECONDS) and _remove(path)
    except OSError:
        return False


def _remove(path: Path) -> bool:
    """Remove a file; tell whether it is gone."""
    with suppress(OSError):
        path.unlink(missing_ok=True)
        return True
    return False
