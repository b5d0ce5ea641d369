"""Which int8 targets a processor can judge; what is not there, or hidden, judges nothing."""

from __future__ import annotations

import platform
from collections.abc import Callable

import pytest

from job import processor

Have = Callable[[str], None]


@pytest.fixture
def have(monkeypatch: pytest.MonkeyPatch) -> Have:
    """Return a function that gives the processor these flags."""

    def give(flags: str) -> None:
        answers = {"flags": flags, "model name": "A processor"}
        monkeypatch.setattr(processor, "_read_cpuinfo", lambda key: answers.get(key, ""))
        monkeypatch.setattr(platform, "machine", lambda: "x86_64")

    return give


def judged() -> set[str]:
    return {target for target in ("portable", "avx2", "avx512_vnni", "arm64") if processor.can_judge(target)}


@pytest.mark.parametrize(
    ("flags", "targets"),
    [
        ("sse4_2", {"portable"}),
        ("avx2", {"portable", "avx2"}),
        ("avx2 avx512f", {"portable", "avx2"}),
        ("avx2 avx512f avx512_vnni", {"portable", "avx512_vnni"}),
        ("avx2 avx_vnni", {"portable"}),
    ],
)
def test_a_target_is_judged_where_its_own_kernels_run(have: Have, flags: str, targets: set[str]) -> None:
    have(flags)
    assert judged() == targets


def test_what_is_hidden_judges_nothing_and_is_said(have: Have, monkeypatch: pytest.MonkeyPatch) -> None:
    have("avx2 avx512f avx512_vnni")
    monkeypatch.setenv("JOB_HIDE_CPU_FLAGS", "avx512_vnni")
    assert judged() == {"portable"}, "AVX2 files still run on VNNI's kernels here, which do not overflow"
    assert processor.describe_processor() == "A processor (avx2 avx512f; hidden: avx512_vnni)"
