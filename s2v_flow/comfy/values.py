"""Translators of nodes that hold, compute, choose or hand on values."""

from __future__ import annotations

import ast
import math
import operator
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from s2v_flow.comfy.catalog import IGNORED, classes
from s2v_flow.comfy.graph import Link, Value
from s2v_flow.comfy.meaning import AtNode, Translator
from s2v_flow.wording import shortened

PRIMITIVES = (
    *("PrimitiveInt", "PrimitiveFloat", "PrimitiveString", "PrimitiveStringMultiline", "PrimitiveBoolean"),
    *("INTConstant", "FloatConstant", "BOOLConstant", "StringConstant", "StringConstantMultiline"),
    *("easy int", "easy float", "Seed (rgthree)", "Seed Everywhere"),
)
_MAX_LETTERS = 1000
_LARGEST = 2.0**64


def _power(base: float, exponent: float) -> Any:
    if abs(exponent) > 64:
        raise ValueError("exponents go up to 64")
    return base**exponent


_NAMED = """Add:add Sub:sub Mult:mul Div:truediv FloorDiv:floordiv Mod:mod BitAnd:and_ BitOr:or_ BitXor:xor
Invert:invert USub:neg UAdd:pos Not:not_ Eq:eq NotEq:ne Lt:lt LtE:le Gt:gt GtE:ge"""
_OPERATORS: Mapping[type[ast.AST], Callable[..., Any]] = MappingProxyType(
    {ast.Pow: _power}
    | {getattr(ast, name): getattr(operator, does) for name, does in (pair.split(":") for pair in _NAMED.split())}
)
_FUNCTIONS: Mapping[str, Any] = MappingProxyType(
    {"min": min, "max": max, "abs": abs, "round": round, "int": int, "float": float, "pow": _power}
    | {function.__name__: function for function in (math.sqrt, math.ceil, math.floor, math.log)}
)


def calculated(text: str, names: Mapping[str, Any]) -> int | float | bool:
    """Return what an expression of ComfyUI's calculating nodes gives: Python's arithmetic, and nothing else of it.

    `text`: up to 1,000 characters; `names`: the values of its letters.

    Raises:
        ValueError: It is no arithmetic, has an unknown name, or its result is no number below 2**64.
    """
    try:
        if len(text) > _MAX_LETTERS:
            raise ValueError("it is too long")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's remarks about style
            tree = ast.parse(text.strip(), mode="eval")
        return _number(_evaluated(tree.body, names))
    except (SyntaxError, TypeError, ArithmeticError, RecursionError, MemoryError) as error:
        raise ValueError(str(error) or type(error).__name__) from None


def _evaluated(node: ast.expr, names: Mapping[str, Any]) -> Any:
    def value(part: ast.expr) -> Any:
        return _number(_evaluated(part, names))

    match node:
        case ast.Constant():
            return node.value
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.Name(id=name):
            raise ValueError(f"there is no {shortened(name)}")
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](value(left), value(right))
        case ast.UnaryOp(op=op, operand=operand):
            return _OPERATORS[type(op)](value(operand))
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](value(left), value(right))
        case ast.BoolOp(op=op, values=values):
            return (all if isinstance(op, ast.And) else any)(value(part) for part in values)
        case ast.IfExp(test=test, body=body, orelse=otherwise):
            return value(body) if value(test) else value(otherwise)
        case ast.Call(func=ast.Name(id=name), args=given, keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](*map(value, given))
    raise ValueError("only arithmetic is understood")


def _number(value: Any) -> int | float | bool:
    if not isinstance(value, (int, float)) or not abs(value) <= _LARGEST:
        raise ValueError("a number below 2**64 is expected")
    return value


def _math(at: AtNode) -> Any:
    """Every calculating node: its letters are inputs, named `a` or, in newer ones, `values.a`."""
    given = at.value(at.widgets[0])
    names: dict[str, Any] = {"pi": math.pi, "euler": math.e}
    for name in (name for name, item in at.node.inputs.items() if isinstance(item, Link) or name[-2:-1] in ("", ".")):
        names[name.rpartition(".")[2]] = at.value(name, "NUMBER").value
    try:
        result = calculated(given.value, names)
        whole = round(result) if at.class_type == "SimpleMath+" else int(result)
    except (ValueError, OverflowError) as error:
        raise at.refuse(f"{shortened(given.value)}: {error}", "type the result in where it is used") from None
    numbers = Value(float(result)), Value(whole), Value(bool(result))
    return numbers if classes()[at.class_type].outputs[0][0] == "FLOAT" else (numbers[1], numbers[0])


def _primitive(at: AtNode) -> Any:
    given = at.value(at.widgets[0])
    value = given.value
    if at.class_type == "Seed (rgthree)" and value < 0:
        raise at.refuse(f"seed {value} draws another one for each run", "give it a seed")
    if "strip_newlines" in at.widgets and at.value("strip_newlines").value:
        value = "".join(value.splitlines())
    return Value(value, given.knob or at.node.id)


def _concatenate(at: AtNode) -> Any:
    first, second, between = (at.value(name).value for name in ("string_a", "string_b", "delimiter"))
    return Value(f"{first}{between}{second}")


def _switch(at: AtNode) -> Any:
    if at.class_type == "ComfySwitchNode":
        name = "on_true" if at.value("switch").value else "on_false"
    else:  # Any Switch (rgthree): the first input that has something
        name = min((name for name, _ in at.node.links()), default="any_01")
    return _handed_on(at, name)


def _ignored(at: AtNode) -> Any:
    text = "it changes how and where ComfyUI computes, not what"
    if at.class_type.endswith("Cache"):
        text = "it saves time by leaving steps out; here every step is computed"
    elif at.class_type == "PreviewAny":
        text = "it shows what is there"
    at.mistakes.note(f"{at.node.described()} is left out: {text}")
    names = [item.name for item in classes()[at.class_type].links]
    return tuple(_handed_on(at, name) if name in at.node.inputs else None for name in names)


def _handed_on(at: AtNode, name: str) -> Any:
    given = at.node.inputs.get(name)
    return given if isinstance(given, Value) else at.meaning(name, object)


VALUES: Mapping[str, Translator] = MappingProxyType(
    {
        **dict.fromkeys(PRIMITIVES, _primitive),
        **dict.fromkeys(("ComfyMathExpression", "SimpleCalculatorKJ", "SimpleMath+", "MathExpression|pysssss"), _math),
        **dict.fromkeys(IGNORED, _ignored),
        "ComfyNumberConvert": lambda at: (at.value("value", "FLOAT"), at.value("value", "INT")),
        "StringConcatenate": _concatenate,
        **dict.fromkeys(("ComfySwitchNode", "Any Switch (rgthree)"), _switch),
    }
)
