"""Parts of a plan, run from the demo's plan without computing anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from s2v_flow.api import Options, Planned, plan, require_files
from s2v_flow.errors import ExitCode, S2VFlowError
from s2v_flow.graph.status import Selection

DEMO = Path(__file__).parents[1] / "untrained.yaml"


def planned(folder: Path, selection: Selection) -> Planned:
    made = plan(DEMO, Options(selection=selection, cache_dir=folder, device="cpu"))
    require_files(made)
    return made


def test_until_leaves_out_what_comes_after(tmp_path: Path) -> None:
    """The last node is the named one; a name of the plan picks one chunk, a name of the recipe all."""
    assert planned(tmp_path, Selection(until=("speech",))).plan.nodes[-1].name == "speech"
    names = [node.name for node in planned(tmp_path, Selection(until=("talk[2]",))).plan.nodes]
    assert names[-1] == "talk[2]"
    assert not {"talk[3]", "frames", "video", "vae"} & set(names) - {"vae"}
    assert planned(tmp_path, Selection(until=("talk",))).plan.nodes[-1].name == "talk[4]"


def test_force_takes_a_node_and_with_a_plus_what_follows(tmp_path: Path) -> None:
    """Frames are decoded anew with what is before them. What is not stored at all, such as a loader, is not forced."""
    made = planned(tmp_path, Selection()).plan
    assert Selection(force=("talk[3]",)).forced(made) == {"talk[3]"}
    assert Selection(force=("talk[3]+",)).forced(made) == {"talk[3]", "talk[4]", "frames", "video"}
    assert Selection(force=("dit",)).forced(made) == frozenset()
    assert "positive" in Selection(is_fresh=True).forced(made)


@pytest.mark.parametrize(
    ("selection", "lacking"),
    [
        (Selection(is_cached_only=True), "positive, negative, speech"),
        (Selection(only=("first",)), "positive, negative, speech"),
        (Selection(start="talk"), "first"),
    ],
)
def test_what_may_not_be_computed_must_be_stored(tmp_path: Path, selection: Selection, lacking: str) -> None:
    """The error names what is lacking and leaves with the code for missing things."""
    made = planned(tmp_path, selection)
    with pytest.raises(S2VFlowError, match=lacking) as error:
        selection.check(made.plan, made.statuses)
    assert error.value.exit_code == ExitCode.MISSING


@pytest.mark.parametrize(
    ("selection", "text"),
    [
        (Selection(is_fresh=True, is_cached_only=True), "--no-cache computes anew what --cache-only takes as it is"),
        (Selection(force=("talk[2]",), is_cached_only=True), "--force computes anew .* as it is stored: talk\\[2\\]"),
        (Selection(is_fresh=True, only=("talk",)), "--no-cache computes anew what --only takes"),
        (Selection(force=("first+",), start="frames"), "--force computes anew what --from takes"),
    ],
)
def test_options_that_contradict_each_other_are_refused_by_every_plan(
    tmp_path: Path, selection: Selection, text: str
) -> None:
    with pytest.raises(S2VFlowError, match=text) as error:
        planned(tmp_path, selection)
    assert error.value.exit_code == ExitCode.USAGE
    planned(tmp_path, Selection(is_fresh=True, until=("talk",), force=("talk",)))
    planned(tmp_path, Selection(force=("talk[2]", "vae"), only=("talk[2]",)))


def test_an_unknown_name_is_a_mistake_on_the_command_line(tmp_path: Path) -> None:
    """The nearest known name is in the fix."""
    with pytest.raises(S2VFlowError, match="tolk") as error:
        planned(tmp_path, Selection(until=("tolk",)))
    assert error.value.exit_code == ExitCode.USAGE
    assert "talk" in str(error.value.fix)
