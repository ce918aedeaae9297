"""Executing plans of toy nodes: what is computed, what is not, what is freed, and what damage does."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import Glue, Join, Length, LoadTool, Read, Save, Split, Word, Workshop, damage

from s2v_flow.cache.store import DamagedObjectError, Store
from s2v_flow.errors import MissingError, S2VFlowError
from s2v_flow.graph.context import Numerics
from s2v_flow.graph.events import Delivered, NodeCached, NodeFinished, NodeStarted, RunStarted
from s2v_flow.graph.node import Node
from s2v_flow.graph.ports import Ref

R = Ref.parse
HOW = ("flip", "cut", "extend", "empty", "delete", "keep")


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


def diamond(a: str = "a", left: str = "l", right: str = "r") -> dict[str, Node]:
    """One leaf, two ways, one join, one file."""
    return {
        "leaf": Word(text=a),
        "left": Join(a=R("$leaf"), suffix=left),
        "right": Join(a=R("$leaf"), suffix=right),
        "both": Join(a=R("$left"), b=R("$right")),
        "save": Save(a=R("$both"), file="out/saved.txt"),
    }


def test_each_node_runs_once_in_order_and_the_result_is_delivered(shop: Workshop) -> None:
    """Also a leaf with two users."""
    result = shop.run(diamond())
    assert shop.started() == ["leaf", "left", "right", "both", "save"]
    assert result.computed == ("leaf", "left", "right", "both", "save")
    assert result.cached == ()
    assert result.outputs == {"save": (shop.folder / "out/saved.txt",)}
    assert (shop.folder / "out/saved.txt").read_bytes() == b"alar"
    assert result.to_json() == {
        "outputs": {"save": [str(shop.folder / "out/saved.txt")]},
        "computed": ["leaf", "left", "right", "both", "save"],
        "stored": [],
    }


def test_events_announce_what_will_run_frame_each_node_and_end_with_the_file(shop: Workshop) -> None:
    """RunStarted names stored kinds only: live values are not waited for."""
    nodes = {"tool": LoadTool(), "word": Word(text="w"), **_users("tool", "save")}
    shop.run(nodes)
    assert [type(event) for event in shop.events] == [
        RunStarted, NodeStarted, NodeFinished, NodeStarted, NodeFinished, Delivered
    ]  # fmt: skip
    assert shop.events[0] == RunStarted(("word", "save"), 3)
    assert shop.events[-1] == Delivered("save", str(shop.folder / "save.txt"), changed=True)


def test_a_second_run_computes_nothing_and_makes_no_live_value(shop: Workshop) -> None:
    """Everything is stored; the file is up to date."""
    nodes = {"tool": LoadTool(), "word": Word(text="w"), **_users("tool", "save")}
    shop.run(nodes)
    result = shop.run(nodes)
    assert (shop.started(), shop.log) == ([], ["end"])
    assert result.cached == ("word", "save")
    assert shop.events == [RunStarted((), 3), Delivered("save", str(shop.folder / "save.txt"), changed=False)]


def test_another_field_reruns_only_what_is_downstream(shop: Workshop) -> None:
    """The other branch stays."""
    shop.run(diamond())
    shop.run(diamond(left="L"))
    assert shop.started() == ["left", "both", "save"]
    assert (shop.folder / "out/saved.txt").read_bytes() == b"aLar"
    shop.run(diamond())
    assert shop.started() == []
    assert (shop.folder / "out/saved.txt").read_bytes() == b"alar"


def test_equal_bytes_upstream_cut_a_rerun_short(shop: Workshop) -> None:
    """Another text of the same length: what uses the length does not run."""
    shop.run(_measured("abc"))
    result = shop.run(_measured("xyz"))
    assert shop.started() == ["word", "length"]
    assert [event.node for event in shop.events if isinstance(event, NodeCached)] == ["join", "save"]
    assert result.computed == ("word", "length")
    shop.run(_measured("xyz!"))
    assert shop.started() == ["word", "length", "join", "save"]


def test_other_numerics_count_only_where_a_kind_computes_with_tensors(shop: Workshop) -> None:
    """Toys do not."""
    shop.run(diamond())
    shop.numerics = Numerics("cuda")
    shop.run(diamond())
    assert shop.started() == []


def test_an_inputs_content_counts_and_its_name_does_not(shop: Workshop) -> None:
    """A copy under another name is a hit; an edited file is not."""
    for name, text in (("a.txt", "same"), ("b.txt", "same"), ("c.txt", "other")):
        (shop.folder / name).write_text(text)
    for name, computed in (("a.txt", ["read", "save"]), ("b.txt", []), ("c.txt", ["read", "save"])):
        shop.run({"read": Read(file=name), "save": Save(a=R("$read"), file="out.txt")})
        assert shop.started() == computed
    (shop.folder / "b.txt").write_text("edited")
    shop.run({"read": Read(file="b.txt"), "save": Save(a=R("$read"), file="out.txt")})
    assert (shop.folder / "out.txt").read_text() == "edited"


def test_a_digest_that_planning_did_not_know_is_found_at_run_time(shop: Workshop) -> None:
    """Large files are hashed by the run; what is stored is recognised then, and not computed."""
    (shop.folder / "a.txt").write_text("a")
    nodes = {"read": Read(file="a.txt"), "save": Save(a=R("$read"), file="out.txt")}
    shop.run(nodes)
    result = shop.run(nodes, assessed_with=lambda path: None)
    assert shop.statuses["save"].status == "RUN"
    assert (shop.started(), set(result.cached)) == ([], {"read", "save"})


def test_a_file_that_vanished_after_planning_is_an_error_that_names_it(shop: Workshop) -> None:
    """It is the user's to mend: exit code 4."""
    (shop.folder / "a.txt").write_text("a")
    nodes = {"read": Read(file="a.txt"), "save": Save(a=R("$read"), file="out.txt")}

    def vanishing(path: Path) -> None:
        path.unlink(missing_ok=True)

    with pytest.raises(MissingError, match=r"a\.txt"):
        shop.run(nodes, assessed_with=vanishing)


