"""From an error of torch to one of the house: memory, disk, a dead loader, a busy port, a lost peer, overflow."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from job.errors import Diverged, JobError, PeerLost, ResourceExhausted, lacks_disk

_LOADER = re.compile(r"DataLoader worker .*(exited unexpectedly|killed by signal: \w+)")
_PEER = re.compile(
    r"gloo|nccl|processgroup|connection (closed|reset|refused)|broken pipe|timed? ?out|socket|store->get", re.IGNORECASE
)
_BUSY_PORT = re.compile(r"EADDRINUSE|address already in use", re.IGNORECASE)
_SCALE = re.compile(r"loss scale already at minimum")
"""DeepSpeed's bare Exception; under DDP torch's scaler goes on for ever, see `job.train.progress.ScaleFloor`."""


@contextmanager
def explain_failures(shape: Callable[[], tuple[int, int]] = lambda: (0, 0)) -> Iterator[None]:
    """Turn what torch or DeepSpeed is known to raise into one line and a code; anything else stays what it is.

    `shape` returns the rows and tokens of the micro-batch that was computed last, zeros before the first.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise explain_memory(*shape()) from None
    except JobError:
        raise
    except Exception as error:
        known = explain_failure(error)
        if known is None:
            raise
        raise known from None


def explain_memory(rows: int, tokens: int) -> ResourceExhausted:
    """Return the error for a GPU that cannot hold a micro-batch; it asks for half the rows where there are two."""
    if rows > 1:
        message = f"GPU memory is too small for {rows} rows of {tokens} tokens at once"
        return ResourceExhausted(
            f"{message}; lower training.max_micro_batch_size (the global batch stays)",
            retry={"max_micro_batch_size": rows // 2},
        )
    what = f"1 row of {tokens} tokens" if rows else "the model and its optimizer"
    return ResourceExhausted(
        f"GPU memory is too small for {what}; lower data.max_length, set training.gradient_checkpointing: true, "
        "or share the model among more GPUs (distributed.engine: deepspeed)"
    )


def explain_overflow(where: str) -> Diverged:
    """Return the error for fp16 gradients that overflow whatever the loss is scaled with."""
    return Diverged(
        f"training.precision: fp16 gradients overflow even {where}, so no step is taken any more; use bf16 or fp32, "
        "or lower training.learning_rate"
    )


def explain_failure(error: Exception) -> JobError | None:
    """Return the error of the house for one of torch's, None for anything else."""
    text = " ".join(str(error).split())
    if lacks_disk(error):
        return ResourceExhausted(f"No space left on device ({text[:200]}); free space or move --work-dir", retry={})
    if loader := _LOADER.search(text):
        return ResourceExhausted(
            f"data.num_workers: a loading process {loader.group(1)}, usually for lack of memory or /dev/shm; "
            "use fewer, or 0",
            retry={},
        )
    if isinstance(error, dist.DistError) and _BUSY_PORT.search(text):
        return PeerLost(f"another process took the port on which the ranks were to meet: {text[:200]}", retry={})
    if _SCALE.search(text):
        return explain_overflow("at the lowest scale of the loss")
    distributed = dist.is_initialized() and dist.get_world_size() > 1
    if isinstance(error, dist.DistError) or (distributed and isinstance(error, RuntimeError) and _PEER.search(text)):
        return PeerLost(f"another rank is gone or does not answer: {text[:200]}; see its log, then run again")
    return None
