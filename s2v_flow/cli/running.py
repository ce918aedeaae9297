"""Running a plan from the terminal: what is printed before, during and after, and the smaller plan of `try`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

from s2v_flow import api
from s2v_flow.api import Options, Planned
from s2v_flow.cli import report
from s2v_flow.cli.progress import Level, Progress
from s2v_flow.errors import ExitCode, RecipeError, S2VFlowError
from s2v_flow.graph.events import Listener, RunFinished
from s2v_flow.graph.run import RunResult
from s2v_flow.graph.status import Selection
from s2v_flow.nodes.chunk import Chunk
from s2v_flow.recipe.argument import Override
from s2v_flow.recipe.load import Recipe
from s2v_flow.recipe.tree import plain, tree_at
from s2v_flow.runs.record import new_run_id, runs_root
from s2v_flow.runs.stream import open_events, to_all

STEPS = 4
_MULTIPLE, _LEAST = 16, 64  # of a side, in pixels; below, the motion's coarsest bucket is empty
_LONG_ON_CPU, _LONG_ON_GPU = 1e13, 1e16  # FLOP: about a minute on two cores, half of one on a large card


def execute(
    planned: Planned,
    options: Options,
    level: Level,
    again: str,
    *,
    as_json: bool,
    events: str | None = None,
    previews: bool = True,
    first_look: bool = False,
    has_report: bool = False,
    also: Callable[[], dict[str, Any]] = dict,
) -> None:
    """Run a plan, made with these options, and report.

    `again`: the command, to be repeated; `also`: gives what the JSON object has beside the run's own, at the end.
    """
    if has_report:
        from s2v_flow.views.report import require_jinja

        require_jinja()
    is_told = not as_json and events != "-"
    if planned.plan.missing and events != "-":
        report.print_json(planned.to_json()) if as_json else report.print_plan(planned)
    api.require_files(planned)
    first: tuple[Planned, Options] | None = None
    if first_look:
        output = None if options.output is None else options.output.with_suffix(".first.mp4")
        first = trial(planned, replace(options, output=output), is_smaller=False)
    is_measured = _is_unknown_and_long(planned)
    planned = api.calibrated(planned, options) if is_measured else planned
    progress = Progress(planned.recipe.path.stem, planned, level)
    for note in planned.notes:
        progress.note(note)
    if is_measured:
        progress.note(f"nothing like this ran here yet: {report.duration(planned.estimate)}")
    run_id, seen = new_run_id(runs_root(options.cache_root)), []
    try:
        with open_events(events, progress, run_id) as stream:
            told = to_all(progress, *stream)
            if first is not None:
                look = _run(*first, _without_end(told), run_id, previews=previews)
                seen = [path for paths in look.outputs.values() for path in paths]
                progress.note(f"a first look: {', '.join(map(str, seen))}")
                planned = api.plan(planned.recipe.path, options)
            result = _run(planned, options, told, run_id, previews=previews, goes_on=first_look)
    finally:
        progress.close()
    for path in seen if is_told else ():
        report.print_result(f"{path}")
    if as_json:
        report.print_json(result.to_json() | also())
    elif is_told:
        for paths in result.outputs.values():
            for path in paths[:1] if len(paths) > 3 else paths:
                report.print_result(f"{path}" + (f" and {len(paths) - 1} more" if len(paths) > 3 else ""))
    pages = _summary(planned, result)
    for path in (*pages, *(_page(result, options, pages) if has_report else ())):
        if is_told:
            report.print_result(f"{path}")
    if not result.failures:
        progress.end(planned, result, again)
    else:
        names = ", ".join(name for name, why in result.failures.items() if not why.startswith("needs "))
        raise S2VFlowError(f"failed: {names}", kept="every other cell, and all that was finished in these")
    if result.unmet:
        what = "; ".join(f"{name}: {why}" for name, why in result.unmet.items())
        fix = "look at it, and change the recipe or what it requires"
        raise S2VFlowError(f"require: {what}", fix, "the video, which is written", exit_code=ExitCode.UNMET)


def _run(
    planned: Planned, options: Options, told: Listener, run_id: str, *, previews: bool, goes_on: bool = False
) -> RunResult:
    """Run a plan, with or without pictures of what is sampled."""
    from s2v_flow.views.previews import Previews

    if previews:
        pictures = Previews(planned.plan, options.cache_root, runs_root(options.cache_root) / run_id, told)
        options, told = replace(options, watch=pictures.watch), to_all(told, pictures)
    return api.run_planned(planned, options, told, run_id, goes_on=goes_on)


def _without_end(told: Listener) -> Listener:
    return lambda event: None if isinstance(event, RunFinished) else told(event)


def _page(result: RunResult, options: Options, pages: list[Path]) -> list[Path]:
    """Write a page about a run beside its video, or a matrix's sheet; that it fails is no failure of the run."""
    from s2v_flow.views.report import write_report

    videos = {name: paths[0] for name, paths in result.outputs.items() if paths and paths[0].suffix == ".mp4"}
    if not videos:
        report.print_message("warning: there is no video to report on")
        return []
    target = (*pages, *videos.values())[0].with_suffix(".html")
    try:
        return [write_report(result.run_id, target, options, videos=videos)]
    except (S2VFlowError, OSError, ValueError) as error:
        report.print_message(f"warning: the report cannot be written: {error}")
        return []


