"""What carries the project on: pages about it, templates, hooks, one place for the version."""

from __future__ import annotations

import re
import shlex
from typing import Any

import yaml
from pages import PAGES, ROOT, text_of
from test_architecture import ALLOWED

from s2v_flow import __version__


def loaded(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def test_files_that_pages_name_are_there() -> None:
    """Paths in backticks, and tests wherever they are named."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        named = re.findall(r"`((?:s2v_flow|tests|benchmarks|schemas|\.ci)/[\w./]*)`|(\btests/[\w/]+\.py)", text)
        assert [path for found in named for path in found if path and not (ROOT / path).exists()] == [], page
    assert len(re.findall(r"`s2v_flow/[\w/]+\.py`", text_of("ARCHITECTURE.md"))) > 20, "the list above is not empty"


def test_the_table_of_layers_is_the_rule_that_the_imports_keep() -> None:
    """Each layer stands below all that it may import."""
    rows = re.findall(r"^\| (`.+?) \|", text_of("ARCHITECTURE.md"), re.MULTILINE)
    levels = {layer: level for level, row in enumerate(rows) for layer in re.findall(r"`(\w+)`", row)}
    assert levels.keys() == ALLOWED.keys() - {""}
    levels[""] = levels["api"]  # the package's face
    for layer, below in ALLOWED.items():
        assert all(levels[name] <= levels[layer] for name in below), layer


def test_the_version_stands_in_one_place() -> None:
    """pyproject.toml takes it from the package, the changelog goes with it."""
    project = text_of("pyproject.toml")
    assert 'dynamic = ["version"]' in project
    assert 'version = {attr = "s2v_flow.version.__version__"}' in project
    assert __version__ not in project
    assert re.search(r"^## \[Unreleased\]$", text_of("CHANGELOG.md"), re.MULTILINE)


def test_the_changelog_has_the_usual_headings() -> None:
    found = re.findall(r"^### (.+)$", text_of("CHANGELOG.md"), re.MULTILINE)
    assert set(found) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_a_report_of_a_defect_asks_for_the_machine_and_the_manifest() -> None:
    form = loaded(".github/ISSUE_TEMPLATE/defect.yml")
    labels = " ".join(item["attributes"].get("label", "") for item in form["body"])
    described = " ".join(item["attributes"].get("description", "") for item in form["body"])
    assert "s2vflow doctor --json" in labels
    assert "s2vflow show last --json" in described
    assert {"name", "description", "body"} <= loaded(".github/ISSUE_TEMPLATE/wish.yml").keys()


def test_hooks_are_the_tools_of_the_environment_and_fetch_nothing() -> None:
    repositories = loaded(".pre-commit-config.yaml")["repos"]
    assert [repository["repo"] for repository in repositories] == ["local"]
    hooks = repositories[0]["hooks"]
    assert all(hook["language"] == "system" for hook in hooks)
    tools = [shlex.split(hook["entry"])[0] for hook in hooks]
    assert tools == [".venv/bin/ruff", ".venv/bin/ruff", ".venv/bin/mypy"]


def test_a_public_forge_runs_what_everybody_runs() -> None:
    """Linux and macOS, every Python that pyproject.toml promises, and .ci/run."""
    job = loaded(".github/workflows/ci.yml")["jobs"]["test"]
    assert job["strategy"]["matrix"]["os"] == ["ubuntu-latest", "macos-latest"]
    promised = re.findall(r"Python :: (3\.\d+)", text_of("pyproject.toml"))
    assert job["strategy"]["matrix"]["python"] == promised
    assert job["steps"][-1] == {"run": ".ci/run"}