def test_live_values_are_closed_as_soon_as_nobody_needs_them(shop: Workshop) -> None:
    """Each is made at its first use and closed after its last, the user of another before the other."""
    nodes: dict[str, Node] = {
        "hammer": LoadTool(),
        "handle": LoadTool(),
        "axe": LoadTool(made_with=R("$handle")),
        "word": Word(text="w"),
        "one": Join(a=R("$word"), tool=R("$hammer"), suffix="1"),
        "two": Join(a=R("$one"), tool=R("$hammer"), suffix="2"),
        "three": Join(a=R("$two"), tool=R("$axe"), suffix="3"),
        "save": Save(a=R("$three"), file="out.txt"),
    }
    shop.run(nodes)
    assert shop.log == [
        "make hammer", "one uses hammer", "two uses hammer", "close hammer",
        "make handle", "make axe", "three uses axe", "close axe", "close handle", "end",
    ]  # fmt: skip


def test_a_live_value_is_closed_when_its_last_user_turns_out_to_be_stored(shop: Workshop) -> None:
    """After an early cut-off, too, nothing stays until the end; and nothing is made for it."""

    def nodes(text: str) -> dict[str, Node]:
        return {
            "handle": LoadTool(),
            "axe": LoadTool(made_with=R("$handle")),
            "word": Word(text=text),
            "first": Join(a=R("$word"), tool=R("$handle")),
            "length": Length(a=R("$first")),
            "second": Join(a=R("$length"), tool=R("$axe")),
            "last": Join(a=R("$second"), b=R("$first")),
            "save": Save(a=R("$last"), file="out.txt"),
        }

    shop.run(nodes("abc"))
    shop.run(nodes("xyz"))
    assert shop.started() == ["word", "first", "length", "last", "save"]
    assert shop.log == ["make handle", "first uses handle", "close handle", "end"]


def test_live_values_are_closed_after_a_failure(shop: Workshop) -> None:
    """What uses another first, each once."""
    nodes: dict[str, Node] = {
        "handle": LoadTool(),
        "axe": LoadTool(made_with=R("$handle")),
        "word": Word(text="w"),
        "bad": Join(a=R("$word"), tool=R("$axe"), fails="broken"),
        "save": Save(a=R("$bad"), file="out.txt"),
    }
    with pytest.raises(S2VFlowError, match="broken"):
        shop.run(nodes)
    assert shop.log == ["make handle", "make axe", "close axe", "close handle", "end"]


def test_a_failure_keeps_what_was_finished_and_the_next_run_goes_on_from_there(shop: Workshop) -> None:
    """The results before it are stored, the files of other branches are delivered, nothing half-made is left."""
    nodes = {
        **diamond(),
        "bad": Join(a=R("$both"), suffix="!", fails="broken"),
        "late": Save(a=R("$bad"), file="late.txt"),
    }
    with pytest.raises(S2VFlowError, match="broken"):
        shop.run(nodes)
    assert (shop.folder / "out/saved.txt").read_bytes() == b"alar"
    assert not (shop.folder / "late.txt").exists()
    assert list((shop.folder / "cache/tmp").iterdir()) == []
    shop.run({**nodes, "bad": Join(a=R("$both"), suffix="!")})
    assert shop.started() == ["bad", "late"]


