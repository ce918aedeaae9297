"""Spoilt recipes, changes and workflows: a recipe or an error of ours with its place, soon, and never anything else.

The quick tier is part of the default tests. `make soak` runs more and prints figures: S2VFLOW_SOAK_RECIPES says how
many.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from recipe_mutation import mutated, override

from s2v_flow import api
from s2v_flow.errors import Diagnostic, ExitCode, RecipeError, S2VFlowError
from s2v_flow.recipe.argument import Override
from s2v_flow.recipe.config import config_text
from s2v_flow.recipe.reader import _LINE_BREAK
from s2v_flow.wording import format_diagnostic

TESTS = Path(__file__).parents[1]
FOLDERS = ("../recipes", "recipe/good", "recipe/bad", "comfy/recipes", "e2e/recipes")
EXPECTED = {"sound", "refused", *(f"exit {int(code)}" for code in (ExitCode.USAGE, ExitCode.MISSING, ExitCode.REFUSED))}
LIMIT_SECONDS = 10.0  # of CPU: what is quick takes hundredths, what hangs takes for ever
LIMIT_BYTES = 200 << 20


def sources() -> dict[str, bytes]:
    """Return every recipe that ships or is tested, by its name."""
    found: dict[str, bytes] = {}
    for folder in FOLDERS:
        for path in sorted((TESTS / folder).glob("**/*.yaml")):
            found.setdefault(path.relative_to(TESTS / folder).as_posix(), path.read_bytes())
    return found


class Bench:
    """A folder with all sources, so that what extends another finds it, in which spoilt recipes are checked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe = folder / "spoilt.yaml"
        files = sources()
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        (folder / "prompt.txt").write_text("She speaks.\n", encoding="utf-8")
        (folder / "large.txt").write_text("She speaks. " * 10_000, encoding="utf-8")
        self.texts = [data.decode("utf-8", "replace") for data in files.values() if len(data) > 100]
        self.good = [text for text in self.texts if text.startswith("# yaml") and "kind: sample" in text]
        self.cache = folder / "cache"
        self.places = 0

    def spoil(self, chance: random.Random) -> tuple[bytes, api.Options]:
        """Return a recipe and options, one of them spoilt or both."""
        is_whole = chance.random() < 0.25
        text = chance.choice(self.good if is_whole or chance.random() < 0.6 else self.texts)
        data = text.encode() if is_whole else mutated(text, self.texts, chance)
        count = chance.choice((1, 1, 3)) if is_whole or chance.random() < 0.1 else 0
        changes = [override(chance) for _ in range(count)]
        kinds = ("set", "set-json", "set-file", "unset")
        return data, api.Options(
            profiles=[name for kind, text in changes if kind == "-p" for name in text.split(",")],
            axes=[text for kind, text in changes if kind == "-m"],
            overrides=[Override(kind, text) for kind, text in changes if kind in kinds],  # type: ignore[arg-type]
            override_files=[self.recipe] if chance.random() < 0.05 else [],
            cache_dir=self.cache,
            models_dirs=[self.folder / "none"],
            device="cpu",
        )

    def outcome(self, data: bytes, options: api.Options) -> str:
        """Check and plan a recipe, and read what `config` prints of it; say what came of it.

        Raises:
            AssertionError: What came of it must not be.
        """
        self.recipe.write_bytes(data)
        started = time.process_time()
        try:
            planned = api.plan(self.recipe, options)
        except RecipeError as error:
            result = self.refused(error, options)
        except S2VFlowError as error:
            result = f"exit {int(error.exit_code)}"
        else:
            text = config_text(planned.recipe)
            (self.folder / "again.yaml").write_text(text, encoding="utf-8")
            again = api.check(self.folder / "again.yaml")
            assert {name: spec.node for name, spec in again.nodes.items()} == {
                name: spec.node for name, spec in planned.recipe.nodes.items()
            }
            result = "sound"
        assert result in EXPECTED
        seconds = time.process_time() - started
        assert seconds < LIMIT_SECONDS, f"took {seconds:.2f} s"
        return result

    def refused(self, error: RecipeError, options: api.Options) -> str:
        assert error.diagnostics, "an error without a reason"
        for diagnostic in error.diagnostics:
            printed = format_diagnostic(diagnostic)
            assert all(character.isprintable() or character == "\n" for character in printed)
            self.check_place(diagnostic, options)
        return "refused"

    def check_place(self, diagnostic: Diagnostic, options: api.Options) -> None:
        """Hold a mistake's place against the text that it is in."""
        place = diagnostic.place
        assert place is not None, f"no place: {diagnostic}"
        self.places += 1
        given = {
            "-m": options.axes,
            "--profile": options.profiles,
            **{
                f"--{kind}": [change.text for change in options.overrides if change.kind == kind]
                for kind in ("set", "set-json", "set-file", "unset")
            },
        }
        if place.file in given:
            texts = given[place.file]
            text = texts[place.line - 1] if place.line <= len(texts) else diagnostic.excerpt or ""
            assert 1 <= place.column <= len(text) + 1, f"{place} is not in {text[:100]!r}"
            return
        path = Path(place.file) if Path(place.file).is_absolute() else self.folder / place.file
        assert path.exists() or place.line == place.column == 1, f"{place}: no such file"
        lines = _LINE_BREAK.split(path.read_bytes().decode("utf-8", "replace")) if path.is_file() else [""]
        assert 1 <= place.line <= len(lines), f"{place}: the file has {len(lines)} lines"
        assert 1 <= place.column <= len(lines[place.line - 1]) + 1, f"{place}: {lines[place.line - 1][:100]!r}"


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    (tmp_path / "bench").mkdir()
    monkeypatch.chdir(tmp_path / "bench")
    return Bench(tmp_path / "bench")


def fuzz(bench: Bench, count: int, seed: int) -> Counter[str]:
    """Check so many spoilt recipes; a failing one is kept beside the folder, and named."""
    outcomes: Counter[str] = Counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        chance = random.Random(f"{seed}:{number}")
        data, options = bench.spoil(chance)
        try:
            outcomes[bench.outcome(data, options)] += 1
        except Exception as error:
            kept = bench.folder.parent / f"failed-{seed}-{number}.yaml"
            kept.write_bytes(data)
            given = (options.overrides, options.axes, options.profiles, options.override_files)
            told = f"seed {seed}, recipe {number}: {error!r}; kept as {kept}; given: {given}"
            raise AssertionError(told[:4000]) from error
        shutil.rmtree(bench.cache, ignore_errors=True)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * 1024 < LIMIT_BYTES, f"memory grew by {grown >> 10} MB"
    return outcomes


def test_spoilt_recipes_are_refused_with_a_place_or_sound(bench: Bench) -> None:
    """80 of them: planned or refused within a second, every mistake at a place that is there."""
    outcomes = fuzz(bench, 80, seed=1)
    assert outcomes["refused"] > 40
    assert outcomes["sound"] > 1
    assert bench.places > 80


@pytest.mark.soak
def test_soak_recipes(bench: Bench) -> None:
    """S2VFLOW_SOAK_RECIPES spoilt recipes (10,000 unless told otherwise)."""
    count, seed = int(os.environ.get("S2VFLOW_SOAK_RECIPES", "10000")), int(time.time())
    started = time.monotonic()
    outcomes = fuzz(bench, count, seed)
    rate = count / (time.monotonic() - started)
    told = ", ".join(f"{number} {what}" for what, number in outcomes.most_common())
    sys.stdout.write(f"\nseed {seed}: {count} recipes, {told}; {bench.places} places checked, {rate:.0f} a second\n")
