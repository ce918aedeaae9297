"""Read images into arrays, and crop and resize them as the pipelines do."""

from __future__ import annotations

import io
import os
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, UnidentifiedImageError

from s2v_flow.errors import MediaError, RefusedError
from s2v_flow.media import centre_cut
from s2v_flow.media.source import MAX_IMAGE_PIXELS, Remark, open_source

Background = Literal["white", "black", "grey", "ignore"]

# No format that runs another program or holds several meanings: EPS, PDF, PSD and the like stay out.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_OTHERS = {  # what a file of no such format begins with
    "HEIC, as phones make it": rb"....ftyp(hei|hev|mif1|msf1)",
    "AVIF": rb"....ftypavi",
    "JPEG XL": rb"\xff\x0a|....JXL ",
    "a video": rb"....(ftyp|moov)|\x1a\x45\xdf\xa3",
    "a sound": rb"RIFF....WAVE|OggS|fLaC|ID3",
    "SVG": rb"\s*(<\?xml.*?)?<svg",
    "a web page: the download failed": rb"\s*<(!doctype )?html",
    "PDF": rb"%PDF",
    "a Photoshop file": rb"8BPS",
}
_BACKGROUNDS = {"white": 1.0, "black": 0.0, "grey": 0.5}
_SEEN_LEVELS = 8.0  # of 255: versions of sRGB differ by less
_EXIF_ORIENTATION = 0x0112
_ORIENTATIONS = {  # EXIF orientation -> what sets the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PILLOW_ERRORS = (  # what Pillow raises for damaged files
    *(OSError, ValueError, SyntaxError, EOFError, TypeError, LookupError, AttributeError, ArithmeticError),
    *(MemoryError, RuntimeError, struct.error),
)


def probe_image(path: str | os.PathLike[str], *, decodes: bool = False) -> tuple[int, int]:
    """Return an image's width and height, upright (EXIF orientation applied), from its header.

    Raises:
        MissingError, MediaError, RefusedError: as `read_image`: with `decodes` all of them, else what the header shows.
    """
    with _opened(path) as image:
        width, height = image.size
        is_turned = _orientation(image) >= 5
        if decodes:
            image.load()
        if decodes and image.mode.startswith(("I", "F")):
            _deep_grey(image, path)
        return (height, width) if is_turned else (width, height)


def read_image(path: str | os.PathLike[str], background: Background = "white") -> NDArray[np.float32]:
    """Read png, jpeg, webp, bmp, gif, tiff or ppm as float32 [H, W, 3] in [0, 1], upright.

    Of an animation the first frame is read. Transparent parts show `background`; "ignore" drops the transparency and
    keeps whatever colour lies beneath, as ComfyUI does. Grey, palette, CMYK and 16-bit grey images become RGB.

    Raises:
        ValueError: `background` is none of the four.
        MissingError: the file is not there, or may not be read.
        MediaError: it is not an image of these formats, or is damaged or cut short.
        RefusedError: it has more than 64 megapixels; nothing was decoded then.
    """
    if background != "ignore" and background not in _BACKGROUNDS:
        raise ValueError(f"background must be white, black, grey or ignore, got {background!r}")
    with _opened(path) as image:
        orientation = _orientation(image)
        image.load()
        upright = image.transpose(_ORIENTATIONS[orientation]) if orientation in _ORIENTATIONS else image
        has_alpha = "A" in upright.getbands() or "a" in upright.getbands() or "transparency" in image.info
        if upright.mode.startswith(("I", "F")):
            return _deep_grey(upright, path)
        if not has_alpha or background == "ignore":
            return _unit_range(upright.convert("RGB"))
        if "transparency" in image.info:
            upright.info["transparency"] = image.info["transparency"]
        rgba = _unit_range(upright.convert("RGBA"))
        alpha = rgba[..., 3:]
        composed: NDArray[np.float32] = rgba[..., :3] * alpha + np.float32(_BACKGROUNDS[background]) * (1 - alpha)
        return composed


