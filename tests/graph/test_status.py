"""What a plan says it would do, and why."""

from __future__ import annotations

from pathlib import Path

import pytest
from toy import Glue, Join, Length, LoadTool, Read, Save, Split, Word, Workshop, digest, plan_toys

from s2v_flow.graph.context import Numerics
from s2v_flow.graph.fingerprint import fingerprint
from s2v_flow.graph.node import Node
from s2v_flow.graph.ports import Ref, Source
from s2v_flow.graph.status import needed_nodes, output_digests, preimage
from s2v_flow.nodes.chunk import EncodeMotion

R = Ref.parse
NEW = "never ran with these inputs and settings"
NEEDLESS = "not needed: what follows is stored"


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/tool.bin").write_bytes(b"tool")
    (tmp_path / "text.txt").write_text("text")
    return Workshop(tmp_path)


def nodes(suffix: str = "", text: str = "text.txt", tool: str = "tool.bin") -> dict[str, Node]:
    return {
        "tool": LoadTool(file=tool),
        "handle": LoadTool(made_with=R("$tool")),
        "read": Read(file=text),
        "join": Join(a=R("$read"), tool=R("$handle"), suffix=suffix),
        "length": Length(a=R("$join")),
        "save": Save(a=R("$length"), file="out.txt"),
    }


def told(shop: Workshop, planned: dict[str, Node], file_digest: object = digest) -> dict[str, tuple[str, str]]:
    statuses = shop.assess(planned, file_digest)  # type: ignore[arg-type]
    return {name: (status.status, status.reason) for name, status in statuses.items()}


def test_before_the_first_run_everything_is_to_do(shop: Workshop) -> None:
    """Files are read, live values made; what follows something unknown waits for it."""
    assert told(shop, nodes()) == {
        "tool": ("LOAD", "read when it is needed"),
        "handle": ("RUN", "made as it is used, never stored"),
        "read": ("LOAD", "read when it is needed"),
        "join": ("RUN", "waits for read"),
        "length": ("RUN", "waits for join"),
        "save": ("RUN", "waits for length"),
    }
    assert not (shop.folder / "cache").exists(), "looking makes nothing"


def test_after_a_run_everything_is_stored_and_nothing_is_loaded(shop: Workshop) -> None:
    """With the entry and the fingerprint at hand."""
    shop.run(nodes())
    statuses = shop.assess(nodes())
    assert {name: status.status for name, status in statuses.items()} == {
        "tool": "SKIP", "handle": "SKIP", "read": "HIT", "join": "HIT", "length": "HIT", "save": "HIT",
    }  # fmt: skip
    assert statuses["tool"].reason == NEEDLESS
    for status in statuses.values():
        assert status.entry is None or status.entry.fingerprint == status.fingerprint


def test_a_changed_field_is_to_run_and_what_follows_waits(shop: Workshop) -> None:
    """What it needs is stored or loaded."""
    shop.run(nodes())
    assert told(shop, nodes(suffix="!")) == {
        "tool": ("LOAD", "read when it is needed"),
        "handle": ("RUN", "made as it is used, never stored"),
        "read": ("HIT", "stored"),
        "join": ("RUN", "nodes.join.suffix: '' -> '!'"),
        "length": ("RUN", "waits for join"),
        "save": ("RUN", "waits for length"),
    }


def test_only_a_lost_end_is_made_again(shop: Workshop) -> None:
    """Its inputs are stored; what is behind them is not needed."""
    shop.run(nodes())
    (saved,) = (path for path in shop.objects() if path.suffix == ".txt")
    saved.unlink()
    found = told(shop, nodes())
    assert found["save"] == ("RUN", NEW)
    assert found["tool"] == found["handle"] == ("SKIP", NEEDLESS)
    assert {found[name][0] for name in ("read", "join", "length")} == {"HIT"}


