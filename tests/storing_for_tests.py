"""Results that their keys decide, published in every way: whatever else is read is wrong."""

from __future__ import annotations

import hashlib
from pathlib import Path

from s2v_flow.cache.resume_point import ResumePoints
from s2v_flow.cache.store import Store
from s2v_flow.files.atomic import writing

KEYS = 6
SIZE = 200_000


def key(number: int) -> str:
    return hashlib.sha256(b"key %d" % number).hexdigest()


def content(number: int) -> bytes:
    """A result that its key decides: any other bytes are wrong."""
    return hashlib.shake_256(b"result %d" % number).digest(SIZE + number)


def publish_all(store: Store, count: int = KEYS) -> None:
    """Publish every result as bytes and as a file, with a resume point before each."""
    resume_points = ResumePoints(store.root)
    payload = len(b"{}").to_bytes(8, "little") + b"{}"
    for number in range(count):
        resume_points.write(key(number), {"step": str(number)}, payload)
        with store.scratch() as scratch:
            path = scratch / "film.mp4"
            with writing(path):  # as the writer of films does
                path.write_bytes(content(number))
            store.publish(key(number), {"kind": "toy"}, {"a": content(number), "b": path}, {})
        resume_points.forget(key(number))


def assert_sound(root: Path, count: int = KEYS) -> int:
    """Read all that can be looked up; return how many results there are."""
    store, found = Store(root), 0
    for number in range(count):
        entry = store.lookup(key(number))
        if entry is not None:
            assert [store.read(item) for item in entry.outputs.values()] == [content(number)] * 2
            found += 1
        facts = ResumePoints(root).peek(key(number))
        assert facts is None or ResumePoints(root).read(key(number)) is not None
    return found
