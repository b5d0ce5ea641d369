"""The training stage on every node of a run: node 0 leads (`Lead`), the others follow (`member.py`).

Order of calls; the numbers are those of `store/commit.py`, what is said between nodes stands in `launch/host.py`.

    a  every node starts its ranks, which import what they need and wait (`opening.py`), and fetches its sources; the
       others tell node 0 (`ready`), which compares
    b  node 0 fetches the newest whole checkpoint (7)
    c  node 0 gives the order; every other node fetches the checkpoint that it names (`here`)
    d  all nodes let their ranks go (`start`), which commit checkpoints (8–13)
    e  node 0 commits stages/train.json (14) and dismisses the others with 0; it finishes the run alone

A node that dies before d is waited for; between d and e all leave with 79 and go on from the last checkpoint. After
e the others are not needed any more: node 0 skips the training when it starts again, the others leave with 0.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from job.errors import PeerLost
from job.identity import check_checkpoint, describe_checkpoint
from job.launch import ALONE, Guest, Host, Topology, Verdict, find_free_port, find_interface
from job.node import Node
from job.recipe import Recipe, Run, hash_json
from job.recipe.schema import DEFINES_TRAINING
from job.stages import Stage
from job.store import Attempt
from job.store.ledger import WAITED_IN_VAIN
from job.store.models import count_parameters
from job.store.restore import read_manifest

log = logging.getLogger("job.pipeline")

_MOST_BYTES_PER_PARAMETER = 64
_MOST_BYTES_BESIDE = 1 << 30
"""No checkpoint is larger (weights and two moments in fp32 are 12 bytes a parameter); a manifest that says so lies."""


TRAINED = Verdict(0, "the training is committed; node 0 finishes the run alone", {})
"""How the part of every node but the first ends well."""


def introduce(run: Run, topology: Topology) -> dict[str, Any]:
    """Return what the nodes of a run must have in common."""
    recipe = run.recipe.hash_sections(*DEFINES_TRAINING, "distributed", "store")
    return {"run": run.run_id, "recipe": recipe, "processes": topology.processes_per_node}


class Lead:
    """Node 0's part."""

    def __init__(self, node: Node, run: Run, topology: Topology) -> None:
        self._node, self._topology = node, topology
        hello, hang_timeout_s = introduce(run, topology), run.recipe.launch.hang_timeout_s
        self._host = Host(topology, hello, hang_timeout_s) if topology.nodes > 1 else None

    def verdicts(self) -> list[Verdict]:
        """Return how the other nodes' part ended, as far as it has."""
        return self._host.verdicts() if self._host else []

    def dismiss(self, verdict: Verdict) -> None:
        """Tell the other nodes how it ended, 0: they are not needed any more; end ranks that still wait."""
        self._node.drop_ahead()
        if self._host:
            self._host.dismiss(verdict)

    def train(self, stage: Stage, run: Run, attempt: Attempt, about: dict[str, Any]) -> dict[str, Any]:
        """Have all nodes train (calls a–d), from the newest whole checkpoint where there is one; return the record.

        `about` is that of `identity.describe_run`.
        """
        folder = clear_folder(run)
        self._gather(run, attempt, about)
        order = _describe_attempt(run, attempt) | self._restore(run, attempt, about)
        self._gather(run, attempt, about)  # again: one may have died and come back meanwhile
        self._give(run, attempt, order)
        port = find_free_port()
        run.write("attempt.json", order | {"resume": order["checkpoint"] and str(folder / "resume")})
        environments = list_environments(run, self._topology, port, self._host)
        if self._host:
            self._host.start(port)
        record = self._node.run_processes(stage.target, run, environments, self._host or ALONE)
        shutil.rmtree(folder / "resume", ignore_errors=True)
        checkpoint = self._node.transfer(attempt.current_checkpoint)
        if checkpoint is None or checkpoint["step"] != record["steps"]:
            raise PeerLost(f"the checkpoint of step {record['steps']}, the last, was not committed; run again")
        manifest = self._node.transfer(
            lambda: read_manifest(attempt.store.objects, checkpoint["manifest"], checkpoint["manifest_sha256"])
        )
        about = {"checkpoint": checkpoint, "checkpoint_bytes": manifest.total_bytes}
        return record | about | {"attempts": self._node.transfer(attempt.list_attempts)}

    def _gather(self, run: Run, attempt: Attempt, about: dict[str, Any]) -> None:
        if not self._host:
            return
        try:
            self._host.gather(hash_json(about["identity"]), join_timeout_s(run), lambda: self._check(attempt))
        except PeerLost:
            if self._host.is_awaited():
                attempt.note(WAITED_IN_VAIN)
            raise

    def _give(self, run: Run, attempt: Attempt, order: dict[str, Any]) -> None:
        if self._host:
            self._host.give(order, join_timeout_s(run), lambda: self._check(attempt))

    def _check(self, attempt: Attempt) -> None:
        attempt.check()
        self._node.check_stop("while waiting for the other nodes; run again to go on from what is committed")

    def _restore(self, run: Run, attempt: Attempt, about: dict[str, Any]) -> dict[str, Any]:
        """Fetch the newest whole checkpoint; return what the ranks of all nodes must know of it."""
        expected = describe_checkpoint(about)
        max_bytes = _MOST_BYTES_PER_PARAMETER * count_parameters(run.base_model) + _MOST_BYTES_BESIDE
        restored = self._node.transfer(lambda: attempt.restore(run.folder / "train" / "resume", max_bytes))
        if restored is None:
            return {"checkpoint": None, "resumed_from": None, "committed": [], "about": expected}
        found, world_size = restored.manifest.about, self._topology.world_size
        check_checkpoint(restored.manifest, expected)
        log.info("resuming from the checkpoint of step %s", found["step"])
        if found["world_size"] != world_size:
            log.warning(
                "it was written by %s ranks, these are %s: samples go on in order, but bits may differ from here on",
                found["world_size"], world_size,
            )  # fmt: skip
        return {
            "checkpoint": restored.committed[0],
            "resumed_from": found["step"],
            "committed": restored.committed,
            "about": expected,
        }


