"""`s2vflow doctor`: what it sees, what it calls a problem, and what it does not tell."""

from __future__ import annotations

import getpass
import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import av
import pytest
import torch
from recipes_for_tests import call

from s2v_flow.api import Options
from s2v_flow.cli import doctor
from s2v_flow.cli.doctor import Finding, examine, findings_text

VAE = "wan_2.1_vae.safetensors"


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(models_dirs=[tmp_path / "models"], cache_dir=tmp_path / "cache")


def by_topic(options: Options, topic: str) -> list[Finding]:
    return [finding for finding in examine(options) if finding.topic == topic]


def test_a_machine_that_is_all_right_is_exit_code_0(tmp_path: Path) -> None:
    """As this one: the tests encode videos and compute with torch."""
    where = ["--cache-dir", str(tmp_path / "cache"), "--models-dir", str(tmp_path / "models")]
    code, out, err = call("doctor", *where)
    assert (code, err) == (0, "")
    assert out.endswith("no problems\n")
    code, out, _ = call("doctor", *where, "--json")
    report = json.loads(out)
    assert (code, report["ok"]) == (0, True)
    topics = [finding["topic"] for finding in report["findings"]]
    assert list(dict.fromkeys(topics)) == ["python", "torch", "device", "video", "cache", "models", "packages"]
    facts = {finding["topic"]: finding["facts"] for finding in report["findings"]}
    assert facts["torch"]["version"] == torch.__version__
    assert facts["python"]["python"] == platform.python_version()
    assert facts["video"]["encoders_missing"] == []
    assert not (tmp_path / "cache").exists(), "it only looks"


def test_neither_the_machine_nor_its_user_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The home folder is `~`, also inside errors."""
    home = tmp_path / "secret-name"
    file = home / "ComfyUI" / "extra_model_paths.yaml"
    (home / "ComfyUI" / "models").mkdir(parents=True)
    file.write_text("a: 3\n")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    monkeypatch.setenv("S2VFLOW_CACHE_DIR", str(home / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret-name")
    monkeypatch.delenv("S2VFLOW_MODELS_DIR", raising=False)
    for given in ([], ["--json"]):
        code, out, err = call("doctor", *given)
        assert code == 1
        assert "secret-name" not in out + err
        assert str(Path("~/ComfyUI/extra_model_paths.yaml")) in json.dumps(out).replace("\\\\", "\\")
        assert not re.search(rf"\b{re.escape(platform.node())}\b", out)
        assert getpass.getuser() not in re.findall(r"\w+", out)
        file.write_text("")
        assert call("doctor", *given)[0] == 0
        file.write_text("a: 3\n")


def test_known_models_are_counted_where_they_are(tmp_path: Path, options: Options) -> None:
    note = by_topic(options, "models")[-1]
    assert (note.status, note.fix) == ("note", "s2vflow models RECIPE --download")
    path = tmp_path / "models" / "vae" / VAE
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")
    folder, found = by_topic(options, "models")
    assert "there" in folder.text
    assert found.facts["found"] == [VAE]
    assert found.text.startswith("1 of the 7 known files")


def test_the_cache_is_measured(tmp_path: Path, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its size, and what is free; little space is worth a note."""
    (tmp_path / "cache" / "objects").mkdir(parents=True)
    (tmp_path / "cache" / "objects" / "a").write_bytes(bytes(1000))

    class Usage(NamedTuple):
        free: int

    for free, status in ((1 << 40, "ok"), (1 << 30, "note")):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: Usage(free))
        (cache,) = by_topic(options, "cache")
        assert (cache.status, cache.facts["size_bytes"], cache.facts["free_bytes"]) == (status, 1000, free)


