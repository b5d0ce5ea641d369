"""The machine that measures: how busy it is, what it is, and the peers' own virtual environments."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from job.processor import describe_processor

_LOAD_PER_CORE, _MOST_STOLEN = 2.0, 0.1
_LEAST_GOT, _GOT_ALONE = 0.7, 0.9
_SAMPLE_S = 2.0


@dataclass(frozen=True)
class Busyness:
    """Load of one minute; of a sample in which this process asks for all cores, the shares it got and was robbed of."""

    load: float
    got: float
    stolen: float

    @property
    def is_busy(self) -> bool:
        """Tell whether figures measured now are worth nothing.

        A high load is no neighbour's where all cores can be had now: it is what the lane before has left.
        """
        loaded = self.load > _LOAD_PER_CORE * count_cores() and self.got < _GOT_ALONE
        return loaded or self.got < _LEAST_GOT or self.stolen > _MOST_STOLEN

    def __str__(self) -> str:
        return f"load {self.load:.1f}, {self.got:.0%} of {count_cores()} cores to be had, {self.stolen:.0%} stolen"

    def to_json(self) -> dict[str, Any]:
        """Return what `bench.json` keeps of it."""
        return asdict(self) | {"busy": self.is_busy}


def count_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


def measure_busyness() -> Busyness:
    """Ask for all cores for two seconds, and see what is left of them."""
    load = os.getloadavg()[0]  # before the sample adds to it
    block, until = bytes(1 << 24), time.perf_counter() + _SAMPLE_S
    before, began_s, began_cpu = _read_ticks(), time.perf_counter(), time.process_time()

    def ask() -> None:
        while time.perf_counter() < until:
            hashlib.sha256(block)  # without the interpreter's lock

    threads = [threading.Thread(target=ask) for _ in range(count_cores())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu
    return Busyness(load, min(cpu_s / seconds / count_cores(), 1.0), _share_stolen(before, _read_ticks()))


def _read_ticks() -> list[int]:
    """Return user, nice, system, idle, iowait, irq, softirq, steal of all cores (proc(5))."""
    return [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]


def _share_stolen(before: list[int], after: list[int]) -> float:
    spent = [new - old for old, new in zip(before, after, strict=True)]
    return spent[7] / max(sum(spent), 1)


def describe_machine() -> str:
    """Return processor, cores and memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{describe_processor()}, {count_cores()} cores, {memory / 2**30:.0f} GiB"


def open_venv(folder: Path, name: str, *requirements: str) -> Path:
    """Return the bin folder of a virtual environment with these packages alone, made once."""
    venv = folder / "venvs" / name
    done = venv / "requirements.txt"
    wanted = "\n".join(requirements)
    if not done.exists() or done.read_text() != wanted:
        print(f"installing {', '.join(requirements)} into {venv} ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True)
        subprocess.run([str(venv / "bin" / "pip"), "install", "-qq", *requirements], check=True)
        done.write_text(wanted)
    return venv / "bin"
