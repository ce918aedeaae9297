"""Fixtures for every test."""

from __future__ import annotations

import fcntl
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from runs_for_tests import Place, ran

# The same examples every time: whether a commit is green is no matter of luck. New ones: HYPOTHESIS_PROFILE=default.
settings.register_profile(  # however busy the machine is
    "same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


READ_BY_THE_PROGRAM = tuple(
    f"S2VFLOW_{name}"
    for name in ("CACHE_DIR", "CACHE_LIMIT", "CACHE_REMOTE", "DEFAULTS", "EXTRA_MODEL_PATHS", "MODELS_DIR")
)
LONGEST = ("batch", "demo", "views", "parallel", "docs", "e2e")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the folders that take longest: what comes last is to end on both workers at once."""
    items.sort(key=lambda item: item.path.parent.name not in LONGEST)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Give the tests of a file to one worker: what they share is made once."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


@pytest.fixture(autouse=True, scope="session")
def _home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Give tests an empty home folder: what the user has there decides nothing, and nothing is left there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        for name in [*READ_BY_THE_PROGRAM, "XDG_CACHE_HOME", "XDG_CONFIG_HOME"]:
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(autouse=True, scope="module")
def _what_is_imported_is_no_garbage() -> None:
    """Spare the collections of every run what is there already: half a second each, once torch and the tests are."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def demo_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a models folder with the demo's models, made once for all workers; do not write into it."""
    from s2v_flow.demo.models import make_demo_models

    return _made_once(tmp_path_factory, "demo", make_demo_models)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory, demo_models: Path) -> Path:
    """Return the demo's models, the untrained VAE and audio encoder narrower: a run takes two thirds of the time."""
    from models_for_tests import make_narrow_models

    return _made_once(tmp_path_factory, "tiny", lambda root: make_narrow_models(root, demo_models))


def _made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with (base / f"{name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.fstat(lock.fileno()).st_size == 0:
            make(base / name / "models")
            lock.write("made")
    return base / name / "models"


@pytest.fixture(scope="session")
def quick_run(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> Place:
    """Return a recipe that has run, once for all tests; do not write into it: take a copy with `copied`."""
    return ran(tmp_path_factory.mktemp("quick"), tiny_models)
