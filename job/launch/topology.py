"""Who this node is among the nodes of a run, and how many ranks each of them runs.

`read_place` reads what Kubeflow (PET_*), SLURM (inside a step), or a Kubernetes Indexed Job says, the first
that is there; without any, this machine is the only node. `find_topology` adds the ranks and their GPUs.
"""

from __future__ import annotations

import os
import platform
import re
import socket
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from job.errors import RecipeError, ResourceExhausted
from job.processor import count_processors

if TYPE_CHECKING:
    from job.recipe.schema import Distributed  # to build its classes takes time that most verbs have not

RENDEZVOUS_PORT = 29400
"""Where node 0 waits for the others in Kubernetes, where every pod has an address of its own."""

_DEVICE = re.compile(r"[0-9]+|(GPU|MIG)-.+")
_SPINS = {"GOMP_SPINCOUNT": "1000"}
"""How often a thread of libgomp looks whether the others have come before it sleeps. By itself it looks for
milliseconds, on a processor that an upload or a server, for which the others come late, could use.
"""
_KEEPS_PAGES = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
"""glibc gives freed memory back, and the kernel zeroes it for the next step: up to a third of the time of a processor
that trains. A rank with a GPU has nothing to gain, and would keep what its weights took before they went there.
"""
_PORTS = (20000, 12000)
"""First port and how many: below those that Linux hands out by itself (from 32768 on)."""


@dataclass(frozen=True)
class Place:
    """This node's number among `nodes`, where node 0 listens, and the run's id where the scheduler names one."""

    nodes: int = 1
    node_rank: int = 0
    host: str = ""
    port: int = 0
    processes_per_node: int | None = None
    run_id: str | None = None


