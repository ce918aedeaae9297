"""Finding runs: by id, by the beginning of one, by a manifest's path, or by what a video says of itself."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from s2v_flow.cache.housekeeping import is_running
from s2v_flow.errors import MissingError, UsageError
from s2v_flow.runs.essence import read_essence
from s2v_flow.runs.manifest import Essence, Manifest, from_text
from s2v_flow.runs.record import RUN_ID
from s2v_flow.wording import did_you_mean

LAST = "last"
_NAME = "manifest.json"
_MAX_BYTES = 64 << 20
_MAX_NAMED = 10  # runs that a message names


@dataclass(frozen=True)
class Listing:
    """The runs that left a sound manifest, the newest first, and what to say of the others."""

    runs: tuple[Manifest, ...]
    notes: tuple[str, ...]


def list_runs(root: Path) -> Listing:
    """Return every run that is kept; `root`: the folder with a folder for every run; it need not be there."""
    runs, notes = [], []
    for path in _manifests(root).values():
        try:
            runs.append(read_manifest(path))
        except MissingError as error:
            notes.append(error.message)
    return Listing(tuple(runs), tuple(notes))


def run_ids(root: Path) -> list[str]:
    """Return the ids of the runs that are kept, the newest first."""
    return list(_manifests(root))


def forget_runs(root: Path, keep: int, *, is_dry: bool = False) -> list[str]:
    """Remove the manifests of all runs but the last `keep`, sound or not; return the ids of those that go.

    `root`: the folder with a folder for every run; it need not be there. Folders in it that are no runs' stay.
    """
    runs = [name for name in _manifests(root) if RUN_ID.fullmatch(name)][keep:]
    if is_dry:
        return runs
    gone = []
    for folder in (root / name for name in runs):
        with suppress(OSError):  # it cannot be removed
            (folder / _NAME).unlink(missing_ok=True)  # another process may have been first
            gone.append(folder.name)
            for picture in folder.glob("*.jpg"):  # its previews
                picture.unlink()
            folder.rmdir()
    return gone


def find(root: Path, text: str) -> Manifest | Essence:
    """Return the manifest of a run, or what a video says of itself.

    `text`: A run's id or the beginning of one, "last", a manifest's path, or an mp4's.

    Raises:
        S2VFlowError: There is no such run.
        MissingError: The manifest, or the video, cannot be read.
    """
    path = Path(text)
    if os.path.isfile(path / _NAME):
        path = path / _NAME
    if os.path.isfile(path):  # what cannot even be looked at, such as a name too long, is none
        return read_manifest(path) if path.suffix == ".json" else read_essence(path)
    return read_manifest(_find_path(root, text))


def read_manifest(path: Path) -> Manifest:
    """Read a manifest. One that says "running" of a run that lives no more says "killed" here.

    Raises:
        MissingError: It cannot be read, or is damaged, or of another version.
    """
    found = _stored(path)
    root = path.absolute().parent.parent.parent
    if found.status == "running" and not is_running(root, found.id):
        found = _stored(path)  # it may have ended just now
        found = found.model_copy(update={"status": "killed"}) if found.status == "running" else found
    return found


def _stored(path: Path) -> Manifest:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise MissingError(f"{path}: cannot be read: {error.strerror}", "check its permissions") from error
    try:
        return from_text(Manifest, content)
    except (ValueError, RecursionError) as error:
        raise MissingError(f"{path}: is damaged, or of another version of s2vflow") from error


def _find_path(root: Path, text: str) -> Path:
    known = _manifests(root)
    if text == LAST and known:
        return next(iter(known.values()))
    found = [text] if text in known else [name for name in known if text and name.startswith(text)]
    if len(found) == 1:
        return known[found[0]]
    if found:
        raise UsageError(f"{len(found)} runs begin with {text}", f"say more of it: {', '.join(found[:_MAX_NAMED])}")
    near = did_you_mean(text, list(known)[:_MAX_NAMED], "the last runs")
    fix = near or "no run has been kept yet; is it another --cache-dir?"
    raise UsageError(f"there is no run {text!r}, and no such file", fix)


def _manifests(root: Path) -> dict[str, Path]:
    """Return the manifests by run, the newest first: ids begin with the time. Reading one tells why it cannot be."""
    try:
        names = os.listdir(root)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise MissingError(f"{root}: cannot be read: {error.strerror}", "check its permissions") from error
    paths = {name: root / name / _NAME for name in sorted(names, reverse=True)}
    return {name: path for name, path in paths.items() if _may_be_there(path)}


def _may_be_there(path: Path) -> bool:
    try:
        os.stat(path)
    except OSError as error:
        return not isinstance(error, (FileNotFoundError, NotADirectoryError))
    return True
