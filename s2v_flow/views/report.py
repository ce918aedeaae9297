"""A run, a video or a comparison as one HTML file that needs no network: `write_report`."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

from s2v_flow.api import Options
from s2v_flow.cache.store import Store, StoredObject
from s2v_flow.errors import MissingError, RecipeError, UsageError
from s2v_flow.files.atomic import write_whole, writing
from s2v_flow.history.compare import compare
from s2v_flow.history.find import find, list_runs
from s2v_flow.history.side import side
from s2v_flow.runs.essence import essence_in
from s2v_flow.runs.manifest import Essence, Manifest, OutputRecord
from s2v_flow.runs.record import runs_root
from s2v_flow.version import __version__
from s2v_flow.views import film
from s2v_flow.views.film import Film, film_of, poster_of, proxy_of
from s2v_flow.wording import duration_text, size_text

VIDEOS = (".mp4", ".mov", ".mkv", ".webm")
MAX_BYTES = 10 * 10**6  # of a page
_EMBEDDED_BYTES = 6 * 10**6  # of video in it, before base64
_MARK = b'<meta name="generator" content="s2vflow report'
_SHORT = 12  # digits of a commit
_MAX_TIMELINES = 4  # videos that are shown with all their curves


def require_jinja() -> None:
    """Refuse to go on without the package that fills the page in.

    Raises:
        MissingError: It is not installed.
    """
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        raise MissingError("a report needs the package jinja2", "pip install 's2vflow[report]'") from error


def write_report(
    subject: str,
    target: Path,
    options: Options | None = None,
    *,
    against: str | None = None,
    embed: bool = False,
    videos: Mapping[str, Path] | None = None,
) -> Path:
    """Write a report, one HTML file of less than 10 MB, its videos linked where they lie; return the page's path.

    Args:
        subject: A video's path, a run's id or the beginning of one, or "last".
        target: The page. Another report there is replaced, any other file is not.
        options: The cache folder, with the runs.
        against: Compare with this one: the same.
        embed: Put small copies of the videos inside, as far as they fit.
        videos: Where the run's videos are, by plan node; else they are looked for, and where they are gone, copied out
            of the cache beside the page.

    Raises:
        MissingError: There is no such run or file, a video is neither there nor in the cache, or jinja2 is not
            installed.
        S2VFlowError: Another file stands under the page's name, or it cannot be written.
    """
    require_jinja()
    options = options or Options()
    _refuse_other(target)
    sources = _Sources(options, target, dict(videos or {}))
    content = sources.subject(subject) if against is None else sources.comparison(subject, against)
    text = _rendered({**content, "films": list(_sourced(content["films"], target, embed=embed))})
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, text.encode(errors="backslashreplace"))  # a file's name may be no UTF-8
    return target


def _refuse_other(target: Path) -> None:
    with suppress(FileNotFoundError, IsADirectoryError), target.open("rb") as file:
        if _MARK not in file.read(4096):
            raise UsageError(f"{target} is there already, and is no report", "name another file with -o")


@dataclass
class _Sources:
    """Finds what a report shows."""

    options: Options
    target: Path
    known: dict[str, Path]

    def subject(self, text: str) -> dict[str, Any]:
        """Return the page of a run or a video."""
        found, paths = self._find(text)
        if not isinstance(found, Manifest):
            shown = film_of(paths[""], paths[""].name)
            values: dict[str, Any] = {}
            with suppress(RecipeError):  # of another version, or with kinds that are not installed here
                values = dict(side(text, self.options).values) if found is not None else {}
            return _page([shown], values, found, title=shown.label, facts=_video_facts(found, shown))
        quality: dict[str, Any] = dict(found.quality or {})
        known = quality.get("videos") or dict.fromkeys(paths, quality or None)
        make = poster_of if found.cells or len(paths) > _MAX_TIMELINES else film_of
        films = [replace(make(path, path.name, known.get(name)), cell=cell_of(name)) for name, path in paths.items()]
        title = Path(found.recipe.path).stem if len(films) > 1 else films[0].label
        changes = film.changes_of(found, list_runs(runs_root(self.options.cache_root)).runs)
        more = {"title": title, "facts": _run_facts(found, films), "changes": changes, "axes": _axes(films)}
        return _page(films, found.recipe.values, found, **more)

    def comparison(self, one: str, other: str) -> dict[str, Any]:
        """Return the page of two."""
        compared = compare(one, other, self.options)
        paths = [next(iter(self._find(text)[1].values())) for text in (one, other)]
        films = [film_of(path, f"{letter}: {path.name}") for letter, path in zip("AB", paths, strict=True)]
        rows = list(film.rows_of(compared.differences))
        times = [(item.name, duration_text(item.a), duration_text(item.b)) for item in compared.times]
        measures = [line for line in compared.to_text().splitlines() if line.startswith(("latent: ", "video: "))]
        same = "Nothing differs." if compared.is_same else f"{len(rows)} values, models or inputs differ."
        facts = [("A", compared.a), ("B", compared.b), ("Result", same)]
        found = {"rows": rows, "times": times, "measures": measures}
        is_pair = films[0].size == films[1].size
        return _page(films, {}, None, title="A and B", facts=facts, compared=found, is_pair=is_pair)

    def _find(self, text: str) -> tuple[Manifest | Essence | None, dict[str, Path]]:
        """Return a run or what a video says of itself, and the videos by plan node."""
        path = Path(text)
        if os.path.isfile(path) and path.suffix != ".json":
            return essence_in(path), {"": path}
        if path.suffix.lower() in VIDEOS:
            raise MissingError(f"{text}: there is no such file", "give a video, a run's id, or last")
        run = find(runs_root(self.options.cache_root), text)
        assert isinstance(run, Manifest)
        found = {item.node: self._file(run, item) for item in run.outputs if item.name.endswith(".mp4")}
        if not found:
            raise MissingError(f"run {run.id}: it wrote no mp4", "give a run that wrote one, or a video's file")
        return run, found

    def _file(self, run: Manifest, output: OutputRecord) -> Path:
        """Return a run's video: as it was delivered, else a copy of what the cache holds."""
        recipe, name = (Path(os.path.expanduser(text)) for text in (run.recipe.path, output.name))
        places = [self.options.output_dir] if self.options.output_dir else []
        places += [Path.cwd(), recipe.parent]
        candidates = [self.known[output.node]] if output.node in self.known else [place / name for place in places]
        for path in candidates:
            if path.is_file() and output.size in (None, path.stat().st_size):
                return path
        node = next(node for node in run.nodes if node.name == output.node)
        stored = Store(self.options.cache_root).object_path(StoredObject(node.outputs.get("file", ""), 0, ".mp4"))
        if not stored.is_file():
            text = f"run {run.id}: {output.name} is neither at {' nor at '.join(map(str, candidates))} nor in the cache"
            raise MissingError(text, "run the recipe again, or give the video's file")
        copy = self.target.with_name(f"{self.target.stem}.{node.outputs['file'][:8]}.mp4")
        if not copy.is_file():
            with writing(copy):
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(stored, copy)
        return copy


