"""What a node's failure means: an error with its place in the recipe, or a defect of this program."""

from __future__ import annotations

import errno
import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from s2v_flow.errors import ExitCode, S2VFlowError, broken_package
from s2v_flow.files.atomic import CannotWriteError, cannot_write
from s2v_flow.graph.node import PlanNode
from s2v_flow.graph.results import Scratch

_WRITING_ONLY = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}  # reading gives none of these
_WRAPPED = re.compile(r"(?:\(os error |\bOs \{ code: )(?P<number>[0-9]+)")  # safetensors gives it as text alone
_SIZE_FIX = "a smaller width and height, or a lower frames_per_call in decode"


@contextmanager
def failures_of(node: PlanNode, scratch: Scratch) -> Iterator[None]:
    """Turn what a node raises because of what it was given into errors that name it.

    What else it may raise (an assertion, a missing key, a wrong type, a division by zero) is a defect of this program,
    and passes.

    Raises:
        CannotWriteError: The node's files cannot be written in `scratch`.
        S2VFlowError: The node failed for another reason.
    """
    try:
        yield
    except S2VFlowError as error:
        is_full = error.exit_code == ExitCode.DISK_FULL and not isinstance(error, CannotWriteError)
        if is_full and scratch.folder is not None:
            raise placed(cannot_write(scratch.folder, _refusal(errno.ENOSPC)), node) from error
        placed(error, node)
        raise
    except _expected() as error:
        broken = broken_package(error)
        if broken is None and isinstance(error, (NotImplementedError, RecursionError, ImportError)):
            raise
        raise placed(broken or _refused(error, scratch.folder) or _failed(error, node), node) from error


def _expected() -> tuple[type[Exception], ...]:
    from safetensors import SafetensorError

    return (OSError, ValueError, OverflowError, MemoryError, RuntimeError, ImportError, SafetensorError)


def placed(error: S2VFlowError, node: PlanNode) -> S2VFlowError:
    """Say in an error which node it is of, unless it says so already."""
    if error.inside is None:
        error.place, error.inside = node.place, f"nodes.{node.recipe_node} (kind: {node.kind})"
    return error


def _refused(error: Exception, folder: Path | None) -> CannotWriteError | None:
    """Return the error that files cannot be written in a scratch folder, if that is what an exception says."""
    if folder is None:
        return None
    if not isinstance(error, OSError):
        match = _WRAPPED.search(str(error))
        return cannot_write(folder, _refusal(int(match["number"]))) if match else None
    is_there = isinstance(error.filename, str) and Path(error.filename).is_relative_to(folder)
    # a full disk needs no file name
    return cannot_write(folder, error) if is_there or error.errno in _WRITING_ONLY else None


def _refusal(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def _failed(error: Exception, node: PlanNode) -> S2VFlowError:
    text = (str(error) or type(error).__name__).strip()
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return S2VFlowError(f"{node.name}: out of memory: {text}", fix=_SIZE_FIX, exit_code=ExitCode.OUT_OF_MEMORY)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    fix = "change the settings or the files that this names; if nothing is wrong with them, report it, with "
    fix += f"{type(error).__name__} in {Path(frame.filename).name}, line {frame.lineno}"
    return S2VFlowError(f"{node.name}: {text}", fix)
