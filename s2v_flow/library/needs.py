"""Which model files a recipe needs, which of them are there, where ComfyUI keeps others, and how to get the rest.

Nothing is downloaded, and no server is asked anything, unless `download` is called.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, Literal

from s2v_flow.convert.release import RELEASE_FILES, RELEASE_FOLDER
from s2v_flow.demo import DEMO_FILES
from s2v_flow.errors import MissingError, RefusedError, S2VFlowError, UsageError
from s2v_flow.graph.locations import Locations, Missing, ModelFolder
from s2v_flow.graph.ports import FileField
from s2v_flow.library.downloads import RemoteFile, at_endpoint, check_space, fetch, look_up
from s2v_flow.recipe.load import Recipe
from s2v_flow.recipe.problems import Problems, StopReadingError
from s2v_flow.recipe.reader import read_file
from s2v_flow.recipe.tree import Entry, MapValue, Scalar, absolute_dir
from s2v_flow.weights.family import BELONGS, FAMILIES, detect_family
from s2v_flow.weights.header import convert_command
from s2v_flow.weights.reader import Checkpoint
from s2v_flow.wording import did_you_mean, path_slip, size_text

_WAN22 = "https://huggingface.co/Comfy-Org/Wan_2.2_ComfyUI_Repackaged/resolve/main/split_files"
_WAN21 = "https://huggingface.co/Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files"

HOMES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        name: (f"{repository}/{folder}/{name}",)
        for repository, folder, name in (
            (_WAN22, "diffusion_models", "wan2.2_s2v_14B_fp8_scaled.safetensors"),
            (_WAN22, "diffusion_models", "wan2.2_s2v_14B_bf16.safetensors"),
            (_WAN22, "audio_encoders", "wav2vec2_large_english_fp16.safetensors"),
            (_WAN22, "loras", "wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise.safetensors"),
            (_WAN21, "text_encoders", "umt5_xxl_fp8_e4m3fn_scaled.safetensors"),
            (_WAN21, "text_encoders", "umt5_xxl_fp16.safetensors"),
            (_WAN22, "vae", "wan_2.1_vae.safetensors"),
        )
    }
)


_MODEL_SUFFIXES = (".safetensors", ".gguf")
_SHORT = 5
_DEEPEST, _MANY = 3, 5000  # how far down, and among how many files, a name like a missing one is looked for
Progress = Callable[[str, int, int], None]  # file name, bytes that are there, bytes in all


@dataclass(frozen=True)
class ModelNeed:
    """A model file: its name in the recipe, its usual folder, and where it is (None: nowhere, see `looked_in`).

    "made" files are the demo's: this program makes them itself on first use, at `path`. `convert` is the command that
    makes a missing one of the authors' own file, where that is there.
    """

    file: str
    folder: str
    path: Path | None
    status: Literal["found", "made", "missing"]
    homes: tuple[str, ...] = ()
    looked_in: tuple[str, ...] = ()
    convert: str | None = None

    @property
    def size(self) -> int | None:
        """Bytes of the file that is there, else None."""
        return self.path.stat().st_size if self.path is not None and self.status == "found" else None

    def to_json(self) -> dict[str, Any]:
        """Return what `s2vflow models --json` prints of it."""
        return {
            "file": self.file,
            "folder": self.folder,
            "status": self.status,
            "path": None if self.path is None else str(self.path),
            "size_bytes": self.size,
            "homes": list(self.homes),
            "looked_in": list(self.looked_in),
            "convert": self.convert,
        }


def recipe_needs(recipe: Recipe, locations: Locations) -> list[ModelNeed]:
    """List the model files that a recipe names, in its order, each once."""
    found: dict[tuple[str, str], ModelNeed] = {}
    for spec in recipe.nodes.values():
        for path, mark, text in spec.node.files():
            if mark.role == "model" and (mark.folders[0], text) not in found:
                found[mark.folders[0], text] = _need(mark, text, spec.origin(path).base_dir, locations)
    return list(found.values())


def known_needs(homes: Mapping[str, Sequence[str]], locations: Locations) -> list[ModelNeed]:
    """List the model files whose homes are known, as if a recipe named them all."""
    marks = {name: FileField("model", "model", (PurePosixPath(urls[0]).parent.name,)) for name, urls in homes.items()}
    return [_need(mark, name, Path(), locations) for name, mark in marks.items()]


def _need(mark: FileField, text: str, base_dir: Path, locations: Locations) -> ModelNeed:
    folder = mark.folders[0]
    place = locations.find(mark, text, base_dir)
    if isinstance(place, Missing):
        command = _conversion(text, folder, locations) if place.homes else None
        return ModelNeed(text, folder, None, "missing", place.homes, place.looked_in, command)
    is_made = place == locations.made_models.get(text) and not place.is_file()
    return ModelNeed(text, folder, place, "made" if is_made else "found")


def _conversion(text: str, folder: str, locations: Locations) -> str | None:
    """Return the command that makes a well-known file of the authors' own, if that stands in a models folder.

    Their files are not in fp8, and none is made: the command makes a file of another name instead, in bfloat16.
    """
    name = re.sub(r"_fp8\w*", "_bf16", PurePosixPath(text).name)
    dtype = next((dtype for dtype in ("bf16", "fp16") if f"_{dtype}" in name), "keep")
    for root in locations.models_dirs:
        for place in (root / folder, root, root / RELEASE_FOLDER):
            for source in (place / file for file in RELEASE_FILES.get(folder, ())):
                if source.is_file():
                    return convert_command(
                        source, root / folder / name, *([] if dtype == "keep" else ["--dtype", dtype])
                    )
    return None


def near_files(file: str, kind: str, looked_in: Sequence[str]) -> tuple[list[str], bool]:
    """Return up to three files that a missing one may be and True, or else five of those that its folders hold.

    Those of its very name may lie in folders for other kinds of models too; then where they belong is said. `kind` is
    the usual folder of a model, or what an input is.
    """
    folders = [Path(folder) for folder in looked_in]
    roots = [folder.parent for folder in folders if folder.name == kind]  # all kinds of models: it may lie among others
    wanted = PurePosixPath(file.replace("\\", "/").lower())
    there: dict[str, Path] = {}
    for path in itertools.islice(_walk(roots or folders, _DEEPEST if roots else 0), _MANY):
        if path.suffix.lower() in (wanted.suffix, *_MODEL_SUFFIXES * bool(roots)) or path.stem.lower() == wanted.stem:
            there.setdefault(path.name.lower(), path)
    own = {name: path for name, path in there.items() if any(path.is_relative_to(folder) for folder in folders)}
    stems = {PurePosixPath(name).stem: name for name in own}
    like = [stems[stem] for stem in difflib.get_close_matches(wanted.stem, stems, n=3)]
    near = [wanted.name] if wanted.name in there else like
    chosen = [there[name] for name in near or sorted(own)[:_SHORT]]
    ours = (PurePosixPath(name).stem for name in DEMO_FILES if name.startswith(f"{kind}/{wanted.stem[:4]}"))
    if not near and (made := difflib.get_close_matches(wanted.stem, ours, n=1)):
        return [f"{made[0]}.safetensors, which this program makes"], True
    texts = [
        f"{path.name} ({size_text(path.stat().st_size)}) in {path.parent}{_other_place(path, kind) if roots else ''}"
        for path in chosen
        if path.is_file()
    ]
    return texts, bool(near)


def obstacles(file: str, looked_in: Sequence[str]) -> list[str]:
    """Say what is wrong with a missing file's name, what has it and is none, which folders may not be looked into."""
    found = list(filter(None, [path_slip(file)]))
    for folder in looked_in:
        path = os.path.join(folder, PurePosixPath(file).name)
        if os.path.isdir(folder) and not os.access(folder, os.X_OK):
            found.append(f"{folder} may not be looked into: check its permissions")
        elif os.path.isdir(path):
            found.append(f"{path} is a folder: name a file in it")
        elif os.path.lexists(path):
            found.append(f"{path} is {'a link that leads nowhere' if os.path.islink(path) else 'no regular file'}")
    return found


