"""Fixtures for every test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from runs_for_tests import Place, ran

# The same examples every time: whether a commit is green is no matter of luck. New ones: HYPOTHESIS_PROFILE=default.
settings.register_profile("same", derandomize=True, suppress_health_check=[HealthCheck.too_slow])  # on a busy machine
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a models folder with the demo's models, made once; do not write into it."""
    from s2v_flow.demo.models import make_demo_models

    root = tmp_path_factory.mktemp("tiny") / "models"
    make_demo_models(root)
    return root


@pytest.fixture(scope="session")
def quick_run(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> Place:
    """Return a recipe that has run, once for all tests; do not write into it: take a copy with `copied`."""
    return ran(tmp_path_factory.mktemp("quick"), tiny_models)