@pytest.mark.parametrize("how", HOW[:-1])
def test_a_damaged_result_in_the_middle_is_computed_again(shop: Workshop, how: str) -> None:
    """With a warning where it was found on reading; what follows is the same; the bad bytes are put aside."""
    shop.run(diamond())
    damage(shop.object_of(b"al"), how)
    changed = {**diamond(), "both": Join(a=R("$left"), b=R("$right"), suffix="!")}
    shop.run(changed)
    assert sorted(shop.started()) == ["both", "left", "save"]
    assert shop.warnings() == (["left"] if how == "flip" else [])
    assert (shop.folder / "out/saved.txt").read_bytes() == b"alar!"
    assert len(list((shop.folder / "cache").glob("quarantine/*"))) == (1 if how == "flip" else 0)
    shop.run(changed)
    assert shop.started() == []


def test_the_tools_of_a_recomputed_node_are_closed_again(shop: Workshop) -> None:
    """A model loaded to mend one result does not stay until the end of the run."""
    nodes: dict[str, Node] = {
        "tool": LoadTool(),
        "word": Word(text="w"),
        "one": Join(a=R("$word"), tool=R("$tool"), suffix="1"),
        "two": Join(a=R("$one"), suffix="2"),
        "save": Save(a=R("$two"), file="out.txt"),
    }
    shop.run(nodes)
    damage(shop.object_of(b"w1"), "flip")
    shop.run({**nodes, "two": Join(a=R("$one"), suffix="3")})
    assert shop.log == ["make tool", "one uses tool", "close tool", "end"]
    assert (shop.folder / "out.txt").read_bytes() == b"w13"


def test_a_damaged_final_result_is_mended_on_delivery(shop: Workshop) -> None:
    """And everything behind it, if that is damaged as well."""
    shop.run(diamond())
    for path in shop.objects():
        damage(path, "flip")
    (shop.folder / "out/saved.txt").unlink()
    shop.run(diamond())
    assert (shop.folder / "out/saved.txt").read_bytes() == b"alar"
    assert set(shop.warnings()) == {"save", "both", "left", "right", "leaf"}
    shop.run(diamond())
    assert (shop.started(), shop.warnings()) == ([], [])


