"""What a report shows of a video: a poster, a film strip, and curves over its time, drawn from one pass over it.

And of its run: stages, memory, the graph, LoRAs, drift, and what has changed.
"""

from __future__ import annotations

import base64
import io
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from s2v_flow.history.compare import Difference, inputs_that_differ
from s2v_flow.history.side import of_run
from s2v_flow.runs.essence import essence_in
from s2v_flow.runs.manifest import Manifest, NodeRecord
from s2v_flow.wording import duration_text, shown, size_text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


WIDTH = 1000  # of a time line, in its own units
STRIP_HEIGHT, WAVE_HEIGHT, CURVE_HEIGHT = 64, 56, 64
_POSTER_SIDE = 640  # pixels
_TILE_SIDE = 320  # of one in a grid
_MAX_MOVEMENT_FRAMES = 60_000  # an hour: a kilobyte is kept of each
_POINTS = 500  # of a curve
_PROXY_SIDE = 360
_PROXY_CRFS = (28, 36, 44)


@dataclass(frozen=True)
class Film:
    """A video and what is drawn of it; pictures are `data:` addresses, curves the `d` of an SVG path."""

    label: str
    path: Path
    frames: int
    fps: float
    size: tuple[int, int]
    poster: str
    figures: Mapping[str, Any] | None = None
    seams: tuple[float, ...] = ()  # in seconds
    strip: str = ""
    wave: str = ""
    loudness: str = ""
    mouth: str = ""
    src: str = ""  # where the page finds it
    cell: tuple[str, ...] = field(default=())

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.frames / self.fps


