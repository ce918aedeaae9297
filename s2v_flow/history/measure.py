"""How far two results are apart: latents by their largest difference, videos also by their PSNR."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from math import log10
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from s2v_flow.cache.store import DamagedObjectError, Store, StoredObject
from s2v_flow.history.side import Video

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Measure:
    """How two results of one node compare.

    `max_abs` is the largest difference of two values (of a video: of 0 to 255); `psnr_db` is missing where nothing
    differs; `note` says why nothing could be measured.
    """

    node: str
    what: Literal["latent", "video"]
    is_identical: bool
    max_abs: float | None = None
    psnr_db: float | None = None
    note: str | None = None


def compare_latents(store: Store, node: str, a: str, b: str) -> Measure:
    """Compare two chunks' latents by their digests, or, where these differ, by their values if both are stored."""
    if a == b:
        return Measure(node, "latent", True, 0.0)
    try:
        one, other = (_latent(store, sha256) for sha256 in (a, b))
    except DamagedObjectError:
        return Measure(node, "latent", False, note="not both are in the cache any more")
    if one.shape != other.shape:
        return Measure(node, "latent", False, note=f"{_size(one)} cannot be compared with {_size(other)}")
    return Measure(node, "latent", False, float(abs(one - other).max()))


def compare_videos(store: Store, node: str, a: Video, b: Video) -> Measure:
    """Compare two videos by their frames' digests, or, where these differ, as a player shows them."""
    if a.frames_sha256 is not None and a.frames_sha256 == b.frames_sha256:
        return Measure(node, "video", True, 0.0)
    try:
        with _file(store, a) as one, _file(store, b) as other:
            return _compare_files(node, one, other)
    except DamagedObjectError:
        return Measure(node, "video", False, note="not both are in the cache any more")


def _compare_files(node: str, a: Path, b: Path) -> Measure:
    import numpy as np

    from s2v_flow.media.video import VideoReader

    with VideoReader(a) as one, VideoReader(b) as other:
        sizes = [f"{len(video)} frames of {video.info.width}x{video.info.height}" for video in (one, other)]
        if sizes[0] != sizes[1]:
            return Measure(node, "video", False, note=f"{sizes[0]} cannot be compared with {sizes[1]}")
        largest, squares, count = 0, 0, 0
        for left, right in zip_longest(one, other):
            if left is None or right is None:
                return Measure(node, "video", False, note="one of them ends before its length")
            difference = left.astype(np.int32) - right.astype(np.int32)
            largest = max(largest, int(abs(difference).max()))
            squares += int((difference * difference).sum(dtype=np.int64))
            count += difference.size
    if largest == 0:
        return Measure(node, "video", True, 0.0)
    return Measure(node, "video", False, float(largest), round(10 * log10(255**2 * count / squares), 2))


def _latent(store: Store, sha256: str) -> NDArray[np.float32]:
    from safetensors.numpy import load

    tensors: dict[str, Any] = load(store.read(StoredObject(sha256, 0, ".safetensors")))
    latent: NDArray[np.float32] = tensors["samples"]
    return latent


def _size(latent: NDArray[np.float32]) -> str:
    return "x".join(map(str, latent.shape))


@contextmanager
def _file(store: Store, video: Video) -> Iterator[Path]:
    """Give a video as a file; one of the store is copied, for the store names its files as it likes."""
    if video.file is not None:
        yield video.file
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        path.write_bytes(store.read(StoredObject(video.sha256 or "", 0, ".mp4")))
        yield path
