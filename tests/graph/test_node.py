"""What a kind says of itself: ports, files, and what of it counts."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import pytest
from pydantic import Field, ValidationError
from toy import Join, LoadTool, Save

from s2v_flow.graph.context import Numerics
from s2v_flow.graph.fingerprint import fingerprint
from s2v_flow.graph.node import Node
from s2v_flow.graph.ports import FileField, Neutral, Port, Ref
from s2v_flow.nodes.load import LoadDiffusionModel, LoadVae, Lora
from s2v_flow.nodes.save import SaveVideo
from s2v_flow.nodes.table import NODE_KINDS

CPU = Numerics("cpu").precision
LORA_DIGESTS = {("checkpoint",): "sha256:c", ("loras", 0, "file"): "sha256:0", ("loras", 1, "file"): "sha256:1"}


def identity(*loras: Lora, digests: dict[Any, str] | None = None) -> str:
    node = LoadDiffusionModel(checkpoint="c.safetensors", loras=list(loras))
    return fingerprint(node.identity(digests or LORA_DIGESTS, CPU))


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        ("$vae", Ref("vae")),
        ("$vae.latent", Ref("vae", "latent")),
        ("$a-b_1.c-d", Ref("a-b_1", "c-d")),
        *((bad, None) for bad in ("vae", "$", "$1", "$a.b.c", "$a.", "$a b", " $a", "$a\n", "$$a", "${a}", "$ä")),
    ],
)
def test_references_are_read_whole_or_not_at_all(text: str, ref: Ref | None) -> None:
    """And are written as they are read."""
    if ref is None:
        with pytest.raises(ValueError, match="expected a reference"):
            Ref.parse(text)
    else:
        assert Ref.parse(text) == ref
        assert str(ref) == text


def test_ports_are_found_also_where_they_are_optional() -> None:
    """With their type and whether they are required; a field without a port is no input."""
    assert Join.input_ports() == {
        "a": (Port("conditioning"), True),
        "b": (Port("conditioning"), False),
        "tool": (Port("vae"), False),
    }
    assert Join(a=Ref("x"), b=Ref("y")).refs() == {"a": Ref("x"), "b": Ref("y")}


def test_fields_are_strict_closed_and_frozen() -> None:
    """Nothing is guessed, nothing unknown is let in, nothing changes."""
    with pytest.raises(ValidationError, match="valid string"):
        Join(a=Ref("x"), suffix=1)
    with pytest.raises(ValidationError, match="Extra inputs"):
        Join(a=Ref("x"), sufix="")
    with pytest.raises(ValidationError, match="frozen"):
        Join(a=Ref("x")).suffix = "y"
    with pytest.raises(ValidationError, match="expected a reference like"):
        Join(a=3)


def test_files_are_found_inside_lists_and_where_they_are_optional() -> None:
    """With the path of the field; what is not given is no file."""
    node = LoadDiffusionModel(checkpoint="c", loras=[Lora(id="x", file="a"), Lora(id="y", file="b")])
    assert [(path, mark.role, text) for path, mark, text in node.files()] == [
        (("checkpoint",), "model", "c"),
        (("loras", 0, "file"), "model", "a"),
        (("loras", 1, "file"), "model", "b"),
    ]
    assert list(LoadTool().files()) == []
    assert LoadTool.file_fields() == {"file": FileField("model", "VAE", ("vae", "old_vae"))}


def test_a_loras_name_and_tolerance_do_not_count() -> None:
    """Neither changes what is computed."""
    one = identity(Lora(id="x", file="a"), Lora(id="y", file="b"))
    assert one == identity(Lora(id="p", file="a", allow_partial=True), Lora(id="q", file="b"))


def test_a_loras_path_does_not_count_but_its_content_does() -> None:
    """A renamed file is the same LoRA."""
    one = identity(Lora(id="x", file="a"))
    assert one == identity(Lora(id="x", file="b"))
    assert one != identity(Lora(id="x", file="a"), digests={**LORA_DIGESTS, ("loras", 0, "file"): "sha256:9"})


def test_a_loras_strength_and_place_count() -> None:
    """So does there being one at all."""
    a, b = Lora(id="x", file="a"), Lora(id="y", file="b")
    swapped = {("checkpoint",): "sha256:c", ("loras", 0, "file"): "sha256:1", ("loras", 1, "file"): "sha256:0"}
    identities = [
        identity(a, b),
        identity(b, a, digests=swapped),
        identity(a),
        identity(),
        identity(Lora(id="x", file="a", strength=0.5), b),
        identity(a, Lora(id="y", file="b", strength=0.5)),
    ]
    assert len(set(identities)) == len(identities)


def test_whole_numbers_stand_for_floats() -> None:
    """strength: 1 and strength: 1.0 are one recipe."""
    assert identity(Lora(id="x", file="a", strength=1)) == identity(Lora(id="x", file="a", strength=1.0))


def test_where_a_result_is_written_does_not_count() -> None:
    """How it is encoded does."""
    one = SaveVideo(frames=Ref("f"), file="a.mp4").identity({}, CPU)
    assert one == SaveVideo(frames=Ref("g"), file="b.mp4").identity({}, CPU)
    assert one != SaveVideo(frames=Ref("f"), file="a.mp4", crf=19).identity({}, CPU)
    assert "file" not in one
    assert Save.neutral_fields() == {"file"}


def test_the_resolved_precision_counts_not_the_word_for_it() -> None:
    """auto on a CPU is fp32; on a GPU it is not."""
    digests = {("checkpoint",): "sha256:c"}
    auto, exact = LoadVae(checkpoint="c"), LoadVae(checkpoint="c", precision="fp32")
    assert auto.identity(digests, CPU) == exact.identity(digests, CPU)
    cuda = Numerics("cuda").precision
    assert auto.identity(digests, cuda) != exact.identity(digests, cuda)
    assert cuda("load_audio_encoder", "auto") == "fp32"


def test_an_optional_neutral_field_is_neutral() -> None:
    """The mark is found inside `X | None`, too."""

    class Labelled(Node):
        kind: ClassVar[str] = "labelled"

        label: Annotated[str, Neutral()] | None = None
        number: int = 0

    assert Labelled(label="x", number=1).identity({}, CPU) == {"number": 1}


@pytest.mark.parametrize("kind", NODE_KINDS, ids=lambda kind: kind.kind)
def test_every_kind_keeps_the_rules(kind: type[Node]) -> None:
    """What planning and running rely on, and what becomes help text."""
    assert kind.__doc__
    assert all(info.description for info in kind.model_fields.values())
    outputs = {name for name, mark in kind.file_fields().items() if mark.role == "output"}
    assert outputs <= kind.neutral_fields(), "an output's path has no digest"
    assert kind.is_sink == bool(outputs)
    assert kind.is_stored or not kind.is_sink, "only what is stored can be delivered"
    assert bool(kind.outputs) != kind.is_sink


def test_kinds_have_names_of_their_own() -> None:
    """Recipes and fingerprints tell them apart by it."""
    assert len({kind.kind for kind in NODE_KINDS}) == len(NODE_KINDS)


def test_a_kind_that_is_planned_as_others_does_not_run() -> None:
    """To call it is a defect."""

    class Abstract(Node):
        kind: ClassVar[str] = "abstract"

        number: int = Field(0)

    with pytest.raises(RuntimeError, match="abstract is planned as other nodes"):
        Abstract().run(None, {})  # type: ignore[arg-type]
