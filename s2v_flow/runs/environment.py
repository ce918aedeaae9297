"""What a run ran on and with, and the digests of its files, found out without importing anything heavy."""

from __future__ import annotations

import getpass
import importlib.metadata
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from s2v_flow.files.facts import file_digest, known_digest
from s2v_flow.graph.events import Listener, StageStarted
from s2v_flow.graph.node import Plan
from s2v_flow.machine import device_class
from s2v_flow.plugins import NODES, SAMPLERS, Plugin, plugins
from s2v_flow.recipe.load import Recipe
from s2v_flow.runs.manifest import EnvironmentRecord, GitRecord
from s2v_flow.version import __version__
from s2v_flow.wording import size_text

if TYPE_CHECKING:
    from concurrent.futures import Future

_GIT_SECONDS = 3.0


@cache
def torch_version() -> str | None:
    """Return the installed version of torch, without importing it."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None


def plugins_of(recipe: Recipe, plan: Plan) -> list[Plugin]:
    """Return the other packages' kinds and samplers that a recipe and its plan use."""
    kinds, samplers = plugins(NODES), plugins(SAMPLERS)
    found = [kinds.get(spec.kind) for spec in recipe.nodes.values()]
    found += [samplers.get(getattr(node.node, "sampler", "")) for node in plan.nodes]
    return list(dict.fromkeys(plugin for plugin in found if plugin is not None))


def packages_of(recipe: Recipe, plan: Plan) -> dict[str, str]:
    """Return these packages' versions by name."""
    return {plugin.package: plugin.version for plugin in plugins_of(recipe, plan)}


def environment(device: str, *, has_host: bool = False) -> EnvironmentRecord:
    """Return what this process runs on, with the names of host and user if wanted; `device`: as torch names it."""
    return EnvironmentRecord(
        s2vflow=__version__,
        python=platform.python_version(),
        torch=torch_version(),
        system=platform.system(),
        machine=platform.machine(),
        device=device_class(device),
        gpu=_gpu_name(device) if device_class(device) == "cuda" else None,
        host=platform.node() if has_host else None,
        user=_user_name() if has_host else None,
    )


def _gpu_name(device: str) -> str | None:
    """Return the GPU's name where torch was needed anyway."""
    torch = sys.modules.get("torch")
    return str(torch.cuda.get_device_name(device)) if torch is not None and torch.cuda.is_initialized() else None


def _user_name() -> str | None:
    with suppress(OSError, KeyError):
        return getpass.getuser()
    return None


def git_state(files: Sequence[Path]) -> GitRecord | None:
    """Return the state of the repository in which files stand, or None where there is none, or git takes too long.

    `files`: the recipe's files; the last one tells the repository.
    """
    folder = files[-1].absolute().parent
    status = _git(folder, "status", "--porcelain=v2", "--branch", "--untracked-files=no")
    if status is None:
        return None
    lines = status.splitlines()
    oid = next((line.split()[2] for line in lines if line.startswith("# branch.oid ")), "(initial)")
    names = [os.path.relpath(os.path.abspath(file), folder) for file in files]
    is_tracked = _git(folder, "ls-files", "--error-unmatch", "--", *names) is not None
    is_changed = any(not line.startswith("# ") for line in lines)
    return GitRecord(commit=None if oid == "(initial)" else oid, is_dirty=is_changed or not is_tracked)


def _git(folder: Path, *arguments: str) -> str | None:
    """Run a git command that only reads, and no program that the repository's settings name."""
    command = ["git", "-c", "core.fsmonitor=false", "-C", str(folder), *arguments]
    environ = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(command, capture_output=True, timeout=_GIT_SECONDS, check=False, env=environ)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else None


_HASHED_AT_ONCE_BYTES = 64 << 20
_HASHED_SIDE_BY_SIDE = 2


class FileDigests:
    """sha256 of files, remembered in a table on the disk; `emit` is told where a large one has to be read."""

    def __init__(self, memory: Path, emit: Listener = lambda event: None) -> None:
        self._memory = memory
        self._emit = emit
        self._made: dict[Path, str] = {}
        self._begun: dict[Path, Future[str]] = {}

    @contextmanager
    def hashing(self, files: Iterable[Path]) -> Iterator[bool]:
        """Hash large files in the background while this block runs, two at once, in order; tell whether there are any.

        What is unfinished at the block's end is given up. Errors are told by the call that asks for the file.
        """
        unknown = [file for file in dict.fromkeys(files) if file.is_file() and self.known(file) is None]
        if not unknown:
            yield False
            return
        from concurrent.futures import ThreadPoolExecutor

        stopped = threading.Event()
        hashed = partial(file_digest, memory_path=self._memory, should_stop=stopped.is_set)
        with ThreadPoolExecutor(_HASHED_SIDE_BY_SIDE) as pool:
            try:
                self._begun = {file: pool.submit(hashed, file) for file in unknown}
                yield True
            finally:
                stopped.set()
                self._begun = {}
                pool.shutdown(cancel_futures=True)

    def __call__(self, file: Path) -> str:
        """Return a file's sha256, reading all of it where it is not remembered.

        Raises:
            MissingError: It cannot be read.
        """
        is_long = file.is_file() and self.known(file) is None
        if is_long:
            self._emit(StageStarted("", f"hashing {file.name} ({size_text(file.stat().st_size)}), once"))
        if file in self._begun:
            self._begun[file].exception()
        self._made[file] = file_digest(file, self._memory)  # not anew, unless it failed or the file has changed since
        if is_long:
            self._emit(StageStarted("", ""))
        return self._made[file]

    def known(self, file: Path) -> str | None:
        """Return a file's sha256 if that takes no time; None where it does, or the file is not there."""
        if not file.is_file():
            return None
        if file.stat().st_size <= _HASHED_AT_ONCE_BYTES:
            return file_digest(file, self._memory)
        return known_digest(file, self._memory) or self._made.get(file)
