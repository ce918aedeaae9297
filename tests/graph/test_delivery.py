"""A file that is replaced by another: before and when it happens, that is said."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from toy import Save, Word, Workshop, plan_toys

from s2v_flow.graph.events import Noted
from s2v_flow.graph.node import Node
from s2v_flow.graph.ports import Ref
from s2v_flow.graph.status import replacing

R = Ref.parse


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


def nodes(text: str) -> dict[str, Node]:
    return {"word": Word(text=text), "save": Save(a=R("$word"), file="out.txt")}


def planned(shop: Workshop, text: str) -> list[str]:
    return list(replacing(plan_toys(nodes(text), shop.folder), shop.assess(nodes(text))))


def said(shop: Workshop) -> list[str]:
    return [event.text for event in shop.events if isinstance(event, Noted)]


def test_a_users_file_is_not_replaced_in_silence(shop: Workshop) -> None:
    """The plan says it before, the run when it happens: which file it was."""
    path = shop.folder / "out.txt"
    path.write_text("mine")
    os.utime(path, (0, 86_400 * 365))
    (line,) = planned(shop, "w")
    assert line.startswith(f"file: {path} stands there (4 B, written 1971-01-0")
    assert line.endswith(") and will be replaced; another file, or ${params.seed} in it, keeps both")
    shop.run(nodes("w"))
    (line,) = said(shop)
    assert line.startswith(f"file: {path} stood there (4 B, written 1971-01-0")
    assert line.endswith(") and was replaced; another file, or ${params.seed} in it, keeps both")
    assert path.read_text() == "w"


def test_a_result_in_the_place_of_another_result_is_told(shop: Workshop) -> None:
    """As with two seeds and one name; a stored result counts as well."""
    for text in ("seed 1", "seed 2", "seed 1"):
        expected = (shop.folder / "out.txt").exists()
        assert len(planned(shop, text)) == expected
        shop.run(nodes(text))
        assert len(said(shop)) == expected


def test_the_same_result_replaces_nothing(shop: Workshop) -> None:
    """Nor does another note behind the same film, nor equal bytes that were not stored any more."""
    shop.run(nodes("w"))
    assert planned(shop, "w") == []
    shop.run(nodes("w"))
    assert said(shop) == []
    (shop.folder / "out.txt").write_bytes(b"w and a note of an earlier version")
    assert planned(shop, "w") == []
    shop.run(nodes("w"))
    assert said(shop) == []
    assert (shop.folder / "out.txt").read_bytes() == b"w"
    for path in shop.objects():
        path.unlink()
    shop.run(nodes("w"))
    assert said(shop) == []


def test_a_new_file_replaces_nothing(shop: Workshop) -> None:
    assert planned(shop, "w") == []
    shop.run(nodes("w"))
    assert said(shop) == []
