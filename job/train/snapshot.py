"""A checkpoint leaves the training as a copy in memory, which is checked, written and uploaded beside the next steps.

The copies lie in one stretch of memory that is allocated while training begins (pinned beside a GPU) and used for every
checkpoint: a save blocks the loop for as long as copying takes. One checkpoint is written at a time, and a save that
comes sooner waits for the one before. So does a fork (`data.num_workers`): a lock that a thread held would stay locked
in the new process for ever.

What is uploaded from this memory (`HeldFile`) goes to disk where that takes long, well before the next save is due,
which would have to wait for it.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary, finalize

import numpy as np
import torch

from job.liveness import beat
from job.store.held import HeldFile
from job.store.parallel import run_beside

log = logging.getLogger("job.train")

Keep = Callable[[torch.Tensor], torch.Tensor]
"""Returns a copy on the CPU that the next step does not change."""

_ALIGNED_BYTES = 64
_WAIT_S = 0.5
_LEAST_PATIENCE_S, _LONGEST_PATIENCE_S = 1.0, 20.0
"""Half of the time between two saves; after that, what is not uploaded yet leaves this memory."""
_THREAD = "checkpoint"
"""No process is forked while one of this name works."""
_LIVING: WeakValueDictionary[int, np.ndarray] = WeakValueDictionary()
_INHERITED: list[np.ndarray] = []
"""Where a forked process has no such memory, to give it back would take what has come to lie at its address."""


@dataclass(frozen=True)
class Written:
    """A checkpoint in its folder, but for files that are `held` in memory; `seconds` from `begin` on."""

    seconds: float
    held: list[HeldFile]


class Snapshot:
    """Memory for the state of this rank, `size` bytes; what is more finds room, but costs an allocation each time."""

    def __init__(self, size: int) -> None:
        gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._memory: Future[torch.Tensor] = run_beside(_THREAD, lambda: _allocate(size, gpu))
        self._used, self._began, self._patience_s = 0, time.monotonic(), 0.0
        self._written: Future[Written] | None = None

    def begin(self) -> None:
        """Make room for a new snapshot; raise what went wrong with the one before."""
        began, before = time.monotonic(), self._began
        self._began, self._patience_s = began, max(min((began - before) / 2, _LONGEST_PATIENCE_S), _LEAST_PATIENCE_S)
        if self._written:
            _wait_alive(self._written)
            for file in self._written.result().held:
                moved = run_beside(_THREAD, file.move_to_disk)
                _wait_alive(moved)
                moved.result()
        _wait_alive(self._memory)
        self._used = 0

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy on the CPU; one of a GPU's tensor is whole when `write` is called."""
        memory, size = self._memory.result(), tensor.numel() * tensor.element_size()
        if self._used + size > len(memory):
            return tensor.detach().to("cpu", copy=True)
        copy = memory[self._used : self._used + size].view(tensor.dtype).view(tensor.shape)
        self._used += -(-size // _ALIGNED_BYTES) * _ALIGNED_BYTES
        return copy.copy_(tensor.detach(), non_blocking=True)

    def write(self, work: Callable[[], list[HeldFile]]) -> Future[Written]:
        """Call `work` beside the training; the answer has the files that it holds, or what it raised."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        began, patience_s = self._began, self._patience_s

        def write() -> Written:
            held = work()
            for file in held:
                threading.Thread(target=_give_way, args=[file, patience_s], name="give-way", daemon=True).start()
            return Written(time.monotonic() - began, held)

        self._written = run_beside(_THREAD, write)
        return self._written


def _allocate(size: int, gpu: int | None) -> torch.Tensor:
    """Return uint8 [size], each page of it written once: the first copy would else wait for the kernel."""
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_DONTFORK)  # a fork would copy what is pinned, for each loading process
    memory = np.frombuffer(pages, np.uint8)
    _LIVING[memory.ctypes.data] = memory
    memory.fill(0)  # torch would start a team of threads for it
    if gpu is not None:
        torch.cuda.set_device(gpu)  # a thread has its own, and would take room on the first GPU for nothing
        _pin(memory)
    return torch.from_numpy(memory)


def _pin(memory: np.ndarray) -> None:
    """Keep these pages where they are, as a GPU asks for to copy at full speed, and while others compute.

    torch's `pin_memory` would take up to twice as many: it rounds up to the next power of two (pytorch#95823).
    """
    address, runtime = memory.ctypes.data, torch.cuda.cudart()
    if code := int(runtime.cudaHostRegister(address, memory.nbytes, 0)):
        log.warning("memory for checkpoints cannot be pinned (CUDA error %d): a save keeps the GPU for longer", code)
        return
    finalize(memory, runtime.cudaHostUnregister, address).atexit = False


def _give_way(file: HeldFile, patience_s: float) -> None:
    """Write a file that has not been sent for so long, unless that would fill the disk."""
    if file.is_free.wait(patience_s):
        return
    try:
        if shutil.disk_usage(file.path.parent).free < 2 * file.size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        run_beside(_THREAD, file.move_to_disk).result()
    except OSError as error:
        log.warning("%s: %s; it stays in memory until it is uploaded", file.path, error.strerror)


def _wait_alive(future: Future[Any]) -> None:
    while not wait([future], _WAIT_S).done:
        beat()


def _finish_before_fork() -> None:
    for thread in threading.enumerate():
        if thread.name == _THREAD and thread is not threading.current_thread():
            while thread.is_alive():
                thread.join(_WAIT_S)
                beat()


os.register_at_fork(before=_finish_before_fork, after_in_child=lambda: _INHERITED.extend(_LIVING.values()))
