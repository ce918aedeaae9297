"""What the command line does, for Python: check, plan and run recipes. Importing this never imports torch."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

from s2v_flow.api.result import Planned as Planned
from s2v_flow.api.result import Result
from s2v_flow.cache.housekeeping import live_run
from s2v_flow.cache.remote import RemoteStore
from s2v_flow.cache.store import Store
from s2v_flow.demo import demo_root
from s2v_flow.errors import ExitCode, MissingError, RefusedError, S2VFlowError, UsageError
from s2v_flow.files.atomic import cannot_write
from s2v_flow.files.facts import recalled, remembered
from s2v_flow.graph.build import build_plan, merge_plans
from s2v_flow.graph.context import Numerics
from s2v_flow.graph.estimate import Flops, estimate
from s2v_flow.graph.events import Listener, Noted, StageStarted, ignore
from s2v_flow.graph.interrupt import gpu_turn
from s2v_flow.graph.node import Plan
from s2v_flow.graph.run import Run, RunResult
from s2v_flow.graph.status import EARLIER, TO_COMPUTE, assess
from s2v_flow.library.needs import meant_instead, misnamed
from s2v_flow.machine import device_class, free_memory_bytes, hardware, measure, resolve_device
from s2v_flow.nodes.memory import needs, require_room
from s2v_flow.nodes.precision import check_fit, precision_notes
from s2v_flow.nodes.table import KINDS as KINDS
from s2v_flow.options import Options as Options
from s2v_flow.options import with_fields
from s2v_flow.parallel import shared_models
from s2v_flow.parallel.layout import check_ranks, rank_device
from s2v_flow.quality import known, unmet
from s2v_flow.recipe.argument import Changes
from s2v_flow.recipe.layers import Written
from s2v_flow.recipe.load import Recipe, Variant, load_cells, load_recipe, only_output
from s2v_flow.runs.environment import FileDigests, plugins_of, torch_version
from s2v_flow.runs.essence import essence_in, likely_folders, note_maker, video_notes
from s2v_flow.runs.lockfile import check_lock, lock_path
from s2v_flow.runs.record import Recorder, runs_root
from s2v_flow.runs.values import files_of
from s2v_flow.version import __version__

RecipeLike = str | Written
_FIX_CACHE = "free some space, or name another folder with --cache-dir"


def check(recipe: RecipeLike, options: Options | None = None, **fields: Any) -> Recipe:
    """Read and check a recipe: a file, or a dict of its shape, in which paths are relative to the current folder.

    Of the options (and `fields`, single ones of them) profiles, override files, `sets`, `params` and `overrides` count.

    Raises:
        RecipeError: With every mistake that was found; also where a recipe's file cannot be read.
    """
    written, changes = _asked(recipe, with_fields(options, fields))
    return load_recipe(written, kinds=KINDS, changes=changes)


load = check  # the name that some look for first


def _asked(recipe: RecipeLike, options: Options) -> tuple[Written, Changes]:
    """Return a recipe and what is laid over it; where a video stands for it, with the recipe that is in the video."""
    if isinstance(recipe, Mapping):
        return recipe, options.changes
    if (isinstance(recipe, str) and "\n" in recipe) or not isinstance(recipe, (str, os.PathLike)):
        what = "its text" if isinstance(recipe, str) else type(recipe).__name__
        fix = "give the path, or the text as a dict: yaml.safe_load(text)"
        raise UsageError(f"expected a recipe's file or a dict, got {what}", fix)
    path, changes = Path(recipe), options.changes
    if essence := essence_in(path):
        inside = load_recipe(path, kinds=KINDS, changes=Changes(inside=(essence.recipe, path.absolute().parent)))
        changes = replace(changes, inside=(essence.recipe, likely_folders(path, inside, essence.node)[0]))
    return path, changes


def plan(recipe: RecipeLike, options: Options | None = None, **fields: Any) -> Planned:
    """Find out what a run would do, without computing anything and without importing torch.

    Raises:
        RecipeError: With every mistake that was found.
        S2VFlowError: A file that is there cannot be used, or the device is not there.
    """
    options = with_fields(options, fields)
    written, changes = _asked(recipe, options)
    return _plan(*load_cells(written, kinds=KINDS, changes=changes, axes=options.axes), options)


def _plan(recipe: Recipe, variants: tuple[Variant, ...], options: Options) -> Planned:
    device = resolve_device(options.device)
    digests = FileDigests(_digest_memory(options))

    def remember(what: str, file: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        digest = digests.known(file)
        return remembered(options.cache_root / "facts.json", f"{what}:{digest}", compute) if digest else compute()

    def built(of: Recipe, label: str) -> Plan:
        tag = re.sub(r"[^A-Za-z0-9._=,-]", "_", label)
        found = options.locations
        input_dirs = (
            found.input_dirs if of.folder is None else (*found.input_dirs, of.path.absolute().parent, Path.cwd())
        )
        output_file = only_output(of, options.output)
        locations = replace(found, input_dirs=input_dirs, output_tag=tag, output_file=output_file)
        return build_plan(of.nodes, of.order, locations, remember)

    if variants:
        parts = [(item.cell.label, built(item.recipe, item.cell.label)) for item in variants]
        whole, alone = merge_plans(parts)
        recipes = {item.cell.label: item.recipe for item in variants}
        cells = {name: recipes[label] for name, label in alone.items()}
    else:
        whole, cells = built(recipe, ""), {}
    made = options.selection.cut(whole)
    check_fit(made)
    notes = *made.notes, *precision_notes(made, device), *video_notes(recipe, made, digests.known)
    made = replace(made, notes=notes)
    forced = options.selection.forced(made)
    store, numerics = Store(options.cache_root), Numerics(device_class(device))
    statuses = assess(made, store, numerics, digests.known, forced)
    has_work = any(status.status in TO_COMPUTE for status in statuses.values())
    to_compute = {name for name, status in statuses.items() if status.status in TO_COMPUTE}
    check_ranks(made, to_compute, options.gpus, device, options.device)
    to_store = {node.name for node in made.nodes if node.node.is_stored} & to_compute
    free_bytes = free_memory_bytes(device)
    limit = min((size for size in (free_bytes, options.vram) if size is not None), default=None)
    computed = needs(made, to_store, numerics, limit)
    if variants and limit is not None and any((need.peak_bytes or 0) > limit for need in computed.values()):
        made = options.selection.cut(merge_plans(parts, by_stage=True)[0])
        made = replace(made, notes=(*made.notes, "the cells' files are written after all sampling, for lack of memory"))
        computed = needs(made, to_store, numerics, limit)
    if options.vram is not None:
        require_room(computed, options.vram, device)
    earlier = store.recent(EARLIER) if has_work else []
    named, speeds = _hardware(options, device), _speeds(options, device)
    expected = estimate(made, statuses, earlier, numerics, computed, named, speeds)
    return Planned(
        recipe, made, statuses, device, expected, cells, variants, free_bytes, options.overwrite, computed, options.vram
    )


def _hardware(options: Options, device: str) -> str:
    """Name what computes; so many ranks are other hardware than one."""
    return hardware(device) + (f", {options.gpus} ranks" if options.gpus > 1 else "")


def _speed_key(device: str, item_bytes: int) -> str:
    return f"speed:{hardware(device)}:{item_bytes}:{torch_version()}"


def _speeds(options: Options, device: str) -> dict[int, Flops]:
    """Return what a device does in a second, by the bytes of a number, as far as it was measured."""
    table = options.cache_root / "facts.json"
    found = {item_bytes: recalled(table, _speed_key(device, item_bytes)) for item_bytes in (2, 4)}
    names = ("matrices", "attention", "convolutions")
    return {key: (known[names[0]], known[names[1]], known[names[2]]) for key, known in found.items() if known}


def calibrated(planned: Planned, options: Options) -> Planned:
    """Measure how fast the device computes, once, in about a second, and estimate again. Imports torch."""
    for item_bytes in {each.item_bytes for each in planned.needs.values() if each.weights}:
        key = _speed_key(planned.device, item_bytes)
        remembered(options.cache_root / "facts.json", key, partial(measure, planned.device, item_bytes))
    return _plan(planned.recipe, planned.variants, options)


def _digest_memory(options: Options) -> Path:
    return options.cache_root / "digests.json"


def run(recipe: RecipeLike, options: Options | None = None, on_event: Listener = ignore, **fields: Any) -> Result:
    """Run a recipe: compute what is not stored yet, and write the results.

    `on_event`: called with every event, in the calling thread.

    Raises:
        RecipeError: The recipe is wrong; nothing was run.
        MissingError: A model or an input is missing; nothing was run.
        S2VFlowError: A node failed; what was finished before is stored.
    """
    options = with_fields(options, fields)
    return run_planned(plan(recipe, options), options, on_event)


def run_planned(
    planned: Planned,
    options: Options,
    on_event: Listener = ignore,
    run_id: str = "",
    models: Any = None,
    *,
    goes_on: bool = False,
) -> Result:
    """Run a plan; see `run`.

    Args:
        on_event: Called with every event, in the calling thread.
        run_id: Under which the run is recorded; "": one is made.
        models: A `lazy_registry` that runs share; without, none stays live that no node needs.
        goes_on: The run has begun under this id, with a first look; its manifest is written anew.
    """
    if not callable(on_event):
        raise UsageError(f"on_event: expected a function, got {on_event!r}")
    if models is not None and options.gpus > 1:
        raise S2VFlowError("a Session's runs are on one GPU", "s2v_flow.run(recipe, gpus=N)")
    require_files(planned)
    options.selection.check(planned.plan, planned.statuses)
    digests, demo = FileDigests(_digest_memory(options), on_event), set(options.locations.made_models.values())
    made = [file for node in planned.plan.nodes for file in node.files.values() if file in demo]
    if is_made := all(file.is_file() for file in made):
        _refuse_files(planned, options, digests)
    recorder = Recorder(
        recipe=planned.recipe,
        plan=planned.plan,
        statuses=planned.statuses,
        device=planned.device,
        folder=runs_root(options.cache_root),
        changes=options.changes,
        axes=options.axes,
        output=options.output,
        cells=planned.labels,
        digest=digests.known,
        emit=on_event,
        has_host=options.record_host,
        id=run_id,
        goes_on=goes_on,
    )
    needed = [status.fingerprint for status in planned.statuses.values() if status.fingerprint is not None]
    with live_run(options.cache_root, needed, recorder.id), recorder:
        if not is_made:
            _make_demo_models(made, options, on_event)
            planned = _plan(planned.recipe, planned.variants, options)
            recorder.plan, recorder.statuses = planned.plan, planned.statuses
            _refuse_files(planned, options, digests)
        held = partial(_held, planned, options.vram, models or lazy_registry())
        with shared_models(cache(held), options.gpus, planned.device, recorder) as shared:
            result = _execute(planned, options, recorder, digests, shared)
    return Result(**vars(replace(result, run_id=recorder.id)), cache_root=options.cache_root)


def _held(planned: Planned, vram: int | None, models: Callable[[], Any]) -> Any:
    """Return the registry, held to what this run may take."""
    registry = models()
    registry.hold_to(planned.device, vram, max((need.work_bytes for need in planned.needs.values()), default=0))
    return registry


def _refuse_files(planned: Planned, options: Options, digests: FileDigests) -> None:
    """Refuse models, plug-ins and places that a run cannot use, and files that are not as locked."""
    for node in planned.plan.nodes:
        if planned.statuses[node.name].status == "LOAD" or node.node.is_sink:
            node.node.check(node.files)
    if options.locked:
        with digests.hashing(item.file for item in files_of(planned.plan.nodes)):
            check_lock(lock_path(planned.recipe.path), planned.recipe, planned.plan, digests)
    for plugin in plugins_of(planned.recipe, planned.plan) if planned.has_work else ():
        plugin.load()  # a sampler that cannot be imported is an error before anything is computed


def _execute(planned: Planned, options: Options, recorder: Recorder, digests: FileDigests, models: Any) -> RunResult:
    numerics = recorder.numerics
    url, warn = options.cache_remote, lambda text: recorder(Noted("", text))
    store = RemoteStore(options.cache_root, url, warn) if url else Store(options.cache_root)
    execution = Run(
        plan=planned.plan,
        statuses=planned.statuses,
        store=store,
        numerics=numerics,
        device=planned.device,
        models=models,
        file_digest=digests,
        emit=recorder,
        forced=options.selection.forced(planned.plan),
        keeps_going=bool(planned.labels) and not options.fail_fast,
        note=note_maker(planned.recipe_of, planned.plan, digests, numerics.device_class, _workflows),
        should_stop=options.should_stop,
        about={"s2vflow": __version__, "torch": torch_version(), "hardware": _hardware(options, planned.device)},
        about_nodes={name: computed.facts() for name, computed in planned.needs.items()},
        cache_limit=options.size_limit,
        overwrites=options.overwrite,
        watch=options.watch,
        ways={name: need.way for name, need in planned.needs.items() if need.way},
    )
    recorder.entries, recorder.not_kept = execution.entries, execution.not_kept
    waits = planned.has_work and not options.share_gpu
    loaders = [node for node in planned.plan.nodes if planned.statuses[node.name].status == "LOAD"]
    with digests.hashing(item.file for item in files_of(loaders)) as is_hashing, ExitStack() as on_gpu:
        if is_hashing:
            _import_meanwhile(planned, store, execution.forced, recorder)
        for device in dict.fromkeys(rank_device(planned.device, rank) for rank in range(options.gpus)):
            on_gpu.enter_context(gpu_turn(device, recorder, options.should_stop, is_needed=waits))
        try:
            result = execution.execute()
            recorder.failures = result.failures
            if planned.recipe.require:
                result = replace(result, unmet=_unmet(planned, result, execution.store))
                recorder.failures = {**result.failures, **result.unmet}
        finally:
            execution.close()
            if isinstance(store, RemoteStore):
                store.close()
    return result


def _import_meanwhile(planned: Planned, store: Store, forced: frozenset[str], emit: Listener) -> None:
    """Import what takes seconds, of nodes that are sure to run: forced ones, or none of their kind is stored."""
    stored = {entry.preimage.get("kind") for entry in store.recent(EARLIER)}
    for node in planned.plan.nodes:
        if planned.statuses[node.name].status == "RUN" and (node.name in forced or node.node.kind not in stored):
            for module in node.node.slow_imports:
                emit(StageStarted("", f"importing {module.partition('.')[0]} while weights are hashed"))
                with suppress(
                    ImportError, RuntimeError, OSError, ValueError, AttributeError
                ):  # told where it is needed
                    import_module(module)
                emit(StageStarted("", ""))


def _unmet(planned: Planned, result: RunResult, store: Store) -> dict[str, str]:
    """Return which videos do not meet what the recipe requires, and why; what was not measured is measured now."""
    found = {}
    for name in result.outputs:
        node, entry = planned.plan.node(name), result.entries[name]
        if node.kind == "save_video":
            figures = known(entry.facts.get("quality"))
            if figures is None:
                from s2v_flow.quality.figures import measure_video

                path = store.object_path(entry.outputs["file"])
                figures = measure_video(path, node.facts.get("chunk_starts") or ())
            why = "; ".join(unmet(figures, planned.recipe.require))
            found.update({name: why} if why else {})
    return found


def _workflows(recipe: Recipe, plan: Plan) -> dict[str, str]:
    """Return the tags by which ComfyUI opens a video's graph; none where it has nothing for the recipe."""
    from s2v_flow.comfy.exporter import export_workflow

    try:
        return {
            "workflow": export_workflow(recipe, plan, "editor")[0],
            "prompt": export_workflow(recipe, plan, "api")[0],
        }
    except S2VFlowError:
        return {}


