"""Planning toys: what is kept, in which order, and what is found wrong."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from toy import Glue, Join, LoadTool, Read, Save, Split, Word, plan_toys, toy_spec

from s2v_flow.errors import RecipeError, RefusedError
from s2v_flow.graph.build import build_plan
from s2v_flow.graph.locations import Locations, Missing
from s2v_flow.graph.node import Node
from s2v_flow.graph.ports import Ref, Source, Value

R = Ref.parse


def names(nodes: dict[str, Node], folder: Path) -> list[str]:
    return [node.name for node in plan_toys(nodes, folder).nodes]


def test_only_what_an_output_needs_is_planned(tmp_path: Path) -> None:
    """Nodes that lead nowhere are left out, with what only they need."""
    nodes: dict[str, Node] = {
        "used": Word(text="w"),
        "lost": Word(text="x"),
        "alone": Join(a=R("$lost"), b=R("$used")),
        "save": Save(a=R("$used"), file="out.txt"),
    }
    assert names(nodes, tmp_path) == ["used", "save"]


def test_an_input_that_is_not_given_is_no_input(tmp_path: Path) -> None:
    """Nor is one whose node has no value in the plan."""
    plan = plan_toys({"w": Word(text="w"), "j": Join(a=R("$w"))}, tmp_path)
    assert plan.node("j").inputs == {"a": Source("w", "text")}
    assert list(plan.node("j").sources()) == [Source("w", "text")]


def test_several_outputs_keep_what_each_needs_in_the_recipes_order(tmp_path: Path) -> None:
    """What two of them need stands once."""
    nodes: dict[str, Node] = {
        "b": Word(text="b"),
        "a": Word(text="a"),
        "both": Join(a=R("$a"), b=R("$b")),
        "one": Save(a=R("$b"), file="1.txt"),
        "two": Save(a=R("$both"), file="2.txt"),
    }
    assert names(nodes, tmp_path) == ["b", "a", "both", "one", "two"]


def test_where_the_graph_leaves_a_choice_lower_stages_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the recipe's order; what depends on a later stage still waits for it."""
    monkeypatch.setattr(Join, "stage", 1)
    nodes: dict[str, Node] = {
        "a": Word(text="a"),
        "big": Join(a=R("$a")),
        "after": Read(file="x"),
        "b": Word(text="b"),
        "last": Join(a=R("$big"), b=R("$b")),
    }
    (tmp_path / "x").write_text("x")
    assert names(nodes, tmp_path) == ["a", "after", "b", "big", "last"]
    assert names({**nodes, "use": Join(a=R("$after"), b=R("$last"))}, tmp_path) == [
        "a", "after", "b", "big", "last", "use"
    ]  # fmt: skip


def test_without_outputs_everything_is_planned(tmp_path: Path) -> None:
    """A recipe may be for its stored results only."""
    assert names({"a": Word(text="a"), "b": Word(text="b"), "c": Join(a=R("$a"))}, tmp_path) == ["a", "b", "c"]


def test_each_part_is_a_node_of_its_own(tmp_path: Path) -> None:
    """The words are the recipe's; an input of parts holds them in order, even if there is one."""
    for count in (1, 3):
        nodes = {"w": Word(text="abc"), "s": Split(a=R("$w"), count=count), "g": Glue(parts=R("$s"))}
        plan = plan_toys(nodes, tmp_path)
        parts = [f"s[{i + 1}]" for i in range(count)]
        assert [node.name for node in plan.nodes] == ["w", *parts, "g"]
        assert plan.node("g").inputs == {"parts": tuple(Source(part, "part") for part in parts)}
        assert {(plan.node(part).recipe_node, plan.node(part).kind) for part in parts} == {("s", "split")}
        assert plan.notes == (f"s: {count} letters",)


def test_a_value_of_one_part_refuses_to_be_many() -> None:
    """`source` is for ports that have exactly one."""
    with pytest.raises(ValueError, match="unpack"):
        _ = Value("latent", (Source("a", "x"), Source("b", "x"))).source


def test_files_are_missed_once_and_only_where_they_are_needed(tmp_path: Path) -> None:
    """All of them at once; what was found has its path."""
    (tmp_path / "there.txt").write_text("x")
    nodes: dict[str, Node] = {
        "there": Read(file="there.txt"),
        "gone": Read(file="gone.txt"),
        "again": Read(file="gone.txt"),
        "needless": Read(file="needless.txt"),
        "tool": LoadTool(file="tool.bin"),
        "one": Join(a=R("$there"), b=R("$gone")),
        "two": Join(a=R("$one"), b=R("$again"), tool=R("$tool")),
        "save": Save(a=R("$two"), file="out.txt"),
    }
    plan = plan_toys(nodes, tmp_path)
    assert plan.node("there").files == {("file",): tmp_path / "there.txt"}
    assert plan.node("gone").files == {}
    assert plan.node("save").files == {("file",): tmp_path.resolve() / "out.txt"}
    looked_in = (str(tmp_path / "vae"), str(tmp_path / "old_vae"))
    assert plan.missing == (
        Missing("gone.txt", "text", (), (str(tmp_path),)),
        Missing("tool.bin", "vae", (), looked_in),
    )


def test_every_mistake_of_planning_is_told_at_once_by_place(tmp_path: Path) -> None:
    """What depends on a node that cannot be planned says nothing of its own."""
    nodes: dict[str, Node] = {
        "w": Word(text="abc"),
        "s": Split(a=R("$w"), count=0),
        "t": Split(a=R("$w"), count=0),
        "g": Glue(parts=R("$s")),
    }
    with pytest.raises(RecipeError) as caught:
        plan_toys(dict(reversed(nodes.items())), tmp_path)
    found = [(item.code, item.place and item.place.line) for item in caught.value.diagnostics]
    assert found == [("R099", 2), ("R099", 3)]


def test_outputs_outside_the_recipes_folder_are_refused_unless_typed(tmp_path: Path) -> None:
    """A value of --set is the user's own; a file that merely bears that name is not the command line."""
    outside = tmp_path / "outside.txt"
    inside = tmp_path / "recipes"
    inside.mkdir()

    def planned(file: str) -> Path:
        specs = {
            "w": toy_spec("w", Word(text="w"), inside, file),
            "s": toy_spec("s", Save(a=R("$w"), file=str(outside)), inside, file),
        }
        return build_plan(specs, ["w", "s"], Locations()).node("s").files["file",]

    assert planned("--set") == outside.resolve()
    for file in ("r.yaml", "--set.yaml", "--x", "recipes/--set"):
        with pytest.raises(RefusedError, match="outside"):
            planned(file)
    (inside / "--set").write_text("a recipe says `extends: --set`")
    with pytest.raises(RefusedError, match="outside"):
        planned("--set")


def test_a_chain_of_1000_nodes_and_a_fan_of_1000_outputs_are_planned_quickly(tmp_path: Path) -> None:
    """Time grows with the graph, not with its square."""
    chain: dict[str, Node] = {"n0": Word(text="w")}
    chain |= {f"n{i}": Join(a=R(f"$n{i - 1}")) for i in range(1, 1000)}
    fan: dict[str, Node] = {"w": Word(text="w"), **{f"s{i}": Save(a=R("$w"), file=f"{i}.txt") for i in range(1000)}}
    started = time.process_time()
    assert names(chain, tmp_path) == list(chain)
    assert names(fan, tmp_path) == list(fan)
    assert time.process_time() - started < 3
