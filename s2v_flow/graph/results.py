"""What comes of a node's work: results, in the store or held until nobody needs them, or a failure in words."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from s2v_flow.cache.budget import NO_LIMIT, Budget, free_bytes
from s2v_flow.cache.store import (
    ChangedBytesError,
    DamagedObjectError,
    Entry,
    Store,
    StoredObject,
    described,
    file_sha256,
    put_copy,
)
from s2v_flow.errors import ExitCode, S2VFlowError, broken_package
from s2v_flow.files.atomic import CannotWriteError, cannot_write, reap, temporary_prefix, writing
from s2v_flow.graph.events import Listener, Noted
from s2v_flow.graph.interrupt import StoppedError
from s2v_flow.graph.node import PlanNode

_BLOCK = 8 << 20
ResultT = TypeVar("ResultT")


class Results:
    """The results of one run.

    A store that refuses costs nobody the run: what cannot be stored is held, bytes in memory and finished files where
    they were written, and given out as if it were stored. Each publish asks again: there may be space by then.

    Args:
        emit: Gets a note, once for each reason, that a result is not stored, and what an eviction removed.
        limit: What the cache may grow to in bytes; None: as `Budget` chooses.
    """

    def __init__(self, store: Store, emit: Listener, limit: int | None = NO_LIMIT) -> None:
        self.store = store
        self._emit = emit
        self.budget = Budget(store.root, limit, lambda text: emit(Noted("", text)))
        store.on_fetched = self.budget.added
        self._payloads: dict[StoredObject, bytes | Path] = {}
        self._held: dict[str, Entry] = {}  # by plan node, as long as somebody needs it
        self._not_kept: dict[str, None] = {}
        self._reasons: set[str] = set()
        self._folders: list[Path] = []

    @property
    def not_kept(self) -> Set[str]:
        """The plan nodes whose results the store has not taken, in the order of the run."""
        return self._not_kept.keys()

    def begin(self, entries: Mapping[str, Entry]) -> None:
        """Begin a run that will use these stored results."""
        for entry in entries.values():
            self.store.touch(entry.fingerprint)
        self.budget.begin()

    def find(self, node: str, key: str) -> Entry | None:
        """Return a result that is stored, or held for another plan node."""
        entry = self.store.lookup(key)
        if entry is not None:
            self.store.touch(key)
            return entry
        held = next((entry for entry in self._held.values() if entry.fingerprint == key), None)
        if held is not None:
            self._held[node] = held
            self._not_kept[node] = None
        return held

    def read(self, item: StoredObject) -> bytes:
        """Return an output's bytes.

        Raises:
            DamagedObjectError: It is gone or damaged.
        """
        payload = self._payloads.get(item)
        if payload is None:
            return self.store.read(item)
        return payload if isinstance(payload, bytes) else b"".join(self._blocks(item, payload))

    def copy_to(self, item: StoredObject, target: Path, trailer: bytes = b"", replaces: bool = True) -> bool:
        """Put an output at a path; see `Store.copy_to`."""
        payload = self._payloads.get(item)
        if payload is None:
            return self.store.copy_to(item, target, trailer, replaces)
        blocks = iter((payload,)) if isinstance(payload, bytes) else self._blocks(item, payload)
        return put_copy(blocks, item, target, trailer, replaces)

    def publish(
        self,
        node: str,
        key: str,
        image: Mapping[str, Any],
        outputs: Mapping[str, bytes | Path],
        facts: Mapping[str, Any],
        *,
        replaces: bool,
        is_last: bool,
        holds: bool = False,
    ) -> Entry:
        """Store a node's outputs, or hold them: in any case where it `holds` what the store has lost once.

        `is_last`: nothing uses the result and no file is made of it: the store is where it is to go.

        Raises:
            CannotWriteError: The store cannot be written, and the result is for nothing else.
        """
        with writing(self.store.root):
            items = {port: described(payload) for port, payload in outputs.items()}
        for is_second in (False, True):
            try:
                entry = self.store.publish(key, image, outputs, facts, replaces=replaces, items=items)
            except CannotWriteError as error:
                size = sum(item.size for item in items.values())
                if not is_second and error.is_full and self.budget.make_room(size):
                    continue
                if is_last:
                    raise
                self.tell(error.reason, error.fix)
                break
            self.budget.added(sum(item.size for item in set(items.values())))
            self.forget(node)
            self._not_kept.pop(node, None)
            if holds:
                self._hold(node, entry, items, outputs)
            return entry
        self._not_kept[node] = None
        return self._hold(node, Entry(key, image, items, facts), items, outputs)

    def _hold(
        self, node: str, entry: Entry, items: Mapping[str, StoredObject], outputs: Mapping[str, bytes | Path]
    ) -> Entry:
        for port, payload in outputs.items():
            # a file that is not there any more has become an object
            if isinstance(payload, bytes) or os.path.isfile(payload):
                self._payloads[items[port]] = payload
        self._held[node] = entry
        return entry

    def work(self, node: PlanNode, work: Callable[[Scratch], ResultT]) -> ResultT:
        """Do a node's work; where its files cannot be written in the store's filesystem, once more in other places.

        Raises:
            S2VFlowError: What `work` raises; or its files cannot be written in any of the places.
        """
        failure: CannotWriteError | None = None
        for make in (self.store.make_scratch, *_other_places(node)):
            scratch = Scratch(make)
            try:
                return work(scratch)
            except CannotWriteError as error:
                if not scratch.refuses(error):
                    raise
                if failure is None:
                    self.tell(error.reason, error.fix)
                failure = error
                # they hold what the node had in memory
                error.__traceback__ = error.__cause__ = error.__context__ = None
            finally:
                self._leave(scratch.folder)
        assert failure is not None
        raise failure

    def forget(self, node: str) -> None:
        """Release a held result that nobody needs any more."""
        entry = self._held.pop(node, None)
        if entry is None:
            return
        needed = {item for other in self._held.values() for item in other.outputs.values()}
        for item in set(entry.outputs.values()) - needed:
            payload = self._payloads.pop(item, None)
            if isinstance(payload, Path):
                with suppress(OSError):
                    payload.unlink()
        for folder in list(self._folders):
            self._leave(folder)

    def close(self) -> None:
        """Let everything go."""
        for node in list(self._held):
            self.forget(node)
        for folder in list(self._folders):
            self._leave(folder)

    def amend(self, error: S2VFlowError | StoppedError) -> None:
        """Make what ends a run say what is kept, and which results are not."""
        if isinstance(error, StoppedError):
            error.lost = tuple(self._not_kept)
        elif self._not_kept:
            error.kept = f"what the cache holds; not these, for it could not be written: {', '.join(self._not_kept)}"
        elif error.kept is None:
            error.kept = "every result that was finished: the same command goes on from there"

    def tell(self, reason: str, fix: str | None) -> None:
        """Say, once for each reason, that the store cannot be written."""
        if reason in self._reasons:
            return
        self._reasons.add(reason)
        text = f"the cache folder {self.store.root} cannot be written ({reason}): the run goes on, but what cannot be "
        text += f"stored is kept only until it ends{f'; {fix}' if fix else ''}"
        self._emit(Noted("", text, is_warning=True))

    def _leave(self, folder: Path | None) -> None:
        """Remove a scratch folder unless something in it is held."""
        if folder is None:
            return
        is_used = any(isinstance(held, Path) and held.is_relative_to(folder) for held in self._payloads.values())
        if is_used and folder not in self._folders:
            self._folders.append(folder)
        elif not is_used:
            shutil.rmtree(folder, ignore_errors=True)
            if folder in self._folders:
                self._folders.remove(folder)

    def _blocks(self, item: StoredObject, path: Path) -> Iterator[bytes]:
        """Yield a held file's bytes; raise DamagedObjectError where they are not what they were."""
        try:
            if file_sha256(path) != item.sha256:
                raise ChangedBytesError
            with path.open("rb") as file:
                while block := file.read(_BLOCK):
                    yield block
        except (OSError, ChangedBytesError) as error:
            self._payloads.pop(item)
            raise DamagedObjectError.at(path, str(error) or "its bytes have changed") from error


