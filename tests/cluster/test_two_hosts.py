"""Two nodes in network namespaces of their own with a cable between them, and what happens when it is cut."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from cases import wait_for

from job.store import RunStore
from job.store.commit import read_pointer

pytestmark = pytest.mark.cluster

HANG_TIMEOUT_S = 15
DOMAIN = "finetune.training.svc.cluster.local"
RECORDED = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "JOB_NODES": "2", "JOB_RUN_ID": "finetune-29401380"}
"""What the pods of an Indexed Job are given, beside the index; their names come from the Job."""


@dataclass(frozen=True)
class Cable:
    """Two hosts, finetune-29401380-0 and -1, and the cable between them."""

    hosts: tuple[str, str]

    def call(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    def lay(self) -> None:
        pods = [f"finetune-29401380-{index}" for index in (0, 1)]
        lines = [f"10.77.0.{index + 1} {pod}.{DOMAIN} {pod}\n" for index, pod in enumerate(pods)]
        for host in self.hosts:
            folder = Path("/etc/netns") / host
            folder.mkdir(parents=True)
            (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))
            self.call("netns", "add", host)
        ends = ["netns", self.hosts[0], "type", "veth", "peer", "cable", "netns", self.hosts[1]]
        self.call("link", "add", "cable", *ends)
        for index, host in enumerate(self.hosts):
            self.call("-n", host, "address", "add", f"10.77.0.{index + 1}/24", "dev", "cable")
            for device in ("lo", "cable"):
                self.call("-n", host, "link", "set", device, "up")

    def cut(self) -> None:
        """One end sees its own device down, the other sends into the void."""
        self.call("-n", self.hosts[1], "link", "set", "cable", "down")

    def mend(self) -> None:
        self.call("-n", self.hosts[1], "link", "set", "cable", "up")

    def remove(self) -> None:
        for host in self.hosts:
            subprocess.run(["ip", "netns", "delete", host], capture_output=True)
            for path in (Path("/etc/netns") / host).glob("*"):
                path.unlink()
            (Path("/etc/netns") / host).rmdir()

    def start(self, index: int, *words: str) -> subprocess.Popen[str]:
        """Start `job` on a host, called as the Job would call its pod."""
        named = f'hostname finetune-29401380-{index} && exec "$@"'
        command = ["ip", "netns", "exec", self.hosts[index], "unshare", "--uts", "sh", "-c", named, "sh"]
        environment = os.environ | RECORDED | {"JOB_COMPLETION_INDEX": str(index)}
        return subprocess.Popen(
            [*command, sys.executable, "-m", "job", *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip


@pytest.fixture
def cable() -> Iterator[Cable]:
    cable = Cable((f"finetune-a{os.getpid()}", f"finetune-b{os.getpid()}"))
    cable.lay()
    yield cable
    cable.remove()


def test_a_cut_cable_is_79_on_both_sides_within_the_timeout_and_mended_they_go_on(
    cable: Cable, assets: Path, reviews: Path, tmp_path: Path
) -> None:
    recipe = {
        "name": "hosts",
        "task": "text-classification",
        "model": {"id": str(assets / "minilm-l6")},
        "data": {"source": str(reviews), "max_length": 64},
        "training": {"num_train_epochs": 1, "global_batch_size": 16, "save_steps": 3, "eval_steps": 1000},
        "launch": {"hang_timeout_s": HANG_TIMEOUT_S},
        "baselines": ["majority"],
        "export": {"int8": {"targets": ["portable"], "gate": "report_only"}},
        "store": {"uri": str(tmp_path / "store"), "lease_ttl_s": 5},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    words = [("run", str(tmp_path / "recipe.yaml"), "--work-dir", str(tmp_path / f"work-{index}")) for index in (0, 1)]
    objects = RunStore(str(tmp_path / "store"), "finetune-29401380").objects

    nodes = [cable.start(index, *words[index]) for index in (0, 1)]
    wait_for(lambda: objects.read("current.json") and read_pointer(objects), 240)
    cable.cut()
    began = time.monotonic()
    ended = [node.communicate(timeout=120) for node in nodes]
    assert [node.returncode for node in nodes] == [79, 79], ended
    assert time.monotonic() - began < 2 * HANG_TIMEOUT_S + 20
    committed = (read_pointer(objects) or {})["step"]
    assert committed >= 3

    cable.mend()
    nodes = [cable.start(index, *words[index]) for index in (0, 1)]
    ended = [node.communicate(timeout=900) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], ended
    assert json.loads(ended[0][0].strip().splitlines()[-1])["train"]["resumed_from"] >= committed
