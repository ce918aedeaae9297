"""The mistakes found so far. Reading goes on after most of them, so that a user sees all at once."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from s2v_flow.errors import Diagnostic, Place, RecipeError
from s2v_flow.recipe.tree import Origin
from s2v_flow.wording import worded

CODES: Mapping[str, str] = MappingProxyType(
    {
        # the text
        "R001": "the file is not YAML",
        "R002": "the file cannot be read",
        "R003": "the file is not UTF-8 text, or holds control characters or half a surrogate pair",
        "R004": "the file is larger, deeper or longer than a recipe may be",
        "R005": "a feature of YAML that recipes do without: tags, merge keys, directives, several documents",
        "R006": "a key is repeated in the same map",
        "R007": "a key is not text",
        "R008": "a number is infinite, not a number, or too long",
        "R009": "an alias is unknown, or stands inside its own anchor",
        # the shape, the fields and their values
        "R010": "an unknown key at the top of a recipe, a profile or an override file",
        "R011": "a node has no such field",
        "R012": "a value has the wrong type",
        "R013": "a number is out of range",
        "R014": "a value is none of the possible ones",
        "R015": "something required is missing",
        "R016": "a value breaks a rule of its field",
        "R017": "a name has characters that names may not have, or is reserved",
        "R018": "there is no such kind of node",
        "R019": "the recipe is written for another version of the recipe language",
        # the graph
        "R020": "a reference names a node that does not exist",
        "R021": "a reference names a port that the node does not have",
        "R022": "a reference leads to a value of the wrong type",
        "R023": "nodes depend on themselves",
        "R024": "an input is not a reference to a node",
        # parameters
        "R030": "a reference names a parameter that does not exist",
        "R031": "a reference to a parameter is misspelt",
        "R032": "parameters depend on themselves",
        "R033": "parameters expand too deep or too far",
        "R034": "a parameter is neither a scalar nor a list of scalars",
        # layers
        "R040": "`extends` does not name a file relative to this one",
        "R041": "files extend each other in a circle",
        "R042": "a chain of `extends` is too long",
        "R043": "there is no such profile",
        "R050": "an override is not written as PATH=VALUE",
        "R051": "an override names something that does not exist",
        "R052": "an override's value cannot be read as what its place takes",
        "R053": "an override removes what is required",
        # the matrix
        "R060": "an axis of the matrix is no list of values, or include or exclude no list of maps",
        "R061": "a matrix has more cells than it may have, or none",
        "R062": "an exclude of the matrix names what does not vary",
        "R063": "an axis of the matrix, or one of its values, is given twice",
        "R064": "an override sets what the matrix varies",
        # what is no recipe
        "R070": "the file is something else that is known: a workflow, a picture, a model",
    }
)

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