def test_a_cache_that_cannot_be_written_is_a_problem(
    tmp_path: Path, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file")
    (cache,) = by_topic(options, "cache")
    assert cache.status == "problem"
    (tmp_path / "cache").unlink()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    (cache,) = by_topic(options, "cache")
    assert (cache.status, cache.fix) == ("problem", "name another folder with --cache-dir or S2VFLOW_CACHE_DIR")


@pytest.mark.parametrize(("module", "topic"), [("torch", "torch"), ("av", "video")])
def test_a_broken_installation_is_a_problem(
    options: Options, monkeypatch: pytest.MonkeyPatch, module: str, topic: str
) -> None:
    """Everything else is still looked at."""
    monkeypatch.setitem(sys.modules, module, None)
    findings = examine(options)
    assert [finding.topic for finding in findings if finding.status == "problem"] == [topic]
    assert findings_text(findings).endswith("1 problem")


def test_a_package_that_is_there_and_cannot_be_imported_is_a_problem(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "soundfile.py").write_text("raise OSError('sndfile library not found')")
    monkeypatch.delitem(sys.modules, "soundfile", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    (found,) = by_topic(options, "packages")
    assert (found.status, found.text) == (
        "problem",
        "the package soundfile cannot be imported: sndfile library not found",
    )
    assert (found.fix or "").endswith("-m pip install --upgrade --force-reinstall soundfile")


@pytest.mark.parametrize("module", ["transformers.models.umt5.modeling_umt5", "safetensors.torch", "PIL.ImageOps"])
def test_a_package_whose_top_alone_can_be_imported_is_a_problem(
    options: Options, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    """A half-installed package: what recipes use of it is imported, too."""
    monkeypatch.setitem(sys.modules, module, None)
    (found,) = by_topic(options, "packages")
    assert found.status == "problem"
    assert "cannot be imported" in found.text
    assert module in found.text


def test_torch_without_numpy_and_pyav_without_codecs_are_problems(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: object) -> None:
        raise RuntimeError("Numpy is not available")

    monkeypatch.setattr(torch.Tensor, "numpy", refuse)
    monkeypatch.delattr(av, "Codec")
    problems = {finding.topic: finding.text for finding in examine(options) if finding.status == "problem"}
    assert problems["torch"] == "cannot be used: Numpy is not available"
    assert problems["video"].startswith("PyAV cannot be used: ")
    assert problems.keys() == {"torch", "video"}


def test_an_encoder_or_a_decoder_that_is_not_there_is_named(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its encoders nothing can be written; a decoder may be missed."""
    monkeypatch.setattr(doctor, "_DECODERS", ("h264", "no-such-codec"))
    (video,) = by_topic(options, "video")
    assert video.status == "note"
    assert "it cannot read no-such-codec" in video.text
    monkeypatch.setattr(doctor, "_ENCODERS", ("libx264", "no-such-codec"))
    (video,) = by_topic(options, "video")
    assert video.status == "problem"
    assert "cannot write no-such-codec" in video.text


def test_gpus_are_listed(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties(NamedTuple):
        name: str = "Card"
        total_memory: int = 80 << 30
        major: int = 9
        minor: int = 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties())
    devices = [finding.text for finding in by_topic(options, "device") if finding.facts.get("device") != "mps"]
    assert devices == [f"cuda:{index}: Card, 80.0 GiB, compute capability 9.0" for index in range(2)]


@pytest.mark.parametrize("units", [(), ("amx_bf16",)])
def test_a_cpu_that_has_units_for_bf16_is_said_to_have_them(
    units: tuple[str, ...], options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU: that is where it may pay."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("s2v_flow.machine.cpu_bf16_units", lambda: units)
    (found,) = by_topic(options, "device")
    assert ("amx_bf16: bf16 may be quicker, doctor --precision measures it" in found.text) == bool(units)
    assert found.facts == {"cpu_bf16_units": list(units)}


def test_a_package_that_is_missing_is_a_problem(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> Any:
        if name == "soxr":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    (packages,) = by_topic(options, "packages")
    assert (packages.status, packages.text, packages.fix) == ("problem", "missing: soxr", "pip install soxr")


@pytest.mark.parametrize(("version", "is_right"), [((3, 9), False), ((3, 10), True), ((3, 13), True), ((3, 14), False)])
def test_pythons_that_are_too_old_or_too_new_are_a_problem(
    options: Options, monkeypatch: pytest.MonkeyPatch, version: tuple[int, int], is_right: bool
) -> None:
    monkeypatch.setattr(sys, "version_info", (*version, 0, "final", 0))
    finding = doctor._python()
    assert (finding.status == "ok") is is_right


def test_the_table_of_packages_is_that_of_the_project() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    section = re.search(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert section is not None
    assert tuple(re.findall(r'"([A-Za-z0-9_-]+)', section[1])) == doctor.DEPENDENCIES
    first, end = (".".join(map(str, version)) for version in doctor._PYTHONS)
    assert f'requires-python = ">={first},<{end}"' in text