def _is_unknown_and_long(planned: Planned) -> bool:
    """Tell whether two seconds of measuring are little beside a run of which no time is known."""
    flops = sum(sum(needs.flops) for needs in planned.needs.values() if needs.flops)
    return planned.estimate.seconds is None and flops > (_LONG_ON_CPU if planned.device == "cpu" else _LONG_ON_GPU)


def _summary(planned: Planned, result: RunResult) -> list[Path]:
    """Put a matrix's videos on one page, where there are at least two; that it fails is no failure of the run."""
    if not planned.labels:
        return []
    from s2v_flow.history.side import summarise

    try:
        return summarise(planned, result)
    except (S2VFlowError, OSError, ValueError) as error:
        report.print_message(f"warning: the page of all cells cannot be made: {error}")
        return []


def trial(whole: Planned, options: Options, *, is_smaller: bool = True) -> tuple[Planned, Options]:
    """Plan a trial of a planned recipe.

    `is_smaller`: at half the size in few steps, as NAME.try.mp4; else as the whole has it, as NAME.first.mp4.

    Returns:
        The trial's plan, and its options. Where the recipe cannot take fewer steps or half the size (another film of
        the full size is joined to it, say), it keeps them.

    Raises:
        S2VFlowError: There is no first chunk, or no video that shows it; exit code 3.
    """
    of, plan = whole.recipe, whole.plan
    samples = {name for name, spec in of.nodes.items() if spec.kind == "sample"}
    firsts = [node for node in plan.nodes if isinstance(node.node, Chunk) and node.recipe_node in samples]
    names = {node.name for node in firsts}
    shown = {node.recipe_node for node in plan.nodes if plan.before([node.name]) & names}
    videos = [name for name, spec in of.nodes.items() if spec.kind == "save_video" and name in shown]
    if not videos:
        lacks = "save_video node that shows what is sampled" if samples else "sample node"
        text = f"{of.path}: there is nothing to try: the recipe has no {lacks}"
        raise S2VFlowError(text, fix=f"add one, or run it as it is: s2vflow run {of.path}", exit_code=ExitCode.RECIPE)
    sizes = {(node.node.width, node.node.height) for node in firsts if isinstance(node.node, Chunk)}
    failure: RecipeError | None = None
    smaller: list[tuple[Set[tuple[int, int]], int | None]] = [(sizes, STEPS), (sizes, None), (set(), STEPS)]
    for halved, steps in (*(smaller if is_smaller else []), (set(), None)):
        suffix = ".try.mp4" if is_smaller else ".first.mp4"
        changes = [*_changes(of, halved, steps), *(_file(of, name, options.output_dir, suffix) for name in videos)]
        changes = [item for item in changes if item.text.partition("=")[0] not in of.matrix.axes]
        overrides = (*options.overrides, *changes)
        given = replace(options, overrides=overrides, selection=Selection(until=tuple(videos)))
        try:
            trial = api.plan(of.path, given)
            return replace(trial, recipe=replace(trial.recipe, require={})), given  # which is about the whole
        except RecipeError as error:
            failure = failure or error
    assert failure is not None
    raise failure


def _changes(recipe: Recipe, halved: Set[tuple[int, int]], steps: int | None) -> Iterator[Override]:
    """Yield what leaves the further chunks out, and makes the first one of these sizes smaller, and its steps fewer."""
    for name, spec in recipe.nodes.items():
        node = spec.node
        if spec.kind == "extend":
            yield Override("set", f"nodes.{name}.chunks=0")
            given = {"seed": isinstance(getattr(node, "seed", None), list), "timeline": getattr(node, "timeline", None)}
            yield from (Override("unset", f"nodes.{name}.{field}") for field, is_given in given.items() if is_given)
        if spec.kind == "sample" and steps is not None and getattr(node, "steps", 0) > steps:
            yield Override("set", f"nodes.{name}.steps={steps}")
        size = getattr(node, "width", None), getattr(node, "height", None)
        if spec.kind in ("sample", "encode_image") and size in halved:
            for side, pixels in zip(("width", "height"), size, strict=True):
                half = max(_MULTIPLE * round((pixels or 0) / 2 / _MULTIPLE), _LEAST)
                yield Override("set", f"nodes.{name}.{side}={min(half, pixels or half)}")


def _file(recipe: Recipe, name: str, output_dir: Path | None, suffix: str) -> Override:
    """Name a trial's video, beside that of the whole: with the parameters that its name is written with."""
    spec, written = recipe.nodes[name], tree_at(recipe.document, ("nodes", name, "file"))
    text = "" if written is None else str(plain(written))
    file = text if text.endswith(".mp4") else str(getattr(spec.node, "file", ""))
    path = (output_dir or spec.base_dir("file")).absolute() / os.path.expanduser(file)
    return Override("set", f"nodes.{name}.file={path.with_suffix(suffix)}")
