"""Translators of what changes or measures pictures: resizing nodes of ComfyUI and KJNodes, sizes, batches."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, get_args

from s2v_flow.comfy.catalog import BRANCHES
from s2v_flow.comfy.graph import Link, Value
from s2v_flow.comfy.meaning import UNKNOWN, AtNode, Made, NodeRef, Translator, UnknownSide
from s2v_flow.nodes.scale import Method
from s2v_flow.wording import shortened

Size = tuple[int, int]
_CUT = "the picture is cut to the new proportions instead"
SCALERS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "ImageScaleBy": ("scale_by", "factor"),
        "ImageScaleToTotalPixels": ("megapixels", "megapixels"),
        "ImageScaleToMaxDimension": ("largest_size", "longest_side"),
    }
)
"""Nodes that take one number: the widget that has it, and the field that it becomes."""
_CHOICES = {  # the same of ResizeImageMaskNode's choices: the field, and the widget's type
    "scale width": ("width", "INT"),
    "scale height": ("height", "INT"),
    "scale by multiplier": ("factor", "FLOAT"),
    "scale longer dimension": ("longest_side", "INT"),
    "scale total pixels": ("megapixels", "FLOAT"),
}


def _core(at: AtNode) -> Any:
    method = at.value("upscale_method")
    if at.class_type == "ImageScale":
        return _to_sides(at, "image", at.value("width"), at.value("height"), at.value("crop").value, method)
    widget, field = SCALERS[at.class_type]
    fields = {"method": method, field: at.value(widget)}
    if "resolution_steps" in at.widgets and (steps := at.value("resolution_steps")).value != 1:
        fields["multiple_of"] = steps
    return _scaled(at, "image", fields)


def _by_choice(at: AtNode) -> Any:
    """ResizeImageMaskNode: what its widgets mean depends on the first."""

    def given(name: str, type_: str = "INT") -> Value:
        return at.value(f"resize_type.{name}", type_)

    choice, method = at.value("resize_type").value, at.value("scale_method")
    size = _size(at, "input")
    if choice in _CHOICES:
        (widget,), (field, type_) = BRANCHES[at.class_type][choice], _CHOICES[choice]
        return _scaled(at, "input", {"method": method, field: given(widget, type_)})
    if choice not in BRANCHES[at.class_type]:
        raise at.refuse(f"resize_type: there is no {choice} here")
    target: Size | None = None
    if choice == "match size":
        target = _size(at, "resize_type.match")
    elif choice == "scale shorter dimension" and size:
        target = _shorter(size, given("shorter_size").value)
    elif choice == "scale to multiple" and size:
        target = _divisible(size, given("multiple").value)
    crop = given("crop", "STRING").value if "resize_type.crop" in at.node.inputs else "center"
    if choice == "scale dimensions":
        return _to_sides(at, "input", given("width"), given("height"), crop, method)
    return _to_size(at, "input", target, method, crop)


def _by_edge(at: AtNode) -> Any:
    if at.class_type == "ResizeImagesByLongerEdge":
        return _scaled(at, "images", {"longest_side": at.value("longer_edge"), "method": Value("lanczos")})
    size, edge = _size(at, "images"), at.value("shorter_edge").value
    return _to_size(at, "images", size and _shorter(size, edge), Value("lanczos"), "disabled")


def _padded(at: AtNode) -> Any:
    at.note(f"recipes put no borders around pictures; {_CUT}")
    sides = at.value("target_width"), at.value("target_height")
    return _to_sides(at, "image", *sides, "center", at.value("interpolation"))


def _kj(at: AtNode) -> Any:
    """ImageResizeKJ and its second version: the picture, its width and height."""
    box = [at.value(side).value for side in ("width", "height")]
    step, method = at.value("divisible_by").value, at.value("upscale_method")
    if at.class_type == "ImageResizeKJv2":
        mode = at.value("keep_proportion").value
        position = at.value("crop_position").value
        if mode == "crop" and position != "center":
            at.note(f"crop_position {position} is left out: cut about the centre")
        if mode.startswith("pad") or mode == "pillarbox_blur":
            at.note(f"keep_proportion {mode}: recipes have no borders; {_CUT}")
            mode = "crop"
    else:
        keeps = at.value("keep_proportion").value
        cuts = at.value("crop").value in ("center", 0)
        mode = "resize" if keeps else "crop" if cuts else "stretch"
        for index, name in enumerate(("width_input", "height_input")):
            box[index] = at.value(name).value if name in at.node.inputs else box[index]
        if isinstance(at.node.inputs.get("get_image_size"), Link):
            other = _size(at, "get_image_size")
            box, step = list(other or (0, 0)), 1
    size = _size(at, "image")
    width, height = box
    target: Size | None = (width, height) if width and height else None
    if mode == "total_pixels" and size and target:
        factor = math.sqrt(width * height / (size[0] * size[1]))
        target = round(size[0] * factor), round(size[1] * factor)
    elif mode in ("resize", "total_pixels"):
        factors = [want / have for want, have in zip(box, size or (1, 1), strict=True) if want]
        factor = min(factors, default=1.0)
        target = (round(size[0] * factor), round(size[1] * factor)) if size else None
    elif size:
        target = width or size[0], height or size[1]
    if target is None:
        guess = [_divisible((side, side), step)[0] or None for side in box]
        sides = (UnknownSide(_file_of(at, "image"), side) for side in guess)
        return (_to_size(at, "image", None, method, "disabled"), *sides, UNKNOWN)
    target = _divisible(target, step)
    made = _to_size(at, "image", target, method, "center" if mode == "crop" else "disabled")
    return made, Value(target[0]), Value(target[1]), UNKNOWN


def _measured(at: AtNode) -> Any:
    """GetImageSize and GetImageSizeAndCount."""
    found = at.meaning("image", object)
    size, total = _size(at, "image"), _total(found)
    count = UnknownSide("a video", None) if total is None else Value(total)
    sides = map(Value, size) if size else [UnknownSide(_file_of(at, "image"), None)] * 2
    return (*([found] if at.class_type == "GetImageSizeAndCount" else []), *sides, count)


def _batch(at: AtNode) -> Any:
    """Frames one after the other; ComfyUI scales all of them to the first one's size."""
    names = [name for name, _ in at.node.links() if re.fullmatch(r"(images\.)?image_?\d+", name)]
    names.sort(key=lambda name: int(re.sub(r"\D", "", name)))
    if at.class_type == "ImageBatchMulti":
        names = names[: at.value("inputcount").value]
    if not names:
        raise at.refuse("nothing is connected", "connect its pictures, or remove it")
    made = at.meaning(names[0], object)
    total = _total(made)
    for name in names[1:]:
        first = at.typed(names[0], made, "frames")
        found = at.meaning(name, object)
        second = at.typed(name, found, "frames")
        size, other = at.size_of(first), at.size_of(second)
        if size and other and size != other:
            scale = {"frames": second, "width": size[0], "height": size[1], "method": "bilinear", "crop": "center"}
            second = at.add("frames_scale", "scaled", scale, titled=False)
        more = _total(found)
        total = None if total is None or more is None else total + more
        made = at.made("frames_concat", "all_frames", {"first": first, "second": second}, "frames", total)
    return made


