"""The story of a run: resolve and fetch → train → evaluate → export → quantize → report → rehearse →
release.

Each stage is a process of its own that writes into the run's folder. After it, this process (which
never imports torch) commits a record to the store: the hash of what the stage read, of what it
wrote, and its numbers. A restart skips a stage whose hashes are equal and whose files are here or
can be fetched. What a crash between any two calls leaves behind stands in `store/commit.py`.
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from job import __version__
from job.data import derive_micro_batch
from job.errors import CheckpointMismatch, DataError, Interrupted, JobError, NoValidCheckpoint, PeerLost, Unreachable
from job.export import build_bundle, int8_file_name
from job.failpoints import failpoint
from job.identity import check_checkpoint, compare_runs, describe_checkpoint, describe_run, material_sections
from job.launch import Limits, StopRequest, Supervisor, Topology, Verdict, find_topology, judge_error
from job.recipe import Recipe, Run, hash_json, write_json
from job.recipe.schema import DEFINES_TRAINING
from job.report import assemble_result
from job.store import Attempt, RunStore, promote_release, publish_release
from job.store.attempt import read_stage
from job.store.manifest import hash_file
from job.store.models import count_parameters
from job.store.restore import fetch_checkpoint

log = logging.getLogger("job.pipeline")

T = TypeVar("T")

_POLL_S = 0.1
_LEAVING_S = 20.0
"""Whoever stopped this attempt will not wait for a store that is out: the result line comes after so long at most."""
_LEAVING_SHARE = 0.25
"""Of the grace, for saying goodbye to the store; the rest is the ranks'."""
_GIVE_UP_S = 1.0
"""How long a call to the store may still take after a stop signal; most end well before."""
_CHECKPOINT_BYTES_PER_PARAMETER = 64
_CHECKPOINT_BYTES_BESIDE = 1 << 30
"""No checkpoint is larger (weights and two moments in fp32 are 12 bytes a parameter); a manifest that says so lies."""


@dataclass(frozen=True)
class Stage:
    """`target` is run in a process; `reads` are recipe sections; `files` (in the run's folder) are its outputs."""

    name: str
    target: str
    reads: tuple[str, ...]
    files: tuple[str, ...]


STAGES = (
    Stage("train", "job.train:run_rank", DEFINES_TRAINING, ("final/config.json", "final/model.safetensors")),
    Stage("evaluate", "job.evaluate:evaluate_run", ("baselines",), ("evaluate/validation.npy", "evaluate/test.npy")),
    Stage("export", "job.export:export_run", (), ("onnx/model.onnx",)),
    Stage("quantize", "job.export:quantize_run", ("export",), ()),
    # numbers go into the report that no file of an earlier stage shows, so it and what follows is always made anew
    Stage("report", "job.report:write_report", ("name", "baselines", "export"), ()),
    Stage("rehearse", "job.export:rehearse_bundle", (), ()),
)

FETCH = "job.data:fetch_sources"
_RELEASE_READS = ("name", "release")


def run_pipeline(recipe: Recipe, run_id: str, work: Path, fresh: bool) -> dict[str, Any]:
    """Run what is not committed yet and return the result (DESIGN §6); a JobError becomes its exit code."""
    records: dict[str, dict[str, Any]] = {}
    run = Run(run_id, recipe, work.absolute())
    pipeline = Pipeline(run, StopRequest(recipe.launch.time_limit_min), fresh, records)
    try:
        outcome = pipeline.run()
    except Exception as error:
        outcome = {"status": "failed", **judge_error(error)}
    result = assemble_result(run_id, records) | outcome
    pipeline.leave_result(result)
    return result


