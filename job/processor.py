"""Which processor measured a number, which int8 targets it can judge, and how many of them there are for this process.

The same int8 file is right on one processor and saturates on another (onnxruntime #5849), so every
int8 number carries the processor's name and flags. With JOB_HIDE_CPU_FLAGS=avx512_vnni,… nothing is
judged by those instruction sets, as on a processor without them.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator
from pathlib import Path

_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm")


def describe_processor() -> str:
    """Return model name and the instruction sets that matter for int8, such as `… (avx2 avx512_vnni)`."""
    hidden = f"; hidden: {' '.join(_hidden())}" if _hidden() else ""
    return f"{_read_cpuinfo('model name') or platform.machine()} ({' '.join(_flags())}{hidden})"


def can_judge(target: str) -> bool:
    """Tell whether this processor runs the kernels that `target` is meant for; newer ones run others."""
    if target in ("portable", "int4"):  # int4 is weights in blocks, whose sums are 32 bits wide
        return True
    if target == "avx2":
        # hidden or not: where VNNI is there, its kernels run, and they do not overflow as AVX2's may
        return "avx2" in _flags() and not {"avx512_vnni", "avx_vnni"} & set(_present())
    if target == "arm64":
        return platform.machine() in ("aarch64", "arm64")
    return target in _flags()


def count_processors(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Return how many processors this process can keep busy.

    Those that it may run on (SLURM, `taskset`), or as many as the quota of its cgroup is worth where that is less (a
    pod's CPU limit, `docker --cpus`): more threads than that are stopped most of the time, and wait for each other.
    """
    quotas = map(_read_quota, _list_cgroups(cgroups, own))
    return min([len(os.sched_getaffinity(0)), *(math.ceil(quota) for quota in quotas if quota)])


def limit_threads() -> int:
    """Return `count_processors` where libraries would start more threads, for they look at no quota; else 0."""
    count = count_processors()
    return count if count < len(os.sched_getaffinity(0)) else 0


def _list_cgroups(cgroups: Path, own: Path) -> Iterator[Path]:
    """Yield the folders of the cgroups that this process is in (v2, or v1's CPU controller), from the leaf upwards."""
    for line in _read(own).splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0" or "cpu" in controllers.split(","):
            root = cgroups / "cpu" if controllers else cgroups
            yield root / path.strip("/")
            yield from (root / parent for parent in Path(path.strip("/")).parents)


def _read_quota(folder: Path) -> float:
    """Return how many processors' time a cgroup is given, 0 for as much as there is."""
    quota = _read(folder / "cpu.max") or " ".join(_read(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    words = quota.split()
    return int(words[0]) / int(words[1]) if len(words) == 2 and all(map(str.isdecimal, words)) else 0


def _flags() -> list[str]:
    return [flag for flag in _present() if flag not in _hidden()]


def _present() -> list[str]:
    found = set((_read_cpuinfo("flags") or _read_cpuinfo("Features")).split())
    return [flag for flag in _FLAGS if flag in found]


def _hidden() -> list[str]:
    return [flag for flag in os.environ.get("JOB_HIDE_CPU_FLAGS", "").split(",") if flag]


def _read_cpuinfo(key: str) -> str:
    lines = _read(Path("/proc/cpuinfo")).splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
