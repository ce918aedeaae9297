"""The places where ComfyUI hides a workflow: each gives the same recipe as the plain file."""

from __future__ import annotations

import json
import shlex
import struct
import zipfile
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
from comfy_workflows import editor, golden
from PIL import Image, PngImagePlugin
from recipes_for_tests import remux
from safetensors.numpy import save_file

from s2v_flow.api import KINDS
from s2v_flow.comfy.importer import import_workflow
from s2v_flow.comfy.source import read_workflow
from s2v_flow.errors import ExitCode, S2VFlowError
from s2v_flow.runs.essence import note_box

WORKFLOW = json.dumps(editor())
PROMPT = json.dumps(golden())
PICTURE = Image.new("RGB", (8, 8))


def png(path: Path, *, compressed: bool = False, unicode_text: bool = False) -> None:
    info = PngImagePlugin.PngInfo()
    if unicode_text:
        info.add_itxt("workflow", WORKFLOW, zip=compressed)
    else:
        info.add_text("prompt", PROMPT, zip=compressed)
        info.add_text("workflow", WORKFLOW, zip=compressed)
    PICTURE.save(path, pnginfo=info)


def webp(path: Path) -> None:
    exif = PICTURE.getexif()
    exif[0x0110], exif[0x010F] = "prompt:" + PROMPT, "workflow:" + WORKFLOW
    PICTURE.save(path, exif=exif, lossless=True)


def video(path: Path, tags: dict[str, str], codec: str) -> None:
    options = {"movflags": "use_metadata_tags"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=options) as container:
        container.metadata.update(tags)
        stream = container.add_stream(codec, rate=16)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        for _ in range(2):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8))))
        container.mux(stream.encode())


def sound(path: Path, tags: dict[str, str], codec: str) -> None:
    """As ComfyUI's SaveAudio, SaveAudioMP3 and SaveAudioOpus do."""
    with av.open(str(path), "w") as container:
        container.metadata.update(tags)
        stream = container.add_stream(codec, rate=48000, layout="mono")
        for _ in range(4):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 960), np.int16), "s16", "mono")
            frame.rate = 48000
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def latin_1(path: Path) -> None:
    """A tag that is no UTF-8 beside the workflow's."""
    sound(path, {"artist": "caf@", "prompt": PROMPT}, "flac")
    path.write_bytes(path.read_bytes().replace(b"caf@", b"caf\xe9"))


