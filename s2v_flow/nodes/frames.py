"""Frames as a value: made or read on iteration, a few at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Semaphore
from typing import TYPE_CHECKING, Any, TypeVar

from s2v_flow.errors import MediaError
from s2v_flow.media import can_be_cut

if TYPE_CHECKING:
    import numpy as np

    from s2v_flow.graph.context import RunContext
    from s2v_flow.graph.ports import Value

FLAT_LEVELS = 2.0
MAX_HANDED_OVER = 3  # groups: one in work, two that wait for it
ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Frames:
    """A video's frames. Iterating makes them anew, in groups: uint8 arrays [n, 8H, 8W, 3].

    `read(start, count)` gives some of them, fewer at the end. `facts` say how they were made, once they are: to be kept
    with what is made of them. `close` is called when nobody needs them any more.
    """

    width: int
    height: int
    num_frames: int
    groups: Callable[[], Iterator[np.ndarray]]
    read: Callable[[int, int], np.ndarray]
    facts: Mapping[str, Any] = field(default_factory=dict)
    close: Callable[[], None] = lambda: None

    def __iter__(self) -> Iterator[np.ndarray]:
        return self.groups()


def still(frame: Callable[[], np.ndarray], width: int, height: int, count: int) -> Frames:
    """Return a video that stands still: one frame, uint8 [1, H, W, 3], `count` times; none of an empty [0, H, W, 3]."""
    import numpy as np

    def groups() -> Iterator[np.ndarray]:
        found = frame()
        return iter([found] * count if len(found) else [])

    def read(start: int, number: int) -> np.ndarray:
        return np.repeat(frame(), max(min(number, count - start), 0), axis=0)

    return Frames(width, height, count, groups, read)


def concatenated(first: Frames, second: Frames) -> Frames:
    """Return two videos of the first one's size, one after the other."""
    import numpy as np

    def groups() -> Iterator[np.ndarray]:
        yield from first.groups()
        yield from second.groups()

    def read(start: int, count: int) -> np.ndarray:
        here = max(min(first.num_frames - start, count), 0)
        parts = [first.read(start, here)] if here else []
        if count > here or not parts:
            parts.append(second.read(max(start - first.num_frames, 0), count - here))
        return np.concatenate(parts)

    return Frames(first.width, first.height, first.num_frames + second.num_frames, groups, read)


def require_cut(name: str, picture: Value | None, width: int, height: int) -> None:
    """Refuse a picture or a video that is too narrow to be cut to a shape, where its size is known.

    Raises:
        MediaError: Nothing would be left of it.
    """
    facts = picture.facts if picture else {}
    columns, rows = facts.get("width"), facts.get("height")
    if columns and rows and not can_be_cut(columns, rows, width / height):
        raise MediaError(
            f"{name}: {facts.get('file', 'the picture')}: {columns}x{rows} pixels are too narrow to be cut to the "
            f"shape of {width}x{height}",
            "give a picture of about the video's proportions",
        )


def window(groups: Iterator[np.ndarray], start: int, count: int) -> Iterator[np.ndarray]:
    """Pass through the frames from `start` on, `count` of them, keeping the grouping."""
    position = 0
    for group in groups:
        first, last = max(start - position, 0), min(start + count - position, len(group))
        position += len(group)
        if first < last:
            yield group[first:last]
        if position >= start + count:
            return


def warned_of_flat(context: RunContext, groups: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Pass frames through, and warn if the first of them show nothing: one colour all over.

    They do where their deviation from their own mean, in each colour, is below 2 of 255 grey levels. What a video codec
    or a decoder leaves on an even surface is below 1; a white spot on black that fills a thousandth of the picture
    makes 8, a face that fills a hundredth and differs by 50 levels makes 5.
    """
    for index, group in enumerate(groups):
        if index == 0 and len(group):
            deviation = float(group[0].reshape(-1, group.shape[-1]).std(axis=0).max())
            mean = group[0].mean()
            if deviation < FLAT_LEVELS:
                shade = "black" if mean < FLAT_LEVELS else f"of one colour (brightness {mean:.0f} of 255)"
                context.note(
                    f"the first frame is {shade}: the model, the precision or the LoRAs may not fit", is_warning=True
                )
        yield group


def beside(items: Iterable[ItemT], work: Callable[[Iterator[ItemT]], ResultT]) -> ResultT:
    """Return what `work` makes of items in a thread of its own, while the next ones are made in this one.

    At most `MAX_HANDED_OVER` are with the thread. What `work` raises is raised here when the next item is there; where
    making the items ends with an error or a signal, `work` is ended by an error too. In any case it has ended after.
    """
    from concurrent.futures import ThreadPoolExecutor

    handed_over: SimpleQueue[tuple[ItemT] | _GivenUpError | None] = SimpleQueue()
    room = Semaphore(MAX_HANDED_OVER)

    def given() -> Iterator[ItemT]:
        while (item := handed_over.get()) is not None:
            if isinstance(item, _GivenUpError):
                raise item
            yield item[0]
            room.release()

    with ThreadPoolExecutor(1) as thread:
        working = thread.submit(work, given())
        working.add_done_callback(lambda _: room.release())
        end: _GivenUpError | None = _GivenUpError()
        try:
            for item in items:
                room.acquire()
                if working.done():
                    break
                handed_over.put((item,))
            end = None
        finally:
            handed_over.put(end)
        try:
            return working.result()
        finally:
            del working  # an error would hold it, and it the error


class _GivenUpError(Exception):
    """Nothing more is coming."""
