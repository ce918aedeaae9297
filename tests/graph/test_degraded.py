"""A result made with less than was asked for is another result: stored under what it is, never taken for the other."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pytest
from toy import Save, Text, Tool, Word, Workshop

from s2v_flow.graph.fingerprint import fingerprint
from s2v_flow.graph.node import Node
from s2v_flow.graph.ports import Ref

R = Ref.parse


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    return Workshop(tmp_path)


class Memory:
    """How much there is; the toys below ask."""

    tiles: ClassVar[int] = 0


class Shout(Node):
    """Its input in capitals, or, with little memory, only the first letter of it."""

    kind: ClassVar[str] = "shout"
    outputs: ClassVar = {"text": "conditioning"}
    is_stored: ClassVar[bool] = True

    a: Text

    def run(self, context: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
        text = inputs["a"].read().upper()
        if Memory.tiles:
            context.record(degraded={"tiles": Memory.tiles})
        return {"text": text[:1] if Memory.tiles else text}


class Stream(Node):
    """A live value that turns out, while it is used, to be made with less."""

    kind: ClassVar[str] = "stream"
    outputs: ClassVar = {"tool": "vae"}

    made_with: Tool | None = None

    def run(self, context: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
        class Use:
            def use(self, by: str) -> None:
                if "made_with" in inputs:
                    inputs["made_with"].use(by)
                elif Memory.tiles:
                    context.facts["degraded"] = {"tiles": Memory.tiles}

        return {"tool": Use()}


class Loud(Save):
    kind: ClassVar[str] = "loud"
    loudness: Annotated[int, "counts"] = 1


def nodes(**more: Node) -> dict[str, Node]:
    return {"word": Word(text="abc"), "shout": Shout(a=R("$word")), "save": Save(a=R("$shout"), file="out.txt"), **more}


@pytest.fixture(autouse=True)
def tiles(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(Memory, "tiles", 2)
    return monkeypatch


def test_a_degraded_result_is_stored_under_its_own_identity(shop: Workshop) -> None:
    """What follows is made of its bytes; the plan says why it is not used, and with memory it is made as asked."""
    result = shop.run(nodes())
    asked, entry = shop.statuses["shout"], result.entries["shout"]
    assert entry.preimage["degraded"] == entry.facts["degraded"] == {"tiles": 2}
    assert entry.fingerprint == fingerprint(entry.preimage) != asked.fingerprint
    assert shop.store.lookup(entry.fingerprint) == entry
    assert (shop.folder / "out.txt").read_bytes() == b"A"
    found = shop.assess(nodes())["shout"]
    assert (found.status, found.fingerprint) == ("RUN", entry.preimage and _asked(entry.preimage))
    assert found.reason == "its last result was made with less memory than it needs: tiles 2"
    Memory.tiles = 0
    shop.run(nodes())
    assert shop.started() == ["shout", "save"]
    assert (shop.folder / "out.txt").read_bytes() == b"ABC"
    assert shop.assess(nodes())["shout"].status == "HIT"


def _asked(preimage: Mapping[str, Any]) -> str:
    return fingerprint({name: part for name, part in preimage.items() if name != "degraded"})


def test_the_same_shortage_gives_the_same_result(shop: Workshop) -> None:
    """It is made again, for there might be memory; what follows is stored already."""
    first = shop.run(nodes()).entries["shout"]
    again = shop.run(nodes())
    assert shop.started() == ["shout"]
    assert again.entries["shout"] == first
    assert again.cached == ("word", "save")


def test_what_a_live_value_was_made_with_counts_for_who_uses_it(shop: Workshop) -> None:
    """However far upstream, whatever kind of file is made of it."""
    made = {"stream": Stream(), "cut": Stream(made_with=R("$stream")), "word": Word(text="w")}
    made["save"] = Save(a=R("$word"), tool=R("$cut"), file="out.txt")
    entry = shop.run(made).entries["save"]
    assert entry.preimage["degraded"] == entry.facts["degraded"] == {"tiles": 2}
    Memory.tiles = 0
    assert shop.assess(made)["save"].reason.startswith("its last result was made with less memory")
    entry = shop.run(made).entries["save"]
    assert "degraded" not in entry.preimage
    assert shop.assess(made)["save"].status == "HIT"


def test_another_difference_is_named_before_the_shortage(shop: Workshop) -> None:
    shop.run(nodes())
    changed = {**nodes(), "word": Word(text="xyz")}
    shop.run({"word": Word(text="xyz")})
    assert shop.assess(changed)["shout"].reason == "input a is another"
