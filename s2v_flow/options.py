"""What a command may be told beside its recipe."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from s2v_flow.cache.budget import parse_size
from s2v_flow.demo import demo_paths
from s2v_flow.errors import UsageError
from s2v_flow.graph.context import Watch
from s2v_flow.graph.interrupt import ShouldStop, never
from s2v_flow.graph.locations import Locations
from s2v_flow.graph.status import Selection
from s2v_flow.library.needs import HOMES, find_extra_models, models_folder, read_extra_models
from s2v_flow.recipe.argument import Changes, Override
from s2v_flow.wording import did_you_mean


@dataclass(frozen=True)
class Options:
    """Everything beside the recipe that a command may be told; the fields are the command line's options.

    Paths may be text, and a single one may stand where several are taken; the same for `profiles`, `sets` and `axes`.

    `should_stop` is asked at the end of every denoising step and before every node; once it says yes, the run leaves a
    checkpoint and ends with `StoppedError`. `watch` looks on as chunks are sampled; see `s2v_flow.views.previews`.
    """

    profiles: Sequence[str] = ()
    override_files: Sequence[Path] = ()
    sets: Sequence[str] = ()
    params: Mapping[str, Any] = field(default_factory=dict)  # by name, as Python's values
    overrides: Sequence[Override] = ()
    models_dirs: Sequence[Path] = ()
    extra_model_paths: Sequence[Path] = ()
    input_dirs: Sequence[Path] = ()
    output_dir: Path | None = None
    output: Path | None = None  # the recipe's only output, wherever the user wants it
    overwrite: bool = False  # take the place of what stands under an output's name
    cache_dir: Path | None = None
    cache_remote: str | None = None  # the URL of a store that machines share, behind the cache
    cache_limit: int | None = None  # in bytes; `cache.budget.NO_LIMIT`: nothing is ever evicted
    device: str = "auto"
    vram: int | None = None  # bytes, or "12GiB", that a run may hold where it computes; None or "auto": what is free
    gpus: int = 1  # how many share the diffusion model's work; with device "cpu" so many processes
    selection: Selection = field(default_factory=Selection)
    axes: Sequence[str] = ()
    fail_fast: bool = False
    locked: bool = False
    record_host: bool = False
    share_gpu: bool = False
    should_stop: ShouldStop = never
    watch: Watch | None = None

    def __post_init__(self) -> None:
        """Take paths as text too, one where several may be given, sizes as text, None for an empty list.

        Raises:
            S2VFlowError: A value is of the wrong type, or a path is empty.
        """
        for each in fields(self):
            object.__setattr__(self, each.name, read_option(each.name, getattr(self, each.name), each.default))

    @cached_property
    def changes(self) -> Changes:
        """What is laid over the recipe: of the overrides, `sets` come first, then `params`."""
        params = (Override("param", str(name), value) for name, value in self.params.items())
        overrides = (*(Override("set", text) for text in self.sets), *params, *self.overrides)
        return Changes(self.profiles, self.override_files, overrides, Path.cwd())

    @cached_property
    def cache_root(self) -> Path:
        """The cache folder: given, S2VFLOW_CACHE_DIR, or the user's."""
        if self.cache_dir is not None:
            return self.cache_dir
        if os.environ.get("S2VFLOW_CACHE_DIR"):
            return Path(os.path.expanduser(os.environ["S2VFLOW_CACHE_DIR"]))
        from platformdirs import user_cache_path

        return user_cache_path("s2vflow")

    @property
    def size_limit(self) -> int | None:
        """How many bytes the cache may take: given, S2VFLOW_CACHE_LIMIT, or None for the default.

        Raises:
            S2VFlowError: The variable holds no size.
        """
        text = os.environ.get("S2VFLOW_CACHE_LIMIT", "")
        return parse_size(text, "S2VFLOW_CACHE_LIMIT") if self.cache_limit is None and text else self.cache_limit

    @cached_property
    def locations(self) -> Locations:
        """The folders of a run. Unless any are given, models are looked for in ./models and in the usual ComfyUI's.

        Where ComfyUI's own folder is given, its models folder counts. ComfyUI's extra_model_paths.yaml is the one that
        is given, or stands beside a models folder.

        Raises:
            RecipeError: An extra_model_paths.yaml is wrong.
        """
        given = [*self.models_dirs, *_paths_in("S2VFLOW_MODELS_DIR")]
        usual = [folder / "ComfyUI" / "models" for folder in (Path(), Path.home(), Path.home() / "Documents")]
        models_dirs = [models_folder(folder) for folder in given] or [Path("models"), *usual]
        extra = [*self.extra_model_paths, *_paths_in("S2VFLOW_EXTRA_MODEL_PATHS")]
        return Locations(
            models_dirs=models_dirs,
            model_folders=read_extra_models(extra or find_extra_models(models_dirs)),
            input_dirs=self.input_dirs,
            output_dir=self.output_dir,
            cache_dir=self.cache_root,
            homes=HOMES,
            made_models=demo_paths(self.cache_root),
        )


