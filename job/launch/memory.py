"""Was it the memory? The kernel counts the processes that it killed for lack of memory in a cgroup."""

from __future__ import annotations

from pathlib import Path

from job.errors import ResourceExhausted

_V2 = ("memory.events", "memory.max")
_V1 = ("memory.oom_control", "memory.limit_in_bytes")


class MemoryWatch:
    """Counts OOM kills in this process' cgroup (v2, or v1's memory controller) since it was made."""

    def __init__(self, cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> None:
        self._counter, self._limit = _find_files(cgroups, own)
        self._before = self._count()

    def explain_kill(self) -> ResourceExhausted | None:
        """Return the error that a SIGKILL stands for when the kernel killed for memory meanwhile, else None."""
        if self._count() <= self._before:
            return None
        limit = _read(self._limit)
        size = f"{int(limit) >> 20} MiB" if limit.isdigit() else "no limit of its own"
        return ResourceExhausted(
            f"the kernel killed a process for lack of memory (cgroup limit: {size}, {self._limit.name}); give the job "
            "more memory, or lower training.max_micro_batch_size or data.num_workers"
        )

    def _count(self) -> int:
        for line in _read(self._counter).splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill" and value.isdigit():
                return int(value)
        return 0


def _find_files(cgroups: Path, own: Path) -> tuple[Path, Path]:
    """Return the files of the counter and the limit; in a container the cgroup is often mounted as the root itself."""
    places = []
    for line in _read(own).splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0":
            places += [(root / path.strip("/"), _V2) for root in (cgroups, cgroups / "unified")]
        elif "memory" in controllers.split(","):
            places.append((cgroups / "memory" / path.strip("/"), _V1))
    places += [(cgroups, _V2), (cgroups / "memory", _V1)]
    found = [(folder / names[0], folder / names[1]) for folder, names in places if (folder / names[0]).is_file()]
    return found[0] if found else (cgroups / _V2[0], cgroups / _V2[1])


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