@dataclass(frozen=True)
class Topology:
    """The place of this node, ranks per node, and the GPUs that the ranks of this node share."""

    place: Place
    processes_per_node: int
    gpus: int

    @property
    def nodes(self) -> int:
        """Nodes of this run."""
        return self.place.nodes

    @property
    def world_size(self) -> int:
        """Ranks on all nodes."""
        return self.nodes * self.processes_per_node

    def rank_environments(self, port: int) -> Iterator[dict[str, str]]:
        """Yield the variables that torch.distributed reads, and JOB_GPUS, one set per rank of this node.

        `port` is one that is free on node 0, where rank 0 will listen.
        """
        threads = max(count_processors() // self.processes_per_node, 1)
        for local_rank in range(self.processes_per_node):
            variables = {
                "RANK": self.place.node_rank * self.processes_per_node + local_rank,
                "LOCAL_RANK": local_rank,
                "WORLD_SIZE": self.world_size,
                "LOCAL_WORLD_SIZE": self.processes_per_node,
                "MASTER_ADDR": self.place.host if self.nodes > 1 else "127.0.0.1",
                "MASTER_PORT": port,
                "JOB_GPUS": self.gpus,
            }
            spins = {} if {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys() else _SPINS
            pages = {} if self.gpus or _KEEPS_PAGES.keys() & os.environ.keys() else _KEEPS_PAGES
            told = {name: str(value) for name, value in variables.items()}
            yield {"OMP_NUM_THREADS": str(threads)} | spins | pages | told


def find_place() -> Place:
    """Return the place of this process, see `read_place`."""
    return read_place(os.environ, socket.getfqdn() if "JOB_COMPLETION_INDEX" in os.environ else platform.node())


def read_place(environment: Mapping[str, str], host_name: str) -> Place:
    """Return this node's place; `host_name` is its fully qualified name. Pure: reads nothing else.

    Raises RecipeError (10) where what a scheduler says cannot be a run of this job, naming the variable.
    """
    place = _read_kubeflow(environment) or _read_slurm(environment) or _read_indexed_job(environment, host_name)
    place = place or Place(run_id=_name_slurm_run(environment))
    if not 0 <= place.node_rank < place.nodes:
        raise RecipeError(f"node {place.node_rank} of {place.nodes} nodes: {_JOB_NODES}")
    if place.nodes > 1 and not place.host:  # a name that is never found would be waited for, again and again
        raise RecipeError(f"node {place.node_rank} of {place.nodes} nodes is not told where node 0 is: {_NODE_0}")
    return place


_JOB_NODES = "JOB_NODES must be the Job's number of completions (and its parallelism)"
_NODE_0 = "PET_MASTER_ADDR (or PET_RDZV_ENDPOINT) must be its name or address; SLURM says it by SLURM_STEP_NODELIST"


def _read_kubeflow(environment: Mapping[str, str]) -> Place | None:
    """Kubeflow Trainer sets what torchrun would read."""
    if "PET_NNODES" not in environment:
        return None
    endpoint = re.fullmatch(r"(.*?)(?::([0-9]+))?", environment.get("PET_RDZV_ENDPOINT", ""))
    host, port = endpoint.groups() if endpoint else ("", None)
    nodes = _read_number(environment, "PET_NNODES")
    asked = _read_port(environment, "PET_MASTER_PORT", port or str(RENDEZVOUS_PORT)) if nodes > 1 else RENDEZVOUS_PORT
    processes = environment.get("PET_NPROC_PER_NODE", "auto")
    return Place(
        nodes=nodes,
        node_rank=_read_number(environment, "PET_NODE_RANK", "0"),
        host=environment.get("PET_MASTER_ADDR") or host.strip("[]"),
        port=asked,
        processes_per_node=int(processes) if processes.isdecimal() else None,
    )


def _read_slurm(environment: Mapping[str, str]) -> Place | None:
    """Inside a step (srun). A batch script is no step, though SLURM gives it most of the same variables."""
    if "SLURM_STEP_NODELIST" not in environment or "SLURM_PROCID" not in environment:
        return None
    nodes, tasks = (_read_number(environment, f"SLURM_STEP_NUM_{what}") for what in ("NODES", "TASKS"))
    if tasks != nodes:
        raise RecipeError(
            f"SLURM started {tasks} tasks on {nodes} node(s); job needs one per node and starts the ranks itself: "
            "srun --ntasks-per-node=1 …"
        )
    start = [environment.get(f"SLURM_{what}", "0") for what in ("JOB_ID", "STEP_ID", "RESTART_COUNT")]
    return Place(
        nodes=nodes,
        node_rank=_read_number(environment, "SLURM_NODEID"),
        host=first_host(environment["SLURM_STEP_NODELIST"]),
        port=_choose_port("-".join(start)),
        run_id=_name_slurm_run(environment),
    )


def _read_indexed_job(environment: Mapping[str, str], host_name: str) -> Place | None:
    """In an Indexed Job every pod is called <job>-<index>.<subdomain>…, so each knows the first one's name."""
    if "JOB_COMPLETION_INDEX" not in environment:
        return None
    index, nodes = _read_number(environment, "JOB_COMPLETION_INDEX"), _read_number(environment, "JOB_NODES", "1")
    own, _, domain = host_name.partition(".")
    job_name = own.removesuffix(f"-{index}")
    if nodes > 1 and (job_name == own or (not domain and "KUBERNETES_SERVICE_HOST" in environment)):
        raise RecipeError(
            f"this pod is called {host_name!r}; for {nodes} nodes the pod template needs `subdomain:` with the name of "
            "a headless Service, and the Job completionMode: Indexed, so that the pods find each other"
        )
    return Place(
        nodes=nodes,
        node_rank=index,
        host=f"{job_name}-0.{domain}".rstrip("."),
        port=_read_port(environment, "JOB_RENDEZVOUS_PORT", str(RENDEZVOUS_PORT)),
        run_id=job_name if job_name != own else None,
    )


def _name_slurm_run(environment: Mapping[str, str]) -> str | None:
    """The job's id stays the same when SLURM requeues it; of an array, every task has its own."""
    job = environment.get("SLURM_JOB_ID")
    return "-".join(filter(None, (environment.get("SLURM_CLUSTER_NAME"), job))) if job else None


def first_host(nodes: str) -> str:
    """Return the first name of a SLURM node list such as `gpu[003-005,9],login1` (slurm.conf(5), NodeName)."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])*", nodes)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first.group() if first else nodes)


def _choose_port(start: str) -> int:
    """Return the same port on every node, and another one for whoever shares a node with this job."""
    first, count = _PORTS
    return first + zlib.crc32(start.encode()) % count


def _read_number(environment: Mapping[str, str], name: str, default: str = "") -> int:
    value = environment.get(name) or default
    if not value.isdecimal():
        raise RecipeError(f"{name}: {value!r} is no number; set by the scheduler, or by hand where it is missing")
    return int(value)


def _read_port(environment: Mapping[str, str], name: str, default: str) -> int:
    port = _read_number(environment, name, default)
    if not 0 < port < 1 << 16:
        raise RecipeError(f"{name}: {port} is no port; it is between 1 and 65535, the same on every node")
    return port


def find_topology(distributed: Distributed, place: Place) -> Topology:
    """Return the ranks of this node: one per GPU, one without a GPU, unless recipe or scheduler says a number.

    Raises ResourceExhausted (78) for more ranks than GPUs; without any GPU the ranks share the processors.
    """
    asked, gpus = distributed.processes_per_node, _count_gpus()
    if asked == "auto":
        asked = place.processes_per_node or max(gpus, 1)
    if 0 < gpus < asked:
        raise ResourceExhausted(
            f"distributed.processes_per_node: {asked}, but node {platform.node()} has {gpus} GPU(s) for this process; "
            "run on another node, lower it, or use auto"
        )
    return Topology(place, asked, gpus)


def _count_gpus() -> int:
    """Return the GPUs that this process may use, from CUDA_VISIBLE_DEVICES and /dev, without importing torch.

    SLURM and container runtimes set the variable to what was allocated. The driver's folder in /proc would show all
    of the node's to a container that was given none.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        # as CUDA reads it, up to the first that is no device; SLURM says NoDevFiles to who asked for none
        return len(list(takewhile(_DEVICE.fullmatch, visible.replace(" ", "").split(","))))
    return len(list(Path("/dev").glob("nvidia[0-9]*")))
