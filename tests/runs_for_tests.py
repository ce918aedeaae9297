"""A quick run to look back at: three chunks of two latent frames, 20 frames of 64x64."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes_for_tests import call, tiny, write_recipe, write_voice

QUICK = tiny(talk={"chunks": 2, "seed": [1, 2]}, video={"preset": "ultrafast"})


@dataclass(frozen=True)
class Place:
    """A folder with a recipe and its voice, and the options that say where everything is."""

    folder: Path
    recipe: Path
    where: tuple[str, ...]

    @property
    def video(self) -> Path:
        return self.folder / "out" / "talk.mp4"

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    def call(self, command: str, *arguments: object) -> tuple[int, str, str]:
        return call(command, *arguments, "--cache-dir", self.cache)

    def run(self, *arguments: object) -> tuple[int, str, str]:
        return call("run", self.recipe, *self.where, *arguments)

    def manifests(self) -> list[Path]:
        return sorted(self.cache.glob("runs/*/manifest.json"), key=lambda path: path.stat().st_mtime_ns)


def place(folder: Path, models: Path, changes: Mapping[str, Any] = QUICK, **more: Any) -> Place:
    """Write a recipe that runs in about a second."""
    write_voice(folder / "voice.wav", 1.2)
    recipe = write_recipe(folder, changes, **more)
    where = ("--models-dir", str(models), "--cache-dir", str(folder / "cache"), "--device", "cpu")
    return Place(folder, recipe, where)


def copied(original: Place, folder: Path) -> Place:
    """Copy a recipe, its cache and its video: it has run there, too."""
    shutil.copytree(original.folder, folder, dirs_exist_ok=True)
    where = [str(folder / "cache") if part == str(original.cache) else part for part in original.where]
    return Place(folder, folder / original.recipe.name, tuple(where))


def copy_encoded(original: Path, cache: Path) -> None:
    """Copy what prompt, voice and portrait are encoded to into another cache: a run there begins to sample."""
    shutil.copytree(original / "objects", cache / "objects", dirs_exist_ok=True)
    for path in original.glob("entries/??/*.json"):
        if json.loads(path.read_text(encoding="utf-8"))["entry"]["preimage"]["kind"].startswith("encode_"):
            (cache / "entries" / path.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, cache / "entries" / path.parent.name)


def ran(folder: Path, models: Path, changes: Mapping[str, Any] = QUICK, **more: Any) -> Place:
    """Write a recipe and run it."""
    made = place(folder, models, changes, **more)
    code, _, err = made.run()
    assert code == 0, err
    return made
