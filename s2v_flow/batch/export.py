"""Job files for what runs jobs elsewhere: a shell script, a Slurm array, an Indexed Job of Kubernetes.

Each job is one `s2vflow run`. Whatever a table or a recipe's name holds is quoted for the shell, and YAML is written by
PyYAML.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence

import yaml

from s2v_flow.batch.record import NEVER_AGAIN, Job
from s2v_flow.errors import S2VFlowError
from s2v_flow.options import Options

MAX_K8S_BYTES = 1_000_000  # Kubernetes takes objects of 1.5 MB at most


def words(job: Job, options: Options) -> list[str]:
    """Return the command that runs one job: program and arguments."""
    recipe = f"./{job.recipe}" if job.recipe.startswith("-") else job.recipe
    found = ["s2vflow", "run", recipe]
    found += [f"--profile={name}" for name in options.profiles]
    found += [word for path in options.override_files for word in ("-f", str(path))]
    for override in (*options.changes.overrides, *job.overrides):
        found.append(f"--{override.kind}={override.text}")
    found += [word for text in job.axes or options.axes for word in ("-m", text)]
    found += [f"--models-dir={path}" for path in options.models_dirs]
    found += [f"--extra-model-paths={path}" for path in options.extra_model_paths]
    found += [f"--input-dir={path}" for path in options.input_dirs]
    found += [f"--output-dir={options.output_dir}"] if options.output_dir else []
    found += [f"--cache-dir={options.cache_dir}"] if options.cache_dir else []
    found += [f"--cache-remote={options.cache_remote}"] if options.cache_remote else []
    found += [f"--device={options.device}"] if options.device != "auto" else []
    found += [f"--vram={options.vram}"] if options.vram is not None else []
    return [*found, "--overwrite"] if options.overwrite else found


def export_jobs(jobs: Sequence[Job], options: Options, form: str, image: str = "s2vflow") -> str:
    """Return the job file of a format of `FORMATS`; its jobs are in the order of their numbers.

    Raises:
        S2VFlowError: There are too many jobs for one object of Kubernetes.
    """
    commands = [shlex.join(words(job, options)) for job in sorted(jobs, key=lambda job: job.number)]
    return FORMATS[form][1](commands, image, options.device != "cpu")


def _shell(commands: Sequence[str], image: str, on_gpu: bool) -> str:
    head = "#!/bin/sh\n# the jobs one after the other; what is stored is not computed again\nfailed=0\n"
    end = 'if [ "$failed" -gt 0 ]; then echo "$failed jobs failed" >&2; exit 1; fi\n'
    return head + "".join(f"{command} || failed=$((failed + 1))\n" for command in commands) + end


def _slurm(commands: Sequence[str], image: str, on_gpu: bool) -> str:
    again = """code=$?
if [ "$code" -eq 75 ]; then  # stopped with a resume point
  scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
fi
exit "$code"
"""
    gpu = "\n#SBATCH --gpus=1" if on_gpu else ""
    head = f"""#!/bin/bash
#SBATCH --job-name=s2vflow
#SBATCH --array=0-{len(commands) - 1}{gpu}
#SBATCH --requeue
#SBATCH --signal=USR1@120
"""
    cases = _cases([f"srun {command}" for command in commands], "SLURM_ARRAY_TASK_ID")
    return head + cases + again


def _k8s(commands: Sequence[str], image: str, on_gpu: bool) -> str:
    script = _cases([f"exec {command}" for command in commands], "JOB_COMPLETION_INDEX")
    container = {
        "name": "s2vflow",
        "image": image,
        "command": ["/bin/sh", "-c", script.replace("$", "$$")],  # the kubelet makes one $ of two
        **({"resources": {"limits": {"nvidia.com/gpu": 1}}} if on_gpu else {}),
    }
    is_code = {"containerName": "s2vflow", "operator": "In"}
    rules = [
        {"action": "FailIndex", "onExitCodes": {**is_code, "values": sorted(NEVER_AGAIN)}},
        {"action": "Ignore", "onExitCodes": {**is_code, "values": [75]}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
    spec = {
        "completions": len(commands),
        "parallelism": len(commands),
        "completionMode": "Indexed",
        "backoffLimitPerIndex": 1,
        "podFailurePolicy": {"rules": rules},
        "template": {"spec": {"restartPolicy": "Never", "containers": [container]}},
    }
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"generateName": "s2vflow-"}, "spec": spec}
    text = yaml.dump(job, Dumper=_Plain, sort_keys=False, allow_unicode=True, width=1_000_000)
    if len(text.encode()) > MAX_K8S_BYTES:
        raise S2VFlowError(f"{len(commands)} jobs are too many for one Kubernetes Job", fix="export parts of the table")
    return text


class _Plain(yaml.SafeDumper):
    """YAML without anchors."""

    def ignore_aliases(self, data: object) -> bool:
        """Write what stands there twice, twice."""
        return True


def _cases(commands: Sequence[str], variable: str) -> str:
    lines = [f"{index}) {command} ;;" for index, command in enumerate(commands)]
    return "\n".join([f'case "${variable}" in', *lines, '*) echo "no such job" >&2; exit 2 ;;', "esac", ""])


FORMATS: Mapping[str, tuple[str, Callable[[Sequence[str], str, bool], str]]] = {
    "shell": ("jobs.sh", _shell),
    "slurm": ("jobs.sbatch", _slurm),
    "k8s": ("job.yaml", _k8s),
}
