"""batch.yaml: a batch that is written down before it is planned."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from s2v_flow.batch.rows import Row, read_rows
from s2v_flow.recipe.argument import Override
from s2v_flow.recipe.problems import Problems, collecting
from s2v_flow.recipe.reader import MAX_BYTES, read_file
from s2v_flow.recipe.tree import Origin, Tree, origins_of, plain

_MARK = re.compile(rb"^batch:", re.MULTILINE)
_CODES = {"extra_forbidden": "R010", "missing": "R015", "literal_error": "R014", "greater_than": "R013"}


class BatchFile(BaseModel):
    """What such a file says; the names are those of the command's options."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    batch: Literal[1]
    recipes: list[str] = Field(min_length=1)
    profiles: list[str] = []
    params: dict[str, Any] = {}
    set: dict[str, Any] = {}
    axes: dict[str, list[Any] | str | int | float] = {}
    jobs: str | list[dict[str, Any]] | None = None
    engine: Literal["local", "ray", "slurm"] = "local"
    address: str | None = None
    slurm: dict[str, Any] = {}
    workers: int | None = Field(None, gt=0)
    devices: list[str] | None = None
    retries: int = Field(1, ge=0)
    timeout: float | None = Field(None, gt=0)
    fail_fast: bool = False
    notify: str | None = None
    _folder: str = PrivateAttr("")  # where the file is: relative recipes and tables start there
    _lines: tuple[str, ...] = PrivateAttr(())  # where each of its own jobs is written

    def patterns(self) -> list[str]:
        """Return the recipes, from the current folder."""
        return [os.path.join(glob.escape(self._folder), name) for name in self.recipes]

    def overrides(self) -> list[Override]:
        """Return what it changes in every recipe."""
        changes = {**{f"params.{name}": value for name, value in self.params.items()}, **self.set}
        return [_override(path, value) for path, value in changes.items()]

    def axis_texts(self) -> list[str]:
        """Return its axes as -m takes them."""
        return [
            f"{path}={','.join(map(_json, values)) if isinstance(values, list) else values}"
            for path, values in self.axes.items()
        ]

    def rows(self) -> list[Row] | None:
        """Return its jobs, None where it has none.

        Raises:
            RecipeError: See `read_rows`.
        """
        if isinstance(self.jobs, str):
            return read_rows(Path(self._folder, self.jobs))
        if self.jobs is None:
            return None
        made = (tuple(_override(path, value) for path, value in job.items()) for job in self.jobs)
        return list(zip(self._lines, made, strict=True))


def is_batch_file(path: Path) -> bool:
    """Tell whether a file is a batch.yaml: it says `batch:` at the start of a line."""
    with suppress(OSError), path.open("rb") as file:
        return path.suffix.lower() in (".yaml", ".yml") and _MARK.search(file.read(MAX_BYTES)) is not None
    return False


def read_batch_file(path: Path) -> BatchFile:
    """Read and check a batch.yaml.

    Raises:
        RecipeError: With every mistake; exit code 3.
    """
    found: BatchFile | None = None
    with collecting(str(path)) as problems:
        tree = read_file(path, str(path), problems)
        origins = origins_of(tree)
        try:
            found = BatchFile.model_validate(plain(tree))
        except ValidationError as error:
            _collect(error, tree, origins, problems)
    assert found is not None, "a batch file is wrong, but nothing was said of it"
    count = len(found.jobs) if isinstance(found.jobs, list) else 0
    found._folder = os.path.dirname(path)
    found._lines = tuple(f"{path}:{origins['jobs', index].place.line}" for index in range(count))
    return found


def _collect(error: ValidationError, tree: Tree, origins: Mapping[Any, Origin], problems: Problems) -> None:
    keys = ", ".join(BatchFile.model_fields)
    for item in error.errors(include_url=False, include_input=False):
        where = item["loc"]
        while where not in origins:
            where = where[:-1]
        name = ".".join(map(str, item["loc"][: len(where) + 1]))
        is_unknown = item["type"] == "extra_forbidden"
        text = "unknown key" if is_unknown else item["msg"].replace("Input s", "s")
        fix = f"the keys are {keys}" if is_unknown or item["type"] == "missing" else None
        problems.add(_CODES.get(item["type"], "R012"), f"{name}: {text}", origins[where], fix=fix)


def _override(path: str, value: Any) -> Override:
    return Override("set-json", f"{path}={_json(value)}")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
