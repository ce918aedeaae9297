"""ComfyUI's extra_model_paths.yaml: more folders in which models are looked for.

Each top-level section has an optional `base_path`, an optional `is_default`, and a line per kind of model (`vae`,
`loras`, `unet`, ...) with a path, or several on lines of their own. Relative paths start at `base_path`, and that at
the file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from s2v_flow.graph.locations import ModelFolder
from s2v_flow.recipe.problems import Problems, StopReadingError
from s2v_flow.recipe.reader import read_file
from s2v_flow.recipe.tree import Entry, MapValue, Scalar, absolute_dir

KINDS = ("diffusion_models", "unet", "text_encoders", "clip", "audio_encoders", "vae", "loras", "checkpoints")
FILE_NAME = "extra_model_paths.yaml"
_TRUE = frozenset({"true", "yes", "on", "1"})  # ComfyUI reads YAML 1.1


def models_folder(folder: Path) -> Path:
    """Return where a folder has its models: in its `models` if it is ComfyUI's own, else in itself."""
    is_one = any((folder / kind).is_dir() for kind in KINDS)
    return folder / "models" if not is_one and (folder / "models").is_dir() else folder


def find_extra_models(models_dirs: Sequence[Path]) -> list[Path]:
    """Return the extra_model_paths.yaml files beside models folders, where ComfyUI has them."""
    beside = dict.fromkeys(folder.absolute().parent / FILE_NAME for folder in models_dirs if folder.is_dir())
    return [path for path in beside if path.is_file()]


def read_extra_models(files: Sequence[Path]) -> tuple[ModelFolder, ...]:
    """Read extra_model_paths.yaml files.

    Args:
        files: The files, the most important first.

    Returns:
        The folders, whether they are there or not.

    Raises:
        RecipeError: With every mistake in the files.
    """
    problems = Problems()
    folders: list[ModelFolder] = []
    for path in files:
        try:
            tree = read_file(path, str(path), problems)
        except StopReadingError:
            continue
        if isinstance(tree, MapValue):
            for entry in tree.entries.values():
                folders += _section(entry, absolute_dir(path), problems)
        elif not (isinstance(tree, Scalar) and tree.value is None):
            problems.add("R012", f"{FILE_NAME} is a map of sections", tree.origin, fix="see ComfyUI's example file")
    problems.raise_any(", ".join(map(str, files)))
    return tuple(folders)


def _section(entry: Entry, root: Path, problems: Problems) -> Iterator[ModelFolder]:
    section = entry.value
    if isinstance(section, Scalar) and section.value is None:
        return
    if not isinstance(section, MapValue):
        problems.add("R012", "a section is a map with base_path and folders", section.origin)
        return
    base = root
    given = section.get("base_path")
    if isinstance(given, Scalar) and isinstance(given.value, str):
        base = root / _expanded(given.value)
    elif given is not None:
        problems.add("R012", "base_path: expected a folder", given.origin)
    flag = section.get("is_default")
    is_default = isinstance(flag, Scalar) and str(flag.value).lower() in _TRUE
    for kind, item in section.entries.items():
        if kind in ("base_path", "is_default"):
            continue
        value = item.value
        if not isinstance(value, Scalar) or not isinstance(value.value, (str, type(None))):
            problems.add("R012", f"{kind}: expected a folder, or several on lines of their own", value.origin)
            continue
        for line in filter(None, map(str.strip, (value.value or "").splitlines())):
            yield ModelFolder(kind, base / _expanded(line), is_default)


def _expanded(text: str) -> str:
    return os.path.expandvars(os.path.expanduser(text))