def clear_folder(run: Run) -> Path:
    """Return the training's folder, empty."""
    folder = run.folder / "train"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def list_environments(
    run: Run, topology: Topology, port: int = 0, other: Host | Guest | None = None
) -> list[dict[str, str]]:
    """Return the variables of every rank of this node; port and `other`, whom it talks to, are not known at first."""
    common = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "JOB_WITHOUT": list_unneeded(run.recipe)}
    common["JOB_START_TIMEOUT_S"] = str(join_timeout_s(run))
    # else compiled kernels lie in TMPDIR, where the next attempt may not find them
    caches = {"TORCHINDUCTOR_CACHE_DIR": run.cache / "inductor", "TRITON_CACHE_DIR": run.cache / "triton"}
    common |= {name: str(folder) for name, folder in caches.items() if name not in os.environ}
    interface = find_interface(other.own_address) if other else None
    if interface and "GLOO_SOCKET_IFNAME" not in os.environ:
        common["GLOO_SOCKET_IFNAME"] = interface
    return [common | rank for rank in topology.rank_environments(port)]


def list_unneeded(recipe: Recipe) -> str:
    """Return the libraries that no rank of a recipe needs, and that transformers and accelerate import all the same."""
    needed = {
        "boto3": recipe.store.uri.startswith("s3://") or bool(recipe.training.report_to),  # trackers may write to S3
        "deepspeed": recipe.distributed.engine == "deepspeed",
        "peft": recipe.tuning.method == "lora",
    }
    return " ".join(["datasets", *(name for name, is_needed in needed.items() if not is_needed)])


def join_timeout_s(run: Run) -> float:
    """Return for how long a node is waited for."""
    return 60.0 * run.recipe.launch.join_timeout_min


def _describe_attempt(run: Run, attempt: Attempt) -> dict[str, Any]:
    return {
        "epoch": attempt.epoch,
        "nonce": attempt.nonce,
        "since": attempt.since,
        "keep": run.recipe.store.keep_checkpoints,
        # a rank that has lost the store trains on for so long, and then says so itself; one that is gone or hangs is
        # noticed by the supervisors
        "peer_timeout_s": 60 * run.recipe.store.max_unsynced_minutes + run.recipe.launch.hang_timeout_s,
        "max_micro_batch_size": run.recipe.training.max_micro_batch_size,
    }
