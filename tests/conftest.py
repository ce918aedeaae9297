"""Fixtures for every test."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a models folder with the demo's models, made once; do not write into it."""
    from s2v_flow.demo.models import make_demo_models

    root = tmp_path_factory.mktemp("tiny") / "models"
    make_demo_models(root)
    return root
