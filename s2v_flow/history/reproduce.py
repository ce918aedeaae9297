"""Making a video again from what it says of itself, naming what is not the same; and writing a recipe's lock."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from s2v_flow import api
from s2v_flow.api import Options, plan, require_files
from s2v_flow.cache.store import Entry
from s2v_flow.demo import demo_root
from s2v_flow.errors import MediaError, MissingError
from s2v_flow.files.atomic import make_root, temporary_prefix, writing
from s2v_flow.graph.events import Listener, ignore
from s2v_flow.graph.run import RunResult
from s2v_flow.graph.status import Selection
from s2v_flow.machine import device_class
from s2v_flow.recipe.argument import Override
from s2v_flow.runs.environment import FileDigests
from s2v_flow.runs.essence import changed_files, likely_folders, read_essence
from s2v_flow.runs.lockfile import lock_path, lock_text, read_lock
from s2v_flow.runs.manifest import Essence
from s2v_flow.runs.values import files_of


@dataclass(frozen=True)
class Reproduction:
    """Whether a video's frames came out the same, and what differs, the likeliest reason first.

    `was_run` is false where a model or an input differs: then nothing was computed. `output` is the new video, where it
    was to be kept.
    """

    video: str
    is_same: bool
    was_run: bool
    differences: tuple[str, ...]
    output: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the object that `s2vflow reproduce --json` prints."""
        output = None if self.output is None else str(self.output)
        found = {"video": self.video, "same": self.is_same, "was_run": self.was_run}
        return {**found, "differences": list(self.differences), "output": output}

    def to_text(self) -> str:
        """Return the lines that `s2vflow reproduce` prints."""
        if self.is_same:
            head = f"{self.video}: the same frames"
        elif self.was_run:
            head = f"{self.video}: other frames"
        else:
            head = f"{self.video}: cannot be made again: nothing was run"
        return "\n".join([head, *(f"  differs: {text}" for text in self.differences)])


def reproduce(
    video: Path, options: api.Options, *, output_dir: Path | None = None, on_event: Listener = ignore
) -> Reproduction:
    """Make a video again, everything computed anew in a temporary cache, and compare the frames.

    Inputs are also looked for where the recipe stood if the video has not been moved, beside the video, and in the
    current folder. The new video is dropped unless `output_dir` is given.

    Raises:
        MediaError: The video does not say how it was made, or not which frames it had.
        MissingError: A model or an input is missing.
        S2VFlowError: A node failed.
    """
    essence = read_essence(video)
    if essence.frames_sha256 is None:
        raise MediaError(f"{video} does not say which frames it had", fix="it was written by an older version")
    with writing(options.cache_root):
        make_root(options.cache_root)
        (options.cache_root / "tmp").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=temporary_prefix(), dir=options.cache_root / "tmp") as name:
        folder = Path(name)
        recipe = folder / "recipe.yaml"
        recipe.write_text(essence.recipe, encoding="utf-8", errors="surrogatepass")
        target = video.name if video.suffix == ".mp4" else f"{video.name}.mp4"
        fresh = replace(
            options,
            overrides=[Override("set", f"nodes.{essence.node}.file={target}")],
            models_dirs=[*options.locations.models_dirs, demo_root(options.cache_root)],
            input_dirs=[*options.input_dirs, *likely_folders(video, api.check(recipe), essence.node)],
            output_dir=output_dir if output_dir is not None else folder / "out",
            cache_dir=folder / "cache",
            selection=Selection(is_fresh=True),
        )
        (folder / "cache").mkdir()
        with suppress(OSError):  # what is known of large files' digests
            shutil.copyfile(options.cache_root / "digests.json", folder / "cache" / "digests.json")
        planned = api.plan(recipe, fresh)
        api.require_files(planned)
        digests = FileDigests(folder / "cache" / "digests.json")

        def digest(file: Path) -> str | None:
            return digests(file) if file.is_file() else None  # the demo's models may not have been made yet

        differences = tuple(
            f"{was.role} {was.name} ({was.at}): expected sha256 {was.sha256}, got {now.sha256}"
            for was, now in changed_files(essence, planned.plan, digest)
        )
        if differences:
            return Reproduction(str(video), is_same=False, was_run=False, differences=differences)
        result = api.run_planned(planned, fresh, on_event)
        return _judged(video, essence, planned, result, output_dir)


def _judged(
    video: Path, essence: Essence, planned: api.Planned, result: RunResult, output_dir: Path | None
) -> Reproduction:
    frames_sha256 = result.entries[essence.node].facts.get("frames_sha256")
    is_same = frames_sha256 == essence.frames_sha256
    differences = []
    for name, versions in essence.software.items():
        now = sorted({str(entry.facts[name]) for entry in result.entries.values() if entry.facts.get(name)})
        if now != versions:
            differences.append(f"{name}: made with {', '.join(versions)}, this is {', '.join(now)}")
    device = device_class(planned.device)
    if device != essence.device:
        differences.append(f"device: made on {essence.device}, this is {device}")
    if not is_same:
        differences.append(_first_other(essence, result.entries))
    output = result.outputs[essence.node][0] if output_dir is not None else None
    return Reproduction(str(video), is_same, was_run=True, differences=tuple(differences), output=output)


def _first_other(essence: Essence, entries: Mapping[str, Entry]) -> str:
    """Say which stored result is the first that came out otherwise."""
    for name, was in essence.nodes.items():
        outputs = entries[name].output_digests() if name in entries else {}
        for port, sha256 in was.outputs.items():
            if outputs.get(port) != sha256:
                return f"{name}: its {port} is the first result that differs"
    return "the frames, but no stored result before them"


def make_lock(recipe: Path, options: Options) -> str:
    """Return the text of a recipe's lock: the digests of its models and inputs.

    With profiles or overrides, what the lock beside the recipe says of other files stays: one lock can hold several
    profiles' files.

    Raises:
        RecipeError: The recipe, or the lock that is there, is wrong.
        MissingError: A model or an input is missing.
    """
    planned = plan(recipe, options)
    require_files(planned)
    files = list(files_of(planned.plan.nodes))
    for item in files:
        if not item.file.is_file():
            raise MissingError(f"{item.name} has not been made yet", fix=f"`s2vflow run {recipe}` makes it, once")
    kept = read_lock(lock_path(recipe)) if options.changes else {}
    digests = FileDigests(options.cache_root / "digests.json")
    with digests.hashing(item.file for item in files):
        return lock_text(planned.recipe, planned.plan, digests, kept=kept)
