"""Whether this machine can run recipes: what is there, what is wrong, and what to do about it.

Nothing here names the machine or its user: the home folder is shown as `~`.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from s2v_flow import __version__
from s2v_flow.errors import PACKAGES, MissingError, S2VFlowError, broken_package
from s2v_flow.library.needs import known_needs
from s2v_flow.wording import counted, size_text

if TYPE_CHECKING:
    from s2v_flow.api import Options

DEPENDENCIES = (
    *("av", "click", "imageio", "networkx", "numpy", "pillow", "platformdirs", "pydantic", "pyyaml", "rich"),
    *("safetensors", "sentencepiece", "soundfile", "soxr", "torch", "transformers"),
)
_USED: Mapping[str, tuple[str, ...]] = {  # what of a package is used, where its top alone does not show that it works
    "imageio": ("imageio.v3",),
    "pillow": ("PIL.Image", "PIL.ImageCms", "PIL.ImageDraw", "PIL.ImageFont", "PIL.ImageOps", "PIL.PngImagePlugin"),
    "rich": ("rich.console", "rich.live", "rich.progress_bar", "rich.table"),
    "safetensors": ("safetensors.numpy", "safetensors.torch"),
    "transformers": ("transformers.models.umt5.modeling_umt5", "transformers.models.wav2vec2.modeling_wav2vec2"),
}
_PYTHONS = ((3, 10), (3, 14))  # the first that will do, the first that will not
_ENCODERS = ("libx264", "aac")
_DECODERS = ("h264", "hevc", "vp9", "aac", "mp3", "opus")
# what a broken installation raises
_IMPORT_ERRORS = (ImportError, OSError, RuntimeError, AttributeError, TypeError, ValueError)
_LOW_SPACE_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. A "problem" keeps recipes from running, a "note" may surprise."""

    topic: str
    status: Literal["ok", "note", "problem"]
    text: str
    fix: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


def examine(options: Options) -> list[Finding]:
    """Look at Python, torch, the codecs, the cache folder, the models and the dependencies. Imports torch."""
    torch = [*_torch()]
    packages = _dependencies(has_torch=torch[0].status == "ok")
    return [_python(), *torch, *_codecs(), _cache(options.cache_root), *_models(options), packages]


def findings_json(findings: list[Finding]) -> dict[str, Any]:
    """Return the object that `s2vflow doctor --json` prints."""
    is_ok = all(finding.status != "problem" for finding in findings)
    return {"ok": is_ok, "findings": [vars(finding) for finding in findings]}


def findings_text(findings: list[Finding]) -> str:
    """Return findings as lines for people."""
    width = max(len(finding.topic) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.status:<7}  {finding.topic:<{width}}  {finding.text}")
        if finding.fix is not None:
            lines.append(f"{'':<{width + 11}}fix: {finding.fix}")
    count = sum(finding.status == "problem" for finding in findings)
    lines.append(counted(count, "problem") if count else "no problems")
    return "\n".join(lines)


def _python() -> Finding:
    first, end = _PYTHONS
    is_right = first <= sys.version_info[:2] < end
    text = f"{platform.python_version()} on {sys.platform} ({platform.machine()}), s2vflow {__version__}"
    fix = None if is_right else f"use Python {first[0]}.{first[1]} or later, before {end[0]}.{end[1]}"
    facts = {"python": platform.python_version(), "platform": sys.platform, "machine": platform.machine()}
    return Finding("python", "ok" if is_right else "problem", text, fix, {**facts, "s2vflow": __version__})


