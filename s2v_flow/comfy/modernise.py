"""From ComfyUI's numbers to exact time: what `import --modernise` changes in a draft, and why."""

from __future__ import annotations

from typing import Any

from s2v_flow.comfy.meaning import Draft, DraftNode, NodeRef

_REMOVED = {
    "encode_audio": ("conditioning", "warmup_frames"),
    "encode_image": ("conditioning",),
    "sample": ("conditioning",),
    "extend": ("conditioning",),
    "load_image": ("background",),
    "load_diffusion_model": ("fp8_rounding",),
}
_WHOLE = 4096
_WHY = {
    "encode_audio": "sound meets the frames as the model was trained (conditioning: official), and a few frames of "
    "warm-up over silence are made and dropped, because a video's first frames are its worst",
    "encode_image": "the portrait is smoothed when it is shrunk (conditioning: official)",
    "load_image": "transparent parts of the portrait become white instead of showing hidden colours",
    "load_diffusion_model": "what fp8 files keep in 16 or 32 bit stays so (fp8_rounding: scaled)",
}


def modernise(draft: Draft) -> list[str]:
    """Rewrite a draft in place; return what changed and why."""
    needed = draft.needed()
    changes = []
    for key in needed:
        node = draft.nodes[key]
        removed = [name for name in _REMOVED.get(node.kind, ()) if node.fields.pop(name, None) is not None]
        if removed and node.kind in _WHY:
            changes.append(_WHY[node.kind])
    changes += _control_goes_on(draft)
    changes += _whole_videos(draft)
    needed = draft.needed()
    changes += [change for key in needed if (change := _decode(draft.nodes[key])) is not None]
    changes += _merged(draft)
    changes.append("the same seeds give other videos than in ComfyUI from now on")
    kinds = sorted({draft.nodes[key].kind for key in needed} & {"latent_cut", "latent_concat", "frames_slice"})
    if kinds:
        changes.append(f"left as they are: {', '.join(kinds)}; they count frames by hand, have a look at them")
    return list(dict.fromkeys(changes))


def round_as_2025(draft: Draft) -> None:
    """Give fp8-scaled models the rounding that ComfyUI of 2025 gave them on loading."""
    for node in draft.nodes.values():
        if (
            node.kind == "load_diffusion_model"
            and "fp8" in str(getattr(node.fields["checkpoint"], "value", "")).lower()
        ):
            node.fields["fp8_rounding"] = "comfyui_2025"


def _whole_videos(draft: Draft) -> list[str]:
    """Take out a slice that is only there because ImageFromBatch has to be told a number."""
    changes = []
    for key in draft.needed():
        for name, value in draft.nodes[key].fields.items():
            given = draft[value] if isinstance(value, NodeRef) else None
            length = getattr(given.fields.get("length"), "value", 0) if given is not None else 0
            if given is not None and given.kind == "frames_slice" and length >= _WHOLE and name == "frames":
                draft.nodes[key].fields[name] = given.fields["frames"]
                changes.append(f"the video is whole, however long: {length} frames were all that ImageFromBatch takes")
    return changes


def _control_goes_on(draft: Draft) -> list[str]:
    """Let the pose video go on from chunk to chunk."""
    changed = False
    for key in draft.needed():
        node = draft.nodes[key]
        given = node.fields.get("control_video")
        if node.kind == "extend" and isinstance(given, NodeRef) and draft[given].kind == "frames_delay":
            node.fields["control_video"] = draft[given].fields["frames"]
            changed = True
            if _inherited(draft, node, "control_video") == node.fields["control_video"]:
                del node.fields["control_video"]
    return ["the pose video goes on from chunk to chunk instead of beginning anew"] if changed else []


def _inherited(draft: Draft, node: DraftNode, name: str) -> Any:
    """Return what a video's node before this one says, from the nearest one that says it."""
    below = node.fields.get("video")
    while isinstance(below, NodeRef):
        found = draft[below].fields
        if name in found:
            return found[name]
        below = found.get("video")
    return None


def _decode(node: DraftNode) -> str | None:
    if node.kind != "decode":
        return None
    dropped = node.fields.pop("drop_frames")
    number = getattr(dropped, "value", dropped)
    for name in ("prefix", "trim"):
        node.fields.pop(name)
    return (
        f"instead of dropping {number} frames, decode drops exactly the warm-up and ends with the sound: frame i shows "
        "the sound at i/16 s; the decoder sees the portrait before the first frame, as with the model's authors"
    )


def _merged(draft: Draft) -> list[str]:
    """Put extends that only repeat each other into one; the last of a video adds as many chunks as the voice needs."""
    changes = []
    while (pair := _repeated(draft)) is not None:
        first, second = pair
        one, two = draft.nodes[first], draft.nodes[second]
        fields: dict[str, Any] = {**one.fields, "chunks": one.fields["chunks"] + two.fields["chunks"]}
        two.fields, two.usual, two.title = fields, one.usual, one.title or two.title
        two.made_from += one.made_from
    users = _users(draft)
    for key in draft.needed():
        node = draft.nodes[key]
        goes_on = any(draft.nodes[user].kind == "extend" for user in users.get(key, ()))
        if node.kind != "extend" or goes_on or not _has_voice(draft, node):
            continue
        changes.append(
            f"{node.fields['chunks']} copies of Extend became one extend with chunks: auto: as many as the voice needs"
        )
        node.fields["chunks"] = "auto"
        node.fields.pop("seed", None)
        changes.append("each chunk's seed follows from the first one's: one more for every chunk")
    return changes


def _repeated(draft: Draft) -> tuple[int, int] | None:
    """Return an extend and the one that continues it with the same settings, where nothing else uses the first."""
    users = _users(draft)
    for key in draft.needed():
        node = draft.nodes[key]
        below = node.fields.get("video")
        if node.kind != "extend" or not isinstance(below, NodeRef) or draft[below].kind != "extend":
            continue
        if node.fields.keys() <= {"video", "chunks", "seed"} and len(users[below.key]) == 1:
            return below.key, key
    return None


def _users(draft: Draft) -> dict[int, list[int]]:
    users: dict[int, list[int]] = {}
    for key in draft.needed():
        for used in draft.nodes[key].refs():
            users.setdefault(used, []).append(key)
    return users


def _has_voice(draft: Draft, node: DraftNode) -> bool:
    return "speech" in node.fields or _inherited(draft, node, "speech") is not None
