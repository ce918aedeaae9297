from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms
from reference import load_golden

from s2v_flow.errors import MediaError, MissingError, RefusedError
from s2v_flow.media.image import crop_resize, image_remarks, probe_image, read_image

PORTRAIT = Path(__file__).parents[2] / "recipes" / "inputs" / "astronaut.png"


def picture(width: int = 6, height: int = 4) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(("width", "height"), [(100, 36), (128, 96), (64, 80)])
def test_resizing_without_antialias_gives_comfyui_s_numbers(width: int, height: int) -> None:
    _, outputs, _ = load_golden("components/image_resize")
    actual = crop_resize(read_image(PORTRAIT), width, height, antialias=False)
    assert actual.dtype == np.float32
    assert np.abs(actual - outputs[f"{width}x{height}"][0].numpy()).max() <= 1e-6


def test_resizing_with_antialias_is_pillow_s_without_its_rounding() -> None:
    image = read_image(PORTRAIT)
    actual = crop_resize(image, 128, 128, antialias=True)
    pillow = Image.fromarray(np.round(image * 255).astype(np.uint8)).resize((128, 128), Image.Resampling.BILINEAR)
    assert actual.shape == (128, 128, 3)
    assert np.abs(actual * 255 - np.asarray(pillow)).max() < 1.01  # its two passes round to 8 bits each
    assert np.abs(actual - crop_resize(image, 128, 128, antialias=False)).max() > 0.1


def test_resizing_to_the_same_size_changes_nothing_and_crops_about_the_centre() -> None:
    image = picture(9, 4).astype(np.float32) / 255
    assert np.array_equal(crop_resize(image, 9, 4, antialias=False), image)
    assert np.array_equal(crop_resize(image, 5, 4, antialias=False), image[:, 2:7])
    assert np.array_equal(crop_resize(image, 9, 2, antialias=False), image[1:3])
    assert np.array_equal(crop_resize(image, 6, 4, antialias=True).shape, (4, 6, 3))


def test_resizing_refuses_sizes_that_leave_nothing() -> None:
    with pytest.raises(ValueError, match="too narrow"):
        crop_resize(np.zeros((1000, 2, 3), np.float32), 1, 100_000, antialias=False)
    with pytest.raises(ValueError, match="cannot scale"):
        crop_resize(np.zeros((4, 4, 3), np.float32), 0, 4, antialias=True)


def test_a_picture_is_its_bytes_over_255(tmp_path: Path) -> None:
    for suffix in ("png", "bmp", "tiff", "ppm"):
        Image.fromarray(picture()).save(tmp_path / f"a.{suffix}")
        image = read_image(tmp_path / f"a.{suffix}")
        assert image.dtype == np.float32
        assert np.array_equal(image, picture().astype(np.float32) / np.float32(255))
        assert probe_image(tmp_path / f"a.{suffix}") == (6, 4)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_exif_orientation_sets_the_picture_upright(tmp_path: Path, orientation: int, suffix: str) -> None:
    """Stored as a camera stores it for each orientation, a picture comes out the same; a probe agrees."""
    colours = [[[250, 0, 0], [0, 250, 0]], [[0, 0, 250], [250, 250, 250]], [[9, 9, 9], [120, 0, 120]]]
    upright = np.array(colours).repeat(16, axis=0).repeat(16, axis=1)
    camera = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: np.rot90(upright.transpose(1, 0, 2), 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(camera.astype(np.uint8)).save(tmp_path / f"a.{suffix}", exif=exif)
    assert probe_image(tmp_path / f"a.{suffix}") == (32, 48)
    assert np.abs(read_image(tmp_path / f"a.{suffix}") * 255 - upright)[8::16, 8::16].max() < 12


@pytest.mark.parametrize(("background", "expected"), [("white", 0.8), ("black", 0.2), ("grey", 0.5), ("ignore", 0.5)])
def test_transparent_parts_show_the_background(tmp_path: Path, background: str, expected: float) -> None:
    """Grey 128 at 40 % opacity, and at 100 %."""
    pixels = np.full((1, 2, 4), 128, np.uint8)
    pixels[..., 3] = [102, 255]
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png", background)  # type: ignore[arg-type]
    assert image[0, 0] == pytest.approx([expected] * 3, abs=0.003)
    assert image[0, 1] == pytest.approx([128 / 255] * 3)


def test_a_transparent_palette_colour_and_grey_show_the_background(tmp_path: Path) -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putdata([0, 1]) if not hasattr(palette, "frombytes") else palette.frombytes(b"\x00\x01")
    palette.save(tmp_path / "p.png", transparency=0)
    palette.save(tmp_path / "p.gif", transparency=0)
    for name in ("p.png", "p.gif"):
        assert read_image(tmp_path / name).tolist() == [[[1, 1, 1], [0, 1, 0]]]
        assert read_image(tmp_path / name, "ignore").tolist() == [[[1, 0, 0], [0, 1, 0]]]
    Image.fromarray(np.array([[0, 255]], np.uint8)).save(tmp_path / "l.png", transparency=0)
    assert read_image(tmp_path / "l.png", "grey").tolist() == [[[0.5] * 3, [1] * 3]]


def test_grey_16_bit_grey_and_cmyk_become_rgb(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 51]], np.uint8)).save(tmp_path / "l.png")
    assert read_image(tmp_path / "l.png")[0, 1] == pytest.approx([0.2] * 3)
    Image.fromarray(np.array([[0, 13_107, 65_535]], np.uint16)).save(tmp_path / "i.png")
    assert read_image(tmp_path / "i.png")[0] == pytest.approx(np.array([[0] * 3, [0.2] * 3, [1] * 3]))
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "c.jpg")
    assert read_image(tmp_path / "c.jpg")[4, 4] == pytest.approx([1, 0, 0], abs=0.02)
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "f.tiff")
    with pytest.raises(MediaError, match="no known range"):
        read_image(tmp_path / "f.tiff")


