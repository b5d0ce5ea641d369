"""A real SLURM on this machine: one controller, two nodes, loopback only, in a folder of the test run's own.

`make test-cluster` installs it (Debian's slurm-wlm and munge). Neither cgroups nor systemd are needed. Both nodes are
this host: their names must lead here (/etc/hosts), as a cluster's names lead to its nodes.
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

NODES = ("node1", "node2")
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
SlurmdPidFile={place}/slurmd-%n.pid
SlurmctldLogFile={place}/slurmctld.log
SlurmdLogFile={place}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# a node that a test set down stays down until the test says «resume»; 2 would let any registration bring it back
ReturnToService=1
KillWait=5
# srun kills the tasks that are left so many seconds after the first has ended, unless it is told --wait=0
WaitTime=3
MinJobAge=3600
JobRequeue=1
MailProg=/bin/true
GresTypes=gpu
NodeName=DEFAULT CPUs={cpus} RealMemory=2000 Gres=gpu:fake:2 State=UNKNOWN
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]}
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=node[1-2] Default=YES MaxTime=1:00:00 State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=node[1-2] MaxTime=1:00:00 State=UP PriorityTier=2
"""
GRES_CONF = "NodeName=node[1-2] Name=gpu Type=fake File={place}/gpu[0-1]\n"


@dataclass(frozen=True)
class Slurm:
    """Where the daemons keep their files, and what leads the commands to them."""

    place: Path

    @property
    def environment(self) -> dict[str, str]:
        """What a command is given, now."""
        return os.environ | {"SLURM_CONF": str(self.place / "slurm.conf")}

    def call(self, *words: str, **variables: str) -> str:
        """Run one of SLURM's commands; return what it prints."""
        environment = self.environment | variables
        done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def describe(self, job: str) -> dict[str, str]:
        """Return what the controller says of a job: JobState, Restarts, ExitCode, …"""
        words = self.call("scontrol", "show", "job", job, "--oneliner").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for_state(self, job: str, *states: str, timeout_s: float = 150) -> dict[str, str]:
        """Wait until a job is in one of `states`; return what the controller says of it."""
        deadline = time.monotonic() + timeout_s
        while (about := self.describe(job))["JobState"] not in states:
            assert time.monotonic() < deadline, about
            time.sleep(0.5)
        return about

    def wait_until_idle(self, timeout_s: float = 60) -> None:
        """Wait until both nodes are free."""
        deadline = time.monotonic() + timeout_s
        command = ["sinfo", "-h", "-t", "idle", "-o", "%D"]
        while True:
            asked = subprocess.run(command, capture_output=True, text=True, env=self.environment)
            if asked.stdout.strip() == str(len(NODES)):
                return
            logs = [path.read_text()[-1500:] for path in sorted(self.place.glob("*.log"))]
            assert time.monotonic() < deadline, "\n".join([asked.stderr, *logs])
            time.sleep(0.2)


@contextmanager
def run_slurm() -> Iterator[Slurm]:
    """Start munged, slurmctld and two slurmd; stop them by their process ids."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, named_nodes():
        place = Path(folder)
        for name in ("controller", *NODES):
            (place / name).mkdir()
        for number in range(2):  # a character device is what makes SLURM set CUDA_VISIBLE_DEVICES
            os.mknod(place / f"gpu{number}", 0o20666, os.makedev(1, 3))
        conf, key = place / "slurm.conf", place / "munge.key"
        host = socket.gethostname().split(".")[0]
        conf.write_text(SLURM_CONF.format(place=place, ports=find_ports(3), host=host, cpus=os.cpu_count()))
        (place / "gres.conf").write_text(GRES_CONF.format(place=place))
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        slurm = Slurm(place)
        daemons = [
            ["munged", "--force", "--foreground", f"--key-file={key}", f"--socket={place}/munge.sock",
             f"--pid-file={place}/munge.pid", f"--log-file={place}/munge.log", f"--seed-file={place}/munge.seed"],
            ["slurmctld", "-c", "-D"],
            *(["slurmd", "-D", "-N", name] for name in NODES),
        ]  # fmt: skip
        started = []
        try:
            for command in daemons:
                started.append(start_daemon(command, slurm))
                wait_for_socket(place / "munge.sock")
            slurm.wait_until_idle()
            yield slurm
        finally:
            end_jobs(slurm)
            for process in reversed(started):
                process.terminate()
                process.wait(timeout=30)


def end_jobs(slurm: Slurm) -> None:
    """Kill what a test that failed has left: jobs outlive the daemons."""
    for options in (["--signal=KILL", "--full"], []):  # the tasks, then the jobs
        command = ["scancel", "--user=root", *options]
        subprocess.run(command, env=slurm.environment, capture_output=True, timeout=30)
    time.sleep(1)


@contextmanager
def named_nodes() -> Iterator[None]:
    """Let the nodes' names lead to this machine, as long as this goes on."""
    hosts, line = Path("/etc/hosts"), f"127.0.0.1 {' '.join(NODES)}  # a test's SLURM nodes\n"
    before = hosts.read_text().replace(line, "")  # of a test run that was killed
    hosts.write_text(before + line)
    try:
        yield
    finally:
        hosts.write_text(hosts.read_text().replace(line, ""))


def find_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def start_daemon(command: list[str], slurm: Slurm) -> subprocess.Popen[bytes]:
    log = (slurm.place / f"{command[-1].replace('/', '-')[:20]}-{command[0]}.out").open("wb")
    return subprocess.Popen(command, env=slurm.environment, stdout=log, stderr=log, cwd=slurm.place)


def wait_for_socket(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come; see the logs beside it"
        time.sleep(0.05)
