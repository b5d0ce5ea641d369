"""How many ranks run where. This version runs on one machine."""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from job.errors import ResourceExhausted
from job.recipe.schema import Distributed


@dataclass(frozen=True)
class Topology:
    """Nodes of this run, this node's rank, ranks per node, and the GPUs that they share."""

    nodes: int
    node_rank: int
    processes_per_node: int
    gpus: int

    @property
    def world_size(self) -> int:
        """Ranks on all nodes."""
        return self.nodes * self.processes_per_node

    def rank_environments(self) -> Iterator[dict[str, str]]:
        """Yield the variables that torch.distributed reads, and JOB_GPUS, one set per rank of this node."""
        port = str(_free_port())
        threads = max((os.cpu_count() or 1) // self.processes_per_node, 1)
        for local_rank in range(self.processes_per_node):
            variables = {
                "RANK": self.node_rank * self.processes_per_node + local_rank,
                "LOCAL_RANK": local_rank,
                "WORLD_SIZE": self.world_size,
                "LOCAL_WORLD_SIZE": self.processes_per_node,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "JOB_GPUS": self.gpus,
            }
            yield {"OMP_NUM_THREADS": str(threads)} | {name: str(value) for name, value in variables.items()}


def find_topology(distributed: Distributed) -> Topology:
    """Return this machine's topology: one rank per GPU, one without a GPU, unless the recipe says a number.

    Raises ResourceExhausted (78) for more ranks than GPUs; without any GPU the ranks share the processors.
    """
    asked, gpus = distributed.processes_per_node, _count_gpus()
    ranks = max(gpus, 1) if asked == "auto" else asked
    if 0 < gpus < ranks:
        raise ResourceExhausted(
            f"distributed.processes_per_node: {asked}, but node {platform.node()} has {gpus} GPU(s) for this process; "
            "run on another node, lower it, or use auto"
        )
    return Topology(nodes=1, node_rank=0, processes_per_node=ranks, gpus=gpus)


def _count_gpus() -> int:
    """Return the GPUs that this process may use, from CUDA_VISIBLE_DEVICES and /dev, without importing torch.

    The driver's folder in /proc would show all of the node's to a container that was given none.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
