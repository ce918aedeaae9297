"""Recipes and what is laid over them, spoilt in every way that text can be."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence

NASTY = [
    *("", "~", "null", "true", "no", "0", "-1", "017", "0x10", "0o17", "1:30", "1e999", "-1e-999", ".inf", ".nan"),
    *("1.5", "9" * 41, "1" + "0" * 39, "-" + "9" * 30, str(2**63), str(2**64), "1_000", "2026-11-22", "+1", "1.", ".5"),
    *("5e-324", "$params", "$params.", "$params.x", "${", "${}", "${params.seed}", "$$params.seed", "$${", "$first"),
    *("$first.x", "$talk.latent.x", "$nodes.first", "$", "$$", "%s", "{0.__class__}", "__class__", "os.system"),
    *("!!python/name:os", "!!binary aGk=", "!t x", "&a", "*a", "*missing", "&a *a", "<<", "<<: *a", "? a", "- a"),
    *("---", "...", "%YAML 1.1", "[", "]", "{", "}", "[[", "{a: {b: 1}}", "{a: 1, a: 2}", "[1, 2", "'", '"', '"\\'),
    *('"\\ud800"', '"\\U0011ffff"', '"\\x00"', '"\\x1b[31m"', "\x1b[31m", "\x00", "\x7f", "\x85", "\u2028"),
    *("\u202e", "\ufeff", "\ud7ff", "\ue000", "\ufffe", "\U0001f600", "ё", "\t", "\r", "\r\n", "\u00a0", "# x"),
    *(": ", ":", ",", "|", ">", "|2", ">-9", "@", "`", "~/x", "/dev/zero", "/", "../../x", "C:\\x", "http://x/y"),
    *("file:x", "a\\u0000", "x" * 300, "x" * 70_000, "é" * 5000, "[" * 40, "{a: " * 40, "- " * 60),
]
"""What has surprised some reader of YAML, numbers, paths or terminals."""

_SCALAR = re.compile(r"(?<=[:,\[{] )[^\s,\[\]{}#][^,\[\]{}#\n]*|(?<=- )[^\s,\[\]{}#][^\n]*")
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def mutated(text: str, others: Sequence[str], chance: random.Random) -> bytes:
    """Return a recipe with one to four things changed: bytes, lines, values, or half of another recipe."""
    for _ in range(chance.choice((1, 1, 1, 2, 2, 4))):
        text = chance.choice(TEXT_CHANGES)(text, others, chance)[:1_200_000]
    data = text.encode("utf-8", "surrogatepass")
    if chance.random() < 0.15:
        data = _bytes_changed(data, chance)
    return data


def _line_changed(text: str, others: Sequence[str], chance: random.Random) -> str:
    lines = text.split("\n")
    at, other = chance.randrange(len(lines)), chance.randrange(len(lines))
    kind = chance.randrange(7)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(other, lines[at])
    elif kind == 2:
        lines[at], lines[other] = lines[other], lines[at]
    elif kind == 3:
        lines[at] = " " * chance.choice((1, 2, 3, 4, 8)) + lines[at]
    elif kind == 4:
        lines[at] = lines[at][chance.choice((1, 2, 4)) :]
    elif kind == 5:
        lines[at] = lines[at].replace(" ", chance.choice(("\t", "", "  ", "\u00a0")), chance.choice((1, 99)))
    else:
        lines[at:at] = lines[at : at + chance.choice((1, 5, 20))] * chance.choice((1, 2, 50))
    return "\n".join(lines)


def _value_changed(text: str, others: Sequence[str], chance: random.Random) -> str:
    found = list(_SCALAR.finditer(text))
    if not found:
        return chance.choice(NASTY)
    match = chance.choice(found)
    new = chance.choice(NASTY) if chance.random() < 0.7 else chance.choice(found)[0]
    return text[: match.start()] + new + text[match.end() :]


def _word_changed(text: str, others: Sequence[str], chance: random.Random) -> str:
    found = list(_WORD.finditer(text))
    if not found:
        return text + chance.choice(NASTY)
    match, other = chance.choice(found), chance.choice(found)
    new = chance.choice((other[0], match[0][:-1], match[0] + match[0][-1:], match[0].upper(), chance.choice(NASTY)))
    return text[: match.start()] + new + text[match.end() :]


def _spliced(text: str, others: Sequence[str], chance: random.Random) -> str:
    other = chance.choice(others)
    if chance.random() < 0.3:
        return text + "\n" + other
    lines, more = text.split("\n"), other.split("\n")
    return "\n".join(lines[: chance.randrange(len(lines) + 1)] + more[chance.randrange(len(more)) :])


def _inserted(text: str, others: Sequence[str], chance: random.Random) -> str:
    at = chance.randrange(len(text) + 1)
    return text[:at] + chance.choice(NASTY) * chance.choice((1, 1, 1, 3)) + text[at:]


def _cut(text: str, others: Sequence[str], chance: random.Random) -> str:
    first, last = sorted((chance.randrange(len(text) + 1), chance.randrange(len(text) + 1)))
    return text[:first] if chance.random() < 0.5 else text[:first] + text[last:]


def _nested(text: str, others: Sequence[str], chance: random.Random) -> str:
    depth = chance.choice((5, 31, 33, 500, 20_000))
    opening, closing = chance.choice((("[", "]"), ("{a: ", "}"), ("- ", ""), ("? ", ""), ("&a [*a, ", "]")))
    bomb = opening * depth + "1" + closing * chance.choice((0, depth))
    return _put_value(text, bomb, chance)


def _aliased(text: str, others: Sequence[str], chance: random.Random) -> str:
    levels = chance.choice((2, 5, 10, 20))
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, levels)]
    merged = [f"m{level}: &m{level} {{<<: [*m{level - 1}, *m{level - 1}]}}" for level in range(1, levels)]
    return text + "\n" + "\n".join(chance.choice((lines, merged))) + "\n"


def _many(text: str, others: Sequence[str], chance: random.Random) -> str:
    count = chance.choice((50, 300, 2000, 25_000))
    node, whole, inside = (
        "  n{0}: {{kind: load_image, file: a.png}}",
        "  p{0}: $params.p{1}",
        "  x{0}: ${{params.x{1}}}",
    )
    line = chance.choice((node, whole, inside))
    section = "nodes" if "kind" in line else "params"
    return f"{text}\n{section}:\n" + "\n".join(line.format(number, number + 1) for number in range(count)) + "\n"


def _put_value(text: str, value: str, chance: random.Random) -> str:
    found = list(_SCALAR.finditer(text))
    if not found:
        return value
    match = chance.choice(found)
    return text[: match.start()] + value + text[match.end() :]


def _bytes_changed(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data or b"x")
    for _ in range(chance.choice((1, 1, 3, 30))):
        at = chance.randrange(len(changed))
        changed[at] = chance.choice((changed[at] ^ (1 << chance.randrange(8)), 0, 0xFF, 0xC0, chance.randrange(256)))
    return bytes(changed)


TEXT_CHANGES: Sequence[Callable[[str, Sequence[str], random.Random], str]] = (
    *(_line_changed, _line_changed, _line_changed, _value_changed, _value_changed, _value_changed, _value_changed),
    *(_word_changed, _word_changed, _spliced, _inserted, _cut, _nested, _aliased, _many),
)

_PATHS = (
    *("steps", "params.steps", "seed", "nodes.first.steps", "nodes.dit.loras[lightning].strength", "prompt", "width"),
    *("nodes.dit.loras", "nodes.dit.loras[0]", "nodes.talk.chunks", "nodes.first.sampler", "nodes.voice.file"),
    *("nodes.talk.timeline", "nodes.talk.timeline[0].at", "nodes.first.model", "nodes.first.kind", "x", "", "a.b.c"),
    *("params", "nodes", "nodes.first", "nodes.first.steps.x", "nodes.dit.loras[lightning][0]", "[0]", "image"),
    *("description", "s2vflow"),
)
_JSON: Sequence[object] = (
    *(None, True, 0, -1, 20, 1.5, "x", "$params.seed", [], {}, [1], [{"id": "a", "file": "b.safetensors"}]),
    *({"at": "0s"}, [[[[[[]]]]]], {"a": {"b": 1}}, [None] * 3000, "\u2028", "\ud800"),
)

_SOUND = (
    *(("set", "steps=20"), ("set", "nodes.first.cfg=4.5"), ("set", "params.seed=7"), ("set", "nodes.talk.chunks=3")),
    *(("set-json", "nodes.dit.loras=[]"), ("set-json", 'prompt="no"'), ("set-file", "prompt=prompt.txt")),
    *(("unset", "nodes.first.shift"), ("unset", "seed"), ("-m", "seed=1..4"), ("-m", "cfg=1.0,4.5"), ("-p", "quality")),
)
"""Changes that most of the shipped recipes take."""


def override(chance: random.Random) -> tuple[str, str]:
    """Return a kind of change (set, set-json, set-file, unset, -m, -p) and its text."""
    if chance.random() < 0.4:
        return chance.choice(_SOUND)
    kind = chance.choice(("set", "set", "set-json", "set-json", "set-file", "unset", "-m", "-m", "-p"))
    path = chance.choice(_PATHS) if chance.random() < 0.9 else chance.choice(NASTY)[:200]
    value = chance.choice((*NASTY, "20", "4.5", "euler", "1..8", "1,2", "1..99999999999", "[1, 2]", "[],[{id: a}]"))
    if kind == "set-json":
        value = json.dumps(chance.choice(_JSON), ensure_ascii=chance.random() < 0.5) if chance.random() < 0.7 else value
    if kind == "set-file":
        value = chance.choice(("prompt.txt", "large.txt", "none.txt", ".", "/dev/zero", value[:300]))
    if kind in ("unset", "-p"):
        return kind, path if kind == "unset" else chance.choice(("quality", "bf16", "quality,bf16", path))
    text = f"{path}={value}" if chance.random() < 0.95 else path + value
    if chance.random() < 0.1:
        at = chance.randrange(len(text) + 1)
        text = text[:at] + chance.choice(NASTY)[:50] + text[at:]
    return kind, text
