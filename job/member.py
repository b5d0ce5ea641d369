"""A node's part in a run that node 0 leads: its ranks, and nothing else. See `training.py` for the order of calls."""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from job import stages
from job.errors import Interrupted, JobError, NoValidCheckpoint, PeerLost
from job.launch import Guest, Verdict, decide
from job.launch.line import Message
from job.opening import Opening
from job.recipe import Run, hash_json, write_json
from job.store import RunStore
from job.store.attempt import read_stage
from job.store.restore import fetch_checkpoint
from job.training import TRAINED, clear_folder, introduce, join_timeout_s, list_environments

log = logging.getLogger("job.pipeline")

_POLL_S = 0.1
_LOOK_S = 15.0
"""How often a node that cannot reach node 0 looks into the store, whether it is needed any more."""


def run_member(opening: Opening, fresh: bool) -> dict[str, Any]:
    """Take part in the training; return a result: 0 when it is committed, else why this node leaves."""
    run = opening.run
    try:
        verdict = Member(opening, fresh).take_part()
    except Exception as error:
        verdict = Verdict.of(error)
    log.info("node %d leaves with %d: %s", opening.place.node_rank, verdict.code, verdict.reason)
    status = {0: "trained", Interrupted.exit_code: "interrupted"}.get(verdict.code, "failed")
    result = {"run_id": run.run_id, "status": status, "exit_code": verdict.code, "reason": verdict.reason}
    with suppress(OSError):
        write_json(run.folder / "result.json", result)
    return result


class Member:
    """One attempt of one run on a node other than the first."""

    def __init__(self, opening: Opening, fresh: bool) -> None:
        self._run, self._node, self._fresh, self._topology = opening.run, opening.node, fresh, opening.topology
        self._failed: Verdict | None = None
        self._try, self._left = 0, float("inf")
        run, hello = self._run, introduce(self._run, self._topology)
        self._guest = Guest(opening.place, hello, join_timeout_s(run), run.recipe.launch.hang_timeout_s)
        self._node.check = self._guest.check
        self._store = RunStore.of(run)

    def take_part(self) -> Verdict:
        """Fetch, join, and train as often as node 0 says; return what decides this node's exit code."""
        try:
            last = self._follow() if self._prepare() else TRAINED
        except Exception as error:
            last = Verdict.of(error)
        self._node.drop_ahead()
        verdict = decide([TRAINED, last, *filter(None, [self._failed])])
        self._guest.leave(self._try, verdict)
        return verdict

    def _prepare(self) -> bool:
        """Fetch the sources and join (call a); False where the training is committed already."""
        self._run.save()
        variables = stages.list_fetch_variables(self._fresh)
        identity = self._node.run_process(stages.FETCH, self._run, variables, self._guest)
        looked = -_LOOK_S
        while not self._guest.has_joined:
            self._check()
            if time.monotonic() - looked > _LOOK_S:
                if self._is_trained(hash_json(identity)):
                    return False
                looked = time.monotonic()
            time.sleep(_POLL_S)
        self._guest.say("ready", identity=hash_json(identity))
        return True

    def _is_trained(self, inputs: str) -> bool:
        """Tell whether this run's training is committed; one that begins afresh has yet to forget the old."""
        if self._fresh:
            return False
        saved = self._node.transfer(lambda: read_stage(self._store.objects, stages.STAGES[0].name))
        return bool(saved and saved["key"] == stages.STAGES[0].key(self._run.recipe, inputs))

    def _follow(self) -> Verdict:
        """Do what node 0 says until its verdict, which is returned; this node's own failure is kept."""
        while (message := self._await()).get("kind") != "verdict":
            if message.get("kind") == "order":
                self._failed, self._try, self._left = None, int(message["number"]), float("inf")
                try:
                    self._train(message)
                except JobError as error:
                    self._failed = Verdict.of(error)
                self._guest.say("left", number=self._try, **(self._failed or TRAINED).describe())
                self._left = time.monotonic()
        return Verdict.parse(message)

    def _train(self, order: Message) -> None:
        """Fetch the order's checkpoint, and train with this node's ranks (calls c and d)."""
        folder = clear_folder(self._run) / "resume"
        run = _change(self._run, int(order["max_micro_batch_size"]))
        if order["checkpoint"]:
            self._fetch(order["checkpoint"], folder)
        self._guest.say("here", number=self._try)
        message = self._await()
        if message.get("kind") != "start":
            self._guest.put_back(message)
            raise PeerLost("node 0 ended this try before it began")
        run.write("attempt.json", order | {"resume": order["checkpoint"] and str(folder)})
        environments = list_environments(run, self._topology, int(message["port"]), self._guest)
        self._node.run_processes(stages.STAGES[0].target, run, environments, self._guest)

    def _fetch(self, checkpoint: dict[str, str], folder: Path) -> None:
        key, sha256 = checkpoint["manifest"], checkpoint["manifest_sha256"]
        try:
            self._node.transfer(lambda: fetch_checkpoint(self._store.objects, key, sha256, folder), self._check_try)
        except NoValidCheckpoint as error:  # node 0 found it whole: something is wrong on the way to this node
            raise PeerLost(f"{error}; node 0 has it whole, run again") from None

    def _await(self) -> Message:
        while (message := self._guest.hear()) is None:
            self._check()
            time.sleep(_POLL_S)
        return message

    def _check_try(self) -> None:
        """Raise what node 0 has said meanwhile: whatever goes on here for it has become pointless."""
        for verdict in self._guest.verdicts():
            raise verdict.as_error()

    def _check(self) -> None:
        """Raise where node 0 is gone, or this one was told to stop.

        One whose part has ended waits for node 0's word all the same, within the grace: node 0 may still upload, and
        SLURM ends the tasks that are left when one leaves with a code.
        """
        self._guest.check()
        if self._left + self._run.recipe.launch.grace_s < time.monotonic() or self._left == float("inf"):
            self._node.check_stop("while waiting for node 0; run again to go on from what is committed")


def _change(run: Run, max_micro_batch_size: int) -> Run:
    """Return the run with what node 0 changed after a try that failed, and save it for the ranks."""
    changed = run.recipe.training.model_copy(update={"max_micro_batch_size": max_micro_batch_size})
    run = replace(run, recipe=run.recipe.model_copy(update={"training": changed}))
    run.save()
    return run