def _other_place(path: Path, kind: str) -> str:
    """Say where a model belongs that is not of the kind that was looked for."""
    try:
        family = detect_family(Checkpoint.open(path).shapes)
    except S2VFlowError:
        return ""
    if family not in BELONGS or family == FAMILIES.get(kind):
        return ""
    return f": it is a {family} file and belongs in {BELONGS[family]}"


def misnamed(homes: Sequence[str], kind: str) -> str | None:
    """Say where a missing model belongs whose name is that of a well-known file of another kind."""
    others = {FAMILIES.get(PurePosixPath(home).parent.name, "") for home in homes} - {"", FAMILIES.get(kind)}
    return next((f"this is the name of a {one} file, which belongs in {BELONGS[one]}" for one in others), None)


def help_lines(file: str, kind: str, homes: Sequence[str], looked_in: Sequence[str]) -> list[str]:
    """Return what there is to say of a missing file: which ones may be it, and where it can be had or belongs."""
    there, are_like = near_files(file, kind, looked_in)
    near = [f"{'near' if are_like else 'there'}: {text}" for text in there]
    other = misnamed(homes, kind)
    return [*obstacles(file, looked_in), *near, *([other] if other else [f"can be had at {home}" for home in homes])]


def meant_instead(file: str, kind: str, looked_in: Sequence[str]) -> str | None:
    """Return the advice on a missing file: what is wrong with its name, or which ones it may be."""
    if slips := obstacles(file, looked_in):
        return slips[0]
    near, are_like = near_files(file, kind, looked_in)
    return f"is it {' or '.join(near)}?" if near and are_like else None


