from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from s2v_flow.errors import Place, RecipeError
from s2v_flow.recipe import reader
from s2v_flow.recipe.problems import Problems, StopReadingError
from s2v_flow.recipe.reader import Source, read_yaml
from s2v_flow.recipe.tree import ListValue, MapValue, Scalar, origins_of, path_text, plain


def read(text: str | bytes) -> Any:
    """Read text that is right."""
    problems = Problems()
    tree = read_yaml(text if isinstance(text, bytes) else text.encode(), Source("r.yaml", Path("/base"), ()), problems)
    problems.raise_any("r.yaml")
    return tree


def codes(text: str | bytes) -> list[str]:
    """Return the codes of what is wrong with a text, and check that reading it takes no time."""
    problems = Problems()
    started = time.process_time()
    with contextlib.suppress(StopReadingError):
        read_yaml(text if isinstance(text, bytes) else text.encode(), Source("r.yaml", Path(), ()), problems)
    assert time.process_time() - started < 2  # a bound on strangers' data, on a busy machine
    with pytest.raises(RecipeError) as caught:
        problems.raise_any("r.yaml")
    return [diagnostic.code for diagnostic in caught.value.diagnostics]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"), ("off", "off"), ("on", "on"), ("yes", "yes"), ("y", "y"), ("NO", "NO"),
        ("017", 17), ("0o17", 15), ("0x1F", 31), ("-017", -17), ("+5", 5), ("0", 0), ("0x", "0x"), ("08", 8),
        ("1:30", "1:30"), ("16:9", "16:9"), ("1e3", 1000.0), ("1e-4", 1e-4), ("1.", 1.0), (".5", 0.5), ("-.5e+1", -5.0),
        ("1_000", "1_000"), ("2024-01-01", "2024-01-01"), ("0b11", "0b11"), ("1.2.3", "1.2.3"),
        ("null", None), ("Null", None), ("~", None), ("", None), ("nil", "nil"), ("none", "none"),
        ("true", True), ("True", True), ("TRUE", True), ("false", False), ("tRUE", "tRUE"),
        ("'12'", "12"), ('"true"', "true"), ("=", "="), ("e5", "e5"), ("infinity", "infinity"),
        ("18446744073709551615", 2**64 - 1),
    ],
)  # fmt: skip
def test_plain_scalars_are_read_as_yaml_1_2_core(text: str, value: object) -> None:
    """What YAML 1.1 guesses to be truth values, sexagesimals, octals and dates is text or a decimal number in 1.2."""
    result = plain(read(f"a: {text}"))["a"]
    assert result == value
    assert type(result) is type(value)


def test_every_value_and_key_knows_where_it_was_written() -> None:
    """Lines and columns count from 1, Chinese characters count as one, and line breaks may be CRLF."""
    tree = read("# 提示\r\na:\r\n  提示: [1, 'two' , {x: 3}]\r\n")
    assert isinstance(tree, MapValue)
    origins = origins_of(tree)
    assert origins["a", "提示", 1].place == Place("r.yaml", 3, 11)
    assert origins["a", "提示", 1].width == 5
    assert origins["a", "提示", 2, "x"].place == Place("r.yaml", 3, 23)
    assert origins["a", "提示", 1].excerpt == "  提示: [1, 'two' , {x: 3}]"
    assert origins["a", "提示", 1].base_dir == Path("/base")
    assert tree.entries["a"].key_origin.place == Place("r.yaml", 2, 1)
    assert path_text(tree, ("a", "提示", 2, "x")) == "a.提示[2].x"


def test_aliases_repeat_a_value_with_the_origin_of_its_anchor() -> None:
    """A handful of aliases is allowed."""
    tree = read("a: &x {b: [1]}\nc: *x\n")
    assert plain(tree) == {"a": {"b": [1]}, "c": {"b": [1]}}
    assert origins_of(tree)["c", "b", 0].place == Place("r.yaml", 1, 12)


def test_quotes_and_blocks_make_text() -> None:
    """Only plain scalars can be numbers."""
    tree = read("- '1'\n- |\n  1\n- >-\n  true\n")
    assert isinstance(tree, ListValue)
    assert plain(tree) == ["1", "1\n", "true"]
    assert all(isinstance(item, Scalar) and item.is_quoted for item in tree.items)


ALIAS_BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGE_BOMB = "a: &a {x: 1}\n" + "".join(f"b{i}: &b{i} {{<<: [*a, *a]}}\n" for i in range(25))