class Pipeline:
    """One attempt of one run on this node."""

    def __init__(self, run: Run, stop: StopRequest, fresh: bool, records: dict[str, dict[str, Any]]) -> None:
        self._run, self._stop, self._fresh, self._records = run, stop, fresh, records
        limits = Limits.of(run.recipe.launch)
        self._leaving_s = min(_LEAVING_S, _LEAVING_SHARE * limits.grace_s)
        limits = replace(limits, grace_s=limits.grace_s - self._leaving_s)
        self._supervisor = Supervisor(stop, limits, self._check_lease)
        self._attempt: Attempt | None = None
        self._about: dict[str, Any] = {}
        self._retried = False

    def run(self) -> dict[str, Any]:
        """Check what can be checked early, own the run, run the stages, release."""
        self._run = run = self._run.lock_folder()
        recipe = run.recipe
        topology = find_topology(recipe.distributed)
        derive_micro_batch(recipe.training.global_batch_size, topology.world_size, recipe.training.max_micro_batch_size)
        where = recipe.store
        store = RunStore(where.uri, run.run_id, allow_http=where.allow_http, single_writer=where.single_writer)
        self._transfer(store.prove_reachable)
        log.info("run %s, store %s", run.run_id, store.uri)
        run.save()
        identity = self._process(FETCH, {"TOKENIZERS_PARALLELISM": "true"})
        self._check_rows()
        self._about, inputs = describe_run(run.run_id, recipe, identity), hash_json(identity)
        if not self._fresh:
            self._transfer(lambda: self._compare(store))
            if finished := self._transfer(lambda: self._find_finished(store, inputs)):
                return finished
        while True:
            try:
                return self._do_stages(self._transfer(lambda: self._own(store)), inputs, topology)
            except JobError as error:
                if not self._may_retry(error):
                    raise
                self.leave_result({"status": "retried", "exit_code": error.exit_code, "reason": str(error)})

    def _do_stages(self, attempt: Attempt, inputs: str, topology: Topology) -> dict[str, Any]:
        for stage in STAGES:
            inputs = self._do_stage(attempt, stage, inputs, topology)
        return self._release(attempt, inputs)

    def _may_retry(self, error: JobError) -> bool:
        """Tell whether another attempt begins at once: with fewer rows at a time, or, for anything else, one only."""
        if error.retry is None or self._stop.count or (self._retried and not error.retry):
            return False
        self._retried, self._fresh = True, False  # what this process has committed is not given up
        run = self._run
        training = run.recipe.training.model_copy(update=error.retry)
        self._run = replace(run, recipe=run.recipe.model_copy(update={"training": training}))
        self._run.save()
        # what the ranks had staged may be what fills the disk
        shutil.rmtree(run.folder / "train", ignore_errors=True)
        changed = ", ".join(f"training.{key}: {value}" for key, value in error.retry.items())
        log.warning("%s. Trying again from the last committed checkpoint%s", error, changed and f" with {changed}")
        return True

    def leave_result(self, result: dict[str, Any]) -> None:
        """Write result.json into the run's folder and, while this attempt owns the run, its prefix; never raises."""
        try:
            write_json(self._run.folder / "result.json", result)
        except OSError as error:
            log.warning("result.json could not be written: %s", error)
        if self._attempt:
            leaving = threading.Thread(target=self._leave_store, args=(self._attempt, result), daemon=True)
            leaving.start()
            leaving.join(self._leaving_s)
            if leaving.is_alive():
                log.warning("the store does not answer; this attempt leaves without a word there")

    def _leave_store(self, attempt: Attempt, result: dict[str, Any]) -> None:
        self._write_status(attempt, result["status"])
        attempt.leave(result)

    def _process(self, target: str, environment: Mapping[str, str] = {}) -> dict[str, Any]:
        return self._processes(target, [environment])

    def _processes(self, target: str, environments: Iterable[Mapping[str, str]]) -> dict[str, Any]:
        """Run a stage's processes; raise the error that they report."""
        verdict = self._supervisor.run(target, self._run.folder, environments)
        if verdict.code:
            raise _as_error(verdict)
        return verdict.record

    def _check_lease(self) -> None:
        if self._attempt:
            self._attempt.check()

    def _check_stop(self) -> None:
        if self._stop.count:
            raise Interrupted(f"{self._stop.name} before this attempt owned the run; nothing was changed")

    def _transfer(self, work: Callable[[], T]) -> T:
        """Ask the store in a thread, so that a stop signal or a lost lease waits neither for gigabytes nor an outage.

        What is given up ends with this process: whoever runs it leaves without waiting for threads.
        """
        done: Future[T] = Future()

        def carry() -> None:
            try:
                done.set_result(work())
            except BaseException as error:  # crosses to the caller
                done.set_exception(error)

        threading.Thread(target=carry, name="transfer", daemon=True).start()
        while not wait([done], timeout=_POLL_S).done:
            self._check_lease()
            if self._stop.count and not wait([done], timeout=_GIVE_UP_S).done:
                raise Interrupted(f"{self._stop.name} during a transfer; run again to go on from what is committed")
        if self._stop.count and isinstance(done.exception(), Unreachable):
            raise Interrupted(f"{self._stop.name} while the store was out; run again to go on from what is committed")
        return done.result()

    def _check_rows(self) -> None:
        """Refuse before training what the gate could never prove after it."""
        gate = self._run.recipe.export.int8
        rows = self._run.read("data.json")["rows"]["test"]
        if gate.gate == "fail" and rows < gate.min_rows:
            raise DataError(
                f"data.test: {rows} rows cannot prove a drop of at most {gate.max_metric_drop:g} "
                f"(export.int8.max_metric_drop); give at least {gate.min_rows} rows, "
                "or set export.int8.gate: report_only"
            )

    def _own(self, store: RunStore) -> Attempt:
        """Become the run's owner, claim run.json, enter the ledger (calls 1–6 of the commit protocol)."""
        recipe, about = self._run.recipe, self._about
        self._attempt = attempt = Attempt(store, recipe.store.lease_ttl_s, self._check_stop)
        failpoint("run-claim")
        if self._fresh:
            attempt.start_over(_list_records())
            attempt.claim(about)
        elif store.write_once("run.json", about) != about:
            self._compare(store)
            if not self._has_begun(store):
                attempt.claim(about)
        attempt.begin(hash_json([recipe.model_dump(mode="json"), __version__]), _list_records())
        self._status("claimed")
        return attempt

    def _compare(self, store: RunStore) -> None:
        """Raise CheckpointMismatch (16) when the run began as another one and has something to lose."""
        found = store.read_json("run.json")
        try:
            if found:
                compare_runs(found, self._about)
        except CheckpointMismatch as mismatch:
            if self._has_begun(store):
                raise
            log.warning("%s. Nothing was trained yet, so the run begins with what is there now", mismatch)

    def _has_begun(self, store: RunStore) -> bool:
        """Tell whether anything was trained, be it only a trace of it."""
        return any(True for prefix in ("checkpoints/", "stages/") for _ in store.objects.list(prefix))

    def _find_finished(self, store: RunStore, inputs: str) -> dict[str, Any] | None:
        """Return the outcome when every stage is committed for these inputs, whatever lies on this disk."""
        records = {}
        for name, reads in [*((stage.name, stage.reads) for stage in STAGES), ("release", _RELEASE_READS)]:
            saved = read_stage(store.objects, name)
            if not saved or saved["key"] != self._key(name, inputs, reads):
                return None
            records[name], inputs = saved["record"], str(saved["outputs"])
        self._records.update(records)
        reason = "already released; nothing was done"
        return {"status": "released", "exit_code": 0, "reason": reason, **records["release"]}

    def _key(self, name: str, inputs: str, reads: tuple[str, ...]) -> str:
        """Return the hash of all that a stage reads."""
        return hash_json([name, inputs, material_sections(self._run.recipe, reads)])

    def _do_stage(self, attempt: Attempt, stage: Stage, inputs: str, topology: Topology) -> str:
        """Skip a committed stage or run it and commit its record; return the hash of its outputs."""
        key = self._key(stage.name, inputs, stage.reads)
        saved = self._transfer(lambda: read_stage(attempt.store.objects, stage.name))
        if saved and saved["key"] == key and self._has_files(attempt, stage, saved):
            log.info("%s: already committed, skipped", stage.name)
            self._records[stage.name] = saved["record"]
            return str(saved["outputs"])
        self._status(stage.name)
        failpoint("stage-run")
        record = self._train(attempt, stage, topology) if stage.name == "train" else self._run_stage(stage)
        files = {name: hash_file(self._run.folder / name) for name in stage.files}
        outputs = hash_json([files, _int8_digests(record)])
        self._records[stage.name] = record
        committed = {"key": key, "outputs": outputs, "files": files, "record": record}
        self._transfer(lambda: attempt.commit_record(stage.name, committed))
        return outputs

    def _run_stage(self, stage: Stage) -> dict[str, Any]:
        if stage.name == "report":
            build_bundle(self._run)
            self._run.write("records.json", self._records)
        return self._process(stage.target, {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})

    def _has_files(self, attempt: Attempt, stage: Stage, saved: dict[str, Any]) -> bool:
        """Tell whether a committed stage's files lie here unchanged; those of training are fetched if not."""
        folder = self._run.folder
        if stage.name == "quantize":
            digests = _int8_digests(saved["record"])
            return all(_lies_here(folder / "onnx" / int8_file_name(target), digests[target]) for target in digests)
        if stage.name in ("report", "rehearse"):
            return False
        if all(_lies_here(folder / name, digest) for name, digest in saved["files"].items()):
            return True
        return stage.name == "train" and self._fetch_trained(attempt, stage, saved)

    def _fetch_trained(self, attempt: Attempt, stage: Stage, saved: dict[str, Any]) -> bool:
        """Fetch the trained model; False where it is not whole any more, so that training goes on before it."""
        log.info("fetching the trained model from the store")
        wanted = {Path(name).name for name in stage.files}
        pointer = saved["record"]["checkpoint"]
        try:
            self._transfer(
                lambda: fetch_checkpoint(
                    attempt.store.objects, pointer["manifest"], pointer["manifest_sha256"], self._run.final_model,
                    only=lambda path: path in wanted,
                )
            )  # fmt: skip
        except NoValidCheckpoint as error:
            log.warning("%s; training goes on from the next older checkpoint", error)
            return False
        return all(_lies_here(self._run.folder / name, digest) for name, digest in saved["files"].items())

    def _train(self, attempt: Attempt, stage: Stage, topology: Topology) -> dict[str, Any]:
        """Start the ranks, from the newest whole checkpoint where there is one; return the training's record."""
        folder = self._run.folder / "train"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        recipe = self._run.recipe
        order = {
            "epoch": attempt.epoch,
            "nonce": attempt.nonce,
            "since": attempt.since,
            "keep": recipe.store.keep_checkpoints,
            "peer_timeout_s": recipe.launch.hang_timeout_s,
        }
        self._run.write("attempt.json", order | self._restore(attempt, folder / "resume", topology))
        common = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        common["JOB_START_TIMEOUT_S"] = str(60 * recipe.launch.join_timeout_min)
        record = self._processes(stage.target, [common | rank for rank in topology.rank_environments()])
        shutil.rmtree(folder / "resume", ignore_errors=True)
        checkpoint = self._transfer(attempt.current_checkpoint)
        if checkpoint is None or checkpoint["step"] != record["steps"]:
            raise PeerLost(f"the checkpoint of step {record['steps']}, the last, was not committed; run again")
        return record | {"checkpoint": checkpoint}

    def _restore(self, attempt: Attempt, folder: Path, topology: Topology) -> dict[str, Any]:
        """Fetch the newest whole checkpoint; return what the ranks must know of it."""
        about = describe_checkpoint(self._about)
        max_bytes = _CHECKPOINT_BYTES_PER_PARAMETER * count_parameters(self._run.base_model) + _CHECKPOINT_BYTES_BESIDE
        restored = self._transfer(lambda: attempt.restore(folder, max_bytes))
        if restored is None:
            return {"resume": None, "resumed_from": None, "committed": [], "about": about}
        found = restored.manifest.about
        check_checkpoint(restored.manifest, about)
        log.info("resuming from the checkpoint of step %s", found["step"])
        if found["world_size"] != topology.world_size:
            log.warning(
                "it was written by %s ranks, these are %s: samples go on in order, but bits may differ from here on",
                found["world_size"], topology.world_size,
            )  # fmt: skip
        return {
            "resume": str(folder),
            "resumed_from": found["step"],
            "committed": restored.committed,
            "about": about,
        }

    def _release(self, attempt: Attempt, inputs: str) -> dict[str, Any]:
        """Publish the bundle and move the model's pointer."""
        recipe = self._run.recipe
        self._status("release")
        failpoint("stage-run")
        version = self._transfer(
            lambda: publish_release(recipe.store, recipe.name, self._run.run_id, self._run.bundle, attempt.verify)
        )
        promoted = recipe.release.promote_if == "proven"
        record = {"release": f"{recipe.store.uri}/models/{recipe.name}/{version}", "promoted": promoted}
        key = self._key("release", inputs, _RELEASE_READS)
        self._transfer(lambda: self._promote(attempt, {"key": key, "outputs": version, "record": record}))
        self._records["release"] = record
        passed = any(target["accepted"] for target in self._records["quantize"]["targets"].values())
        reason = "" if passed else "no int8 target passed; fp32 is released (gate: report_only)"
        return {"status": "released", "exit_code": 0, "reason": reason, **record}

    def _promote(self, attempt: Attempt, committed: dict[str, Any]) -> None:
        """Move the model's pointer to what was published where the recipe says so, and commit the stage's record."""
        recipe = self._run.recipe
        if committed["record"]["promoted"]:
            promote_release(recipe.store, recipe.name, committed["outputs"], attempt.verify)
        attempt.store.upload_report(self._run.bundle / "report.html", "report.html")
        attempt.commit_record("release", committed)

    def _status(self, phase: str) -> None:
        """Leave a line for `job show`; nothing depends on it."""
        attempt = self._attempt
        if attempt:
            self._transfer(lambda: self._write_status(attempt, phase))

    def _write_status(self, attempt: Attempt, phase: str) -> None:
        about = {"run_id": self._run.run_id, "name": self._run.recipe.name, "phase": phase, "epoch": attempt.epoch}
        try:
            attempt.check()
            attempt.store.write_json("status.json", about | {"host": platform.node(), "pid": os.getpid()})
        except JobError as error:
            log.warning("status.json could not be written: %s", error)


def _list_records() -> list[str]:
    """Return the names of all stage records, in order."""
    return [*(stage.name for stage in STAGES), "release"]


def _as_error(verdict: Verdict) -> JobError:
    error = JobError(verdict.reason)
    error.exit_code, error.retry = verdict.code, verdict.retry
    return error


def _int8_digests(record: dict[str, Any]) -> dict[str, str]:
    """Return target → sha256 of the files that the quantize stage left; nothing for other stages."""
    return {target: about["sha256"] for target, about in record.get("targets", {}).items() if about["sha256"]}


def _lies_here(path: Path, sha256: str) -> bool:
    return path.is_file() and hash_file(path) == sha256
