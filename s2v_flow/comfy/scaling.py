"""Translators of what changes or measures pictures: resizing nodes of ComfyUI and KJNodes, sizes, batches."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, get_args

from s2v_flow.comfy.graph import ComfyNode, Link, Value
from s2v_flow.comfy.meaning import UNKNOWN, Context, FramesMade, Made, NodeRef, Translator, UnknownSide
from s2v_flow.nodes.scale import Method
from s2v_flow.wording import shortened

Size = tuple[int, int]
_CUT = "the picture is cut to the new proportions instead"


def _core(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    def given(name: str) -> Value:
        return context.value(node, name)

    method = given("upscale_method")
    if node.type == "ImageScale":
        return (_to_sides(context, node, "image", given("width"), given("height"), given("crop").value, method),)
    if node.type == "ImageScaleBy":
        fields = {"factor": given("scale_by")}
    elif node.type == "ImageScaleToTotalPixels":
        steps = given("resolution_steps")
        fields = {"megapixels": given("megapixels"), **({"multiple_of": steps} if steps.value != 1 else {})}
    else:
        fields = {"longest_side": given("largest_size")}
    return (_scaled(context, node, "image", {"method": method} | fields),)


def _by_choice(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    """ResizeImageMaskNode: what its widgets mean depends on the first."""

    def given(name: str, type_: str = "INT") -> Value:
        return context.value(node, f"resize_type.{name}", type_)

    choice, method = context.value(node, "resize_type").value, context.value(node, "scale_method")
    size = _size(context, node, "input")
    if choice == "scale dimensions":
        crop = given("crop", "STRING").value if "resize_type.crop" in node.inputs else "center"
        return (_to_sides(context, node, "input", given("width"), given("height"), crop, method),)
    if choice in ("scale width", "scale height"):
        side = choice.removeprefix("scale ")
        return (_scaled(context, node, "input", {"method": method, side: given(side)}),)
    if choice == "scale by multiplier":
        return (_scaled(context, node, "input", {"method": method, "factor": given("multiplier", "FLOAT")}),)
    if choice == "scale longer dimension":
        return (_scaled(context, node, "input", {"method": method, "longest_side": given("longer_size")}),)
    if choice == "scale total pixels":
        return (_scaled(context, node, "input", {"method": method, "megapixels": given("megapixels", "FLOAT")}),)
    target: Size | None = None
    if choice == "match size":
        target = _size(context, node, "resize_type.match")
    elif choice == "scale shorter dimension" and size:
        target = _shorter(size, given("shorter_size").value)
    elif choice == "scale to multiple" and size:
        target = _divisible(size, given("multiple").value)
    elif choice not in ("scale shorter dimension", "scale to multiple"):
        raise context.refuse(node, f"resize_type: there is no {choice} here")
    crop = given("crop", "STRING").value if "resize_type.crop" in node.inputs else "center"
    return (_to_size(context, node, "input", target, method, crop),)


def _by_edge(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    if node.type == "ResizeImagesByLongerEdge":
        fields = {"longest_side": context.value(node, "longer_edge"), "method": Value("lanczos")}
        return (_scaled(context, node, "images", fields),)
    size, edge = _size(context, node, "images"), context.value(node, "shorter_edge").value
    return (_to_size(context, node, "images", size and _shorter(size, edge), Value("lanczos"), "disabled"),)


def _padded(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    context.mistakes.note(f"{node.described()}: recipes put no borders around pictures; {_CUT}")
    sides = context.value(node, "target_width"), context.value(node, "target_height")
    return (_to_sides(context, node, "image", *sides, "center", context.value(node, "interpolation")),)


def _kj(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    """ImageResizeKJ and its second version: the picture, its width and height."""
    box = [context.value(node, side).value for side in ("width", "height")]
    step, method = context.value(node, "divisible_by").value, context.value(node, "upscale_method")
    if node.type == "ImageResizeKJv2":
        mode = context.value(node, "keep_proportion").value
        position = context.value(node, "crop_position").value
        if mode == "crop" and position != "center":
            context.mistakes.note(f"{node.described()}: crop_position {position} is left out: cut about the centre")
        if mode.startswith("pad") or mode == "pillarbox_blur":
            context.mistakes.note(f"{node.described()}: keep_proportion {mode}: recipes have no borders; {_CUT}")
            mode = "crop"
    else:
        keeps = context.value(node, "keep_proportion").value
        cuts = context.value(node, "crop").value in ("center", 0)
        mode = "resize" if keeps else "crop" if cuts else "stretch"
        for index, name in enumerate(("width_input", "height_input")):
            box[index] = context.value(node, name).value if name in node.inputs else box[index]
        if isinstance(node.inputs.get("get_image_size"), Link):
            other = _size(context, node, "get_image_size")
            box, step = list(other or (0, 0)), 1
    size = _size(context, node, "image")
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
        sides = (UnknownSide(_file_of(context, node, "image"), side) for side in guess)
        return (_to_size(context, node, "image", None, method, "disabled"), *sides, UNKNOWN)
    target = _divisible(target, step)
    made = _to_size(context, node, "image", target, method, "center" if mode == "crop" else "disabled")
    return made, Value(target[0]), Value(target[1]), UNKNOWN


def _measured(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    """GetImageSize and GetImageSizeAndCount."""
    found = context.meaning(node, "image", object)
    size = _size(context, node, "image")
    total = found.total if isinstance(found, FramesMade) else 1
    count = UnknownSide("a video", None) if total is None else Value(total)
    sides = map(Value, size) if size else [UnknownSide(_file_of(context, node, "image"), None)] * 2
    return (*([found] if node.type == "GetImageSizeAndCount" else []), *sides, count)


def _batch(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    """Frames one after the other; ComfyUI scales all of them to the first one's size."""
    names = sorted((name for name, _ in node.links() if re.fullmatch(r"(images\.)?image_?\d+", name)), key=_number)
    if node.type == "ImageBatchMulti":
        names = names[: context.value(node, "inputcount").value]
    if not names:
        raise context.refuse(node, "nothing is connected", "connect its pictures, or remove it")
    made = context.meaning(node, names[0], object)
    total = made.total if isinstance(made, FramesMade) else 1
    for name in names[1:]:
        first = context.typed(node, names[0], made, "frames")
        found = context.meaning(node, name, object)
        second = context.typed(node, name, found, "frames")
        size, other = context.size_of(first), context.size_of(second)
        if size and other and size != other:
            scale = {"frames": second, "width": size[0], "height": size[1], "method": "bilinear", "crop": "center"}
            second = context.draft.add("frames_scale", "scaled", scale, node, titled=False)
        more = found.total if isinstance(found, FramesMade) else 1
        total = None if total is None or more is None else total + more
        ref = context.draft.add("frames_concat", "all_frames", {"first": first, "second": second}, node)
        made = FramesMade(ref, total)
    return (made,)