def _page(
    films: Sequence[Film], values: Mapping[str, Any], found: Manifest | Essence | None, **more: Any
) -> dict[str, Any]:
    """Return what the template is filled with; what is not known is empty."""
    run = found if isinstance(found, Manifest) else None
    return {
        "films": films,
        "cues": film.cues_of(values),
        "stages": film.stages_of(run) if run else [],
        "graph": film.graph_of(values, run.nodes if run else ()) if values else None,
        "loras": film.loras_of(run) if run else [],
        "files": found.files if found else [],
        "recipe": run.recipe.text if run else found.recipe if isinstance(found, Essence) else "",
        "run": run,
    } | {"changes": None, "axes": None, "compared": None, "is_pair": False, **more}


def cell_of(name: str) -> tuple[str, ...]:
    """Return the parts of a cell's label, from a plan node's name: "seed=1,cfg=2/video" has two."""
    label = name.rpartition("/")[0]
    return tuple(re.split(r",(?=[\w.\[\]-]+=)", label)) if label else ()


def _axes(films: Sequence[Film]) -> dict[str, list[str]] | None:
    """Return the values down and across; further axes count as rows."""
    cells = [item.cell for item in films if item.cell]
    if not cells:
        return None
    rows = list(dict.fromkeys(", ".join((cell[0], *cell[2:])) for cell in cells))
    return {"rows": rows, "columns": list(dict.fromkeys(cell[1] if len(cell) > 1 else "" for cell in cells))}


def _run_facts(run: Manifest, films: Sequence[Film]) -> list[tuple[str, str]]:
    on, git, seeds = run.environment, run.git, list(dict.fromkeys(run.seeds.values()))
    commit = "" if git is None or git.commit is None else git.commit[:_SHORT] + (" and changes" if git.is_dirty else "")
    facts = [
        ("Run", f"{run.id}, {run.status}"),
        ("Started", run.started[:16].replace("T", " ") + " UTC"),
        ("Took", duration_text(run.seconds) if run.seconds is not None else ""),
        ("Recipe", " ".join([run.recipe.path, *(f"-p {name}" for name in run.given.profiles), *run.given.overrides])),
        ("Picture", _picture(films[0])),
        ("Seed", f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else "".join(map(str, seeds))),
        ("Made with", f"s2vflow {on.s2vflow}, torch {on.torch}, {on.gpu or on.device}"),
        ("Commit", commit),
        ("Error", run.error or ""),
    ]
    return [fact for fact in facts if fact[1]]


def _video_facts(found: Essence | None, shown: Film) -> list[tuple[str, str]]:
    facts = [("Picture", _picture(shown)), ("File", size_text(shown.path.stat().st_size))]
    if found is None:
        return [*facts, ("Note", "none inside: s2vflow did not write this file, or another program has changed it")]
    software = ", ".join(f"{name} {' '.join(versions)}" for name, versions in found.software.items() if versions)
    return [*facts, ("Made with", f"{software}, {found.device}")]


def _picture(shown: Film) -> str:
    return f"{shown.size[0]}×{shown.size[1]}, {shown.frames} frames, {shown.fps:g} a second, {shown.seconds:.1f} s"


def _sourced(films: Sequence[Film], target: Path, *, embed: bool) -> Iterator[Film]:
    """Yield films with their addresses: inside the page as far as they fit, else relative to it."""
    room = _EMBEDDED_BYTES // max(len(films), 1)
    for item in films:
        inside = proxy_of(item, room) if embed else ""
        beside = os.path.relpath(item.path.absolute(), target.absolute().parent).replace(os.sep, "/")
        yield replace(item, src=inside or quote(os.fsencode(beside)))


def _rendered(content: Mapping[str, Any]) -> str:
    from jinja2 import Environment, StrictUndefined

    folder = resources.files("s2v_flow.views")
    source, style, script = ((folder / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    about: dict[str, Any] = {"style": style, "script": script, "digests": digests, "version": __version__}
    about |= {"film": film, "drawn": film, "duration": duration_text, "size": size_text}
    return environment.from_string(source).render({**content, **about})
