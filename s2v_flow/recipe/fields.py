"""What a node's field takes, read off its annotation: to read `--set` by, and to say what was expected."""

from __future__ import annotations

import re
import types
import typing
import unicodedata
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from s2v_flow.graph.ports import FieldPath, Ref
from s2v_flow.recipe.tree import read_scalar
from s2v_flow.wording import listed, nearest, shortened

_WORDS: tuple[tuple[type, str], ...] = (
    (bool, "true or false"),
    (float, "a number"),
    (int, "a whole number"),
    (str, "text"),
)
_PLURALS: tuple[tuple[type, str], ...] = ((float, "numbers"), (int, "whole numbers"), (str, "texts"))
_NOT_YAML_1_2 = {"yes": "true", "on": "true", "no": "false", "off": "false"}
_NUMBER = re.compile(r"=?\s*([-+]?(?:[0-9]+[.,]?[0-9]*|[.,][0-9]+)(?:[eE][-+]?[0-9]+)?)\s*(?:[a-zA-Z]{1,3}|%)?")
_THOUSANDS = re.compile(r"[0-9]{1,3}(?:[ _',.][0-9]{3})+")


@dataclass(frozen=True)
class Accepts:
    """What a field takes: scalars of some types, literal words, a reference, a list, a map; any of them, or null."""

    scalars: frozenset[type] = frozenset()
    words: tuple[str, ...] = ()
    is_input: bool = False
    has_list: bool = False
    item: Accepts | None = field(default=None)
    model: type[BaseModel] | None = None

    def takes(self, value: object) -> bool:
        """Return whether a value has one of the accepted types, whatever its range."""
        if isinstance(value, str):
            return str in self.scalars or value in self.words
        if isinstance(value, list):
            return self.has_list
        if isinstance(value, dict):
            return self.model is not None
        if isinstance(value, bool) or value is None:
            return type(value) in self.scalars
        return type(value) in self.scalars or (isinstance(value, int) and float in self.scalars)

    def described(self) -> str:
        """Return what is expected, in words: `auto or a whole number`."""
        parts = [word for kind, word in _WORDS if kind in self.scalars]
        if float in self.scalars:
            parts = [part for part in parts if part != "a whole number"]
        if self.words:
            parts.insert(0, f"one of {listed(self.words)}" if len(self.words) > 1 and not parts else listed(self.words))
        if self.is_input:
            parts.append("a reference like $node")
        if self.has_list:
            kinds = self.item.scalars if self.item is not None else frozenset()
            plural = next((words for kind, words in _PLURALS if kind in kinds), None)
            parts.append(f"a list of {plural}" if plural else "a list")
        if self.model is not None:
            parts.append("a map")
        return " or ".join(parts) or "null"

    def advice(self, text: str, *, is_quoted: bool = False) -> str | None:
        """Return how to mend a text of the wrong type, where the usual slips explain it."""
        match = nearest(text, self.words)
        if match is not None:
            return f"did you mean {match}?"
        if bool in self.scalars and text.lower() in _NOT_YAML_1_2:
            return f"write {_NOT_YAML_1_2[text.lower()]}: {text} is text in YAML 1.2"
        if text.startswith("$"):
            return "references to nodes are for inputs; a parameter is written $params.NAME"
        number = _number_meant(text, is_whole=float not in self.scalars)
        if number is not None and self.takes(number):
            if is_quoted and text == str(number):
                return f"remove the quotes: {text}"
            return f"write {number}" + (": a decimal is written with a point" if "," in text else "")
        return f"write [{shortened(text)}]" if self.item is not None and self.item.takes(text) else None


def accepts(annotation: Any) -> Accepts:
    """Return what an annotation takes. Constraints are pydantic's business and are left out."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return accepts(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return _union([accepts(argument) for argument in arguments])
    if origin is typing.Literal:
        return Accepts(words=tuple(argument for argument in arguments if isinstance(argument, str)))
    if origin is list:
        return Accepts(has_list=True, item=accepts(arguments[0]))
    if annotation is Ref:
        return Accepts(is_input=True)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return Accepts(model=annotation)
    if annotation in (int, float, bool, str, type(None)):
        return Accepts(scalars=frozenset({annotation}))
    raise TypeError(f"no recipe can hold a field of type {annotation!r}")


def field_at(model: type[BaseModel], path: FieldPath) -> Accepts | None:
    """Return what the field at a path takes, or None where the model has no such field."""
    current = Accepts(model=model)
    for part in path:
        if isinstance(part, int):
            if current.item is None:
                return None
            current = current.item
        else:
            if current.model is None or part not in current.model.model_fields:
                return None
            current = accepts(current.model.model_fields[part].annotation)
    return current


def _union(parts: list[Accepts]) -> Accepts:
    return Accepts(
        scalars=frozenset().union(*(part.scalars for part in parts)),
        words=tuple(word for part in parts for word in part.words),
        is_input=any(part.is_input for part in parts),
        has_list=any(part.has_list for part in parts),
        item=next((part.item for part in parts if part.item is not None), None),
        model=next((part.model for part in parts if part.model is not None), None),
    )


def _number_meant(text: str, *, is_whole: bool) -> int | float | None:
    """Return the number that a text was most likely meant to be: `1,5`, `1_000`, `64px`, `=4`, `1.5f`, `１`."""
    text = unicodedata.normalize("NFKC", text).strip()
    thousands = is_whole or "_" in text
    text = re.sub(r"[ _',.]", "", text) if thousands and _THOUSANDS.fullmatch(text) else text.replace(",", ".")
    found = _NUMBER.fullmatch(text)
    try:
        number = read_scalar(found[1]) if found else None
    except ValueError:
        return None
    if isinstance(number, float):
        return int(number) if is_whole and number.is_integer() else number
    return number if isinstance(number, int) else None
