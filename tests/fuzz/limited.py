"""Spoilt files, one after the other, in child processes with limits: what crashes or hangs is pinned on its number."""

from __future__ import annotations

import importlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from s2v_flow.errors import S2VFlowError

LIMIT_SECONDS = 10
LIMIT_BYTES = 4 << 30
_PROGRAM = "import sys; sys.path[:0] = sys.argv[1:3]; from limited import work; work(*sys.argv[3:])"

Check = Callable[[bytes, str, Path], str]
"""Reads a spoilt file, given its bytes, the name of what it was made from, and a folder; says what came of it."""


@dataclass
class Survey:
    """What came of the files: how often what, and the failures, each with its number and what happened."""

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[int, str]] = field(default_factory=list)


def survey(module: str, folder: Path, count: int, seed: int) -> Survey:
    """Give so many spoilt files to `check` of a module, in a child process; after a crash the next child goes on.

    Args:
        module: It has `spoil(chance, seeds)`, which returns a name and bytes, and `check`, a `Check`.
        folder: Holds the sound files, in `seeds`; failing files are kept in it.
        count: How many.
        seed: Of all chance.
    """
    found, first = Survey(), 0
    tests = Path(__file__).parents[1]
    while first < count and len(found.failures) < 50:
        arguments = [str(tests / "fuzz"), str(tests), module, str(folder), str(seed), str(first), str(count)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run([sys.executable, "-c", _PROGRAM, *arguments], capture_output=True, env=environment)
        last = first - 1
        for line in done.stdout.splitlines():
            number, said = json.loads(line)
            if said is None:
                last = number
            elif said.startswith("!"):
                found.failures.append((number, said[1:]))
            else:
                found.outcomes[said] += 1
        if done.returncode == 0:
            break
        assert last >= first, done.stderr.decode(errors="replace")
        ended = signal.Signals(-done.returncode).name if done.returncode < 0 else f"exit {done.returncode}"
        found.failures.append((last, f"{ended}: {done.stderr[-500:].decode(errors='replace')}"))
        first = last + 1
    return found


def work(module: str, folder: str, seed: str, first: str, count: str) -> None:
    """Be the child: say each number before its file is read, and afterwards what came of it."""
    tested = importlib.import_module(module)
    root = Path(folder)
    seeds = {path.name: path.read_bytes() for path in sorted((root / "seeds").iterdir())}
    warm = getattr(tested, "warm", None)
    if warm is not None:
        warm(root)
    _limit()
    for number in range(int(first), int(count)):
        name, data = tested.spoil(random.Random(f"{seed}:{number}"), seeds)
        _say(number, None)
        signal.alarm(LIMIT_SECONDS)
        try:
            said = tested.check(data, name, root)
        except S2VFlowError as error:
            said = f"!{type(error).__name__} where none is expected: {error}"
        except Exception:  # noqa: BLE001
            said = f"!{name}: {traceback.format_exc()[-1500:]}"
        signal.alarm(0)
        if said.startswith("!"):
            (root / f"failed-{seed}-{number}-{name}").write_bytes(data)
        _say(number, said)


def _say(number: int, said: str | None) -> None:
    os.write(1, (json.dumps([number, said]) + "\n").encode())


def _limit() -> None:
    """Bound what a file may take: memory beyond what the imports took, and no core dumps."""
    used = 0
    status = Path("/proc/self/statm")
    if status.exists():
        used = int(status.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT_BYTES, used + LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
