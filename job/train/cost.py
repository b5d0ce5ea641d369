"""What a checkpoint costs on so many ranks: bytes of rank 0, the loop's stall, the lag until it is durable.

Calculated, from the order in which `saving.py` and `store/checkpoints.py` do things. Rank 0 copies, checks, hashes and
sends all weights alone, so neither time falls with the number of ranks as the moments' share does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from job.store.parallel import SMALL_AT_A_TIME
from job.train.interval import find_interval

_BYTES_PER_WEIGHT, _BYTES_PER_MOMENTS = 4, 8
"""A parameter's fp32 weight, and Adam's two moments in fp32."""
_PASSES = {0: 0, 1: 2, 2: 2, 3: 1}
"""ZeRO stage → how often each weight goes over a rank's link before rank 0 has it whole. DeepSpeed reduces in stages 1
and 2 (`utils/tensor_fragment.py`: a ring's all-reduce sends twice) and gathers in stage 3 (`stage3.py`).
"""


@dataclass(frozen=True)
class Cluster:
    """What is taken for granted of ranks and store; GB are 1e9 bytes."""

    copy_gb_s: float = 50.0  # GPU to pinned memory, measured on an H200 (12.3 GiB in 0.25 s, tests/bench/gpu.py)
    collective_gb_s: float = 40.0  # assumed; of a NIC of 400 Gb/s for each GPU 46–48 can be had (nccl-tests#290)
    write_gb_s: float = 1.5  # weights checked for NaN and written as a file, measured on one core (1.4–2.4)
    hash_gb_s: float = 1.6  # sha256, measured on one core
    send_gb_s: float = 0.85  # one process that also signs what it sends, measured (1.17 CPU s/GB); TLS spares that
    node_gb_s: float = 12.5  # assumed: 100 Gb/s from a node to the store
    store_gb_s: float = 50.0  # assumed: what the store takes in all
    request_s: float = 0.03  # S3: «tens of milliseconds» (Timeouts and Retries for Latency-Sensitive Applications)
    ranks_per_node: float = 8.0
    mtbf_h: float = 50_700.0  # of one GPU: 419 interruptions of 16,384 in 54 days (Llama 3, 2024, table 5)


ON_GPUS = Cluster()
ON_PROCESSORS = Cluster(copy_gb_s=11.3, collective_gb_s=0.7)
"""Measured: a copy of 803 MB in 0.071 s on one core, into memory that is allocated already; gloo between two ranks on a
core each, tensors of 1–64 MB (0.3–0.9).
"""


@dataclass(frozen=True)
class Saved:
    """What is saved: `trained` parameters (all, or those that a tuning method moves) by so many `ranks`.

    `stage`: ZeRO's, 0 under DDP. From 1 on every rank saves its part of the moments; under 0 rank 0 saves them all.
    `with_best`: the weights of the best evaluation lie in the checkpoint, too.
    """

    trained: float
    ranks: int
    stage: int
    with_best: bool = False

    @property
    def weight_bytes(self) -> float:
        """Of the trained parameters' weights, which rank 0 alone saves."""
        return _BYTES_PER_WEIGHT * self.trained

    @property
    def moment_bytes(self) -> float:
        """Of the moments that rank 0 saves."""
        return _BYTES_PER_MOMENTS * self.trained / (self.ranks if self.stage else 1)

    @property
    def file_bytes(self) -> float:
        """Of the files with weights that rank 0 sends."""
        return self.weight_bytes * (2 if self.with_best else 1)

    def count_sent(self, ranks: float) -> float:
        """Return the bytes that the first `ranks` ranks send together."""
        savers = min(ranks, self.ranks) if self.stage else 1
        return self.file_bytes + savers * self.moment_bytes


@dataclass(frozen=True)
class Cost:
    """Seconds: of the loop's stall in a save, from its begin until it is durable, and between two saves at best."""

    stall_s: float
    lag_s: float
    interval_s: float

    def count_steps(self, step_s: float) -> int:
        """Return how many steps of so many seconds lie between two saves; together they are no shorter than the lag."""
        return max(round(self.interval_s / step_s), math.ceil(self.lag_s / step_s), 1)


def estimate_cost(saved: Saved, cluster: Cluster) -> Cost:
    """Return what a checkpoint costs.

    The interval is that of Young and Daly, but no shorter than the lag: one checkpoint is uploaded at a time, and one
    that comes sooner waits, or replaces the one that waits.
    """
    stall_s = _estimate_stall(saved, cluster)
    lag_s = stall_s + _estimate_upload(saved, cluster)
    return Cost(stall_s, lag_s, max(find_interval(stall_s, 3600 * cluster.mtbf_h / saved.ranks), lag_s))


def _estimate_stall(saved: Saved, cluster: Cluster) -> float:
    """Return rank 0's seconds; the others wait for it in the next step. A weight is gathered, then copied, in turn."""
    gathered = _PASSES[saved.stage] * saved.weight_bytes * (saved.ranks - 1) / saved.ranks
    copied = saved.weight_bytes + saved.moment_bytes
    return (gathered / cluster.collective_gb_s + copied / cluster.copy_gb_s) / 1e9


def _estimate_upload(saved: Saved, cluster: Cluster) -> float:
    """Return the seconds after the stall: weights are written and hashed, then all is sent, then committed.

    Moments are hashed while they are sent. Rank 0 reads what each rank has sent, of several ranks at a time.
    """
    prepared_s = saved.weight_bytes / cluster.write_gb_s + saved.file_bytes / cluster.hash_gb_s
    sent_s = max(
        saved.count_sent(1) / cluster.send_gb_s,
        saved.count_sent(cluster.ranks_per_node) / cluster.node_gb_s,
        saved.count_sent(saved.ranks) / cluster.store_gb_s,
    )
    return (prepared_s + sent_s) / 1e9 + math.ceil(saved.ranks / SMALL_AT_A_TIME) * cluster.request_s
