"""Names for results beside others: talk.mp4, talk.2.mp4, talk.3.mp4. What stands there is never written over."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from contextlib import suppress
from itertools import chain, count
from pathlib import Path


class TakenError(Exception):
    """Somebody else has given another file the name."""


def numbered(path: Path, number: int) -> Path:
    """Return the name of a path's second file, third file and so on: talk.2.mp4; the first has the path itself."""
    return path if number < 2 else path.with_name(f"{path.stem}.{number}{path.suffix}")


def free_name(path: Path, fits: Callable[[Path], bool]) -> Path:
    """Return the wanted name where it fits, else a number that is in use and fits, else the first above all in use.

    Args:
        path: The name that is wanted.
        fits: Tells of a name whether it is free, or is the result's already.
    """
    if fits(path):
        return path
    pattern = re.compile(rf"{re.escape(path.stem)}\.([2-9]|[1-9][0-9]+)(?:_[0-9]+)?{re.escape(path.suffix)}")
    names: list[str] = []
    with suppress(OSError):
        names = os.listdir(path.parent)
    found = sorted({int(match[1]) for name in names if (match := pattern.fullmatch(name))})
    numbers = chain(found, count(max(found, default=1) + 1))
    return next(name for number in numbers if fits(name := numbered(path, number)))


def is_file_there(path: Path) -> bool:
    """Tell whether a name is in use, by anything but a folder: that is an error when it is written to."""
    return os.path.lexists(path) and not os.path.isdir(path)


def put_new(made: str | Path, path: Path) -> None:
    """Give a finished file a name in the same file system that nobody has yet; its old name may stay.

    Raises:
        TakenError: Somebody has it.
        OSError: The name cannot be given.
    """
    try:
        os.link(made, path)
    except FileExistsError as error:
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path)) from error
        raise TakenError(path) from None
    except OSError:  # a file system without links
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError:
            raise TakenError(path) from None
        os.replace(made, path)
