"""The documented exit codes, each as a person meets it: one run of the program, its code and what it says."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from recipes_for_tests import RECIPES, call, tiny, write_recipe, write_voice
from safetensors.torch import load_file, save_file

from s2v_flow.cache import store
from s2v_flow.cli.main import EXIT_CODES
from s2v_flow.errors import Diagnostic, ExitCode, MediaError, Place, RecipeError, S2VFlowError
from s2v_flow.files.atomic import cannot_write
from s2v_flow.models.vae import WanVAE


class Here:
    """A small recipe in a folder of its own."""

    def __init__(self, folder: Path, models: Path) -> None:
        self.folder = folder
        write_voice(folder / "voice.wav", 0.3)
        self.recipe = write_recipe(folder, tiny(talk={"chunks": 0}))
        self.where = ["--models-dir", models, "--cache-dir", folder / "cache", "--device", "cpu"]

    def run(self, *more: object) -> tuple[int, str]:
        code, _, err = call("run", self.recipe, *self.where, *more)
        return code, err


@pytest.fixture
def here(tmp_path: Path, tiny_models: Path) -> Here:
    return Here(tmp_path, tiny_models)


def test_the_help_names_every_code_and_no_other() -> None:
    named = [int(code) for code in re.findall(r"^ +(\d+)  ", EXIT_CODES, re.MULTILINE)]
    assert named == sorted(ExitCode) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 75, 130, 143]


def test_0_and_10(here: Here) -> None:
    """A run that went well; a plan with work in it and one without."""
    plan = ["plan", here.recipe, *here.where, "--detailed-exitcode"]
    assert call(*plan)[0] == 10
    assert here.run()[0] == 0
    assert call(*plan)[0] == 0


@pytest.mark.slow
def test_1_a_node_failed(here: Here) -> None:
    """Its output cannot be written: it is larger than the process's files may be."""
    assert here.run()[0] == 0
    video = here.folder / "out" / "talk.mp4"
    size, before = video.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    video.unlink()
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, before[1]))
    try:
        code, err = here.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (code, "Traceback" in err, "cannot write" in err) == (1, False, True), err


@pytest.mark.parametrize("words", [["no-such-command"], ["run"], ["run", "r.yaml", "--no-such-option"]])
def test_2_the_command_line_is_wrong(words: list[str]) -> None:
    assert call(*words)[0] == 2


def test_3_the_recipe_is_wrong(here: Here) -> None:
    code, err = here.run("--set", "nodes.first.steps=0")
    assert (code, "error[R" in err, "fix:" in err or "must be" in err) == (3, True, True)


@pytest.mark.parametrize(
    "change", ["nodes.voice.file=none.wav", "nodes.vae.checkpoint=none.safetensors", "nodes.voice.file=recipe.yaml"]
)
def test_4_a_file_is_missing_or_cannot_be_used(change: str, here: Here) -> None:
    assert here.run("--set", change)[0] == 4


