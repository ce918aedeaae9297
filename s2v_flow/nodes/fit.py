"""Do a recipe's models fit each other? Found at planning, from the headers of their files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from s2v_flow.errors import CheckpointError
from s2v_flow.graph.plan import Plan, PlanNode
from s2v_flow.graph.ports import Source
from s2v_flow.nodes.chunk import Chunk
from s2v_flow.weights.layout import EMBEDDING_COPY_KEY, EMBEDDING_KEY, num_layers
from s2v_flow.weights.reader import Checkpoint, Shapes

_Size = Callable[[Shapes], int]


def _text_width(shapes: Shapes) -> int:
    return shapes[EMBEDDING_KEY if EMBEDDING_KEY in shapes else EMBEDDING_COPY_KEY][1]


# By the encoder's loader: what has to be equal, in the encoder's file and in the diffusion model's.
_FITS: Mapping[str, Sequence[tuple[str, _Size, _Size]]] = {
    "load_text_encoder": (
        ("features of width {}", _text_width, lambda dit: dit["text_embedding.0.weight"][1]),
    ),
    "load_audio_encoder": (
        (
            "{} layers",
            lambda encoder: num_layers(encoder, "encoder.layers"),
            lambda dit: dit["casual_audio_encoder.weights"][1] - 1,  # and what goes into the first
        ),
        (
            "features of width {}",
            lambda encoder: encoder["encoder.layer_norm.weight"][0],
            lambda dit: dit["casual_audio_encoder.encoder.conv1_local.conv.weight"][1],
        ),
    ),
    "load_vae": (
        (
            "{} latent channels",
            lambda vae: vae["conv2.weight"][0],
            lambda dit: dit["patch_embedding.weight"][1],
        ),
    ),
}  # fmt: skip


def check_fit(plan: Plan) -> None:
    """Compare the diffusion model of every chunk with the encoders of what it is conditioned on.

    Raises:
        CheckpointError: They are of different depth or width.
    """
    opened: dict[Path, Shapes] = {}

    def shapes(node: PlanNode) -> Shapes:
        path = node.files["checkpoint",]
        if path not in opened:
            opened[path] = Checkpoint.open(path).shapes
        return opened[path]

    pairs = {}
    for chunk in plan.nodes:
        model = chunk.inputs.get("model")
        if isinstance(chunk.node, Chunk) and isinstance(model, Source):
            makers = (plan.node(source.node) for source in chunk.sources())
            encoders = (plan.node(source.node) for maker in makers for source in maker.sources())
            pairs.update({(model.node, encoder.name): encoder for encoder in encoders if encoder.kind in _FITS})
    for (name, _), encoder in pairs.items():
        dit = plan.node(name)
        if not all(node.files.get(("checkpoint",), Path()).is_file() for node in (dit, encoder)):
            continue
        for words, size, wanted in _FITS[encoder.kind]:
            found, needed = size(shapes(encoder)), wanted(shapes(dit))
            if found != needed:
                raise CheckpointError(
                    f"{encoder.files['checkpoint',]}: has {words.format(found)}, the model needs {needed}",
                    fix=f"name another file in node {encoder.name}, or another model in node {name}",
                )
