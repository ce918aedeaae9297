"""The store against a model: whatever is done to it, in whatever order, nothing wrong is read and nothing held goes.

The model is a dict of what was published, and a look at the files that shares no code with the store: a result that is
whole on the disk must be found and read; one that is not may be missed or refused, but never be read as anything else.
S2VFLOW_SOAK_MODEL says how many histories `make soak` makes up.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from s2v_flow.cache.bundle import export_bundle, import_bundle
from s2v_flow.cache.housekeeping import collect, inventory, live_run, pin, remove, tidy, verify
from s2v_flow.cache.store import DamagedObjectError, Entry, Store
from s2v_flow.errors import RefusedError

HOUR = 3600.0
KEYS = [hashlib.sha256(b"%d" % number).hexdigest() for number in range(4)]
key = st.sampled_from(KEYS)
payload = st.sampled_from([b"", b"a", b"ab", b"ba" * 300, b"cd" * 300])
payloads = st.dictionaries(st.sampled_from(["x", "y"]), payload, min_size=1)
damages = st.sampled_from(["flip", "cut", "extend", "zero", "delete"])


class StoreMachine(RuleBasedStateMachine):
    """Everything that may happen to a cache folder."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp()) / "cache"
        self.store = Store(self.root)
        self.values: dict[str, dict[str, bytes]] = {}
        self.texts: dict[str, bytes] = {}
        self.pinned: set[str] = set()
        self.needed: set[str] = set()
        self.stack = ExitStack()

    @initialize()
    def quick(self) -> None:
        self.fsync, os.fsync = os.fsync, lambda descriptor: None
        for number, key in enumerate(KEYS[:3]):
            self.publish(key, {"x": bytes([number]) * 400}, False, False)

    def teardown(self) -> None:
        os.fsync = self.fsync
        self.stack.close()
        shutil.rmtree(self.root.parent)

    def entry_path(self, key: str) -> Path:
        return self.root / "entries" / key[:2] / f"{key}.json"

    def is_whole(self, key: str) -> bool:
        """Look at the files: the entry as it was written, every object with its digest."""
        path = self.entry_path(key)
        if key not in self.values or not path.is_file() or path.read_bytes() != self.texts[key]:
            return False
        digests = [hashlib.sha256(value).hexdigest() for value in self.values[key].values()]
        objects = [self.root / "objects" / digest[:2] / f"{digest}.safetensors" for digest in digests]
        return all(path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == path.stem for path in objects)

    def whole(self) -> set[str]:
        return {key for key in self.values if self.is_whole(key)}

    def digests(self, values: dict[str, bytes]) -> dict[str, str]:
        return {port: hashlib.sha256(value).hexdigest() for port, value in values.items()}

    @rule(key=key, values=payloads, replaces=st.booleans(), as_file=st.booleans())
    def publish(self, key: str, values: dict[str, bytes], replaces: bool, as_file: bool) -> None:
        was_whole = self.is_whole(key)
        with self.store.scratch() as scratch:
            outputs: dict[str, bytes | Path] = dict(values)
            if as_file:
                for port, value in values.items():
                    (scratch / f"{port}.safetensors").write_bytes(value)
                    outputs[port] = scratch / f"{port}.safetensors"
            entry = self.store.publish(key, {"kind": "toy"}, outputs, {"seconds": 1.0}, replaces=replaces)
        got = {port: item.sha256 for port, item in entry.outputs.items()}
        if got == self.digests(values) and not (was_whole and not replaces):
            self.values[key] = values
        assert got == self.digests(self.values[key]), "neither this result nor the one before"
        self.texts[key] = self.entry_path(key).read_bytes()

    @rule(key=key)
    def read(self, key: str) -> None:
        entry = self.store.lookup(key)
        self.assert_right(key, entry, self.is_whole(key))

    def assert_right(self, key: str, entry: Entry | None, must: bool) -> None:
        if entry is None:
            assert not must, "a whole result was missed"
            return
        for port, item in entry.outputs.items():
            try:
                assert self.store.read(item) == self.values[key][port]
            except DamagedObjectError:
                assert not must

    @rule(data=st.data(), how=damages, is_entry=st.booleans(), looks=st.booleans())
    def damage(self, data: st.DataObject, how: str, is_entry: bool, looks: bool) -> None:
        files = sorted(self.root.glob("entries/??/*" if is_entry else "objects/??/*"))
        if not files:
            return
        path = data.draw(st.sampled_from(files))
        content, middle = path.read_bytes(), path.stat().st_size // 2
        path.unlink()
        if how == "flip" and content:
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        content = {"cut": content[:middle], "extend": content + b"x", "zero": bytes(len(content))}.get(how, content)
        if how != "delete":
            path.write_bytes(content)
        for key in self.values if looks else ():
            self.read(key)

    @rule(data=st.data(), shift=st.sampled_from([-48.0, -2.0, 0.0, 0.5, 2.0, 20_000.0]))
    def shift_the_clock(self, data: st.DataObject, shift: float) -> None:
        files = sorted(path for path in self.root.glob("[eo]*/??/*"))
        for path in data.draw(st.lists(st.sampled_from(files), max_size=6)) if files else ():
            os.utime(path, (time.time() + shift * HOUR,) * 2)

    @rule(limit=st.sampled_from([0, 700, 1300, 10**9]), shift=st.sampled_from([None, -2.0, 20_000.0]))
    def evict(self, limit: int, shift: float | None) -> None:
        """Evict, most often hours later, or years earlier: after a wrong clock."""
        entries = sorted(self.root.glob("entries/??/*"))
        if shift is not None:
            for path in (*entries, *sorted(self.root.glob("objects/??/*"))):
                os.utime(path, (time.time() + shift * HOUR,) * 2)
        held = self.pinned | self.needed
        held |= {path.stem for path in entries if -HOUR < time.time() - path.stat().st_mtime < HOUR - 5}
        before = self.whole()
        found = collect(self.root, limit)
        assert self.whole() >= held & before
        size = sum(path.stat().st_size for path in self.root.glob("objects/??/*"))
        assert found["bytes_after"] == size
        assert size <= limit or self.whole() <= held

    @rule(key=key, is_pinned=st.booleans())
    def pin(self, key: str, is_pinned: bool) -> None:
        pin(self.root, [key], is_pinned=is_pinned)
        (self.pinned.add if is_pinned else self.pinned.discard)(key)

    @rule(key=key)
    def remove(self, key: str) -> None:
        others = self.whole() - {key}
        remove(self.root, [key])
        assert self.store.lookup(key) is None
        assert self.whole() == others

    @rule(is_repair=st.booleans())
    def verify(self, is_repair: bool) -> None:
        before = self.whole()
        found = verify(self.root, is_repair=is_repair)
        assert self.whole() == before
        assert found["sound"] == len(before)
        assert not is_repair or verify(self.root)["damaged"] == []

    @rule()
    def take_elsewhere(self) -> None:
        """Export and import give whole results; damaged ones are refused by whoever notices first."""
        bundle, other = self.root.parent / "bundle.tar", self.root.parent / "other"
        chosen = inventory(self.root)
        try:
            export_bundle(self.root, chosen, bundle)
            import_bundle(other, bundle)
        except (DamagedObjectError, RefusedError):
            assert {item.entry.fingerprint for item in chosen} != self.whole()
            return
        finally:
            mine, self.store = self.store, Store(other)
            for item in chosen:
                self.assert_right(item.entry.fingerprint, self.store.lookup(item.entry.fingerprint), False)
            self.store = mine
            shutil.rmtree(other, ignore_errors=True)
        assert {item.entry.fingerprint for item in chosen} == self.whole()

    @rule(values=payload, name=st.sampled_from(["a", "b"]))
    def crash(self, values: bytes, name: str) -> None:
        """Leave what a killed process leaves: half a file in tmp, an object without an entry."""
        if not (self.root / "tmp").exists():
            return
        (self.root / "tmp" / f".s2vflow-{'0' * 8}-1-{name}").write_bytes(values)
        digest = hashlib.sha256(values + b"!").hexdigest()
        folder = self.root / "objects" / digest[:2]
        folder.mkdir(exist_ok=True)
        (folder / f"{digest}.safetensors").write_bytes(values + b"!")

    @rule(is_new=st.booleans())
    def begin(self, is_new: bool) -> None:
        """Tidy up, and open the store anew."""
        before = self.whole()
        tidy(self.root)
        assert self.whole() == before
        self.store = Store(self.root) if is_new else self.store

    @rule(keys=st.sets(key))
    def live(self, keys: set[str]) -> None:
        self.stack.enter_context(live_run(self.root, keys))
        self.needed |= keys

    @rule()
    def end(self) -> None:
        self.stack.close()
        self.needed.clear()

    @invariant()
    def nothing_wrong_is_ever_read(self) -> None:
        reader = Store(self.root)
        for key in self.whole():
            entry = reader.lookup(key)
            assert entry is not None
            assert {port: reader.read(item) for port, item in entry.outputs.items()} == self.values[key]

    @invariant()
    def nothing_is_left_lying_about(self) -> None:
        own = f"-{os.getpid()}-"
        assert not [path for path in self.root.glob("tmp/*") if own in path.name]


QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


@pytest.fixture(autouse=True)
def _own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_whatever_happens_to_a_store_nothing_wrong_is_read() -> None:
    """25 histories of up to 25 events."""
    run_state_machine_as_test(
        StoreMachine,
        settings=settings(max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=QUIET),
    )


@pytest.mark.soak
def test_soak_model() -> None:
    """S2VFLOW_SOAK_MODEL histories (300 unless told otherwise) of up to 100 events."""
    count = int(os.environ.get("S2VFLOW_SOAK_MODEL", "300"))
    started = time.monotonic()
    run_state_machine_as_test(
        StoreMachine,
        settings=settings(
            max_examples=count,
            stateful_step_count=100,
            deadline=None,
            derandomize=False,
            suppress_health_check=QUIET,
        ),
    )
    sys.stdout.write(f"\n{count} histories of up to 100 events, {time.monotonic() - started:.0f} s, 0 wrong reads\n")