def image_remarks(path: str | os.PathLike[str]) -> Iterator[Remark]:
    """Yield what a person might not expect of how `read_image` reads an image.

    Raises:
        MissingError, MediaError, RefusedError: as `read_image`.
    """
    with _opened(path) as image, suppress(ImageCms.PyCMSError, *_PILLOW_ERRORS):  # what is damaged is not used
        count = getattr(image, "n_frames", 1) if image.format != "MPO" else 1  # a phone's: the rest are smaller copies
        if count > 1:
            yield Remark(f"of its {count} pictures the first is used")
        profile = image.info.get("icc_profile")
        if profile:
            image.thumbnail((64, 64))
            own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            right = ImageCms.profileToProfile(image, own, ImageCms.createProfile("sRGB"), outputMode="RGB")
            off = np.abs(np.asarray(right, np.float32) - np.asarray(image.convert("RGB"), np.float32)).max()
            if off > _SEEN_LEVELS:
                name = "".join(filter(str.isprintable, ImageCms.getProfileDescription(own)))[:60]  # a stranger's text
                text = f"its colours are in {name}, and taken as sRGB, as ComfyUI does: up to {off:.0f} of 255 off"
                yield Remark(f"{text}; save it in sRGB")


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """Open an image of an allowed format and size, undecoded; turn what Pillow raises within into a `MediaError`."""
    too_large = RefusedError(
        f"{path}: the image has more than {MAX_IMAGE_PIXELS // 2**20} megapixels",
        "scale it down; 2 megapixels are plenty",
    )
    with open_source(path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd metadata, which does not concern the pixels
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        head = file.read(512)
        if not head:
            raise MediaError(f"{path}: the file is empty", "give a file that has content")
        file.seek(0)
        try:
            with Image.open(file, formats=_FORMATS) as image:
                if image.width * image.height > MAX_IMAGE_PIXELS:
                    raise too_large
                yield image
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise too_large from None
        except UnidentifiedImageError:
            is_so = (what for what, start in _OTHERS.items() if re.match(start, head, re.DOTALL | re.IGNORECASE))
            what = next((f" (it is {what})" for what in is_so), "")
            text, fix = f"{path}: not an image that can be read{what}", "use png, jpeg, webp, bmp, gif, tiff or ppm"
            raise MediaError(text, fix) from None
        except _PILLOW_ERRORS as error:
            raise MediaError(f"{path}: a damaged image ({error})", "export it again, as png or jpeg") from error


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 (upright) to 8, that stands in the header; 1 if there is none."""
    if image.format == "PNG" and not {"exif", "Raw profile type exif"} & image.info.keys():
        return 1  # Pillow would decode the whole file to look behind the pixels
    if image.format == "TIFF":
        return 1  # Pillow sets it upright itself
    value = image.getexif().get(_EXIF_ORIENTATION, 1)
    return value if value in _ORIENTATIONS else 1


def _unit_range(image: Image.Image) -> NDArray[np.float32]:
    """Return 8-bit pixels [H, W, bands] divided by 255."""
    pixels: NDArray[np.float32] = np.asarray(image, dtype=np.float32) / np.float32(255)
    return pixels


def _deep_grey(image: Image.Image, path: str | os.PathLike[str]) -> NDArray[np.float32]:
    """Return 16-bit grey, or what older versions of Pillow read into 32-bit integers, as RGB in [0, 1]."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65_535:
        raise MediaError(f"{path}: pixels in mode {image.mode} have no known range", "save it as 8 or 16-bit png")
    grey = values.astype(np.float32) / np.float32(65_535)
    return np.repeat(grey[..., None], 3, axis=2)  # [H, W, 3]


def crop_resize(image: NDArray[np.float32], width: int, height: int, antialias: bool) -> NDArray[np.float32]:
    """Cut an image about its centre to the aspect ratio of width to height, then scale it bilinearly.

    Half-pixel centres. Without `antialias` the two nearest pixels on each axis are mixed whatever the scale, as ComfyUI
    does; with it the filter widens as the image shrinks, as Pillow does (on floats, so nothing is rounded to 8 bits).

    `image`: float32 [H, W, 3] in [0, 1]; the result is float32 [height, width, 3].

    Raises:
        ValueError: a size is not positive, or the image is too narrow to be cut to that shape.

    Source: bilinear as torch.nn.functional.interpolate(align_corners=False).
    """
    if image.ndim != 3 or width < 1 or height < 1:
        raise ValueError(f"cannot scale an image of shape {image.shape} to {width}x{height}")
    rows, columns = image.shape[:2]
    cut_x, cut_y = centre_cut(columns, rows, width / height)
    cropped = image[cut_y : rows - cut_y, cut_x : columns - cut_x]
    if cropped.size == 0:
        raise ValueError(
            f"an image of {columns}x{rows} pixels is too narrow to be cut to the shape of {width}x{height}"
        )
    if antialias:
        bands = [Image.fromarray(np.ascontiguousarray(band)) for band in np.moveaxis(cropped, 2, 0)]  # mode F each
        scaled = [np.asarray(band.resize((width, height), Image.Resampling.BILINEAR)) for band in bands]
        return np.stack(scaled, axis=2)
    return _bilinear(_bilinear(cropped, width, axis=1), height, axis=0)


def _bilinear(image: NDArray[np.float32], size: int, axis: int) -> NDArray[np.float32]:
    """Scale one axis by mixing the two nearest pixels; positions in float32, as torch computes them."""
    old = image.shape[axis]
    scale = np.float32(old) / np.float32(size)
    position = np.maximum(
        (np.arange(size, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5), np.float32(0)
    )
    lower = np.minimum(position.astype(np.int64), old - 1)
    upper = np.minimum(lower + 1, old - 1)
    shape = [1, 1, 1]
    shape[axis] = size
    weight = (position - lower.astype(np.float32)).reshape(shape)
    mixed: NDArray[np.float32] = image.take(lower, axis) * (1 - weight) + image.take(upper, axis) * weight
    return mixed
