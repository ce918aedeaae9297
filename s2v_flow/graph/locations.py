"""Where files are looked for, and where results may be written."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from s2v_flow.errors import RefusedError
from s2v_flow.graph.ports import FileField


@dataclass(frozen=True)
class Missing:
    """A file that is needed and was not found: its name, what it is, where it can be had, where it was looked for."""

    file: str
    kind: str
    homes: tuple[str, ...] = ()
    looked_in: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelFolder:
    """One more folder with models of a kind, "vae" or "loras"; `is_default`: searched before the models folders."""

    kind: str
    path: Path
    is_default: bool = False


@dataclass(frozen=True)
class Locations:
    """The folders of one run.

    `models_dirs` have ComfyUI's layout; `model_folders` are single folders beside them; `input_dirs` are searched after
    the folder of the file that wrote a path; relative outputs go to `output_dir` where it is given; `homes` knows where
    well-known model files can be had; `made_models` maps names of models that this program makes itself on first use to
    where they will stand; `output_file` is where the only output goes, whatever the recipe says; `output_tag` stands
    before the suffix of outputs' names, so that a matrix's cells do not overwrite each other.
    """

    models_dirs: Sequence[Path] = ()
    model_folders: Sequence[ModelFolder] = ()
    input_dirs: Sequence[Path] = ()
    output_dir: Path | None = None
    cache_dir: Path = Path("cache")
    homes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    made_models: Mapping[str, Path] = field(default_factory=dict)
    output_tag: str = ""
    output_file: Path | None = None

    def find(self, mark: FileField, text: str, base_dir: Path) -> Path | Missing:
        """Find a model or an input: the file's path, or what is missing.

        `base_dir`: the folder of the file that says it.
        """
        name = Path(os.path.expanduser(text))
        if mark.role == "model":
            folders = [folder for folder in self.model_folders if folder.kind in mark.folders]
            candidates = [folder.path / name for folder in folders if folder.is_default]
            candidates += [root / folder / name for root in self.models_dirs for folder in mark.folders]
            candidates += [folder.path / name for folder in folders if not folder.is_default]
            made = self.made_models.get(text)
            candidates += [made] if made is not None and made.parent.name in mark.folders else []
        else:
            candidates = [base_dir / name, *(root / name for root in self.input_dirs)]
        for candidate in dict.fromkeys(candidates):
            # isfile: what cannot even be looked at (a name too long, a forbidden folder) is not there
            if os.path.isfile(candidate) or candidate == self.made_models.get(text):
                return candidate
        kind = mark.folders[0] if mark.role == "model" else mark.what
        looked_in = tuple(dict.fromkeys(str(candidate.parent) for candidate in candidates))
        return Missing(text, kind, tuple(self.homes.get(name.name, ())), looked_in)

    def output(self, text: str, base_dir: Path, *, typed_by_user: bool) -> Path:
        """Return where to write a result; `base_dir`: the folder of the file that says it.

        `typed_by_user`: whether it was given on the command line, where any path is the user's own choice.

        Raises:
            RefusedError: The path leaves the folders in which a recipe may write.
        """
        root = self.output_dir if self.output_dir is not None else base_dir
        if self.output_file is not None:
            root, text, typed_by_user = Path(), str(self.output_file), True
        if self.output_tag:
            text = str(Path(text).with_suffix(f".{self.output_tag}{Path(text).suffix}"))
        named = Path(os.path.abspath(root / os.path.expanduser(text)))
        target = Path(os.path.realpath(named))
        if typed_by_user or target.is_relative_to(os.path.realpath(root)):
            links = filter(os.path.islink, named.parents)
            is_lost = any(not os.path.lexists(os.path.realpath(link)) for link in links)
            is_lost = is_lost or (os.path.islink(named) and not target.parent.is_dir())
            return named if is_lost else target  # what a link stands for, such as a disk, is never made
        fix = f"use a path inside {root}, or say --output-dir {target.parent}"
        raise RefusedError(f"the recipe wants to write outside its folder: {text} is {target}", fix)
