"""The mistakes found so far. Reading goes on after most of them, so that a user sees all at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from s2v_flow.errors import Diagnostic, Origin, Place, RecipeError
from s2v_flow.wording import worded

_UNREADABLE = frozenset({"R003", "R005", "R008"})  # whatever else is said of such a value would only follow from that
_MAX_COLLECTED = 200  # after so many, more would help nobody and take time


class StopReadingError(Exception):
    """Going on makes no sense; what is wrong has been collected already."""


class Problems:
    """Collects diagnostics; the same mistake at the same place counts once."""

    def __init__(self) -> None:
        self._found: dict[tuple[object, str, str], Diagnostic] = {}
        self._unreadable: set[Place | None] = set()

    def __bool__(self) -> bool:
        return bool(self._found)

    def has(self, code: str) -> bool:
        """Return whether a mistake of this code was found."""
        return any(diagnostic.code == code for diagnostic in self._found.values())

    def add(
        self, code: str, message: str, origin: Origin, *, inside: str | None = None, fix: str | None = None
    ) -> None:
        """Add a mistake.

        Raises:
            StopReadingError: There are too many already.
        """
        self.add_diagnostic(origin.diagnostic(code, message, inside=inside, fix=fix))

    def add_diagnostic(self, diagnostic: Diagnostic) -> None:
        """Add a mistake that is complete.

        Raises:
            StopReadingError: There are too many already.
        """
        if diagnostic.place in self._unreadable:
            return
        if diagnostic.code in _UNREADABLE:
            self._unreadable.add(diagnostic.place)
        self._found.setdefault((diagnostic.place, diagnostic.code, diagnostic.message), diagnostic)
        if len(self._found) > _MAX_COLLECTED:
            raise StopReadingError

    def stop(self, code: str, message: str, origin: Origin, *, fix: str | None = None) -> StopReadingError:
        """Add a mistake and return the exception to raise, after which nothing can be read."""
        self._found[(origin.place, code, message)] = origin.diagnostic(code, message, fix=fix)
        return StopReadingError()

    def extend(self, other: Problems) -> None:
        """Take over what another collection found.

        Raises:
            StopReadingError: There are too many already.
        """
        for diagnostic in other._found.values():
            self.add_diagnostic(diagnostic)

    def raise_any(self, recipe: str) -> None:
        """Do nothing if nothing is wrong.

        Raises:
            RecipeError: With all mistakes, sorted by place.
        """
        if self._found:
            found = sorted(self._found.values(), key=Diagnostic.sort_key)
            are_all = len(found) <= _MAX_COLLECTED
            raise worded(RecipeError(recipe, diagnostics=found[:_MAX_COLLECTED], are_all=are_all))


@contextmanager
def collecting(recipe: str) -> Iterator[Problems]:
    """Give a collection of mistakes, and raise at the end what it holds, or what stopped the reading.

    Raises:
        RecipeError: See `Problems.raise_any`.
    """
    problems = Problems()
    with suppress(StopReadingError):
        yield problems
    problems.raise_any(recipe)
