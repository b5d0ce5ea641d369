"""How many ranks run where. This version runs on one machine."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from job.recipe.schema import Distributed


@dataclass(frozen=True)
class Topology:
    """Nodes of this run, this node's rank, and ranks per node."""

    nodes: int
    node_rank: int
    processes_per_node: int

    @property
    def world_size(self) -> int:
        """Ranks on all nodes."""
        return self.nodes * self.processes_per_node

    def rank_environments(self) -> Iterator[dict[str, str]]:
        """Yield the variables that torch.distributed reads, one set per rank of this node."""
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
            }
            yield {"OMP_NUM_THREADS": str(threads)} | {name: str(value) for name, value in variables.items()}


def find_topology(distributed: Distributed) -> Topology:
    """Return this machine's topology: one rank per GPU, one without a GPU, unless the recipe says a number."""
    asked = distributed.processes_per_node
    return Topology(nodes=1, node_rank=0, processes_per_node=max(count_gpus(), 1) if asked == "auto" else asked)


def count_gpus() -> int:
    """Return the GPUs that this process may use, from the driver and CUDA_VISIBLE_DEVICES, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