def test_a_missing_file_is_the_reason(shop: Workshop) -> None:
    """Of the loader; what follows waits for that."""
    found = told(shop, nodes(text="gone.txt", tool="gone.bin"))
    assert found["read"] == ("LOAD", "gone.txt is missing")
    assert found["tool"] == ("LOAD", "gone.bin is missing")
    assert found["handle"] == ("RUN", "made as it is used, never stored")
    assert found["join"] == ("RUN", "waits for read")


def test_a_file_that_is_not_hashed_yet_is_the_reason(shop: Workshop) -> None:
    """Large models are not read while planning."""
    found = told(shop, nodes(), lambda path: None if path.suffix == ".bin" else digest(path))
    assert found["tool"] == ("LOAD", "tool.bin has not been read yet")
    assert found["join"][0] == "RUN"


def test_what_counts_is_kind_version_fields_files_inputs_and_numerics(shop: Workshop) -> None:
    """The whole pre-image, literally: no path, no name, no time."""
    plan = plan_toys(nodes(suffix="s"), shop.folder)
    numerics = Numerics("cuda")
    known = {Source("read", "text"): "sha256:r", Source("handle", "tool"): "h.tool"}
    assert preimage(plan.node("join"), numerics, digest, known.get) == {
        "kind": "join",
        "version": 1,
        "fields": {"suffix": "s"},
        "inputs": {"a": "sha256:r", "tool": "h.tool"},
    }
    assert preimage(plan.node("tool"), numerics, lambda path: "0" * 64, known.get) == {
        "kind": "load_tool",
        "version": 1,
        "fields": {"file": "sha256:" + "0" * 64},
        "inputs": {},
    }
    assert preimage(plan.node("save"), numerics, digest, known.get) == "waits for length"


def test_parts_count_in_order(shop: Workshop) -> None:
    """An input of parts is a list of digests."""
    planned = plan_toys({"w": Word(text="ab"), "s": Split(a=R("$w"), count=2), "g": Glue(parts=R("$s"))}, shop.folder)
    known = {Source("s[1]", "part"): "one", Source("s[2]", "part"): "two"}
    image = preimage(planned.node("g"), Numerics("cpu"), digest, known.get)
    assert isinstance(image, dict)
    assert image["inputs"] == {"parts": ["one", "two"]}
    del known[Source("s[2]", "part")]
    assert preimage(planned.node("g"), Numerics("cpu"), digest, known.get) == "waits for s[2]"


def test_kinds_that_compute_with_tensors_count_the_device_but_not_its_index() -> None:
    """The policy stands in the pre-image of such a kind and changes its fingerprint."""
    assert EncodeMotion.has_numerics
    assert Numerics("cuda").identity() == {"device": "cuda", "attention": "sdpa"}
    assert fingerprint(Numerics("cuda").identity()) != fingerprint(Numerics("cpu").identity())


def test_the_version_of_a_kind_counts(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raising it makes what is stored a miss."""
    shop.run(nodes())
    monkeypatch.setattr(Length, "version", 2)
    found = told(shop, nodes())
    assert found["length"] == ("RUN", "the kind length has changed in s2vflow (version 1 -> 2)")
    assert found["join"][0] == "HIT"


def test_what_is_not_stored_is_known_by_its_fingerprint(shop: Workshop) -> None:
    """A stored kind without an entry gives no digest: it must be computed first."""
    plan = plan_toys(nodes(), shop.folder)
    assert output_digests(plan.node("tool"), "f" * 64, None) == {Source("tool", "tool"): f"{'f' * 64}.tool"}
    assert output_digests(plan.node("join"), "f" * 64, None) == {}


def test_needed_is_what_is_not_stored_back_to_what_is(shop: Workshop) -> None:
    """From the outputs."""
    plan = plan_toys(nodes(), shop.folder)
    assert needed_nodes(plan, set()) == set(nodes())
    assert needed_nodes(plan, {"join"}) == {"length", "save"}
    assert needed_nodes(plan, {"read", "length"}) == {"save"}
    assert needed_nodes(plan, {"save"}) == set()
