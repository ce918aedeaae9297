"""What can go wrong, as data: places, diagnostics, and one exception per exit code.

Every error a user can cause is an `S2VFlowError`; `cli.py` turns it into text and an exit code. No other module prints.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from pathlib import Path


class ExitCode(IntEnum):
    """The exit codes of `s2vflow`; scripts may depend on them."""

    OK = 0
    FAILED = 1  # a node failed while running
    USAGE = 2  # the command line itself is wrong
    RECIPE = 3  # the recipe is wrong; nothing was run
    MISSING = 4  # a model or an input is missing or unreadable
    REFUSED = 5  # refused for safety (pickles, paths outside the allowed roots, limits)
    DISK_FULL = 6
    OUT_OF_MEMORY = 7
    BAD_NUMBERS = 8  # NaN or infinity
    INTERNAL = 9  # a defect of s2vflow
    WORK_TO_DO = 10  # plan --detailed-exitcode
    UNMET = 11  # a video does not meet what its recipe requires
    CHECKPOINTED = 75  # SIGUSR1: run the same command again (sysexits.h: temporary failure)
    INTERRUPTED = 130
    TERMINATED = 143


@dataclass(frozen=True, order=True)
class Place:
    """A position in a file that a person wrote; line and column count from 1. `file` is as the user named it.

    What came as Python's values has no lines: `line` is 0, and `file` says all, as in "<dict>:nodes.first.steps".
    """

    file: str
    line: int = 1
    column: int = 1

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


@dataclass(frozen=True)
class Diagnostic:
    """One mistake: where, what, and how to mend it.

    `code` is stable ("R013"); `place` may be missing; a mistake on the command line has "--set" or the like as its
    file; `excerpt` is the source line without its newline; `width` is how many characters the caret underlines;
    `inside` names the value ("nodes.first.steps (kind: sample)"); `fix` says what to do.
    """

    code: str
    message: str
    place: Place | None = None
    excerpt: str | None = None
    width: int = 1
    inside: str | None = None
    fix: str | None = None

    def sort_key(self) -> tuple[str, int, int, str]:
        """Order by file, line, column, code; what has no place comes last."""
        if self.place is None:
            return ("\uffff", 0, 0, self.code)
        return (self.place.file, self.place.line, self.place.column, self.code)


@dataclass(frozen=True)
class Origin:
    """Where a value was written.

    `excerpt` is the source line; `width` is how many of its characters the value takes; relative paths in the value
    start at `base_dir`, the directory of the file (for `--set`: where the command was given).
    """

    place: Place
    excerpt: str
    base_dir: Path
    width: int = 1

    def diagnostic(self, code: str, message: str, *, inside: str | None = None, fix: str | None = None) -> Diagnostic:
        """Return a mistake that is marked here."""
        return Diagnostic(code, message, self.place, self.excerpt or None, self.width, inside, fix)

    def around(self, part: str) -> Origin:
        """Return the origin of a part of this text, or this one where the part does not stand on its first line."""
        start = self.excerpt.find(part, self.place.column - 1, self.place.column - 1 + self.width)
        if start < 0:
            return self
        return replace(self, place=replace(self.place, column=start + 1), width=len(part))


@dataclass(eq=False)
class S2VFlowError(Exception):
    """An error that a person can mend. `message` says what and why, `fix` what to do, `kept` what is not lost.

    At run time `place` and `inside` say of which node it is ("nodes.frames (kind: decode)").
    """

    message: str
    fix: str | None = None
    kept: str | None = None
    place: Place | None = field(default=None, kw_only=True)
    inside: str | None = field(default=None, kw_only=True)
    exit_code: ExitCode = field(default=ExitCode.FAILED, kw_only=True)

    def __post_init__(self) -> None:
        """Give pickle what makes the error again, however it was made."""
        self.args = (self.message, self.fix, self.kept)

    def __str__(self) -> str:
        return self.message

    @property
    def __notes__(self) -> list[str]:
        """What a traceback shows below the message, from Python 3.11 on."""
        about = {"in": self.inside, "kept": self.kept, "fix": self.fix}
        return [f"{name}: {text}" for name, text in about.items() if text]


@dataclass(eq=False)
class RecipeError(S2VFlowError):
    """The recipe (or an override of it) is wrong; carries every mistake that was found, unless there are very many.

    `str()` gives the mistakes as the command line prints them.
    """

    diagnostics: Sequence[Diagnostic] = ()
    are_all: bool = field(default=True, kw_only=True)  # whether these are all
    exit_code: ExitCode = field(default=ExitCode.RECIPE, kw_only=True)


@dataclass(eq=False)
class UsageError(S2VFlowError):
    """A command, or a call, asks for what cannot be done."""

    exit_code: ExitCode = field(default=ExitCode.USAGE, kw_only=True)


@dataclass(eq=False)
class MissingError(S2VFlowError):
    """A file that is needed is not there, or cannot be read."""

    exit_code: ExitCode = field(default=ExitCode.MISSING, kw_only=True)


@dataclass(eq=False)
class CheckpointError(MissingError):
    """A model file is there, but is damaged, of another family, or in a format that is not supported."""


@dataclass(eq=False)
class MediaError(MissingError):
    """An image, sound or video file is there, but cannot be used."""


@dataclass(eq=False)
class RefusedError(S2VFlowError):
    """Refused for safety: pickles, paths outside the allowed roots, limits."""

    exit_code: ExitCode = field(default=ExitCode.REFUSED, kw_only=True)


@dataclass(eq=False)
class BadNumbersError(S2VFlowError):
    """NaN or infinity where finite numbers must be."""

    exit_code: ExitCode = field(default=ExitCode.BAD_NUMBERS, kw_only=True)


PACKAGES = {"yaml": "pyyaml", "PIL": "pillow"}  # where a module's name is not that of its package


def broken_package(error: BaseException) -> MissingError | None:
    """Return the error that another package cannot be imported, where an exception comes of that, else None."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    frames = [frame for each in chain for frame, _ in traceback.walk_tb(each.__traceback__)]
    modules = [str(frame.f_globals.get("__name__")).partition(".")[0] for frame in frames]
    start = max((index for index, name in enumerate(modules) if name == "s2v_flow"), default=-1) + 1
    error, is_import = chain[-1], any(isinstance(each, ImportError) for each in chain)
    if not is_import and all(frame.f_code.co_name != "<module>" for frame in frames[start:]):
        return None
    named = (error.name or "").partition(".")[0] if isinstance(error, ImportError) else ""
    others = {"s2v_flow", "", "__main__", *sys.stdlib_module_names}
    bodies = [name for name, frame in zip(modules, frames, strict=True) if frame.f_code.co_name == "<module>"]
    found = [name for name in dict.fromkeys([*modules[start : start + 1], *bodies, named]) if name not in others]
    if not found or named == "s2v_flow":
        return None
    from importlib.metadata import packages_distributions

    owners = packages_distributions()
    packages = [PACKAGES.get(name) or name for name in found if name in owners or name == found[0]]
    fix = f"{sys.executable} -m pip install --upgrade --force-reinstall {' '.join(packages)}"
    return MissingError(f"the package {packages[0]} cannot be imported: {error}", fix)
