"""What a plan's nodes need, memory and arithmetic, before anything ran: from model files' headers and the video's size.

Nothing is loaded; the formulas are those of `models.footprint`. What is measured beside them stands in
docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from s2v_flow.errors import ExitCode, S2VFlowError
from s2v_flow.graph.context import Numerics, Way
from s2v_flow.graph.estimate import Flops, Needs
from s2v_flow.graph.node import Plan, PlanNode
from s2v_flow.models.footprint import (
    Weights,
    chunk_bytes,
    chunk_flops,
    decoding_bytes,
    encoder_flops,
    encoding_bytes,
    latent_bytes,
    read_weights,
    tile_side,
    vae_flops,
)
from s2v_flow.models.speech_rate import num_features, num_rows, num_states
from s2v_flow.nodes.chunk import FRAMES_PER_CALL, Chunk, DecodeChunk, EncodeControl, EncodeMotion
from s2v_flow.nodes.decode import DecodeFrames
from s2v_flow.nodes.encode import EncodeAudio, EncodeImage
from s2v_flow.sampling import CALLS_PER_STEP
from s2v_flow.weights.tokenizer import MAX_TOKENS
from s2v_flow.wording import size_text

PROCESS_BYTES = 275 * 2**20  # resident in a process that has imported torch and codecs (Linux, torch 2.13)
_ENCODERS_BYTES = 117 * 2**20  # and transformers' UMT5 and Wav2Vec2
_HEAP = 1.3  # the process's growth while frames are decoded, of what torch holds: pieces of glibc's heap stay free
_FLOPS_PER_PIXEL = 100.0  # of copying, scaling and writing a frame: it matters where nothing is decoded
_WAYS = {
    "placement": "weights are streamed",
    "in_turn": "the branches of guidance run one after the other",
    "frames_per_call": "fewer latent frames are decoded at once",
}
_LOADERS = frozenset({"load_diffusion_model", "load_text_encoder", "load_audio_encoder", "load_vae"})


def needs(plan: Plan, to_compute: Collection[str], numerics: Numerics, limit: int | None = None) -> dict[str, Needs]:
    """Compute what nodes need, where the files that say so are there.

    Where that is more than `limit`, ways are chosen that take less and give the same bits: on a GPU weights are
    streamed ("placement"), the branches of guidance run in turn ("in_turn"), fewer latent frames are decoded at once
    ("frames_per_call").

    Returns, by node, what it needs while it runs (on a GPU, of its memory): its own work, and every model that is live
    then. Loaders and frames are among them where a way was chosen for them. `limit`: in bytes; None: none.
    """
    found = _Needs(plan, to_compute, numerics)
    needed = found.all()
    while limit is not None and found.shrink([name for name, need in needed.items() if (need.peak_bytes or 0) > limit]):
        needed = found.all()
    return needed


def ways_text(found: Mapping[str, Needs]) -> str:
    """Say what is done otherwise to take less memory: "weights are streamed, ..."; "" where nothing is."""
    chosen = {name for need in found.values() for name in need.way}
    return ", ".join(text for name, text in _WAYS.items() if name in chosen)


def require_room(found: Mapping[str, Needs], vram: int, device: str) -> None:
    """Refuse what cannot be held to a budget of `vram` bytes, in any way.

    Raises:
        S2VFlowError: With figures.
    """
    name, need = max(found.items(), key=lambda item: item[1].peak_bytes or 0, default=("", Needs()))
    peak = need.peak_bytes or 0
    if peak > vram:
        text = [size_text(size, is_memory=True) for size in (vram, peak, peak - need.work_bytes, need.work_bytes)]
        ways = f", though {ways_text({name: need})}" if need.way else ""
        raise S2VFlowError(
            f"vram: {text[0]} are too little for {name}, which takes about {text[1]} on {device}: {text[2]} of models "
            f"and {text[3]} beside them{ways}",
            fix="a larger --vram, a smaller width and height, a shorter length, more tiles in decode, or bf16",
            exit_code=ExitCode.OUT_OF_MEMORY,
        )


class _Needs:
    def __init__(self, plan: Plan, to_compute: Collection[str], numerics: Numerics) -> None:
        self._plan = plan
        self._numerics = numerics
        self._order = [node for node in plan.nodes if node.name in to_compute]
        self._weights: dict[str, Weights | None] = {}
        self._users: dict[str, set[str]] = {}  # of a node: what it is made with that is not stored, and how far back
        self._work: dict[object, int | None] = {}
        self._live: dict[str, list[str]] = {}  # the loaders whose models are live while a node runs
        self._ways: dict[str, dict[str, Any]] = {}

    def shrink(self, names: Collection[str]) -> bool:
        """Let these nodes take less in the next way of each, once where they share it; tell whether there was any."""
        changes = {at: way for name in names for at, way in self._less(name).items()}
        self._ways.update(changes)
        for loader in changes.keys() & self._weights.keys():
            del self._weights[loader]
        return bool(changes)

    def _less(self, name: str) -> dict[str, dict[str, Any]]:
        """Return the next way in which a node takes less memory, by the nodes that are to go it."""
        of = self._plan.node(name).node
        for loader in filter(self._can_stream, self._live[name]):
            return {loader: {"placement": "streamed"}}
        if isinstance(of, Chunk):
            has_way = "negative" in self._plan.node(name).inputs and "in_turn" not in self._ways.get(name, ())
            return {name: {"in_turn": True}} if has_way else {}
        decoders = [name] if isinstance(of, DecodeChunk) else [node.name for node in self._decoders(name)]
        counts = {decoder: self._frames_per_call(decoder) for decoder in decoders}
        return {decoder: {"frames_per_call": n // 2} for decoder, n in counts.items() if n > 1}

    def _can_stream(self, loader: str) -> bool:
        """Return whether there is a choice: on a CPU there is none, and compiled blocks stay on the device."""
        node: Any = self._plan.node(loader).node
        is_dit = node.kind == "load_diffusion_model" and self._numerics.device_class != "cpu"
        return is_dit and node.placement == "auto" and node.compile == "off" and loader not in self._ways

    def _frames_per_call(self, name: str) -> int:
        node = self._plan.node(name).node
        asked = node.frames_per_call if isinstance(node, DecodeFrames) else FRAMES_PER_CALL
        return int(self._ways.get(name, {}).get("frames_per_call", asked))

    def _way(self, name: str) -> Way:
        """Return all that is done otherwise while a node runs."""
        found: dict[str, Any] = {}
        for other in (*self._live[name], *(node.name for node in self._decoders(name)), name):
            found |= self._ways.get(other, {})
        return found

    def all(self) -> dict[str, Needs]:
        """Return every node's needs."""
        first: dict[str, int] = {}
        last: dict[str, int] = {}
        for position, node in enumerate(self._order):
            for name in self._loaders(node.name):
                first.setdefault(name, position)
                last[name] = position
        kinds = {self._plan.node(name).kind for name in first}
        is_encoded = not kinds.isdisjoint(("load_text_encoder", "load_audio_encoder"))
        found, base = {}, PROCESS_BYTES + is_encoded * _ENCODERS_BYTES if self._numerics.device_class == "cpu" else 0
        for position, node in enumerate(self._order):
            self._live[node.name] = [name for name in first if first[name] <= position <= last[name]]
            live = [self._loaded(name) for name in self._live[node.name]]
            work = self._work_of(node)
            sizes = [None if model is None else model.num_bytes for model in live]
            peak = None if work is None or None in sizes else base + work + sum(size or 0 for size in sizes)
            used = [self._loaded(name) for name in sorted(self._loaders(node.name))]
            weights = "+".join(f"{model.num_bytes}/{model.item_bytes}" for model in used if model is not None)
            weights, way = "" if None in used else weights, self._way(node.name)
            found[node.name] = Needs(peak, self._stored(node), self._flops(node), weights, base + (work or 0), way)
        return {**{name: Needs(way=way) for name, way in self._ways.items()}, **found}

    def _loaders(self, name: str) -> set[str]:
        """Return the loaders of the models that a node uses, through whatever is made as it is used."""
        if name not in self._users:
            found = set()
            for source in self._plan.node(name).sources():
                upstream = self._plan.node(source.node)
                if upstream.node.kind in _LOADERS:
                    found.add(upstream.name)
                elif not upstream.node.is_stored:
                    found |= self._loaders(upstream.name)
            self._users[name] = found
        return self._users[name]

    def _loaded(self, name: str) -> Weights | None:
        """Return a loader's model; None where its file is missing."""
        if name not in self._weights:
            loader = self._plan.node(name)
            path = loader.files.get(("checkpoint",))
            self._weights[name] = None
            if path is not None and path.is_file():
                kind, asked = loader.node.kind, getattr(loader.node, "precision", "auto")
                on_cpu = self._numerics.device_class == "cpu"
                placement = self._ways.get(name, vars(loader.node)).get("placement", "auto")
                is_streamed = not on_cpu and placement == "streamed"
                precision = self._numerics.precision(kind, asked)
                found = read_weights(path, kind, precision, on_cpu=on_cpu, is_streamed=is_streamed)
                if found.is_packed and found.num_blocks:  # LoRAs stay beside such weights, of streamed ones two blocks'
                    files = (file for field, file in loader.files.items() if field[0] == "loras" and file.is_file())
                    loras = sum(file.stat().st_size for file in files) * (2 if is_streamed else found.num_blocks)
                    found = replace(found, num_bytes=found.num_bytes + loras // found.num_blocks)
                self._weights[name] = found
        return self._weights[name]

    def _model(self, node: PlanNode, key: str) -> Weights | None:
        given = node.inputs.get(key)
        return None if given is None or isinstance(given, tuple) else self._loaded(given.node)

    def _work_of(self, node: PlanNode) -> int | None:
        """Return what a node's own work takes; computed once for all nodes of one shape."""
        work = _WORK.get(type(node.node).kind)
        if work is None:
            return self._frames_work(node)
        size = repr(node.node.model_copy(update={"seed": 0, "audio_offset": 0, "text": ""}))
        way = self._ways.get(node.name, {})
        models = tuple(sorted(self._loaders(node.name)))
        key = (size, repr(way), frozenset(node.inputs), models, node.facts.get("num_samples"))
        if key not in self._work:
            self._work[key] = work(node, self._model, way)
        return self._work[key]

    def _frames_work(self, node: PlanNode) -> int | None:
        """Return the decoder's work where frames are decoded as they are used; 0 for all that only copies."""
        found = [self._decoding(decoder) for decoder in self._decoders(node.name)]
        return None if None in found else max((work or 0 for work in found), default=0)

    def _decoders(self, name: str) -> Iterator[PlanNode]:
        """Yield the nodes whose frames are decoded as a node uses them."""
        pending = [name]
        while pending:
            for source in self._plan.node(pending.pop()).sources():
                upstream = self._plan.node(source.node)
                if isinstance(upstream.node, DecodeFrames):
                    yield upstream
                elif not upstream.node.is_stored and upstream.node.kind not in _LOADERS:
                    pending.append(upstream.name)

    def _flops(self, node: PlanNode) -> Flops | None:
        """Count what a node computes, with what is made as it is used; None where a model's file is missing."""
        of, samples = node.node, node.facts.get("num_samples")
        dit, vae = self._model(node, "model"), self._model(node, "vae")
        encoder = self._model(node, "text_encoder") or self._model(node, "audio_encoder")
        if isinstance(of, Chunk) and dit is not None:
            calls = (of.steps - 1) * CALLS_PER_STEP.get(of.sampler, 1) + 1
            matrices, attention, _ = chunk_flops(dit, of.width, of.height, of.num_latent_frames, node.inputs.keys())
            return calls * matrices, calls * attention, 0
        if of.kind in ("encode_text", "encode_audio") and encoder is not None:
            return encoder_flops(encoder, MAX_TOKENS if samples is None else num_states(samples))
        if isinstance(of, (EncodeImage, EncodeMotion, EncodeControl)) and vae is not None:
            return vae_flops(vae, "encoder", of.width, of.height, _num_encoded(of))
        width: Any = node.facts.get("width")
        height: Any = node.facts.get("height")
        if isinstance(of, DecodeChunk) and vae is not None:
            decoding = vae_flops(vae, "decoder", width, height, 4 * of.num_latent_frames)[2]
            return 0, 0, decoding + vae_flops(vae, "encoder", width, height, 73)[2]
        if self._loaders(node.name) and of.kind in _WORK:
            return None
        return self._frames_flops(node)

    def _frames_flops(self, node: PlanNode) -> Flops | None:
        """Count the decoding of frames that are decoded as they are used, and something for each pixel beside it."""
        facts, convolutions = node.facts, 0.0
        if isinstance(node.node, DecodeFrames) and "parts" not in node.inputs:
            vae = self._model(node, "vae")
            if vae is None or not all(facts.get(name) for name in ("width", "height", "frames")):
                return None
            convolutions = vae_flops(vae, "decoder", facts["width"], facts["height"], facts["frames"])[2]
        elif all(facts.get(name) for name in ("width", "height", "frames")):
            convolutions = _FLOPS_PER_PIXEL * facts["width"] * facts["height"] * facts["frames"]
        for name in {source.node for source in node.sources()}:
            upstream = self._plan.node(name)
            if not upstream.node.is_stored and upstream.node.kind not in _LOADERS:
                found = self._frames_flops(upstream)
                if found is None:
                    return None
                convolutions += found[2]
        return 0, 0, convolutions

    def _decoding(self, node: PlanNode) -> int | None:
        vae = self._model(node, "vae")
        if "parts" in node.inputs:
            return 0
        if vae is None or None in (node.facts.get("width"), node.facts.get("height")):
            return None
        assert isinstance(node.node, DecodeFrames)
        width, height = (tile_side(node.facts[side], node.node.tiles) for side in ("width", "height"))
        held = decoding_bytes(vae, width, height, self._frames_per_call(node.name))
        return int(held * _HEAP) if self._numerics.device_class == "cpu" else held

    def _stored(self, node: PlanNode) -> int | None:
        """Return the bytes that a node stores, where they are known exactly."""
        if isinstance(node.node, Chunk):
            made = node.node
            return latent_bytes(made.width, made.height, made.num_latent_frames)
        if isinstance(node.node, EncodeImage):
            pixels = 3 * node.node.width * node.node.height * 4
            return pixels + latent_bytes(node.node.width, node.node.height, 1)
        encoder = self._model(node, "audio_encoder")
        if isinstance(node.node, EncodeAudio) and encoder is not None and "num_samples" in node.facts:
            width, layers = _audio_sizes(encoder)
            return num_rows(num_features(num_states(node.facts["num_samples"]))) * (layers + 1) * width * 4
        return None


def _num_encoded(of: EncodeImage | EncodeMotion | EncodeControl) -> int:
    """Count the pixel frames that the VAE encodes for a node; official poses have their first frame doubled."""
    return 1 if isinstance(of, EncodeImage) else 73 if isinstance(of, EncodeMotion) else 4 * of.num_latent_frames + 1


Model = Callable[[PlanNode, str], "Weights | None"]
Work = Callable[[PlanNode, Model, Way], "int | None"]


def _text_work(node: PlanNode, model: Model, way: Way) -> int | None:
    """Encoding 512 tokens, the most that there can be: scores of all heads thrice, the feed-forward's values thrice."""
    encoder = model(node, "text_encoder")
    if encoder is None:
        return None
    heads = encoder.shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"][1]
    wide, narrow = encoder.shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"]
    values = 3 * heads * MAX_TOKENS**2 + 3 * MAX_TOKENS * wide + 6 * MAX_TOKENS * narrow
    return values * max(encoder.item_bytes, 4)


def _audio_work(node: PlanNode, model: Model, way: Way) -> int | None:
    """Encoding a voice, whole or a window of it.

    The first convolutions, over 30 s at a time: three arrays [512, samples / 5]. Then, over all states that are encoded
    at once: the feed-forward's values twice, and six streams. And the rows of all layers, twice where the voice is
    whole, before they are stored.
    """
    encoder = model(node, "audio_encoder")
    assert isinstance(node.node, EncodeAudio)
    if encoder is None or "num_samples" not in node.facts:
        return None
    width, layers = _audio_sizes(encoder)
    channels = encoder.shapes["feature_extractor.conv_layers.0.conv.weight"][0]
    wide = encoder.shapes["encoder.layers.0.feed_forward.intermediate_dense.weight"][0]
    num_samples = int(node.facts["num_samples"])
    window = node.node.window_states(num_samples)
    states = num_states(num_samples) if window is None else min(num_states(num_samples), window + 1000)
    convolutions = 3 * channels * min(num_samples, 480_000) // 5 * encoder.item_bytes
    rows = num_rows(num_features(states)) * (layers + 1) * width * 4
    waveform = 0 if window is not None else 3 * num_samples * 4
    return max(convolutions, states * (2 * wide + 6 * width) * encoder.item_bytes + 2 * rows) + waveform


@lru_cache(16)
def _audio_sizes(encoder: Weights) -> tuple[int, int]:
    """Return the width of the audio encoder and its number of layers."""
    width = encoder.shapes["encoder.layers.0.feed_forward.intermediate_dense.weight"][1]
    return width, len({key.split(".")[2] for key in encoder.shapes if key.startswith("encoder.layers.")})


def _encoding_work(node: PlanNode, model: Model, way: Way) -> int | None:
    vae, of = model(node, "vae"), node.node
    assert isinstance(of, (EncodeImage, EncodeMotion, EncodeControl))
    return None if vae is None else encoding_bytes(vae, of.width, of.height, _num_encoded(of))


def _decode_chunk_work(node: PlanNode, model: Model, way: Way) -> int | None:
    """Decoding a chunk and what was before it, two latent frames at a time, its pixels thrice, then encoding."""
    vae = model(node, "vae")
    assert isinstance(node.node, DecodeChunk)
    if vae is None:
        return None
    width, height = int(node.facts["width"]), int(node.facts["height"])
    pixels = 3 * 4 * node.node.num_latent_frames * width * height * 4
    decoding = decoding_bytes(vae, width, height, way.get("frames_per_call", FRAMES_PER_CALL))
    return max(decoding, encoding_bytes(vae, width, height, 73)) + 3 * pixels


def _chunk_work(node: PlanNode, model: Model, way: Way) -> int | None:
    dit = model(node, "model")
    assert isinstance(node.node, Chunk)
    size = node.node.width, node.node.height, node.node.num_latent_frames
    return None if dit is None else chunk_bytes(dit, *size, node.inputs.keys(), in_turn="in_turn" in way)


_WORK: Mapping[str, Work] = {
    "encode_text": _text_work,
    "encode_audio": _audio_work,
    **dict.fromkeys(("encode_image", "encode_motion", "encode_control"), _encoding_work),
    "decode_chunk": _decode_chunk_work,
    "chunk": _chunk_work,
}
