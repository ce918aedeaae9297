from __future__ import annotations

import time

import networkx as nx

from s2v_flow.graph.node import Node
from s2v_flow.graph.ports import Ref
from s2v_flow.nodes.load import LoadLatent, LoadVae
from s2v_flow.nodes.load_media import LoadAudio, LoadImage
from s2v_flow.nodes.sample import Extend
from s2v_flow.nodes.save import SaveImages, SaveLatent
from s2v_flow.recipe.load import link


def extend(video: str) -> Extend:
    return Extend(video=Ref.parse(video))


def clip() -> LoadLatent:
    return LoadLatent(file="clip.latent")


def test_edges_lead_from_a_node_to_those_that_use_it_and_name_the_field() -> None:
    """An edge carries the first input that it feeds."""
    nodes: dict[str, Node] = {
        "out": SaveLatent(latent=Ref("more"), file="o"),
        "clip": clip(),
        "more": extend("$clip.latent"),
    }
    graph, problems = link(nodes)
    assert problems == []
    assert list(graph) == ["out", "clip", "more"]
    assert dict(graph.edges) == {
        ("clip", "more"): {"field": "video"},
        ("more", "out"): {"field": "latent"},
    }
    assert list(nx.topological_sort(graph)) == ["clip", "more", "out"]


def test_every_faulty_reference_is_named_with_advice() -> None:
    """Unknown node, unknown port, wrong type, no output, self: all at once, and no edges of them."""
    nodes: dict[str, Node] = {
        "clip": clip(),
        "face": LoadImage(file="a.png"),
        "unknown": extend("$clpi"),
        "port": extend("$clip.frames"),
        "type": extend("$face"),
        "sink": SaveImages(frames=Ref("out"), file="a.png"),
        "out": SaveLatent(latent=Ref("clip"), file="o"),
        "self": extend("$self"),
    }
    graph, problems = link(nodes)
    assert [(problem.node, problem.field, problem.code) for problem in problems] == [
        ("unknown", "video", "R020"),
        ("port", "video", "R021"),
        ("type", "video", "R022"),
        ("sink", "frames", "R021"),
        ("self", "video", "R023"),
    ]
    assert problems[0].fix == "did you mean $clip?"
    assert problems[2].message == "video: latent expected, $face is an image"
    assert problems[2].fix == "nodes that give latent: $clip, $unknown, $port, $self"
    assert problems[3].fix == "no other node gives frames"
    assert list(graph.edges) == [("clip", "out")]


def test_nodes_that_are_not_checked_are_not_missed() -> None:
    """A reference to a node with mistakes of its own says nothing."""
    assert link({"more": extend("$broken")}, unchecked={"broken"})[1] == []


def test_each_knot_of_cycles_is_shown_once_as_a_way_round() -> None:
    """The way starts at the first node of the file and is the shortest one; other nodes are not in it."""
    nodes: dict[str, Node] = {
        "before": clip(),
        "a": extend("$c"),
        "b": extend("$a"),
        "c": extend("$b"),
        "after": extend("$a"),
        "x": extend("$y"),
        "y": extend("$x"),
    }
    _, problems = link(nodes)
    assert [problem.message for problem in problems] == [
        "video: nodes depend on themselves: a -> b -> c -> a",
        "video: nodes depend on themselves: x -> y -> x",
    ]
    assert [problem.node for problem in problems] == ["a", "x"]


def test_long_cycles_and_wide_graphs_take_no_time() -> None:
    """1,000 nodes in one circle, and 1,000 users of one node, are linked in a second."""
    circle: dict[str, Node] = {f"n{i}": extend(f"$n{(i - 1) % 1000}") for i in range(1000)}
    wide: dict[str, Node] = {"clip": clip(), **{f"n{i}": extend("$clip") for i in range(1000)}}
    dangling: dict[str, Node] = {f"n{i}": extend(f"$m{i}") for i in range(1000)}
    started = time.process_time()
    assert len(link(circle)[1]) == 1
    assert link(wide)[0].out_degree("clip") == 1000
    assert len(link(dangling)[1]) == 1000
    assert time.process_time() - started < 3


def test_types_differ_even_where_the_node_has_one_output() -> None:
    """Sound is no picture."""
    _, problems = link({"vae": LoadVae(checkpoint="a"), "voice": LoadAudio(file="a"), "more": extend("$voice")})
    assert [problem.message for problem in problems] == ["video: latent expected, $voice is audio"]
