"""Diagnostics as text: plain, without colour, and safe to print whatever a recipe holds.

Messages are worded with the small functions here (`shown`, `listed`, `nearest`): all messages read alike.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping

from s2v_flow.errors import Diagnostic, RecipeError

MAX_DIAGNOSTICS = 50  # mistakes of one recipe that are shown
WARNING = "warning: "
_MAX_EXCERPT = 110  # characters of a source line that are shown
_BEFORE_CARET = 60  # of which so many, at most, stand before the caret
_MAX_SHOWN = 60  # characters of a value in a message
_MAX_NAME = 80  # a longer name is no misspelling of anything
_MAX_KNOWN = 300  # among more names a search takes longer than it helps


def format_diagnostic(diagnostic: Diagnostic) -> str:
    """Return the lines that are printed for one mistake, without a newline at the end.

    The form is that of compilers, which editors make clickable: `file:line:column: error[R013]: message`, the source
    line with carets under the faulty part, then `in:` and `fix:`. Control characters, escape sequences and characters
    that change the direction of text come out escaped; a long source line is cut around the carets.
    """
    head = f"error[{diagnostic.code}]: {diagnostic.message}"
    place = diagnostic.place
    lines = []
    if place is None:
        lines.append(visible(head))
    else:
        lines.append(visible(f"{place}: {head}"))
        if diagnostic.excerpt is not None:
            lines += _excerpt(diagnostic.excerpt, place.line, place.column, diagnostic.width)
    if diagnostic.inside is not None:
        lines.append(visible(f"  in:  {diagnostic.inside}"))
    if diagnostic.fix is not None:
        lines.append(visible(f"  fix: {diagnostic.fix}"))
    return "\n".join(lines)


def mistakes_text(error: RecipeError) -> str:
    """Return every mistake of a recipe as the command line prints them, and how many there are."""
    shown = [format_diagnostic(item) for item in error.diagnostics[:MAX_DIAGNOSTICS]]
    count = len(error.diagnostics)
    number = f"{count}" if error.are_all else f"more than {count}"
    more = f" (the first {MAX_DIAGNOSTICS} are shown)" if count > MAX_DIAGNOSTICS else ""
    return "\n\n".join([*shown, f"{number} {'mistake' if count == 1 else 'mistakes'}{more}; nothing was run"])


def worded(error: RecipeError) -> RecipeError:
    """Make the mistakes of a recipe the error's message."""
    error.message = mistakes_text(error)
    return error


def visible(text: str) -> str:
    """Return the text with every character that a terminal would not show, or would obey, written as an escape.

    A no-break space is one of them: in YAML it indents nothing, and looks as if it did.
    """
    if text.isprintable():
        return text
    return "".join(map(_visible_character, text))


def shown(value: object) -> str:
    """Return a value as it would be written in YAML, short: `0`, `true`, `null`, `'text'`, `a list`, `a map`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"'{shortened(value)}'"
    if isinstance(value, (int, float)):
        return str(value)
    return "a map" if isinstance(value, dict) else "a list"


def shortened(text: str, limit: int = _MAX_SHOWN) -> str:
    """Return the text, cut where it is longer than a message should quote."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def listed(names: Iterable[str], limit: int = 20) -> str:
    """Return names as `a, b, c`, the first ones only where there are many."""
    names = list(names)
    rest = "" if len(names) <= limit else f" and {len(names) - limit} more"
    return ", ".join(shortened(name) for name in names[:limit]) + rest


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that `name` was most likely meant to be, or None."""
    known = list(known)
    if len(name) > _MAX_NAME or len(known) > _MAX_KNOWN:
        return None
    import difflib  # a tenth of what `--help` takes

    folded = {candidate.lower(): candidate for candidate in reversed(known)}
    matches = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.6)
    return folded[matches[0]] if matches else None


def size_text(count: int, *, is_memory: bool = False) -> str:
    """Return a number of bytes for people: "1.5 GB" of a disk, in powers of 1000, "1.5 GiB" of memory, in 1024."""
    base, units = (1024, ("GiB", "MiB", "KiB")) if is_memory else (1000, ("GB", "MB", "kB"))
    for power, unit in zip((3, 2, 1), units, strict=True):
        if count >= base**power:
            return f"{count / base**power:.1f} {unit}"
    return f"{count} B"


def counted(count: int, noun: str) -> str:
    """Return "1 job", "2 jobs"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def reused_text(caches: Iterable[Mapping[str, int] | None]) -> str:
    """Return "27 of 60 steps reused (step cache, approximate)", of chunks' facts; "" where none has a step cache."""
    of = [cache for cache in caches if cache]
    reused, steps = (sum(cache.get(name, 0) for cache in of) for name in ("reused", "steps"))
    return f"{reused} of {steps} steps reused (step cache, approximate)" if of else ""


def duration_text(seconds: float) -> str:
    """Return a length of time for people: "8 s", "3 min 9 s", "2 h 5 min"; below ten seconds with a tenth."""
    if seconds < 9.95:
        return f"{max(seconds, 0.0):.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, left = divmod(minutes, 60)
    return f"{hours} h {left} min" if hours else f"{minutes} min {rest} s"


def did_you_mean(name: str, known: Iterable[str], what: str = "known") -> str | None:
    """Return the usual advice on an unknown name: the nearest known one, and all of them."""
    known = list(known)
    if not known:
        return None
    match = nearest(name, known)
    everything = f"{what}: {listed(known)}"
    return everything if match is None else f"did you mean {match}? {everything}"


def path_slip(text: str) -> str | None:
    """Return what to write for a path that leads nowhere, where it is another system's, an address, or in quotes."""
    if drive := re.match(r"([A-Za-z]):[\\/]", text):
        there = f"/mnt/{drive[1].lower()}/{text[3:]}".replace("\\", "/")
        return f"this is a path of Windows: under WSL it is {there}"
    if address := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/+", text):
        is_file = address[1].lower() == "file"
        return (
            f"write /{text[address.end() :]}" if is_file else "files are read from disk: download it, and name the file"
        )
    bare = text.strip(" \t\"'\u201c\u201d\u2018\u2019\u201e\u00ab\u00bb")
    if bare and bare != text:
        return f"the quotes and blanks around it count: write {bare}"
    return f"write {text.replace(chr(92), '/')}" if "\\" in text else None


def _visible_character(character: str) -> str:
    if character.isprintable():
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def _display_width(text: str) -> int:
    """Count terminal columns: Chinese and Japanese characters take two, combining marks none."""
    return sum(
        0 if unicodedata.combining(character) else 1 + (unicodedata.east_asian_width(character) in "WF")
        for character in text
    )


def _excerpt(line: str, number: int, column: int, width: int) -> list[str]:
    """Return the source line and the line of carets below it."""
    start = min(max(column - 1, 0), len(line))
    first = max(0, start - _BEFORE_CARET) if len(line) > _MAX_EXCERPT else 0
    last = first + _MAX_EXCERPT
    before, marked = visible(line[first:start]), visible(line[start : min(start + max(width, 1), last)])
    after = visible(line[start + max(width, 1) : last])
    before = f"...{before}" if first else before
    margin = f"{number:>5} | "
    carets = "^" * max(1, _display_width(marked))
    return [
        f"{margin}{before}{marked}{after}{'...' if last < len(line) else ''}".rstrip(),
        " " * (len(margin) - 2) + "| " + " " * _display_width(before) + carets,
    ]
