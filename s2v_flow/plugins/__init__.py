"""Kinds of nodes and samplers that other installed packages declare, as entry points.

Only what an installed distribution declares is ever imported, whatever a recipe names; the current folder, which
Python may search too, holds no installed distributions.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, distributions
from itertools import chain
from typing import Any

from s2v_flow.errors import ExitCode, S2VFlowError

NODES, SAMPLERS = "s2vflow.nodes", "s2vflow.samplers"


@dataclass(frozen=True)
class Plugin:
    """A kind or a sampler, by its name in recipes, and the package that declares it."""

    name: str
    package: str
    version: str
    entry: EntryPoint

    def __str__(self) -> str:
        return f"{self.package} {self.version}"

    def load(self) -> Any:
        """Import it.

        Raises:
            S2VFlowError: It cannot be imported, for whatever reason.
        """
        try:
            return self.entry.load()
        except Exception as error:
            raise self.faulty(f"cannot be imported: {type(error).__name__}: {error}") from error

    def faulty(self, why: str) -> S2VFlowError:
        """Return the error of a plug-in that cannot be used."""
        text = f"{self.name}, of the installed package {self}, {why}"
        return S2VFlowError(text, fix=f"install or mend what {self.package} needs", exit_code=ExitCode.MISSING)


def plugins(group: str, built_in: Collection[str] = ()) -> Mapping[str, Plugin]:
    """Return what installed packages declare in a group, `NODES` or `SAMPLERS`, by name; nothing is imported.

    Raises:
        S2VFlowError: Two packages declare the same name, or one declares a name of s2vflow's own.
    """
    found: dict[str, Plugin] = {}
    for plugin in declared():
        if plugin.entry.group == group:
            other = "s2vflow itself" if plugin.name in built_in else found.get(plugin.name)
            if other is not None:
                text = f"{plugin.name} ({group}) is declared twice: by {plugin} and by {other}"
                raise S2VFlowError(text, fix=f"uninstall {plugin.package}, or the other", exit_code=ExitCode.MISSING)
            found[plugin.name] = plugin
    return found


@cache
def declared() -> tuple[Plugin, ...]:
    """Return everything that installed packages declare, in the order of Python's search path."""
    here = os.path.realpath(os.curdir)
    found: dict[str, list[Plugin]] = {}
    for item in distributions(path=[path for path in sys.path if os.path.realpath(path) != here]):
        entries = [entry for entry in item.entry_points if entry.group in (NODES, SAMPLERS)]
        if entries:  # of two copies, Python imports the first
            found.setdefault(item.name, [Plugin(entry.name, item.name, item.version, entry) for entry in entries])
    return tuple(chain.from_iterable(found.values()))
