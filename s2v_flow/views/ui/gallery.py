"""The runs that are kept, for a list with search; and their videos."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from s2v_flow.cache.store import Store, StoredObject
from s2v_flow.errors import MissingError
from s2v_flow.history.find import Listing, find, list_runs, run_ids
from s2v_flow.history.text import listing_json
from s2v_flow.runs.manifest import Manifest
from s2v_flow.runs.record import runs_root

_MAX_SHOWN = 60


class Gallery:
    """The runs of a cache folder."""

    def __init__(self, cache_root: Path) -> None:
        self._root, self._store = runs_root(cache_root), Store(cache_root)
        self._seen: list[tuple[Path, int]] = []
        self._runs: list[dict[str, Any]] = []

    def search(self, text: str) -> dict[str, Any]:
        """Return the newest runs in which every word occurs: name, settings, outputs, state, time."""
        seen = [(path, path.stat().st_mtime_ns) for path in self._root.glob("*/manifest.json") if path.exists()]
        if seen != self._seen or any(run["status"] == "running" for run in self._runs):
            self._seen, self._runs = seen, self._all(list_runs(self._root))
        words = text.lower().split()
        found = [run for run in self._runs if all(word in run["text"] for word in words)]
        shown = [{key: value for key, value in run.items() if key != "text"} for run in found[:_MAX_SHOWN]]
        return {"runs": shown, "total": len(self._runs), "found": len(found)}

    def _all(self, listing: Listing) -> list[dict[str, Any]]:
        runs = []
        for told, run in zip(listing_json(listing)["runs"], listing.runs, strict=True):
            params = {key[7:]: value for key, value in run.recipe.values.items() if key.startswith("params.")}
            videos = [f"/api/runs/{run.id}/videos/{number}" for number, _ in enumerate(self._videos(run))]
            runs.append({**told, "params": params, "videos": videos, "quality": run.quality})
            runs[-1]["text"] = json.dumps({**runs[-1], "videos": []}, ensure_ascii=False).lower()
        return runs

    def run(self, name: str) -> Manifest:
        """Return a run by its id.

        Raises:
            MissingError: There is none.
        """
        if name not in run_ids(self._root):
            raise MissingError(f"there is no run {name!r}")
        found = find(self._root, name)
        assert isinstance(found, Manifest)
        return found

    def video(self, name: str, number: int) -> Path:
        """Return a run's video as the cache keeps it.

        Raises:
            MissingError: There is none, or it was evicted.
        """
        videos = self._videos(self.run(name))
        if not 0 <= number < len(videos):
            raise MissingError(f"{name} has no video {number} in the cache any more")
        return videos[number]

    def _videos(self, run: Manifest) -> list[Path]:
        nodes = {node.name: node.outputs for node in run.nodes}
        digests = [nodes[item.node].get("file") for item in run.outputs if item.name.endswith(".mp4")]
        paths = (self._store.object_path(StoredObject(digest, 0, ".mp4")) for digest in digests if digest)
        return [path for path in paths if path.is_file()]
