"""Keeping what a live value gives out while it is used: for other runs, and for what uses it next in this one.

It can always be made again. So it takes only room that nothing else needs, is evicted before anything else, and where
it cannot be kept, that is said and costs nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sized
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from s2v_flow.cache.budget import Budget
from s2v_flow.cache.store import DamagedObjectError, Entry, Store
from s2v_flow.files.atomic import CannotWriteError, writing
from s2v_flow.graph.events import Listener, NodeCached, Noted
from s2v_flow.graph.fingerprint import as_made
from s2v_flow.wording import size_text

GroupT = TypeVar("GroupT", bound=Sized)


@dataclass
class Keep:
    """Where one live value of a run is kept: in the store, within the budget; `tell` hears what cannot be written.

    `key` is the plan node's identity, `image` what that was made from, `facts` what the node records while it runs,
    `about` goes with them; `is_fresh`: what other runs have kept is not to be used.
    """

    store: Store
    budget: Budget
    tell: Callable[[str, str | None], None]
    emit: Listener
    node: str
    key: str
    image: Mapping[str, Any]
    facts: Mapping[str, Any]
    about: Mapping[str, Any]
    is_fresh: bool
    _known: Entry | None = None  # found or made in this run
    _is_tried: bool = False  # a second time would cost as much, and fail as well

    def find(self) -> Path | None:
        """Return the file in which the value is kept, verified; None where there is none."""
        if self._known is None and not self.is_fresh:
            self._known = self.store.lookup(self.key)
            if self._known is not None:
                self.store.touch(self.key)
                self.emit(NodeCached(self.node))
        if self._known is None:
            return None
        (item,) = self._known.outputs.values()
        try:
            self.store.check(item)
        except DamagedObjectError:
            self.store.put_aside(item)
            text = "what was kept of it is damaged or gone: it is made again"
            self.emit(Noted(self.node, text, is_warning=True))
            self._known = None
            return None
        return self.store.object_path(item)

    def passing(
        self, groups: Iterator[GroupT], total: int, expected: int, make: Callable[[Path], Any]
    ) -> Iterator[GroupT]:
        """Pass a value's groups through and keep them, if all of them are asked for.

        Args:
            groups: The value, made as it is asked for.
            total: How long all groups are together.
            expected: How many bytes the file may take, at a guess.
            make: Begins a file: an object with `write(group)`, `finish()` and `close()`. Their failures are OSErrors.
        """
        seconds = 0.0
        with closing(self._draft(total, expected, make)) as draft:
            next(draft, None)
            while True:
                started = time.monotonic()
                group = next(groups, None)
                seconds += time.monotonic() - started
                if group is None:
                    return
                with suppress(StopIteration):
                    draft.send((group, seconds))
                yield group

    def _draft(
        self, total: int, expected: int, make: Callable[[Path], Any]
    ) -> Generator[None, tuple[Sized, float], None]:
        """Write what is sent, each group with the seconds so far, as long as there is room; publish the whole."""
        if self._is_tried:
            return
        self._is_tried, room, count = True, self.budget.room(expected), 0
        try:
            with self.store.scratch() as folder, writing(folder), closing(make(folder / "kept.mkv")) as writer:
                while count < total:
                    group, seconds = yield
                    writer.write(group)
                    count += len(group)
                    if count >= total:
                        writer.finish()
                    if (folder / "kept.mkv").stat().st_size > room:
                        left = f"the cache has room for {size_text(max(room, 0))}; --cache-limit sets it"
                        self.emit(Noted(self.node, f"not kept ({left}): what needs it again makes it again"))
                        return
                key, image = as_made(self.key, self.image, self.facts)
                facts = {**self.facts, **self.about, "node": self.node, "seconds": round(seconds, 3), "is_spare": True}
                kept = {"kept": folder / "kept.mkv"}
                self._known = self.store.publish(key, image, kept, facts, replaces=self.is_fresh)
        except CannotWriteError as error:
            self.tell(error.reason, error.fix)
        else:
            self.budget.added(sum(item.size for item in self._known.outputs.values()))