MAKERS = {
    "a.json": lambda path: path.write_text(WORKFLOW),
    "bom.json": lambda path: path.write_bytes(b"\xef\xbb\xbf" + WORKFLOW.encode()),
    "utf16.json": lambda path: path.write_bytes(WORKFLOW.encode("utf-16")),
    "worker.json": lambda path: path.write_text(json.dumps({"input": {"workflow": golden()}})),
    "page.json": lambda path: path.write_text(json.dumps({"output": golden()})),
    "server.json": lambda path: path.write_text(json.dumps({"prompt": golden(), "client_id": "x"})),
    "a.png": png,
    "zipped.png": lambda path: png(path, compressed=True),
    "unicode.png": lambda path: png(path, unicode_text=True),
    "both.png": lambda path: png(path, unicode_text=True, compressed=True),
    "a.webp": webp,
    "a.mp4": lambda path: video(path, {"workflow": WORKFLOW, "prompt": PROMPT}, "mpeg4"),
    "comment.mp4": lambda path: video(path, {"comment": json.dumps({"prompt": golden()})}, "mpeg4"),
    "a.webm": lambda path: video(path, {"prompt": PROMPT}, "vp9"),
    "a.flac": lambda path: sound(path, {"prompt": PROMPT, "workflow": WORKFLOW}, "flac"),
    "a.mp3": lambda path: sound(path, {"prompt": PROMPT, "workflow": WORKFLOW}, "libmp3lame"),
    "a.opus": lambda path: sound(path, {"prompt": PROMPT, "workflow": WORKFLOW}, "libopus"),
    "latin-1.flac": latin_1,
    "a.latent": lambda path: save_file({"latent_tensor": np.zeros(3)}, path, {"prompt": PROMPT}),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_workflow_is_found_where_comfyui_puts_it(name: str, tmp_path: Path) -> None:
    """The recipe is the golden workflow's, whatever the file."""
    plain = tmp_path / "plain.json"
    plain.write_text(PROMPT)
    file = tmp_path / name
    MAKERS[name](file)
    expected = import_workflow(plain, KINDS).text
    assert import_workflow(file, KINDS).text.splitlines()[2:] == expected.splitlines()[2:]


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.mp4", "a.webm", "a.wav", "a.flac"])
def test_media_without_a_workflow_says_so(name: str, tmp_path: Path) -> None:
    """A picture, a video or a sound of anything else."""
    file = tmp_path / name
    if file.suffix in (".png", ".webp"):
        PICTURE.save(file)
    elif file.suffix in (".wav", ".flac"):
        sound(file, {}, "flac" if file.suffix == ".flac" else "pcm_s16le")
    else:
        video(file, {}, "vp9" if name == "a.webm" else "mpeg4")
    with pytest.raises(S2VFlowError, match="no workflow is in it") as caught:
        import_workflow(file, KINDS)
    assert caught.value.exit_code == ExitCode.RECIPE


@pytest.mark.parametrize(
    "head", [b"\x89PNG\r\n\x1a\n", b"RIFF....WEBPxx", b"....ftypisom", b"\x1aE\xdf\xa3", b"OggS", b"ID3"]
)
def test_damaged_media_say_so(head: bytes, tmp_path: Path) -> None:
    """Cut short after the first bytes."""
    file = tmp_path / "file"
    file.write_bytes(head + b"\0" * 40)
    with pytest.raises(S2VFlowError, match="not a ComfyUI workflow"):
        import_workflow(file, KINDS)


def test_a_zipped_text_that_grows_beyond_bounds_is_refused(tmp_path: Path) -> None:
    """A few kilobytes of PNG with 60 MB of spaces in them."""
    data = b"workflow\0\0" + zlib.compress(b" " * (60 << 20), 9)
    file = tmp_path / "bomb.png"
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I4s", len(data), b"zTXt") + data + b"\0" * 4)
    with pytest.raises(S2VFlowError, match="50 MB") as caught:
        read_workflow(file)
    assert caught.value.exit_code == ExitCode.REFUSED


@pytest.mark.parametrize("name", ["talk.mp4", "a copy.mp4", "a copy.mkv"])
def test_a_video_of_ours_is_answered_with_the_command_that_gives_its_recipe(name: str, tmp_path: Path) -> None:
    """As it was written, and as a remux leaves it; it has no workflow in it."""
    file, copy = tmp_path / "talk.mp4", tmp_path / name
    video(file, {}, "mpeg4")
    file.write_bytes(file.read_bytes() + note_box(b'{"essence":2,"recipe":{}}'))
    if copy != file:
        remux(file, copy)
    with pytest.raises(S2VFlowError, match="holds no ComfyUI workflow, but the recipe") as caught:
        import_workflow(copy, KINDS)
    assert shlex.join(["s2vflow", "recipe", str(copy), "-o", f"{copy.stem}.yaml"]) in (caught.value.fix or "")
    assert caught.value.exit_code == ExitCode.RECIPE


def test_what_other_tools_put_beside_the_nodes_is_left_out_with_a_note(tmp_path: Path) -> None:
    """Descriptions and the metadata of sites that show pictures."""
    file = tmp_path / "workflow.json"
    file.write_text(PROMPT)
    plain = import_workflow(file, KINDS)
    file.write_text(json.dumps({"_meta": {"author": "x"}, **golden(), "extraMetadata": "{}"}))
    made = import_workflow(file, KINDS)
    assert made.text == plain.text
    assert [note.split(" ")[0] for note in made.notes] == ["_meta", "extraMetadata"]


def test_an_archive_is_named(tmp_path: Path) -> None:
    """As sites deliver workflows."""
    with zipfile.ZipFile(tmp_path / "workflow.zip", "w") as archive:
        archive.writestr("workflow.json", PROMPT)
    with pytest.raises(S2VFlowError, match="an archive: unpack it"):
        import_workflow(tmp_path / "workflow.zip", KINDS)
