"""What a run ran on and with, found out without importing anything heavy."""

from __future__ import annotations

import getpass
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from s2v_flow.graph.plan import Plan
from s2v_flow.plugins import NODES, SAMPLERS, Plugin, plugins
from s2v_flow.recipe.document import Recipe
from s2v_flow.runs.manifest import EnvironmentRecord, GitRecord
from s2v_flow.version import __version__

_GIT_SECONDS = 3.0


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


def environment(device_class: str, *, has_host: bool = False) -> EnvironmentRecord:
    """Return what this process runs on.

    Args:
        device_class: "cpu", "cuda" or "mps".
        has_host: Whether to name the host and the user.
    """
    return EnvironmentRecord(
        s2vflow=__version__,
        python=platform.python_version(),
        torch=torch_version(),
        system=platform.system(),
        machine=platform.machine(),
        device=device_class,
        gpu=_gpu_name() if device_class == "cuda" else None,
        host=platform.node() if has_host else None,
        user=_user_name() if has_host else None,
    )


def _gpu_name() -> str | None:
    """Return the GPU's name where torch was needed anyway."""
    torch = sys.modules.get("torch")
    return str(torch.cuda.get_device_name()) if torch is not None and torch.cuda.is_initialized() else None


def _user_name() -> str | None:
    with suppress(OSError, KeyError):
        return getpass.getuser()
    return None


def git_state(files: Sequence[Path]) -> GitRecord | None:
    """Return the state of the repository in which files stand, or None where there is none, or git takes too long.

    Args:
        files: The recipe's files; the last one tells the repository.
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