def poster_of(path: Path, label: str, figures: Mapping[str, Any] | None = None) -> Film:
    """Return a video of a grid: its middle frame and no curves.

    Raises:
        MissingError, MediaError, RefusedError: As `VideoReader`.
    """
    from s2v_flow.media.video import VideoReader, probe_video

    fps = probe_video(path).fps
    with VideoReader(path, fps) as reader:
        middle, frames = reader.read(len(reader) // 2, 1)[0], len(reader)
    size = middle.shape[1], middle.shape[0]
    return Film(label, path, frames, float(fps), size, _jpeg(middle, _TILE_SIDE), figures)


def film_of(path: Path, label: str, figures: Mapping[str, Any] | None = None) -> Film:
    """Return a video with its strip and curves; its figures are measured unless given.

    Every frame is decoded, none is kept.

    Raises:
        MissingError, MediaError, RefusedError: As `VideoReader`.
    """
    import numpy as np

    from s2v_flow.media.audio import open_audio
    from s2v_flow.media.video import VideoReader, probe_video
    from s2v_flow.quality.figures import Measure

    info, essence = probe_video(path), essence_in(path)
    sound = open_audio(path) if info.has_audio else None
    with VideoReader(path, info.fps) as reader:
        count = len(reader)
        starts = essence.chunk_starts if essence is not None and essence.frames in (None, count) else []
        measure = Measure(sound, float(info.fps), count, keeps=count <= _MAX_MOVEMENT_FRAMES)
        thumbs = max(1, min(round(WIDTH * info.height / info.width / STRIP_HEIGHT), WIDTH))
        wanted = [int((index + 0.5) * count / thumbs) for index in range(thumbs)]
        strip, poster, place = np.zeros((2 * STRIP_HEIGHT, 2 * WIDTH, 3), np.uint8), None, 0
        for index, frame in enumerate(reader):
            measure.add(frame[None])
            poster = frame.copy() if poster is None or index == count // 2 else poster
            while place < thumbs and wanted[place] == index:  # of a short video each frame several times
                left, right = (2 * WIDTH * (place + side) // thumbs for side in (0, 1))
                place += 1
                strip[:, left:right] = _fitted(frame, right - left, 2 * STRIP_HEIGHT)
    measured, voice = measure.figures(starts), measure.voice
    assert poster is not None
    return Film(
        label=label,
        path=path,
        frames=count,
        fps=float(info.fps),
        size=(info.width, info.height),
        poster=_jpeg(poster, _POSTER_SIDE),
        figures=figures or measured,
        seams=tuple(seam["frame"] / float(info.fps) for seam in measured["seams"]),
        strip=_jpeg(strip, 2 * WIDTH),
        wave="" if sound is None else _envelope(_peaks(sound, count / float(info.fps))),
        loudness="" if voice is None else _curve(voice / max(float(voice.max(initial=0.0)), 1e-9), is_closed=True),
        mouth=_curve((measure.movement() + 1) / 2),
    )


def proxy_of(film: Film, max_bytes: int) -> str:
    """Return a small copy of a video, of 360 lines at most, as a `data:` address; "" where it would be too large."""
    from s2v_flow.media.audio import open_audio
    from s2v_flow.media.video import VideoReader, probe_video
    from s2v_flow.media.writer import VideoWriter

    factor = min(1.0, _PROXY_SIDE / min(film.size))
    width, height = (max(2, round(side * factor / 2) * 2) for side in film.size)
    info = probe_video(film.path)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "proxy.mp4"
        for crf in _PROXY_CRFS:
            sound = open_audio(film.path) if info.has_audio else None
            settings: dict[str, Any] = {"fps": Fraction(info.fps), "crf": crf, "preset": "veryfast", "audio": sound}
            with VideoReader(film.path, info.fps) as reader, VideoWriter(target, width, height, **settings) as writer:
                for frame in reader:
                    writer.write(_fitted(frame, width, height)[None])
            if target.stat().st_size <= max_bytes:
                return _data("video/mp4", target.read_bytes())
    return ""


def _fitted(frame: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """Return a picture that fills a size; what is too much is cut off at the sides."""
    import numpy as np
    from PIL import Image, ImageOps

    return np.asarray(ImageOps.fit(Image.fromarray(frame), (width, height), Image.Resampling.BILINEAR))


def _jpeg(picture: NDArray[np.uint8], side: int) -> str:
    from PIL import Image

    image, content = Image.fromarray(picture), io.BytesIO()
    image.thumbnail((side, side))
    image.save(content, format="JPEG", quality=82, optimize=True)
    return _data("image/jpeg", content.getvalue())


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _peaks(sound: Any, seconds: float) -> NDArray[np.float64]:
    """Return the largest of each share of the picture's time: float64 [points], 1 is the largest of all."""
    import numpy as np

    peaks, position, total = np.zeros(_POINTS), 0, max(seconds * sound.sample_rate_hz, 1.0)
    for block in sound.blocks():
        at = ((position + np.arange(block.shape[1])) * (_POINTS / total)).astype(np.int64)
        inside = at < _POINTS
        np.maximum.at(peaks, at[inside], np.abs(block).max(axis=0)[inside])
        position += block.shape[1]
    return peaks / max(float(peaks.max()), 1e-9)


def _envelope(peaks: NDArray[np.float64]) -> str:
    """Return a wave as a path around the middle of its lane."""
    xs, middle = [WIDTH * (index + 0.5) / len(peaks) for index in range(len(peaks))], WAVE_HEIGHT / 2
    upper = [(x, middle - max(peak, 0.01) * middle) for x, peak in zip(xs, peaks, strict=True)]
    lower = [(x, 2 * middle - y) for x, y in reversed(upper)]
    return _path([*upper, *lower]) + "Z"


def _curve(values: NDArray[np.float64], *, is_closed: bool = False) -> str:
    """Return values of 0 to 1 as a path in their lane, of so many points that it can be seen; "" for none."""
    import numpy as np

    if not len(values):
        return ""
    parts = np.array_split(values, min(len(values), _POINTS))
    points = [
        (WIDTH * (index + 0.5) / len(parts), CURVE_HEIGHT * (1 - float(part.mean())))
        for index, part in enumerate(parts)
    ]
    ends = ([(0.0, float(CURVE_HEIGHT))], [(float(WIDTH), float(CURVE_HEIGHT))]) if is_closed else ([], [])
    return _path(list(chain(ends[0], points, ends[1])))


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


BOX_WIDTH, BOX_HEIGHT = 128, 44
_GAP_ACROSS, _GAP_DOWN = 34, 14
_STATES = ("failed", "interrupted", "not_reached", "computed", "stored", "live", "skipped")  # the first one counts
_REFERENCE = re.compile(r"\$(\w[\w-]*)$")
_SHORT = 12  # digits of a digest that people are shown


def stages_of(run: Manifest) -> list[dict[str, Any]]:
    """Return what each kind took in a run: its time, and its largest peak of memory; as text and as shares."""
    kinds: dict[str, list[NodeRecord]] = defaultdict(list)
    for node in run.nodes:
        if node.seconds is not None:
            kinds[node.kind].append(node)
    took = {kind: sum(node.seconds or 0.0 for node in nodes) for kind, nodes in kinds.items()}
    peaks = {kind: max(node.peak_device_bytes or node.peak_bytes or 0 for node in kinds[kind]) for kind in kinds}
    total, largest = sum(took.values()) or 1.0, max(peaks.values(), default=0) or 1
    return [
        {
            "kind": kind,
            "count": len(nodes),
            "time": duration_text(took[kind]),
            "share": took[kind] / total,
            "peak": size_text(peaks[kind], is_memory=True) if peaks[kind] else "unknown",
            "memory": peaks[kind] / largest,
        }
        for kind, nodes in kinds.items()
    ]


class Box(NamedTuple):
    """A recipe's node in the picture of its graph; `num_nodes` plan nodes were made of it."""

    name: str
    kind: str
    state: str
    num_nodes: int
    time: str
    x: int
    y: int


class Graph(NamedTuple):
    """A recipe's graph, from left to right; edges are paths."""

    boxes: list[Box]
    edges: list[str]
    width: int
    height: int


def graph_of(values: Mapping[str, Any], nodes: Sequence[NodeRecord] = ()) -> Graph:
    """Lay a recipe's graph out, from its values by path; a node's chunks and a matrix's cells are one box.

    `values`: as a manifest has them: "nodes.first.model" is "$dit"; `nodes`: the run's, for what became of them.
    """
    kinds = {
        path.split(".")[1]: str(kind) for path, kind in values.items() if re.fullmatch(r"nodes\.[^.]+\.kind", path)
    }
    sources: dict[str, dict[str, None]] = {name: {} for name in kinds}
    for path, value in values.items():
        name = path.split(".")[1] if path.startswith("nodes.") else ""
        for item in value if isinstance(value, list) else [value]:
            found = _REFERENCE.match(item) if isinstance(item, str) else None
            if name in kinds and found and found[1] in kinds:
                sources[name][found[1]] = None
    ranks: dict[str, int] = {}

    def rank(name: str) -> int:
        if name not in ranks:
            ranks[name] = 0  # a recipe has no circles
            ranks[name] = max((rank(source) + 1 for source in sources[name]), default=0)
        return ranks[name]

    columns: dict[int, list[str]] = defaultdict(list)
    for name in kinds:
        columns[rank(name)].append(name)
    rows: dict[str, float] = {}
    for column in sorted(columns):
        heights = {name: fmean([rows[source] for source in sources[name]] or [0.0]) for name in columns[column]}
        for index, name in enumerate(sorted(columns[column], key=lambda name: heights[name])):
            rows[name] = index - (len(columns[column]) - 1) / 2
    tallest = max(map(len, columns.values()), default=1)
    across, down, top = BOX_WIDTH + _GAP_ACROSS, BOX_HEIGHT + _GAP_DOWN, (tallest - 1) / 2
    places = {name: (ranks[name] * across + 1, round((rows[name] + top) * down) + 1) for name in kinds}
    made: dict[str, list[NodeRecord]] = defaultdict(list)
    for node in nodes:
        made[re.split(r"[.\[]", node.name.rpartition("/")[2])[0]].append(node)
    boxes = []
    for name, kind in kinds.items():
        own = [node for node in made[name] if node.kind == kind] or made[name]
        seconds = [node.seconds for node in own if node.seconds is not None]
        state = next((state for state in _STATES if any(node.status == state for node in own)), "")
        boxes.append(Box(name, kind, state, len(own), duration_text(sum(seconds)) if seconds else "", *places[name]))
    edges = [_edge(places[source], places[name]) for name in kinds for source in sources[name]]
    return Graph(boxes, edges, (max(columns, default=0) + 1) * across - _GAP_ACROSS + 2, tallest * down - _GAP_DOWN + 2)


def _edge(source: tuple[int, int], target: tuple[int, int]) -> str:
    x1, y1, x2, y2 = source[0] + BOX_WIDTH, source[1] + BOX_HEIGHT // 2, target[0], target[1] + BOX_HEIGHT // 2
    return f"M{x1} {y1}C{x1 + _GAP_ACROSS // 2} {y1} {x2 - _GAP_ACROSS // 2} {y2} {x2} {y2}"


def loras_of(run: Manifest) -> list[tuple[str, str, list[tuple[str, int, float]]]]:
    """Return each LoRA of a run once: its id, how much has a home, and by block (name, weights, share of the most)."""
    found = {}
    for lora in run.loras:
        most = max(lora.blocks.values(), default=0) or 1
        blocks = sorted(lora.blocks.items(), key=lambda item: (not item[0].isdigit(), item[0].zfill(4)))
        text = f"{lora.matched} of {lora.total} tensors have a home in the model"
        found[lora.id] = lora.id, text, [(name, count, count / most) for name, count in blocks]
    return list(found.values())


def cues_of(values: Mapping[str, Any]) -> list[tuple[float, str]]:
    """Return when a timeline changes something, and what, by time in seconds."""
    found: dict[tuple[str, str], dict[str, Any]] = defaultdict(dict)
    for path, value in values.items():
        part = re.fullmatch(r"nodes\.([^.]+)\.timeline\[([^]]+)\]\.(.+)", path)
        if part and value is not None:
            found[part[1], part[2]][part[3]] = value
    cues = []
    for entry in found.values():
        at = entry.pop("at", 0.0)
        text = entry.pop("prompt", None) or ", ".join(f"{name} {shown(value)}" for name, value in entry.items())
        if isinstance(at, (int, float)):
            cues.append((float(at), str(text)))
    return sorted(cues)


def changes_of(run: Manifest, runs: Sequence[Manifest]) -> tuple[str, list[tuple[str, str, str]]] | None:
    """Return the run before of the same recipe, and what differs: (name, before, now); None: there is none."""
    older = [item for item in runs if item.recipe.path == run.recipe.path and item.id < run.id]
    if not older:
        return None
    before = max(older, key=lambda item: item.id)
    return before.id, list(rows_of(inputs_that_differ(of_run(before), of_run(run))))


def rows_of(differences: Sequence[Difference]) -> Iterator[tuple[str, str, str]]:
    """Yield differences as (name, one, other)."""
    for item in differences:
        yield item.name, _short(item.a), _short(item.b)


def _short(value: Any) -> str:
    if isinstance(value, dict) and "sha256" in value:
        return f"{value['name']} ({(value['sha256'] or 'unknown')[:_SHORT]})"
    return "nothing" if value is None else str(value) if isinstance(value, list) else shown(value)