def _total(found: object) -> int | None:
    return found.total if isinstance(found, Made) and found.type == "frames" else 1


def _to_sides(at: AtNode, name: str, width: Value, height: Value, crop: str, method: Value) -> Any:
    sides = {key: side for key, side in (("width", width), ("height", height)) if side.value}
    if not sides:  # both 0: as it is
        return at.meaning(name, object)
    return _scaled(at, name, {"method": method, **sides, "crop": crop})


def _to_size(at: AtNode, name: str, size: Size | None, method: Value, crop: str) -> Any:
    if size is None:
        at.mistakes.note(
            f"{at.node.described()} is left out: what it makes depends on a picture's size, which is not in the "
            "workflow; the video's width and height scale and cut the picture anyway"
        )
        return at.meaning(name, object)
    return _to_sides(at, name, Value(size[0]), Value(size[1]), crop, method)


def _scaled(at: AtNode, name: str, fields: Mapping[str, Any]) -> Any:
    found, method = at.meaning(name, object), fields["method"].value
    if method not in get_args(Method):
        at.note(f"scaled by lanczos instead of {shortened(str(method))}")
        fields = {**fields, "method": "lanczos"}
    port = "frames" if isinstance(found, Made) and found.type == "frames" else "image"
    return at.made(f"{port}_scale", "scaled", {port: at.typed(name, found, port), **fields}, port)


def _size(at: AtNode, name: str) -> Size | None:
    ref = getattr(at.meaning(name, object), "ref", None)
    return at.size_of(ref) if isinstance(ref, NodeRef) else None


def _file_of(at: AtNode, name: str) -> str:
    ref = getattr(at.meaning(name, object), "ref", None)
    return at.file_of(ref) if isinstance(ref, NodeRef) else "a picture"


def _shorter(size: Size, edge: int) -> Size:
    return round(size[0] * edge / min(size)), round(size[1] * edge / min(size))


def _divisible(size: Size, step: int) -> Size:
    return (size[0] - size[0] % step, size[1] - size[1] % step) if step > 1 else size


SCALING: Mapping[str, Translator] = MappingProxyType(
    {
        **dict.fromkeys(("ImageScale", *SCALERS), _core),
        "ResizeImageMaskNode": _by_choice,
        "ResizeImagesByLongerEdge": _by_edge,
        "ResizeImagesByShorterEdge": _by_edge,
        "ResizeAndPadImage": _padded,
        **dict.fromkeys(("ImageResizeKJ", "ImageResizeKJv2"), _kj),
        **dict.fromkeys(("GetImageSize", "GetImageSizeAndCount"), _measured),
        **dict.fromkeys(("ImageBatch", "ImageBatchMulti", "BatchImagesNode"), _batch),
    }
)