def reap_outputs(node: PlanNode) -> None:
    """Remove what killed runs left beside a sink's files."""
    for folder in {node.files[path].parent for path, mark, _ in node.node.files() if mark.role == "output"}:
        reap(folder)


class Scratch:
    """A private folder for one node's files, made on first use: what writes no files needs none."""

    def __init__(self, make: Callable[[], Path]) -> None:
        self.folder: Path | None = None
        self._make = make
        self._failure: CannotWriteError | None = None

    def __call__(self) -> Path:
        """Return the folder.

        Raises:
            CannotWriteError: It cannot be made.
        """
        if self.folder is None:
            try:
                self.folder = self._make()
            except CannotWriteError as error:
                self._failure = error
                raise
        return self.folder

    def refuses(self, error: CannotWriteError) -> bool:
        """Tell whether an error says that the folder cannot be made or written to."""
        is_inside = self.folder is not None and error.path is not None and error.path.is_relative_to(self.folder)
        return is_inside or error is self._failure


def _other_places(node: PlanNode) -> Iterator[Callable[[], Path]]:
    """Yield what makes a scratch folder outside the store: beside a sink's files or for temporary files, by space."""
    parents = {node.files[path].parent for path, mark, _ in node.node.files() if mark.role == "output"}
    with suppress(OSError):  # there is no folder for temporary files at all
        parents.add(Path(tempfile.gettempdir()))
    for parent in sorted(parents, key=free_bytes, reverse=True):
        yield partial(_make_scratch, parent)


