"""Tables of jobs: CSV, whose header names paths of `--set`, and JSON lines, each an object of paths and values."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

from s2v_flow.errors import RecipeError
from s2v_flow.recipe.argument import Override
from s2v_flow.wording import shown

MAX_FILE_BYTES = 64_000_000
MAX_JOBS = 100_000
Row = tuple[str, tuple[Override, ...]]  # where it is written ("jobs.csv:4"), and what it changes


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
        texts = {name: json.dumps(item, ensure_ascii=False) for name, item in value.items()}
        yield number, tuple(Override("set-json", f"{name}={text}") for name, text in texts.items())
