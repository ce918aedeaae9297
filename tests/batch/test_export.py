"""Job files, run by real shells: what a table says arrives as it is written, and is never run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from recipes_for_tests import call
from runs_for_tests import place

NASTY = "She says: 'no'; touch pwned; $(touch pwned) `touch pwned` \"$HOME\" $$ $(x)\n2) touch pwned ;; # %s \\"


def exported(folder: Path, models: Path, form: str, *arguments: object) -> tuple[int, str, str]:
    made = place(folder, models, extra="params: {}")
    rows = [
        {"nodes.positive.text": text, "nodes.video.file": name} for text, name in (("Hm.", "a.mp4"), (NASTY, "b.mp4"))
    ]
    (folder / "jobs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    where = made.where[:-2] if "--device" in arguments else made.where
    command = ("batch", "export", made.recipe, "--jobs", folder / "jobs.jsonl", "--format", form, *where)
    return call(*command, *arguments)


def ran(folder: Path, shell: str, script: str, **environment: str) -> tuple[int, list[list[str]]]:
    """Run a script in an empty folder; return its exit code, and the arguments that each s2vflow was given."""
    programs, here = folder / "bin", folder / "here"
    programs.mkdir()
    here.mkdir()
    show = "import json, sys; print(json.dumps(sys.argv[1:]))"
    for name, text in (
        ("s2vflow", f"{sys.executable} -c '{show}' \"$@\"; exit ${{CODE:-0}}"),
        ("srun", 'exec "$@"'),
        ("scontrol", 'echo "[\\"$1\\", \\"$2\\"]"'),
    ):
        (programs / name).write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        (programs / name).chmod(0o755)
    environment |= {"PATH": f"{programs}:{os.environ['PATH']}"}
    done = subprocess.run([shell, "-c", script], env=environment, cwd=here, capture_output=True, text=True, check=False)
    assert not list(here.iterdir()), "something of the table was run"
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def text_of(words: list[str]) -> str:
    (found,) = (word for word in words if word.startswith("--set-json=nodes.positive.text="))
    value = json.loads(found.partition("text=")[2])
    assert isinstance(value, str)
    return value


def test_a_shell_script_runs_every_job_with_its_own_words(tiny_models: Path, tmp_path: Path) -> None:
    """The same options follow, too."""
    code, script, err = exported(tmp_path, tiny_models, "shell")
    assert code == 0, err
    code, commands = ran(tmp_path, "/bin/sh", script)
    assert (code, [text_of(words) for words in commands]) == (0, ["Hm.", NASTY])
    assert {words[0] for words in commands} == {"run"}
    assert all(f"--models-dir={tiny_models}" in words and "--device=cpu" in words for words in commands)


def test_a_shell_script_tells_how_many_jobs_failed(tiny_models: Path, tmp_path: Path) -> None:
    """All are tried."""
    code, commands = ran(tmp_path, "/bin/sh", exported(tmp_path, tiny_models, "shell")[1], CODE="7")
    assert (code, len(commands)) == (1, 2)


@pytest.mark.parametrize(("stopped", "more"), [("0", []), ("75", [["requeue", "9_1"]])])
def test_a_slurm_array_runs_one_job_a_task(tiny_models: Path, tmp_path: Path, stopped: str, more: list[object]) -> None:
    """A task that has stopped with a resume point is queued again."""
    script = exported(tmp_path, tiny_models, "slurm")[1]
    assert "#SBATCH --array=0-1\n" in script
    task = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_JOB_ID": "9", "CODE": stopped}
    code, commands = ran(tmp_path, "/bin/bash", script, **task)
    assert (code, text_of(commands[0]), commands[1:]) == (int(stopped), NASTY, more)


def test_a_kubernetes_job_runs_one_job_an_index(tiny_models: Path, tmp_path: Path) -> None:
    """Valid YAML; every $ is doubled, which the kubelet undoes."""
    job = yaml.safe_load(exported(tmp_path, tiny_models, "k8s", "--image", "me/s2v:1")[1])
    assert (job["kind"], job["spec"]["completions"], job["spec"]["completionMode"]) == ("Job", 2, "Indexed")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    shell, option, script = container["command"]
    assert (container["image"], shell, option) == ("me/s2v:1", "/bin/sh", "-c")
    assert "$" not in script.replace("$$", "")
    code, commands = ran(tmp_path, shell, script.replace("$$", "$"), JOB_COMPLETION_INDEX="1")
    assert (code, text_of(commands[0])) == (0, NASTY)


@pytest.mark.parametrize("form", ["slurm", "k8s"])
def test_a_gpu_is_asked_for_unless_the_device_is_the_cpu(tiny_models: Path, tmp_path: Path, form: str) -> None:
    for device, asks in (("cpu", False), ("auto", True)):
        script = exported(tmp_path, tiny_models, form, "--device", device)[1]
        assert ("#SBATCH --gpus=1" in script or "nvidia.com/gpu: 1" in script) is asks


def test_an_export_into_a_folder_overwrites_nothing(tiny_models: Path, tmp_path: Path) -> None:
    """Another file of that name stays, unless --force is given; two jobs with one output are refused here, too."""
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "jobs.sh").write_text("mine", encoding="utf-8")
    assert exported(tmp_path, tiny_models, "shell", "-o", folder)[0] == 2
    assert (folder / "jobs.sh").read_text(encoding="utf-8") == "mine"
    assert exported(tmp_path, tiny_models, "shell", "-o", folder, "--force")[:2] == (0, f"{folder / 'jobs.sh'}\n")
    assert exported(tmp_path, tiny_models, "shell", "--unset", "nodes.video.crf")[0] == 0
    (tmp_path / "jobs.csv").write_text("nodes.first.cfg\n1.0\n2.0\n", encoding="utf-8")
    made = place(tmp_path, tiny_models)
    assert call("batch", "export", made.recipe, "--jobs", tmp_path / "jobs.csv", *made.where)[0] == 3
