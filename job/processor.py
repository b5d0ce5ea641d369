"""Which processor measured a number, and which int8 targets it can judge.

The same int8 file is right on one processor and saturates on another (onnxruntime #5849), so every
int8 number carries the processor's name and flags. With JOB_HIDE_CPU_FLAGS=avx512_vnni,… nothing is
judged by those instruction sets, as on a processor without them.
"""

from __future__ import annotations

import os
import platform
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


def _flags() -> list[str]:
    return [flag for flag in _present() if flag not in _hidden()]


def _present() -> list[str]:
    found = set((_read_cpuinfo("flags") or _read_cpuinfo("Features")).split())
    return [flag for flag in _FLAGS if flag in found]


def _hidden() -> list[str]:
    return [flag for flag in os.environ.get("JOB_HIDE_CPU_FLAGS", "").split(",") if flag]


def _read_cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")