def test_of_an_animation_the_first_frame_is_read(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (4, 4), (255, 0, 0)), Image.new("RGB", (4, 4), (0, 0, 255))
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    assert read_image(tmp_path / "a.gif")[0, 0].tolist() == [1, 0, 0]


def _png_header(width: int, height: int) -> bytes:
    """Return a png whose header is right and whose pixels are missing."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"")
    chunks = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, data, b"IEND"))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize(("width", "height"), [(8_193, 8_192), (12_000, 9_000), (60_000, 60_000)])
def test_an_image_that_is_too_large_is_refused_by_its_header(tmp_path: Path, width: int, height: int) -> None:
    (tmp_path / "a.png").write_bytes(_png_header(width, height))
    for read in (probe_image, read_image):
        with pytest.raises(RefusedError, match="64 megapixels"):
            read(tmp_path / "a.png")


def test_the_largest_allowed_size_passes_the_probe_which_reads_only_the_header(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(_png_header(8_192, 8_192))
    assert probe_image(tmp_path / "a.png") == (8_192, 8_192)


def test_what_is_not_an_image_is_refused(tmp_path: Path) -> None:
    whole = PORTRAIT.read_bytes()
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
    for content in (b"", b"hello", postscript, whole[: len(whole) // 2], b"<svg xmlns='x'/>"):
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(MediaError) as caught:
            read_image(tmp_path / "a.png")
        assert str(tmp_path / "a.png") in caught.value.message
        assert caught.value.fix
    with pytest.raises(MediaError, match="regular file"):
        read_image(tmp_path)
    with pytest.raises(MissingError):
        read_image(tmp_path / "none.png")
    with pytest.raises(ValueError, match="background"):
        read_image(PORTRAIT, "pink")  # type: ignore[arg-type]


def test_a_mutated_image_gives_pixels_or_a_typed_error(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    outcomes = {"read": 0, "refused": 0}
    for format_name in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"):
        buffer = io.BytesIO()
        Image.fromarray(picture(40, 30)).save(buffer, format_name)
        for _ in range(40):
            mutant = bytearray(buffer.getvalue())
            for at in random.integers(0, random.choice([64, len(mutant)]), 4):
                mutant[at] = random.integers(256)
            (tmp_path / "a").write_bytes(bytes(mutant))
            try:
                image = read_image(tmp_path / "a")
            except (MediaError, RefusedError):
                outcomes["refused"] += 1
            else:
                outcomes["read"] += 1
                assert image.ndim == 3
                assert image.shape[2] == 3
                assert 0 <= image.min() <= image.max() <= 1
    assert min(outcomes.values()) > 0


def test_colours_of_another_space_are_noted_where_they_would_be_seen(tmp_path: Path) -> None:
    """Display P3, as telephones write it: sRGB's profile with other primaries."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    p3 = bytearray(srgb)
    primaries = {
        b"rXYZ": (0.5151, 0.2412, -0.0011),
        b"gXYZ": (0.2920, 0.6922, 0.0419),
        b"bXYZ": (0.1571, 0.0666, 0.7841),
    }
    for entry in range(132, 132 + 12 * struct.unpack_from(">I", p3, 128)[0], 12):
        name, at = struct.unpack_from(">4sI", p3, entry)
        if name in primaries:
            struct.pack_into(">3i", p3, at + 8, *(round(value * 65536) for value in primaries[name]))
    skin = Image.new("RGB", (90, 120), (220, 120, 80))
    for name, profile in (("srgb", srgb), ("p3", bytes(p3)), ("garbage", b"no profile")):
        skin.save(tmp_path / f"{name}.png", icc_profile=profile)
    (remark,) = image_remarks(tmp_path / "p3.png")
    assert "taken as sRGB, as ComfyUI does: up to 15 of 255 off; save it in sRGB" in remark
    assert [*image_remarks(tmp_path / "srgb.png"), *image_remarks(tmp_path / "garbage.png")] == []