@pytest.mark.parametrize(
    ("text", "code"),
    [
        pytest.param(ALIAS_BOMB, "R004", id="alias bomb"),
        pytest.param("a: &a [" + "x," * 9000 + "]\nb: [*a, *a, *a]", "R004", id="three aliases of a long list"),
        pytest.param("a: &a " + "[" * 20 + "]" * 20 + "\nb: " + "[" * 20 + "*a" + "]" * 20, "R004", id="deep by alias"),
        pytest.param(MERGE_BOMB, "R004", id="merge bomb"),
        pytest.param("{<<: {a: 1}}", "R005", id="merge key"),
        pytest.param("[" * 30_000, "R004", id="deep flow list"),
        pytest.param("- " * 50_000, "R004", id="deep block list"),
        pytest.param("{a: " * 40_000, "R004", id="deep flow map"),
        pytest.param("? " * 50_000, "R004", id="deep keys"),
        pytest.param("&a [*a]", "R009", id="self-reference"),
        pytest.param("*a", "R009", id="unknown alias"),
        pytest.param("a: " + "1" * 5000, "R008", id="5,000 digits"),
        pytest.param("a: -" + "9" * 500_000, "R008", id="500,000 digits"),
        pytest.param("a: 1e999", "R008", id="overflow"),
        pytest.param("a: .inf", "R008", id="infinity"),
        pytest.param("a: .NaN", "R008", id="not a number"),
        pytest.param("a: " + "x" * 1_000_001, "R004", id="too long"),
        pytest.param("\n".join(f"k{i}: v" for i in range(30_000)), "R004", id="too many keys"),
        pytest.param("".join(f"%TAG !a{i}! x\n" for i in range(50_000)) + "--- a", "R005", id="directives"),
        pytest.param("%YAML 1.1\n--- a", "R005", id="version directive"),
        pytest.param("a: !!python/object/apply:os.system [ls]", "R005", id="python tag"),
        pytest.param("a: !!python/name:os.system ''", "R005", id="python name"),
        pytest.param("a: !include x.yaml", "R005", id="custom tag"),
        pytest.param("a: !!str 5", "R005", id="standard tag"),
        pytest.param("a: ! 5", "R005", id="non-specific tag"),
        pytest.param("!!map {a: 1}", "R005", id="tag on a map"),
        pytest.param("1: a", "R007", id="number as key"),
        pytest.param("true: a", "R007", id="truth value as key"),
        pytest.param("~: a", "R007", id="null as key"),
        pytest.param("?\n: a", "R007", id="no key"),
        pytest.param("? [a, [b]]\n: c", "R007", id="list as key"),
        pytest.param("? {a: 1}\n: c", "R007", id="map as key"),
        pytest.param("a: &x y\n? *x\n: c", "R007", id="alias as key"),
        pytest.param("a: 1\nb: 2\na: 3", "R006", id="repeated key"),
        pytest.param("{a: 1, 'a': 2}", "R006", id="repeated key in quotes"),
        pytest.param("--- a\n--- b", "R005", id="two documents"),
        pytest.param(b"a: \x00", "R003", id="NUL"),
        pytest.param(b"a: '\x1b[31m'", "R003", id="escape sequence"),
        pytest.param('a: "\\0"', "R003", id="escaped NUL"),
        pytest.param('a: "\\ud800"', "R001", id="half a surrogate pair"),
        pytest.param('a: "\\UFFFFFFFF"', "R001", id="no such character"),
        pytest.param("a: 1".encode("utf-16-le"), "R003", id="UTF-16 without its mark"),
        pytest.param(b"\xff\xfea", "R003", id="half a character of UTF-16"),
        pytest.param(b"a: \xff", "R003", id="no UTF-8"),
        pytest.param(b"a: \xed\xa0\x80", "R003", id="surrogate in UTF-8"),
        pytest.param("a: \ufeffb", "R003", id="byte order mark inside"),
        pytest.param("a: [1", "R001", id="open list"),
        pytest.param("a: b: c", "R001", id="two colons"),
        pytest.param("a:\n\tb: 1", "R001", id="tab"),
    ],
)  # fmt: skip
def test_what_a_recipe_may_not_hold_is_refused_quickly(text: str | bytes, code: str) -> None:
    """Bombs, tags, merge keys, odd keys and odd bytes are refused before anything is built of them."""
    assert code in codes(text)


