"""Which int8 targets a processor can judge (what is not there, or hidden, judges nothing), and how many there are."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from job import processor
from job.launch import Place, Topology
from job.launch.supervisor import _start_process
from job.predict.runtime import count_threads

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


QUOTAS = {
    "v2": ("0::/pods/one\n", {"pods/one/cpu.max": "150000 100000\n"}, 2),
    "v2 in a container": ("0::/\n", {"cpu.max": "400000 100000\n"}, 4),
    "v2, of the pod": (
        "0::/pod/container\n",
        {"pod/cpu.max": "300000 100000\n", "pod/container/cpu.max": "max 100000"},
        3,
    ),
    "v2, less than one": ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
    "v2 without": ("0::/\n", {"cpu.max": "max 100000\n"}, 64),
    "v1": (
        "4:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n",
        {"cpu/docker/x/cpu.cfs_quota_us": "200000\n", "cpu/docker/x/cpu.cfs_period_us": "100000\n"},
        2,
    ),
    "v1 in a container": (
        "3:cpu,cpuacct:/docker/x\n",
        {"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "50000\n"},
        5,
    ),
    "v1 without": ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 64),
    "more than there are": ("0::/\n", {"cpu.max": "9900000 100000\n"}, 64),
    "no cgroups": ("", {}, 64),
}


@pytest.mark.parametrize("case", QUOTAS)
def test_a_quota_of_processor_time_is_so_many_processors(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pod with a CPU limit, or `docker --cpus`, sees all of its node's processors; here 64."""
    own, files, count = QUOTAS[case]
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    assert processor.count_processors(tmp_path / "fs", tmp_path / "own") == count


def test_ranks_and_stages_start_no_more_threads_than_a_quota_lets_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setattr(processor, "_read_quota", lambda folder: 4.0)
    monkeypatch.setattr(processor, "_list_cgroups", lambda *places: [tmp_path])
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [each["OMP_NUM_THREADS"] for each in Topology(Place(), 2, 0).rank_environments(1)] == ["2", "2"]
    assert count_threads(0) == count_threads(64) == 4
    found = {}
    monkeypatch.setattr(subprocess, "Popen", lambda command, env, **options: found.update(env))
    _start_process("job.evaluate:evaluate_run", tmp_path, tmp_path / "outcomes" / "evaluate_run-0.json", {})
    assert found["OMP_NUM_THREADS"] == "4"
    _start_process("job.train:run_rank", tmp_path, tmp_path / "outcomes" / "run_rank-0.json", {"OMP_NUM_THREADS": "2"})
    assert found["OMP_NUM_THREADS"] == "2"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    _start_process("job.evaluate:evaluate_run", tmp_path, tmp_path / "outcomes" / "evaluate_run-0.json", {})
    assert found["OMP_NUM_THREADS"] == "3"
