"""A real Slurm on this machine, in a folder: munged, slurmctld and slurmd of Debian's slurm-wlm and munge."""

from __future__ import annotations

import getpass
import os
import platform
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo")


@contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Start it, and give the environment in which its programs find it; skip the test where it does not start."""
    path = f"{os.environ['PATH']}:/usr/sbin:/usr/bin"
    found = {name: shutil.which(name, path=path) for name in PROGRAMS}
    if None in found.values():
        pytest.skip("Slurm is not installed (apt-get install slurm-wlm munge)")
    folder.mkdir(mode=0o755)
    for name in ("munge", "state", "spool", "log"):
        (folder / name).mkdir(mode=0o755)
    key, conf, socket_file = folder / "munge.key", folder / "slurm.conf", folder / "munge" / "socket"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    conf.write_text(configuration(folder), encoding="utf-8")
    files = {name: folder / "munge" / name for name in ("pid-file", "log-file", "seed-file")}
    said = [f"--{name}={path}" for name, path in files.items()]
    environment = {**os.environ, "SLURM_CONF": str(conf)}
    try:
        start(
            "munged", [found["munged"], "--force", f"--key-file={key}", f"--socket={socket_file}", *said], environment
        )
        start("slurmctld", [found["slurmctld"], "-f", conf], environment)
        start("slurmd", [found["slurmd"], "-f", conf, "-N", platform.node()], environment)
        end = time.monotonic() + 30
        while "idle" not in (state := output([found["sinfo"], "-h", "-o", "%T"], environment)):
            if time.monotonic() > end:
                pytest.skip(f"Slurm's node does not come up: {state}")
            time.sleep(0.5)
        yield {"SLURM_CONF": str(conf)}
    finally:
        for pid in (folder / "slurmd.pid", folder / "slurmctld.pid", files["pid-file"]):
            with suppress(OSError, ValueError):
                os.kill(int(pid.read_text(encoding="ascii")), signal.SIGTERM)


def configuration(folder: Path) -> str:
    user, ports = getpass.getuser(), [free_port(), free_port()]
    return f"""ClusterName=test
SlurmctldHost={platform.node()}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
MailProg=/bin/true
MpiDefault=none
NodeName={platform.node()} NodeAddr=127.0.0.1 CPUs=8 State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def start(name: str, command: list[object], environment: dict[str, str]) -> None:
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=30)
    if done.returncode:
        pytest.skip(f"{name} does not start here: {done.stderr.strip()}")


def output(command: list[object], environment: dict[str, str]) -> str:
    return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=30).stdout


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