def _torch() -> Iterator[Finding]:
    try:
        import torch

        torch.zeros(1).numpy()  # a build for another numpy fails here
    except _IMPORT_ERRORS as error:
        yield Finding("torch", "problem", f"cannot be used: {_private(str(error))}", "install torch again")
        return
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    if torch.version.hip:
        build = f"ROCm {torch.version.hip}"
    facts = {"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip}
    yield Finding("torch", "ok", f"{torch.__version__}, built with {build}", None, facts)
    devices = [_gpu(torch, index) for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
    for device in devices:
        size = size_text(device["memory_bytes"], is_memory=True)
        text = f"{device['device']}: {device['name']}, {size}, {device['capability']}"
        yield Finding("device", "ok", text, None, device)
    if not devices:
        fix = None if torch.version.cuda or torch.version.hip else "for a GPU, install a torch build with CUDA or ROCm"
        from s2v_flow.machine import cpu_bf16_units

        units = cpu_bf16_units()
        faster = f"; {' and '.join(units)}: bf16 may be quicker, doctor --precision measures it" if units else ""
        text = f"no GPU: recipes run on the CPU, the full models very slowly{faster}"
        yield Finding("device", "note", text, fix, {"cpu_bf16_units": list(units)})


def _gpu(torch: Any, index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    capability = f"compute capability {properties.major}.{properties.minor}"
    known = {"device": f"cuda:{index}", "name": properties.name, "memory_bytes": properties.total_memory}
    return {**known, "capability": capability}


def _codecs() -> Iterator[Finding]:
    missing: dict[str, list[str]] = {"w": [], "r": []}
    try:
        import av
        from av.codec.codec import UnknownCodecError

        for mode, names in (("w", _ENCODERS), ("r", _DECODERS)):
            for name in names:
                try:
                    av.Codec(name, mode)
                except UnknownCodecError:
                    missing[mode].append(name)
    except _IMPORT_ERRORS as error:
        yield Finding("video", "problem", f"PyAV cannot be used: {_private(str(error))}", "install av again")
        return
    ffmpeg = getattr(av, "ffmpeg_version_info", "unknown")
    text = f"PyAV {av.__version__} with FFmpeg {ffmpeg}"
    facts = {
        "pyav": av.__version__,
        "ffmpeg": ffmpeg,
        "encoders_missing": missing["w"],
        "decoders_missing": missing["r"],
    }
    if missing["w"]:
        fix = "install PyAV from PyPI: its FFmpeg has them"
        yield Finding("video", "problem", f"{text} cannot write {', '.join(missing['w'])}", fix, facts)
    elif missing["r"]:
        yield Finding("video", "note", f"{text}; it cannot read {', '.join(missing['r'])}", None, facts)
    else:
        yield Finding("video", "ok", f"{text}; writes {' and '.join(_ENCODERS)}", None, facts)


def _cache(root: Path) -> Finding:
    existing = root
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    size = sum(_size(Path(folder) / name) for folder, _, names in os.walk(root) for name in names)
    shown = _private(str(root))
    facts = {"path": shown, "size_bytes": size, "free_bytes": free}
    text = f"{shown}: {size_text(size)} stored, {size_text(free)} free"
    fix = "name another folder with --cache-dir or S2VFLOW_CACHE_DIR"
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return Finding("cache", "problem", f"{shown}: cannot be written", fix, facts)
    is_low = free < _LOW_SPACE_BYTES
    return Finding("cache", "note" if is_low else "ok", text, fix if is_low else None, facts)


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:  # just removed
        return 0


def _models(options: Options) -> Iterator[Finding]:
    try:
        locations = options.locations
    except S2VFlowError as error:
        yield Finding("models", "problem", _private(error.message), "mend the file, or remove it")
        return
    folders = [*locations.models_dirs, *(folder.path for folder in locations.model_folders)]
    for folder in dict.fromkeys(folders):
        state = "there" if folder.is_dir() else "not there"
        yield Finding("models", "ok", f"{_private(str(folder))}: {state}", None, {"path": _private(str(folder))})
    needs = known_needs(locations.homes, locations)
    found = [need.file for need in needs if need.status == "found"]
    missing = [need.file for need in needs if need.status != "found"]
    facts = {"found": found, "missing": missing}
    text = f"{len(found)} of the {len(needs)} known files are there" + (f": {', '.join(found)}" if found else "")
    fix = "s2vflow models RECIPE --download" if not found else None
    yield Finding("models", "ok" if found else "note", text, fix, facts)


def _dependencies(*, has_torch: bool) -> Finding:
    versions: dict[str, str | None] = {}
    for name in DEPENDENCIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    missing = [name for name, version in versions.items() if version is None]
    if missing:
        fix = f"pip install {' '.join(missing)}"
        return Finding("packages", "problem", f"missing: {', '.join(missing)}", fix, versions)
    modules = {package: module for module, package in PACKAGES.items()}
    others = {"torch", "av"} if has_torch else {"torch", "av", "safetensors", "transformers"}
    for name in versions.keys() - others:  # which have lines of their own, or need torch
        try:
            for module in _USED.get(name, (modules.get(name, name),)):
                import_module(module)
        except _IMPORT_ERRORS as error:
            broken = broken_package(error) or MissingError(f"the package {name} cannot be imported: {error}")
            return Finding("packages", "problem", _private(broken.message), _private(broken.fix or ""), versions)
    return Finding(
        "packages", "ok", ", ".join(f"{name} {version}" for name, version in versions.items()), None, versions
    )


def _private(text: str) -> str:
    """Return a text without the name of the user's home folder."""
    home = str(Path.home())
    return text.replace(home, "~") if len(home) > 1 else text


def precision_json(device: str) -> dict[str, Any]:
    """Return the object that `s2vflow doctor --precision --json` prints; on a CPU bf16 is timed against fp32."""
    from s2v_flow.machine import compute_capability, cpu_bf16_units
    from s2v_flow.nodes.precision import COMPUTED, STORED, kind_of_device

    return {
        "device": device,
        "kind": kind_of_device(device),
        "capability": compute_capability(device),
        "cpu_bf16_units": list(cpu_bf16_units()),
        "computed": [vars(row) for row in COMPUTED],
        "stored": [dict(zip(("stored", "on_cpu", "on_cuda"), row, strict=True)) for row in STORED],
        "bf16_to_fp32": _bf16_to_fp32() if device == "cpu" else None,
    }


def precision_text(found: Mapping[str, Any]) -> str:
    """Return the same as lines for people."""
    lines = [f"this machine: {found['device']} ({found['kind']})"]
    if found["bf16_to_fp32"] is not None:
        lines.append(f"measured now: a linear layer in bf16 takes {found['bf16_to_fp32']:.2g} times as long as in fp32")
    lines += ["", "computed in"]
    for row in found["computed"]:
        lines.append(f"  {row['device']:<33} {row['precision']}  {row['verdict']:<8} {row['why']}".rstrip())
    lines += ["", f"{'stored as':<56}{'on a CPU':<32}on a GPU"]
    lines += [f"  {row['stored']:<54}{row['on_cpu']:<32}{row['on_cuda']}" for row in found["stored"]]
    return "\n".join(lines)


def _bf16_to_fp32() -> float:
    """Time a linear layer, [256, 1024] to [256, 2048], as the large models have them: the best of three each."""
    import torch

    seconds = []
    for dtype in (torch.bfloat16, torch.float32):
        x, weight = torch.ones(256, 1024, dtype=dtype), torch.ones(2048, 1024, dtype=dtype)
        times = []
        for _ in range(4):
            start = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            times.append(time.perf_counter() - start)
        seconds.append(min(times[1:]))
    return seconds[0] / seconds[1]