def _make_scratch(parent: Path) -> Path:
    with writing(parent):
        parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(dir=parent, prefix=temporary_prefix()))


_WRITING_ONLY = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}  # reading gives none of these
_WRAPPED = re.compile(r"(?:\(os error |\bOs \{ code: )(?P<number>[0-9]+)")  # safetensors gives it as text alone
_SIZE_FIX = "a smaller width and height, or a lower frames_per_call in decode"


@contextmanager
def failures_of(node: PlanNode, scratch: Scratch) -> Iterator[None]:
    """Turn what a node raises because of what it was given into errors that name it.

    What else it may raise (an assertion, a missing key, a wrong type, a division by zero) is a defect of this program,
    and passes.

    Raises:
        CannotWriteError: The node's files cannot be written in `scratch`.
        S2VFlowError: The node failed for another reason.
    """
    try:
        yield
    except S2VFlowError as error:
        is_full = error.exit_code == ExitCode.DISK_FULL and not isinstance(error, CannotWriteError)
        if is_full and scratch.folder is not None:
            raise placed(cannot_write(scratch.folder, _refusal(errno.ENOSPC)), node) from error
        placed(error, node)
        raise
    except _expected() as error:
        broken = broken_package(error)
        if broken is None and isinstance(error, (NotImplementedError, RecursionError, ImportError)):
            raise
        raise placed(broken or _refused(error, scratch.folder) or _failed(error, node), node) from error


def _expected() -> tuple[type[Exception], ...]:
    from safetensors import SafetensorError

    return (OSError, ValueError, OverflowError, MemoryError, RuntimeError, ImportError, SafetensorError)


def placed(error: S2VFlowError, node: PlanNode) -> S2VFlowError:
    """Say in an error which node it is of, unless it says so already."""
    if error.inside is None:
        error.place, error.inside = node.place, f"nodes.{node.recipe_node} (kind: {node.kind})"
    return error


def _refused(error: Exception, folder: Path | None) -> CannotWriteError | None:
    """Return the error that files cannot be written in a scratch folder, if that is what an exception says."""
    if folder is None:
        return None
    if not isinstance(error, OSError):
        match = _WRAPPED.search(str(error))
        return cannot_write(folder, _refusal(int(match["number"]))) if match else None
    is_there = isinstance(error.filename, str) and Path(error.filename).is_relative_to(folder)
    # a full disk needs no file name
    return cannot_write(folder, error) if is_there or error.errno in _WRITING_ONLY else None


def _refusal(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def _failed(error: Exception, node: PlanNode) -> S2VFlowError:
    text = (str(error) or type(error).__name__).strip()
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return S2VFlowError(f"{node.name}: out of memory: {text}", fix=_SIZE_FIX, exit_code=ExitCode.OUT_OF_MEMORY)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    fix = "change the settings or the files that this names; if nothing is wrong with them, report it, with "
    fix += f"{type(error).__name__} in {Path(frame.filename).name}, line {frame.lineno}"
    return S2VFlowError(f"{node.name}: {text}", fix)