def _walk(roots: Iterable[Path], depth: int) -> Iterator[Path]:
    for root in dict.fromkeys(roots):
        for folder, below, names in os.walk(root):
            if len(Path(folder).relative_to(root).parts) >= depth:
                below.clear()
            yield from (Path(folder, name) for name in sorted(names))


def choose(needs: Sequence[ModelNeed], names: Sequence[str]) -> list[ModelNeed]:
    """Return the needs of these file names; all of them where no names are given.

    Raises:
        S2VFlowError: A name is none of theirs.
    """
    known = [need.file for need in needs]
    for name in names:
        if name not in known:
            fix = did_you_mean(name, known, "models") or "the recipe names no models"
            raise UsageError(f"--only: there is no model {name!r}", fix)
    return [need for need in needs if not names or need.file in names]


def needs_text(needs: Sequence[ModelNeed]) -> str:
    """Return the list for people: a line each, and for what is missing where it was looked for and can be had."""
    if not needs:
        return "no models"
    name_width = max(len(need.file) for need in needs)
    folder_width = max(len(need.folder) for need in needs)
    lines = []
    for need in needs:
        where = str(need.path) if need.status == "found" else ""
        if need.status == "made":
            where = "by this program, on first use"
        size = "" if need.size is None else size_text(need.size)
        row = f"{need.status:<7}  {need.folder:<{folder_width}}  {need.file:<{name_width}}  {size:>9}  {where}"
        lines.append(row.rstrip())
        if need.status == "missing":
            lines.append(f"         looked for in {', '.join(need.looked_in)}")
            texts = help_lines(need.file, need.folder, need.homes, need.looked_in)
            lines += [f"         {text}" for text in texts]
            how = " in bfloat16, to be named in the recipe instead," if "_fp8" in need.file else ""
            lines += [f"         can be made{how} by {need.convert}"] if need.convert else []
    count = sum(need.status == "missing" for need in needs)
    lines.append(f"{len(needs) - count} of {len(needs)} are there" + (f", {count} missing" if count else ""))
    return "\n".join(lines)


def target_path(need: ModelNeed, models_dir: Path) -> Path:
    """Return where a downloaded file goes: into its folder of a models folder, and nowhere else.

    Raises:
        RefusedError: Its name leads out of that folder.
    """
    folder = models_dir / need.folder
    target = folder / need.file
    if not target.resolve().is_relative_to(folder.resolve()):
        raise RefusedError(
            f"the recipe names a model outside the models folder: {need.file}",
            fix="name it by its file name, and put it into the models folder",
        )
    return target


def download(needs: Sequence[ModelNeed], models_dir: Path, on_progress: Progress) -> list[Path]:
    """Download the missing ones of these files from their homes, once all are found there; return where they are now.

    Raises:
        MissingError: A file has no known home; nothing was downloaded.
        RefusedError: A name leads out of the folder, or what came is not what was promised.
        S2VFlowError: The network or the disk failed; what came is kept.
    """
    missing = [need for need in needs if need.status == "missing"]
    homeless = [need.file for need in missing if not need.homes or misnamed(need.homes, need.folder)]
    if homeless:
        raise MissingError(
            f"nothing was downloaded: no home is known of {', '.join(homeless)}",
            fix="put them into the models folder yourself, or choose others with --only",
        )
    targets = [target_path(need, models_dir) for need in missing]
    remotes = [look_up(at_endpoint(need.homes[0])) for need in missing]
    files: list[tuple[RemoteFile, Path]] = list(zip(remotes, targets, strict=True))
    check_space(files)
    for remote, target in files:
        fetch(remote, target, partial(on_progress, target.name))
    return targets


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
    """Read extra_model_paths.yaml files: the folders, whether they are there or not.

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