def test_a_disk_that_damages_everything_costs_a_run_only_time(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be read back just after writing is computed again, and held until nobody needs it."""

    def unreadable(self: Store, item: object, *more: object) -> bytes:
        raise DamagedObjectError.at(Path("x"), "Input/output error")

    monkeypatch.setattr(Store, "read", unreadable)
    shop.run(diamond())
    assert (shop.folder / "out/saved.txt").read_bytes() == b"alar"
    assert set(shop.warnings()) == {"leaf", "left", "right", "both"}
    monkeypatch.setattr(Store, "copy_to", unreadable)
    (shop.folder / "out/saved.txt").unlink()
    shop.run(diamond())
    assert (shop.folder / "out/saved.txt").read_bytes() == b"alar"
    assert list((shop.folder / "cache/tmp").iterdir()) == []


@pytest.mark.parametrize("how", HOW[:-1])
def test_a_damaged_entry_is_a_miss(shop: Workshop, how: str) -> None:
    """The node runs again, and what it gives is equal: nothing else does."""
    shop.run(diamond())
    (entry,) = (p for p in (shop.folder / "cache/entries").glob("*/*") if b'"node": "left"' in p.read_bytes())
    damage(entry, how)
    shop.run(diamond())
    assert shop.started() == ["left"]
    shop.run(diamond())
    assert shop.started() == []


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(hows=st.lists(st.sampled_from(HOW), min_size=10, max_size=10), change=st.booleans())
def test_no_damage_to_the_store_ever_changes_a_result(hows: list[str], change: bool) -> None:
    """Whatever happens to any of its files, the next run ends well, with the right bytes, and mends the store."""
    with tempfile.TemporaryDirectory() as folder:
        shop = Workshop(Path(folder))
        shop.run(diamond())
        files = sorted(path for path in (shop.folder / "cache").glob("[eo]*/*/*"))
        for path, how in zip(files, hows, strict=True):
            damage(path, how)
        right = "R" if change else "r"
        shop.run(diamond(right=right))
        assert (shop.folder / "out/saved.txt").read_text() == f"ala{right}"
        shop.run(diamond(right=right))
        assert shop.started() == []


def test_a_delivered_file_that_was_edited_or_removed_is_written_again(shop: Workshop) -> None:
    """From the store, without computing; an equal file is left alone."""
    path = shop.folder / "out/saved.txt"
    shop.run(diamond())
    for content, changed in ((b"alar", False), (b"ALAR", True), (b"longer than it was", True), (None, True)):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        shop.run(diamond())
        assert shop.started() == []
        assert shop.events[-1] == Delivered("save", str(path), changed=changed)
        assert path.read_bytes() == b"alar"


def test_an_old_file_at_the_outputs_place_is_no_input(shop: Workshop) -> None:
    """It is not read to compute the new one, and may be unreadable; identity does not know it."""
    nodes = {"word": Word(text="w"), "save": Save(a=R("$word"), file="old.txt")}
    (shop.folder / "old.txt").write_text("old")
    hashed: list[Path] = []
    shop.run(nodes, assessed_with=lambda path: hashed.append(path))
    assert hashed == []
    assert (shop.folder / "old.txt").read_text() == "w"


def test_another_output_path_is_no_reason_to_compute(shop: Workshop) -> None:
    """The stored result goes to the new place as well."""
    shop.run(diamond())
    shop.run({**diamond(), "save": Save(a=R("$both"), file="elsewhere.txt")})
    assert shop.started() == []
    assert (shop.folder / "elsewhere.txt").read_bytes() == b"alar"


def test_an_input_of_many_parts_keeps_their_order(shop: Workshop) -> None:
    """One more letter computes one more part, and the other parts are stored."""

    def nodes(count: int) -> dict[str, Node]:
        split = {"word": Word(text="parts"), "split": Split(a=R("$word"), count=count)}
        return {**split, "glue": Glue(parts=R("$split")), "save": Save(a=R("$glue"), file="out.txt")}

    shop.run(nodes(4))
    assert (shop.folder / "out.txt").read_bytes() == b"part"
    shop.run(nodes(5))
    assert shop.started() == ["split[5]", "glue", "save"]
    assert (shop.folder / "out.txt").read_bytes() == b"parts"


def test_without_a_file_to_write_the_last_nodes_are_what_a_run_is_for(shop: Workshop) -> None:
    """They are computed and stored."""
    result = shop.run({"word": Word(text="w"), "one": Join(a=R("$word")), "two": Join(a=R("$word"), suffix="2")})
    assert result.computed == ("word", "one", "two")
    assert result.outputs == {}


@pytest.mark.slow
def test_a_chain_of_3000_nodes_runs(shop: Workshop) -> None:
    """Depth costs no stack. Most of these are found stored on the way: the length of "1" is "1"."""
    nodes: dict[str, Node] = {"n0": Word(text="w")}
    nodes |= {f"n{i}": Length(a=R(f"$n{i - 1}")) for i in range(1, 3000)}
    nodes["save"] = Save(a=R("$n2999"), file="out.txt")
    assert shop.run(nodes).computed == ("n0", "n1", "n2", "save")
    assert (shop.folder / "out.txt").read_bytes() == b"1"


@pytest.mark.slow
def test_a_chain_of_400_damaged_results_is_mended(shop: Workshop) -> None:
    """However far back the damage reaches, it costs no stack; a chain of 200 would, node within node."""
    nodes: dict[str, Node] = {"n0": Word(text="w")}
    nodes |= {f"n{i}": Join(a=R(f"$n{i - 1}"), suffix="x") for i in range(1, 400)}
    nodes["save"] = Save(a=R("$n399"), file="out.txt")
    shop.run(nodes)
    for path in shop.objects():
        damage(path, "flip")
    (shop.folder / "out.txt").unlink()
    assert len(shop.run(nodes).computed) == 401
    assert (shop.folder / "out.txt").read_bytes() == b"w" + 399 * b"x"


def _users(tool: str, name: str) -> dict[str, Node]:
    return {name: Save(a=R("$word"), tool=R(f"${tool}"), file=f"{name}.txt")}


def _measured(text: str) -> dict[str, Node]:
    return {
        "word": Word(text=text),
        "length": Length(a=R("$word")),
        "join": Join(a=R("$length"), suffix=" letters"),
        "save": Save(a=R("$join"), file="out.txt"),
    }