def require_files(planned: Planned) -> None:
    """Refuse to run without the files that are needed.

    Raises:
        MissingError: Naming each of them.
    """
    if planned.plan.missing:
        missing = planned.plan.missing
        names = [item.file for item in missing]
        them = "it where it is" if len(names) == 1 else "them where they are"
        fix = f"put {them} looked for, or name other folders with --models-dir or --input-dir"
        misplaced = {item.file: misnamed(item.homes, item.kind) for item in missing}
        meant = [meant_instead(item.file, item.kind, item.looked_in) or misplaced[item.file] for item in missing]
        fix = "; else ".join([*filter(None, meant[:3]), fix])
        if any(item.homes and not misplaced[item.file] for item in missing):
            fix += f"; or `s2vflow models {planned.recipe.path} --download`"
        what = "a file is" if len(names) == 1 else f"{len(names)} files are"
        raise MissingError(f"{what} missing: {', '.join(names)}", fix)


def _make_demo_models(needed: list[Path], options: Options, on_event: Listener) -> None:
    on_event(
        Noted("", "making the demo's models, once: tiny, of the real architecture, taught to draw one kind of face")
    )
    on_event(StageStarted("", "making the demo's models"))
    from s2v_flow.demo.models import make_demo_models

    root = demo_root(options.cache_root)
    try:
        if os.path.exists(root) and not all(file.is_file() for file in needed):  # it appears whole: a part was removed
            shutil.rmtree(root)
        make_demo_models(root)
    except (OSError, RefusedError) as error:
        if not all(file.is_file() for file in needed):  # else another process has just made them
            is_full = isinstance(error, OSError) and cannot_write(root, error).is_full
            code = ExitCode.DISK_FULL if is_full else ExitCode.FAILED
            text = f"{root}: the demo's models cannot be written: {error}"
            raise S2VFlowError(text, _FIX_CACHE, exit_code=code) from error
    on_event(StageStarted("", ""))


def lazy_registry(budget: Callable[[], int | None] = lambda: 0) -> Any:
    """Return what makes a model registry on its first call: a run that computes nothing does not import torch.

    `budget` says then how many bytes of models that no node needs may stay live; None: any number.
    """

    @cache
    def registry() -> Any:
        from s2v_flow.models.registry import ModelRegistry

        return ModelRegistry(budget())

    return registry