def _to_sides(
    context: Context, node: ComfyNode, name: str, width: Value, height: Value, crop: str, method: Value
) -> Any:
    sides = {key: side for key, side in (("width", width), ("height", height)) if side.value}
    if not sides:  # both 0: as it is
        return context.meaning(node, name, object)
    return _scaled(context, node, name, {"method": method, **sides, "crop": crop})


def _to_size(context: Context, node: ComfyNode, name: str, size: Size | None, method: Value, crop: str) -> Any:
    if size is None:
        context.mistakes.note(
            f"{node.described()} is left out: what it makes depends on a picture's size, which is not in the workflow; "
            "the video's width and height scale and cut the picture anyway"
        )
        return context.meaning(node, name, object)
    return _to_sides(context, node, name, Value(size[0]), Value(size[1]), crop, method)


def _scaled(context: Context, node: ComfyNode, name: str, fields: Mapping[str, Any]) -> Any:
    found, method = context.meaning(node, name, object), fields["method"].value
    if method not in get_args(Method):
        context.mistakes.note(f"{node.described()}: scaled by lanczos instead of {shortened(str(method))}")
        fields = {**fields, "method": "lanczos"}
    if isinstance(found, FramesMade):
        return FramesMade(context.draft.add("frames_scale", "scaled", {"frames": found.ref, **fields}, node))
    image = context.typed(node, name, found, "image")
    return Made(context.draft.add("image_scale", "scaled", {"image": image, **fields}, node), "image")


def _size(context: Context, node: ComfyNode, name: str) -> Size | None:
    ref = getattr(context.meaning(node, name, object), "ref", None)
    return context.size_of(ref) if isinstance(ref, NodeRef) else None


def _file_of(context: Context, node: ComfyNode, name: str) -> str:
    ref = getattr(context.meaning(node, name, object), "ref", None)
    return context.file_of(ref) if isinstance(ref, NodeRef) else "a picture"


def _shorter(size: Size, edge: int) -> Size:
    return round(size[0] * edge / min(size)), round(size[1] * edge / min(size))


def _divisible(size: Size, step: int) -> Size:
    return (size[0] - size[0] % step, size[1] - size[1] % step) if step > 1 else size


def _number(name: str) -> int:
    return int(re.sub(r"\D", "", name))


SCALING: Mapping[str, Translator] = MappingProxyType(
    {
        "ImageScale": _core,
        "ImageScaleBy": _core,
        "ImageScaleToTotalPixels": _core,
        "ImageScaleToMaxDimension": _core,
        "ResizeImageMaskNode": _by_choice,
        "ResizeImagesByLongerEdge": _by_edge,
        "ResizeImagesByShorterEdge": _by_edge,
        "ResizeAndPadImage": _padded,
        "ImageResizeKJ": _kj,
        "ImageResizeKJv2": _kj,
        "GetImageSize": _measured,
        "GetImageSizeAndCount": _measured,
        "ImageBatch": _batch,
        "ImageBatchMulti": _batch,
        "BatchImagesNode": _batch,
    }
)