BROKEN = {
    "too old": "",
    "a part of it": """
import importlib
def __getattr__(name):
    try:
        importlib.import_module("transformers.part")
    except AttributeError as error:
        raise RuntimeError("Failed to import transformers.part") from error
""",
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN.keys())
def test_4_a_package_cannot_be_imported(text: str, here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program's installation may have changed it: that is no defect of this one, and no damaged model file."""
    (here.folder / "transformers").mkdir()
    (here.folder / "transformers" / "__init__.py").write_text(text)
    (here.folder / "transformers" / "part.py").write_text("import os\nos.float3")
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(here.folder)
    code, err = here.run("--until", "positive")
    assert (code, "nodes.positive" in err) == (4, True), err
    assert "the package transformers cannot be imported: " in err
    assert "-m pip install --upgrade --force-reinstall transformers\n" in err


def test_5_refused(here: Here) -> None:
    """A pickle under a name that promises safetensors; a recipe that writes outside its folder."""
    folder = here.folder / "models" / "vae"
    folder.mkdir(parents=True)
    torch.save({"x": torch.zeros(1)}, folder / "v.safetensors")
    pickle = ["--set", "nodes.vae.checkpoint=v.safetensors", "--models-dir", folder.parent]
    assert here.run(*pickle)[0] == 5
    write_recipe(here.folder, tiny(talk={"chunks": 0}, video={"file": "../talk.mp4"}))
    assert here.run()[0] == 5


@pytest.mark.slow
def test_6_the_disk_is_full(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where not even the video itself can be written."""

    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "finish", refuse)
    code, err = here.run()
    assert (code, "Traceback" in err, "no space left" in err) == (6, False, True)


@pytest.mark.slow
def test_7_out_of_memory(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no smaller step helps, and what is kept is said."""

    def refuse(*arguments: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    monkeypatch.setattr(WanVAE, "decode_next", refuse)
    code, err = here.run()
    assert (code, "Traceback" in err, "every sampled chunk" in err) == (7, False, True)


@pytest.mark.slow
def test_8_not_a_number(here: Here, tiny_models: Path) -> None:
    """A model file with a broken weight."""
    tensors = load_file(tiny_models / "diffusion_models" / "tiny_s2v.safetensors")
    tensors["head.head.bias"] = torch.full_like(tensors["head.head.bias"], torch.nan)
    folder = here.folder / "models" / "diffusion_models"
    folder.mkdir(parents=True)
    save_file(tensors, folder / "broken.safetensors")
    code, err = here.run("--set", "nodes.dit.checkpoint=broken.safetensors", "--models-dir", folder.parent)
    assert (code, "first: NaN or infinity in the latent after step 1 of 2" in err) == (8, True)


@pytest.mark.slow
def test_9_a_defect(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise ZeroDivisionError("no such thing")

    monkeypatch.setattr(WanVAE, "decode_next", fail)
    code, err = here.run()
    assert (code, "please report it" in err) == (9, True)


def test_11_the_video_is_not_as_required(here: Here) -> None:
    """It is written all the same, and the manifest says why; `quality: off` measures for the gate alone."""
    text = here.recipe.read_text()
    here.recipe.write_text(text + "require: {min_confidence: 0.99}\n")
    code, err = here.run()
    assert (code, "min_confidence is 0.99" in err) == (11, True)
    assert (here.folder / "out" / "talk.mp4").is_file()
    where = ["--cache-dir", here.folder / "cache", "--json"]
    manifest = json.loads(call("show", "last", *where)[1])
    assert (manifest["status"], "min_confidence" in manifest["error"]) == ("failed", True)
    assert manifest["quality"] == json.loads(call("quality", "last", *where)[1])
    assert here.run("--set", "nodes.video.quality=off", "--force", "video")[0] == 11


SIGNALS = [
    (signal.SIGTERM, 143),
    *(pytest.param(*it, marks=pytest.mark.slow) for it in ((signal.SIGINT, 130), (signal.SIGUSR1, 75))),
]


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_130_143_and_75_signals(number: int, code: int, tmp_path: Path) -> None:
    """In a process of its own, before anything was computed (within a chunk: tests/test_stopping.py)."""
    program = (
        "import os, sys; from s2v_flow import api\nfrom s2v_flow.cli import main\n"
        f"api.plan = lambda *given: os.kill(os.getpid(), {int(number)}) or sys.exit(99)\n"
        f"sys.argv = ['s2vflow', 'run', {str(RECIPES / 'demo.yaml')!r}]\nmain.main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("setpriv") is None, reason="takes root's rights away")
def test_what_may_not_be_read_is_no_defect(tmp_path: Path) -> None:
    """A folder that may not be entered, and a weight file; root may read them all, so its rights are taken away."""
    (tmp_path / "closed" / "runs").mkdir(parents=True)
    (tmp_path / "m" / "vae").mkdir(parents=True)
    (tmp_path / "m" / "vae" / "x.safetensors").write_bytes(b"x")
    recipe = write_recipe(tmp_path, {"vae": {"checkpoint": "x.safetensors"}})
    plan = ["plan", recipe, "--cache-dir", tmp_path / "cache", "--models-dir"]
    less = "-dac_override,-dac_read_search"
    bare = ["setpriv", f"--bounding-set={less}", f"--inh-caps={less}"] if os.geteuid() == 0 else []
    for closed, words in (
        (tmp_path / "closed", ["runs", "--cache-dir", tmp_path / "closed" / "inner"]),
        (tmp_path / "m" / "vae" / "x.safetensors", [*plan, tmp_path / "m"]),
        (tmp_path / "m" / "vae", [*plan, tmp_path / "m"]),
    ):
        closed.chmod(0)
        command = [*bare, sys.executable, "-m", "s2v_flow", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        closed.chmod(0o755)
        told = done.stdout + done.stderr
        assert (done.returncode, "check its permissions" in told, "Traceback" in told) == (4, True, False), told


def test_errors_reach_other_processes_whole() -> None:
    """However they were made: with keywords alone, with a cause's fields, changed since."""
    place = Place("talk.yaml", 3, 5)
    faults = [Diagnostic("R001", "no", place)]
    raised = [
        S2VFlowError(message="no", fix="yes", place=place, exit_code=ExitCode.USAGE),
        RecipeError(message="no", diagnostics=faults, are_all=False),
        RecipeError("no", None, "all", faults),
        MediaError("no", "yes"),
        cannot_write(Path("out"), OSError(errno.ENOSPC, "full")),
    ]
    raised[0].message = "never"
    for error in raised:
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), vars(again), str(again)) == (type(error), vars(error), str(error))