def test_the_limits_themselves_are_allowed() -> None:
    """32 levels and 16 aliases are within the limits."""
    assert plain(read("[" * 32 + "]" * 32))
    assert len(plain(read("[&a x" + ", *a" * 16 + "]"))) == 17


def test_the_parser_is_not_asked_for_more_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the text is, reading stops at the first event too many, and at the first level too deep."""
    taken = 0

    def counted(text: bytes, **options: Any) -> Iterator[Any]:
        nonlocal taken
        for event in parse(text, **options):
            taken += 1
            yield event

    parse = yaml.parse
    monkeypatch.setattr(reader.yaml, "parse", counted)
    for text, most in (("[" + "a," * 490_000 + "]", reader.MAX_EVENTS + 1), ("[" * 490_000, reader.MAX_DEPTH + 3)):
        taken = 0
        assert codes(text) == ["R004"]
        assert taken in (most, 1)  # 1: libyaml's scanner, which reads ahead, refused the depth itself


def test_the_parser_without_libyaml_reads_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyYAML's own parser, used where libyaml is missing, yields the same tree, places and codes."""
    text = "# c\na: [1, 'two', {x: 3}]\nb:\n  - >\n    long\n    text\n  - &y ~\n  - *y\n"
    expected = read(text)
    monkeypatch.setattr(reader, "_LOADER", yaml.SafeLoader)
    assert read(text) == expected
    for bad, code in (("[" * 300, "R004"), ('a: "\\UFFFFFFFF"', "R001"), ('a: "\\ud800"', "R003"), ("a: [1", "R001")):
        assert code in codes(bad)


def test_a_pipe_or_a_device_is_not_waited_for(tmp_path: Path) -> None:
    """Only regular files are read."""
    problems = Problems()
    with pytest.raises(StopReadingError):
        reader.read_file(tmp_path, "folder", problems)
    with pytest.raises(StopReadingError):
        reader.read_file(Path("/dev/zero"), "/dev/zero", problems)
    with pytest.raises(RecipeError) as caught:
        problems.raise_any("r.yaml")
    assert [diagnostic.code for diagnostic in caught.value.diagnostics] == ["R002", "R002"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
def test_what_editors_of_windows_save_is_read(encoding: str) -> None:
    """UTF-8 with a byte order mark and UTF-16 with one, lines with CRLF; places count as if the mark were not there."""
    text = "a: [1]\r\nprompt: caf\u00e9\r\n"
    data = (b"\xfe\xff" if encoding == "utf-16-be" else b"") + text.encode(encoding)
    tree = read(data)
    assert isinstance(tree, MapValue)
    assert plain(tree) == {"a": [1], "prompt": "caf\u00e9"}
    assert origins_of(tree)["a", 0].place == Place("r.yaml", 1, 5)


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ('a: "C:\\Users\\x"', "single quotes"),
        ('a: "C:\\data"', "single quotes"),
        ('a: "D:\\models"', "path with /"),
        ('a: "C:\\x\\y"', "path with /"),
        ('a: "C:\\Uploads"', "path with /"),
        ("a: She says: hello", "in quotes"),
        ("a: @home", "in quotes"),
        ("a: `x`", "in quotes"),
        ("a: %x", "in quotes"),
        ("a: *smiles*", "in quotes"),
        ("a: &x& y", "in quotes"),
        ("a: > text", "in quotes"),
        ("a: - text", "in quotes"),
        ("a: , text", "in quotes"),
        ("a: 'The man's guitar'", "a ' is written ''"),
        ('a: "Hello" she said', "quotes"),
        ("a: [happy] man", "quotes"),
        ('a: "open\nb: 1', "close the quotes"),
        ("a: 'open\nb: 1", "close the quotes"),
        ('a: "x\nb: "y"', "quotes"),
        ("a:\n\tb: 1", "spaces, not tabs"),
        ("a:\n  b: 1\n\tc: 2", "spaces, not tabs"),
        ("a: [1, 2", "close the list"),
    ],
)  # fmt: skip
def test_the_usual_slips_are_advised_on(text: str, advice: str) -> None:
    problems = Problems()
    with pytest.raises(StopReadingError):
        read_yaml(text.encode(), Source("r.yaml", Path("/base"), ()), problems)
    with pytest.raises(RecipeError) as caught:
        problems.raise_any("r.yaml")
    (found,) = caught.value.diagnostics
    assert (found.code, advice in (found.fix or "")) == ("R001", True), found