def _paths_in(variable: str) -> list[Path]:
    """Return the paths that an environment variable lists."""
    return [Path(os.path.expanduser(text)) for text in os.environ.get(variable, "").split(os.pathsep) if text]


_EXPECTED: Mapping[str, tuple[type, str]] = {
    **dict.fromkeys(("override_files", "models_dirs", "extra_model_paths", "input_dirs"), (Path, "paths")),
    **dict.fromkeys(("output_dir", "output", "cache_dir"), (Path, "a path")),
    **dict.fromkeys(("profiles", "sets", "axes"), (str, "texts")),
    **dict.fromkeys(("vram", "cache_limit", "memory"), (int, "a number of bytes, or text like '12GiB'")),
    **dict.fromkeys(("overwrite", "fail_fast", "locked", "record_host", "share_gpu"), (bool, "True or False")),
    "overrides": (Override, "Overrides (sets and params take text and values)"),
    "params": (Mapping, "a dict"),
    "cache_remote": (str, "a URL"),
    "device": (str, "text"),
    "gpus": (int, "a whole number from 1 on"),
    "selection": (Selection, "a Selection"),
    "should_stop": (Callable, "a function"),  # type: ignore[dict-item]
    "watch": (Callable, "a function"),  # type: ignore[dict-item]
}
_LISTS = ("override_files", "models_dirs", "extra_model_paths", "input_dirs", "profiles", "sets", "axes", "overrides")


def read_option(name: str, given: Any, default: Any = None) -> Any:
    """Return the value of an option as it is kept: paths as `Path`, lists as tuples, sizes in bytes.

    Raises:
        S2VFlowError: It is of the wrong type, or a path is empty.
    """
    kind, words = _EXPECTED[name]
    if given is None and (default is None or name in _LISTS):
        return () if name in _LISTS else None
    if kind is int and name != "gpus" and isinstance(given, str):
        return None if given == "auto" else parse_size(given, name)
    is_one = name not in _LISTS or isinstance(given, (str, os.PathLike))
    try:
        items = [given] if is_one else list(given)
        if kind is Path:
            items = [Path(os.path.expanduser(item)) if item != "" else None for item in items]
        if not all(isinstance(item, kind) for item in items):
            raise TypeError
        if kind is int and (isinstance(given, bool) or given < (name == "gpus")):
            raise TypeError
    except TypeError:
        shown = f"{given!r:.80}"
        raise UsageError(f"{name}: expected {words}, got {shown}") from None
    return tuple(items) if name in _LISTS else items[0]


def with_fields(options: Any, given: Mapping[str, Any]) -> Options:
    """Return options, or the defaults, with single fields laid over them.

    Raises:
        TypeError: These are no options, or there is no such field.
        S2VFlowError: A value is of the wrong type.
    """
    if not isinstance(options, Options | None):
        advice = "give its fields as keywords: device='cpu', params={'seed': 7}"
        raise TypeError(f"options: expected s2v_flow.Options, got {type(options).__name__}; {advice}")
    known = [each.name for each in fields(Options)]
    for name in given.keys() - set(known):
        advice = f"a recipe's own values: params={{{name!r}: VALUE}}; {did_you_mean(name, known, 'options')}"
        raise TypeError(f"there is no option {name}; {advice}")
    return replace(options or Options(), **given)
