"""What a batch's jobs are written in: a table, CSV or JSON lines, or batch.yaml, a whole batch.

A CSV's header names paths of `--set`; each of the JSON lines is an object of paths and values.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from s2v_flow.errors import Origin, RecipeError
from s2v_flow.recipe.argument import Override
from s2v_flow.recipe.problems import Problems, collecting
from s2v_flow.recipe.reader import MAX_BYTES, read_file
from s2v_flow.recipe.tree import Tree, origins_of, plain
from s2v_flow.wording import shown

MAX_FILE_BYTES = 64_000_000
MAX_JOBS = 100_000
Row = tuple[str, tuple[Override, ...]]  # where it is written ("jobs.csv:4"), and what it changes
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


def read_rows(path: Path) -> list[Row]:
    """Read a table of jobs. An empty cell of a CSV changes nothing; JSON's values keep their types.

    Raises:
        RecipeError: It cannot be read, is no such table, or has no rows; exit code 3.
    """
    readers = {".csv": _csv, ".jsonl": _json_lines}
    if path.suffix.lower() not in readers:
        raise RecipeError(f"{path}: a table of jobs is a .csv or a .jsonl file", fix="rename it, or write one")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}", fix="check --jobs") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: byte {error.start} is not UTF-8", fix="save it as UTF-8") from error
    if len(content) > MAX_FILE_BYTES:
        raise RecipeError(f"{path}: larger than {MAX_FILE_BYTES // 1_000_000} MB", fix="split it")
    rows = []
    for line, overrides in readers[path.suffix.lower()](path, text):
        rows.append((f"{path}:{line}", overrides))
        if len(rows) > MAX_JOBS:
            raise RecipeError(f"{path}: more than {MAX_JOBS} jobs", fix="split it")
    if not rows:
        raise RecipeError(f"{path}: there are no jobs in it", fix="write a row for each job")
    return rows


def _csv(path: Path, text: str) -> Iterator[tuple[int, tuple[Override, ...]]]:
    first = text.partition("\n")[0]
    delimiter = ";" if ";" in first and "," not in first else ","  # where the comma stands in numbers
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    try:
        for cells in reader:
            if not any(cells):
                continue
            if not header:
                header = [cell.strip() for cell in cells]
                if "" in header or len(set(header)) < len(header):
                    fix = "each cell of the first row is a path of --set, such as seed or nodes.video.file"
                    raise RecipeError(f"{path}:1: a cell of the header is empty or given twice", fix)
            elif len(cells) != len(header):
                fix = 'quote a value that has a comma in it: "Hello, you"'
                raise RecipeError(f"{path}:{reader.line_num}: {len(cells)} cells, the header has {len(header)}", fix)
            else:
                pairs = zip(header, cells, strict=True)
                yield reader.line_num, tuple(Override("set", f"{name}={value}") for name, value in pairs if value)
    except csv.Error as error:
        raise RecipeError(f"{path}:{reader.line_num}: this is not CSV: {error}", fix="check the quotes") from error


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, tuple[Override, ...]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"{path}:{number}: this is not JSON: {error}", fix='write {"seed": 1}') from error
        if not isinstance(value, dict):
            raise RecipeError(f"{path}:{number}: expected an object, got {shown(value)}", fix='write {"seed": 1}')
        yield number, tuple(_override(name, item) for name, item in value.items())


def _override(path: str, value: Any) -> Override:
    return Override("set-json", f"{path}={_json(value)}")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
