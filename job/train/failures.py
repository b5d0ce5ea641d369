"""From an error of torch to one of the house: memory, a loading process that died, a peer that is gone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from job.errors import JobError, PeerLost, ResourceExhausted

_LOADER = re.compile(r"DataLoader worker .*(exited unexpectedly|killed by signal: \w+)")
_PEER = re.compile(
    r"gloo|nccl|processgroup|connection (closed|reset|refused)|broken pipe|timed? ?out|socket|store->get", re.IGNORECASE
)


@contextmanager
def explain_failures(micro_batch: int) -> Iterator[None]:
    """Turn what torch raises for a lack of memory, a dead loading process or a lost peer into one line and a code."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise ResourceExhausted(
            f"GPU memory is too small for {micro_batch} rows at once; lower training.max_micro_batch_size "
            "(the global batch stays)"
        ) from None
    except (RuntimeError, OSError) as error:
        known = explain_failure(error)
        if known is None:
            raise
        raise known from None


def explain_failure(error: Exception) -> JobError | None:
    """Return the error of the house for one of torch's, None for anything else."""
    text = " ".join(str(error).split())
    if loader := _LOADER.search(text):
        return ResourceExhausted(
            f"data.num_workers: a loading process {loader.group(1)}, usually for lack of memory or /dev/shm; "
            "use fewer, or 0"
        )
    distributed = dist.is_initialized() and dist.get_world_size() > 1
    if isinstance(error, dist.DistError) or (distributed and isinstance(error, RuntimeError) and _PEER.search(text)):
        return PeerLost(f"another rank is gone or does not answer: {text[:200]}")
    return None
