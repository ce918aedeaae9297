"""What the page asks for: a recipe, its profiles, and a field for every value, made from the kinds' schema."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from s2v_flow import api
from s2v_flow.errors import UsageError
from s2v_flow.files.atomic import free_name
from s2v_flow.recipe.argument import NO_CHANGES, Override
from s2v_flow.recipe.config import portable_text
from s2v_flow.recipe.layers import Written, merge_layers
from s2v_flow.recipe.load import Recipe
from s2v_flow.recipe.params import whole_reference
from s2v_flow.recipe.problems import Problems
from s2v_flow.recipe.tree import plain
from s2v_flow.runs.values import files_of
from s2v_flow.start.project import DEFAULT_PROMPT, RECIPES, Start, recipe_text
from s2v_flow.views.ui import roots

FOLDER = Path("ui")  # where the page writes, below the current folder
_START = "start:"
_MAX_RECIPES = 200
_IS_RECIPE = re.compile(rb"^[\"']?s2vflow[\"']?[ \t]*:", re.MULTILINE)
_OUTPUT = "s2vflow-ui-output-name"  # stands in a recipe's text for its own name, until that is known


@dataclass(frozen=True)
class Wish:
    """What the page asks to be made: a recipe (`start:demo`, or a path), profiles, and texts by path, as for --set."""

    source: str
    profiles: tuple[str, ...] = ()
    values: Mapping[str, str] = field(default_factory=dict)
    name: str = ""

    @staticmethod
    def read(asked: Mapping[str, Any]) -> Wish:
        """Take it from JSON.

        Raises:
            S2VFlowError: It has another shape.
        """
        try:
            texts = {str(path): str(text) for path, text in dict(asked.get("values") or {}).items()}
            name = "".join(letter for letter in str(asked.get("name") or "") if letter.isalnum() or letter in "-_")
            return Wish(str(asked["source"]), tuple(map(str, asked.get("profiles") or ())), texts, name[:80])
        except (KeyError, TypeError, ValueError) as error:
            shape = '{"source": "recipes/demo.yaml", "profiles": [], "values": {"params.seed": "7"}, "name": "talk"}'
            raise UsageError("no such request is known", f"send {shape}") from error


class Desk:
    """Turns wishes into recipes; `options` and the current folder say where everything is."""

    def __init__(self, options: api.Options, folders: Mapping[str, Path]) -> None:
        self._options, self._roots = options, folders

    def recipes(self) -> list[dict[str, str]]:
        """List what may be chosen: the recipes of the current folder and two levels below, then first ones."""
        found = [{"source": str(path), "about": ""} for path in islice(_recipe_files(), _MAX_RECIPES)]
        return found + [{"source": f"{_START}{name}", "about": like.description} for name, like in RECIPES.items()]

    def form(self, wish: Wish) -> dict[str, Any]:
        """Return what a form for a recipe needs: description, profiles, fields."""
        given, options = self._given(wish)
        recipe = api.check(given, options)
        written: Written = Path(given) if isinstance(given, str) else given
        is_text = not isinstance(written, Path) or written.suffix in roots.RECIPES
        profiles = merge_layers(written, NO_CHANGES, Problems()).profiles if is_text else ()
        fields = list(_fields(recipe))
        return {"description": recipe.description or "", "profiles": list(profiles), "fields": fields}

    def plan(self, wish: Wish) -> tuple[api.Planned, Path, str]:
        """Return what a run would do, where its recipe goes (ui/NAME.yaml), and what that says.

        Where another recipe has the name, this one and its video get a number; where the same one has it, it is used.

        Raises:
            S2VFlowError: The recipe, or a value, is wrong.
        """
        given, options = self._given(wish)
        planned = api.plan(given, options)
        sinks = [name for name, spec in planned.recipe.nodes.items() if spec.kind == "save_video"]
        more = [Override("set", f"nodes.{sinks[0]}.file=out/{_OUTPUT}.mp4")] if len(sinks) == 1 else []
        for item in files_of(planned.plan.nodes):  # what a video's recipe finds here, it would not find from ui/
            start = planned.recipe.nodes[item.node.recipe_node].base_dir(item.path)
            if item.role == "input" and not (start / os.path.expanduser(item.name)).is_file():
                more.append(Override("set", f"{item.at}={os.path.relpath(item.file)}"))
        recipe = api.check(given, replace(options, overrides=(*options.overrides, *more)))
        text = portable_text(replace(recipe, path=FOLDER / "a.yaml", folder=None))

        def named(path: Path) -> str:
            return f"# s2vflow run {path.as_posix()}\n{text.replace(_OUTPUT, path.stem)}"

        def is_there(path: Path) -> bool:
            return path.is_file() and path.read_bytes() == named(path).encode()

        name = wish.name or re.sub(r"\.\d+$", "", Path(wish.source.removeprefix(_START)).stem)
        path = free_name(FOLDER / f"{name}.yaml", lambda path: not os.path.lexists(path) or is_there(path))
        return planned, path, named(path)

    def _given(self, wish: Wish) -> tuple[api.RecipeLike, api.Options]:
        overrides = [Override("set", f"{path}={text}") for path, text in wish.values.items()]
        options = replace(self._options, profiles=wish.profiles, overrides=overrides)
        if wish.source.removeprefix(_START) in RECIPES:
            given = (wish.values.get(f"params.{name}") for name in ("image", "audio"))
            portrait, voice = (Path(text) if text else None for text in given)
            start = Start(portrait, voice, DEFAULT_PROMPT, wish.source.removeprefix(_START))
            data: dict[str, Any] = yaml.safe_load(recipe_text(start, Path()))
            return data, options
        kinds = (*roots.RECIPES, *roots.VIDEOS)
        return os.path.relpath(roots.file_below(self._roots, "work", wish.source, kinds)), options


def _recipe_files() -> Iterator[Path]:
    for pattern in ("*.y*ml", "*/*.y*ml", "*/*/*.y*ml"):
        for path in sorted(Path().glob(pattern)):
            is_own = path.is_file() and not path.is_symlink() and not any(part.startswith(".") for part in path.parts)
            if is_own and path.suffix in roots.RECIPES and not path.stem.endswith(".lock"):
                with suppress(OSError), path.open("rb") as file:
                    if _IS_RECIPE.search(file.read(4096)):
                        yield path


def _fields(recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Yield the recipe's parameters, then what nodes say beside them: a path, a value as text, and what it takes."""
    nodes, rest = plain(recipe.document)["nodes"], []
    taken: dict[str, dict[str, Any]] = {}
    for name, spec in recipe.nodes.items():
        values, marks = spec.node.model_dump(mode="json"), type(spec.node).file_fields()
        for key, schema in type(spec.node).model_json_schema()["properties"].items():
            param, value = whole_reference(nodes[name].get(key)), values[key]
            about = _takes(schema)
            if key in marks and marks[key].role == "input" and value is not None:
                place = spec.base_dir(key) / os.path.expanduser(value)
                about |= {"file": marks[key].what, "at": os.path.relpath(place) if place.is_file() else ""}
            if param is not None:
                taken.setdefault(param, about)
            elif key not in type(spec.node).input_ports() and not isinstance(value, (list, dict)):
                rest.append({"path": f"nodes.{name}.{key}", "group": f"{name} ({spec.kind})", **about, "value": value})
    params = [
        {"path": f"params.{name}", "group": "", **taken.get(name, _takes_like(value)), "value": value}
        for name, value in recipe.params.items()
    ]
    for entry in (*params, *rest):
        value = entry["value"]
        yield {**entry, "value": value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}


def _takes(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an input needs to know of a field's schema; of several types, the first counts."""
    parts = [part for part in schema.get("anyOf", [schema]) if part.get("type") != "null"]
    words = [word for part in parts for word in part.get("enum", [part["const"]] if "const" in part else [])]
    type_ = "string" if len(parts) > 1 or words else parts[0].get("type", "string")
    known = {"type": type_, "help": schema.get("description", ""), "choices": words, "is_free": len(parts) > 1}
    bounds = {"minimum": "min", "exclusiveMinimum": "min", "maximum": "max", "multipleOf": "step"}
    return known | {name: str(parts[0][key]) for key, name in bounds.items() if key in parts[0]}


def _takes_like(value: Any) -> dict[str, Any]:
    types = {bool: "boolean", int: "integer", float: "number"}
    return {"type": types.get(type(value), "string"), "help": "", "choices": []}
