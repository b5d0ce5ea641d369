"""A real SLURM on this machine: one controller, one node, loopback only, in a folder of the test run's own.

`make test-cluster` installs it (Debian's slurm-wlm and munge). Neither cgroups nor systemd are needed.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SLURM_CONF = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire is also what a requeued job waits for; its default is two minutes
AuthInfo=socket={place}/munge.sock,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={place}/controller
SlurmdSpoolDir={place}/%n
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd.pid
SlurmctldLogFile={place}/slurmctld.log
SlurmdLogFile={place}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
KillWait=5
JobRequeue=1
MailProg=/bin/true
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=2000 State=UNKNOWN
PartitionName=all Nodes=node1 Default=YES MaxTime=1:00:00 State=UP
"""


@dataclass(frozen=True)
class Slurm:
    """Where the daemons keep their files, and what leads the commands to them."""

    place: Path
    environment: dict[str, str]

    def call(self, *words: str) -> str:
        """Run one of SLURM's commands; return what it prints."""
        done = subprocess.run(words, capture_output=True, text=True, env=self.environment, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def describe(self, job: str) -> dict[str, str]:
        """Return what the controller says of a job: JobState, Restarts, ExitCode, …"""
        words = self.call("scontrol", "show", "job", job, "--oneliner").split()
        return dict(word.split("=", 1) for word in words if "=" in word)


@contextmanager
def run_slurm() -> Iterator[Slurm]:
    """Start munged, slurmctld and slurmd; stop them by their process ids."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        place = Path(folder)
        (place / "controller").mkdir()
        (place / "node1").mkdir()
        conf, key = place / "slurm.conf", place / "munge.key"
        conf.write_text(SLURM_CONF.format(place=place, ports=find_ports(2), host=socket.gethostname().split(".")[0]))
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        slurm = Slurm(place, os.environ | {"SLURM_CONF": str(conf)})
        daemons = [
            ["munged", "--force", "--foreground", f"--key-file={key}", f"--socket={place}/munge.sock",
             f"--pid-file={place}/munge.pid", f"--log-file={place}/munge.log", f"--seed-file={place}/munge.seed"],
            ["slurmctld", "-c", "-D"],
            ["slurmd", "-D", "-N", "node1"],
        ]  # fmt: skip
        started = []
        try:
            for command in daemons:
                started.append(start_daemon(command, slurm))
                wait_for_socket(place / "munge.sock")
            wait_until_idle(slurm)
            yield slurm
        finally:
            for process in reversed(started):
                process.terminate()
                process.wait(timeout=30)


def find_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def start_daemon(command: list[str], slurm: Slurm) -> subprocess.Popen[bytes]:
    log = (slurm.place / f"{command[0]}.out").open("wb")
    return subprocess.Popen(command, env=slurm.environment, stdout=log, stderr=log, cwd=slurm.place)


def wait_for_socket(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come; see the logs beside it"
        time.sleep(0.05)


def wait_until_idle(slurm: Slurm) -> None:
    deadline = time.monotonic() + 60
    while True:
        asked = subprocess.run(
            ["sinfo", "-h", "-t", "idle", "-o", "%D"], capture_output=True, text=True, env=slurm.environment
        )
        if asked.stdout.strip() == "1":
            return
        logs = [path.read_text()[-1500:] for path in sorted(slurm.place.glob("*.log"))]
        assert time.monotonic() < deadline, "\n".join([asked.stderr, *logs])
        time.sleep(0.2)
