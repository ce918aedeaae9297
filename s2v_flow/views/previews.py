"""Pictures of what is being sampled: a linear map from the latent's channels to colours; no decoder is run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2v_flow.errors import MissingError
from s2v_flow.files.facts import known_digest, recalled, remembered
from s2v_flow.graph.context import Artifact
from s2v_flow.graph.events import Event, Listener, NodeFinished, Noted, Preview, StepDone
from s2v_flow.graph.node import Plan

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

PER_CHUNK = 4  # pictures
_SIDE = 320  # pixels of a picture's longer side, at most
_RIDGE = 0.05  # of each channel's power: one portrait has few colours


class Previews:
    """Makes pictures of a run: give `watch` to its options, and call this with its events.

    A step is never waited for: the middle frame of the latent is copied behind the step's own kernels, and turned into
    a picture at a later event, once it has arrived.

    Colours are remembered below `cache_root` by the VAE's sha256. The pictures go to `folder`, the run's own once it is
    there, as `<node>-<step>.jpg`. `emit` is told of each, as `Preview`; and, once, that none can be written.
    """

    def __init__(self, plan: Plan, cache_root: Path, folder: Path, emit: Listener) -> None:
        self._plan, self._cache, self._folder, self._emit = plan, cache_root, folder, emit
        self._colours: dict[str, NDArray[np.float64] | None] = {}  # by the portrait's digest
        self._latest: tuple[str, torch.Tensor] | None = None
        self._of: dict[str, str] = {}  # plan node -> portrait's digest
        self._pending: list[tuple[StepDone, torch.Tensor, torch.Event | None]] = []
        self._is_over = False

    def watch(self, node: str, inputs: Mapping[str, Any], denoised: torch.Tensor) -> None:
        """Look at what a plan node's model expects: normalised [1, 16, F, H, W], on any device; it is not changed."""
        if node not in self._of:
            portrait = inputs.get("reference")
            self._of[node] = portrait.digest if portrait is not None else ""
            if self._of[node] not in self._colours:
                self._colours[self._of[node]] = self._find_colours(node, portrait)
        if not self._is_over and self._colours[self._of[node]] is not None:
            self._latest = node, denoised

    def __call__(self, event: Event) -> None:
        """Take note of an event of the run."""
        if isinstance(event, StepDone) and self._latest and self._latest[0] == event.node and _is_due(event):
            with suppress(RuntimeError):  # no memory for a copy: the run needs it more
                self._pending.append((event, *_copied(self._latest[1])))
        is_done = isinstance(event, NodeFinished)
        if is_done:
            self._latest = None
        while self._pending and (is_done or self._pending[0][2] is None or self._pending[0][2].query()):
            of, latent, arrival = self._pending.pop(0)
            if arrival is not None:
                arrival.synchronize()
            self._write(of, latent)

    def _write(self, of: StepDone, latent: torch.Tensor) -> None:
        colours = self._colours[self._of[of.node]]
        self._is_over = self._is_over or not self._folder.is_dir()  # where nothing can be written, that has been told
        if self._is_over or colours is None:
            return
        path = self._folder / f"{re.sub(r'[^A-Za-z0-9=,._-]', '_', of.node)}-{of.step:02}.jpg"
        try:
            _picture(latent, colours).save(path, quality=88)
        except OSError as error:
            self._is_over = True
            self._emit(Noted("", f"{path}: previews cannot be written: {error.strerror or error}", is_warning=True))
            return
        self._emit(Preview(of.node, of.step, of.total, str(path)))

    def _find_colours(self, node: str, portrait: Artifact | None) -> NDArray[np.float64] | None:
        """Return the map of the VAE in use: fitted to the portrait, else as an earlier run has fitted it."""
        import numpy as np

        digest, table = self._vae(node), self._cache / "facts.json"
        key = f"preview-colours:{digest}"
        if portrait is not None:
            fitted = fitted_colours(portrait)
            if digest is not None:
                remembered(table, key, lambda: {"colours": fitted.tolist()})
            return fitted
        known = recalled(table, key) if digest else None
        return np.array(known["colours"]) if known else None

    def _vae(self, node: str) -> str | None:
        """Return the sha256 of the VAE's file, where it is known."""
        upstream = self._plan.before([node])
        vaes = [item for item in self._plan.nodes if item.kind == "load_vae"]
        vaes.sort(key=lambda item: item.name not in upstream)
        with suppress(MissingError, KeyError):
            return known_digest(vaes[0].files["checkpoint",], self._cache / "digests.json") if vaes else None
        return None


def _is_due(event: StepDone) -> bool:
    """Whether another quarter of the steps is done."""
    return event.step * PER_CHUNK // event.total > (event.step - 1) * PER_CHUNK // event.total


def fitted_colours(portrait: Artifact) -> NDArray[np.float64]:
    """Fit colours to latents by least squares, on what `encode_image` has stored: the portrait and its latent.

    Returns float64 [17, 3]: normalised channels, and one, to colours in [-1, 1].
    """
    import numpy as np
    from torch.nn.functional import avg_pool2d

    from s2v_flow.models.vae import SPATIAL_STRIDE, normalise
    from s2v_flow.nodes.tensors import unpack

    stored = unpack(portrait)
    latent = normalise(stored["latent"].float())[0, :, 0].flatten(1).T.double().numpy()  # [N, 16]
    colours = avg_pool2d(stored["pixels"][0, :, 0], SPATIAL_STRIDE).flatten(1).T.double().numpy()  # [N, 3]
    channels = np.concatenate([latent, np.ones((len(latent), 1))], axis=1)
    powers = channels.T @ channels
    ridge = np.diag([*[_RIDGE * len(latent)] * latent.shape[1], 0.0])
    found: NDArray[np.float64] = np.linalg.solve(powers + ridge, channels.T @ colours)
    return found


def _copied(latent: torch.Tensor) -> tuple[torch.Tensor, torch.Event | None]:
    """Return the middle frame, [16, H, W], on the host, and what tells that it has arrived; None: it is there."""
    import torch

    frame = latent.detach()[0, :, latent.shape[2] // 2]
    if not frame.is_cuda:
        return frame.float().clone(), None
    host = torch.empty(frame.shape, dtype=frame.dtype, pin_memory=True)
    host.copy_(frame, non_blocking=True)
    event = torch.Event(frame.device)
    event.record(torch.cuda.current_stream(frame.device))
    return host, event


def _picture(latent: torch.Tensor, colours: NDArray[np.float64]) -> Any:
    """Return a latent frame, [16, H, W], as a picture eight times as large, or of 320 pixels."""
    import numpy as np
    from PIL import Image

    rows, columns = latent.shape[1:]
    shown = latent.double().permute(1, 2, 0).numpy() @ colours[:-1] + colours[-1]  # [H, W, 3]
    small = Image.fromarray(np.nan_to_num((shown + 1) * 127.5).clip(0, 255).round().astype(np.uint8))
    factor = min(8.0, _SIDE / max(rows, columns))
    return small.resize((round(columns * factor), round(rows * factor)), Image.Resampling.BICUBIC)
