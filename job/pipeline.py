"""The story of a run: resolve and fetch → train → merge (of parts, or of numbers) → evaluate → export →
quantize → report → rehearse → release.

Each stage is a process of its own that writes into the run's folder. After it, this process (which
never imports torch) commits a record to the store: the hash of what the stage read, of what it
wrote, and its numbers. A restart skips a stage whose hashes are equal and whose files are here or
can be fetched. What a crash between any two calls leaves behind stands in `store/commit.py`.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from job import __version__, stages
from job.data import derive_micro_batch
from job.errors import CheckpointMismatch, Interrupted, JobError, NoValidCheckpoint
from job.export import build_bundle, has_onnx, is_certain
from job.failpoints import failpoint
from job.identity import compare_runs, describe_run
from job.launch import Verdict, decide
from job.opening import Opening
from job.plan import refuse_few_rows, refuse_missing_trackers, refuse_precision
from job.recipe import hash_json, write_json
from job.releasing import find_order, find_unchanged, has_release, release_bundle
from job.report import assemble_result
from job.report.result import hide_paths
from job.stages import Stage
from job.status import Status
from job.store import Attempt, RunStore
from job.store.attempt import read_stage
from job.store.manifest import hash_file
from job.store.restore import fetch_checkpoint
from job.training import TRAINED, Lead

log = logging.getLogger("job.pipeline")


def run_pipeline(opening: Opening, fresh: bool) -> dict[str, Any]:
    """Run what is not committed yet and return the result (DESIGN §6); a JobError becomes its exit code.

    This is node 0's story; what the other nodes do stands in `member.py`.
    """
    records: dict[str, dict[str, Any]] = {}
    pipeline = Pipeline(opening, fresh, records)
    try:
        outcome = pipeline.run(opening)
    except Exception as error:
        outcome = pipeline.judge(error)
    pipeline.dismiss_nodes(outcome)
    result = assemble_result(opening.run.run_id, records) | outcome
    pipeline.leave_result(result)
    return result


class Pipeline:
    """One attempt of one run on node 0."""

    def __init__(self, opening: Opening, fresh: bool, records: dict[str, dict[str, Any]]) -> None:
        self._run, self._node, self._fresh, self._records = opening.run, opening.node, fresh, records
        self._node.check = self._check_lease
        self._lead: Lead | None = None
        self._attempt: Attempt | None = None
        self._status: Status | None = None
        self._about: dict[str, Any] = {}
        self._retried = False

    def run(self, opening: Opening) -> dict[str, Any]:
        """Check what can be checked early, own the run, run the stages, release."""
        run, recipe = self._run, self._run.recipe
        refuse_missing_trackers(recipe)
        topology = opening.topology
        derive_micro_batch(recipe.training.global_batch_size, topology.world_size, recipe.training.max_micro_batch_size)
        self._lead = lead = Lead(self._node, run, topology)
        store = RunStore.of(run)
        self._node.transfer(store.prove_reachable)
        log.info("run %s, store %s", run.run_id, store.uri)
        run.save()
        identity = self._node.run_process(stages.FETCH, run, stages.list_fetch_variables(self._fresh))
        self._refuse_early()
        parent = hide_paths(run.read("sources.json")["model"]["release"])
        self._about, inputs = describe_run(run.run_id, recipe, identity, parent), hash_json(identity)
        run.write("about.json", self._about)
        if not self._fresh:
            self._node.transfer(lambda: self._compare(store))
            if finished := self._node.transfer(lambda: self._find_finished(store, inputs)):
                return finished
            if recipe.release.skip_if_unchanged and (same := self._node.transfer(lambda: find_unchanged(run))):
                reason = "data, model and recipe are those of the current release; nothing was done"
                return {"status": "unchanged", "exit_code": 0, "reason": reason, "release": same, "promoted": True}
        if not is_certain(run):
            self._node.run_process(stages.EXPORTABLE, run, {})
        while True:
            try:
                return self._do_stages(self._node.transfer(lambda: self._own(store)), inputs, lead)
            except JobError as error:
                if not self._may_retry(error):
                    raise
                self.leave_result({"status": "retried", "exit_code": error.exit_code, "reason": str(error)})

    def judge(self, error: Exception) -> dict[str, Any]:
        """Return the outcome of an attempt that `error` ended; another node may have told why this one had to stop."""
        verdict = decide([Verdict.of(error), *(self._lead.verdicts() if self._lead else [])])
        status = "interrupted" if verdict.code == Interrupted.exit_code else "failed"
        return {"status": status, "exit_code": verdict.code, "reason": verdict.reason}

    def dismiss_nodes(self, outcome: dict[str, Any]) -> None:
        """Tell the other nodes how this attempt ended."""
        if self._lead:
            self._lead.dismiss(Verdict(outcome["exit_code"], outcome["reason"], {}))

    def _do_stages(self, attempt: Attempt, inputs: str, lead: Lead) -> dict[str, Any]:
        training, *others = stages.list_stages(self._run.recipe)
        inputs = self._do_stage(attempt, training, inputs, lead)
        lead.dismiss(TRAINED)
        for stage in others:
            inputs = self._do_stage(attempt, stage, inputs, lead)
        return self._release(attempt, inputs)

    def _may_retry(self, error: JobError) -> bool:
        """Tell whether another attempt begins at once: with fewer rows at a time, or, for anything else, one only."""
        if error.retry is None or self._node.stop.count or (self._retried and not error.retry):
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
            leaving.join(self._node.leaving_s)
            if leaving.is_alive():
                log.warning("the store does not answer; this attempt leaves without a word there")

    def _leave_store(self, attempt: Attempt, result: dict[str, Any]) -> None:
        if self._status:
            self._status.write(result["status"])
        attempt.leave(result)

    def _check_lease(self) -> None:
        if self._attempt:
            self._attempt.check()

    def _check_stop(self) -> None:
        self._node.check_stop("before this attempt owned the run; nothing was changed")

    def _refuse_early(self) -> None:
        """Refuse before training what the gate could never prove after it, and what could not be computed."""
        refuse_few_rows(self._run.recipe, self._run.read("data.json")["rows"]["test"])
        refuse_precision(self._run.recipe, self._run.base_model)

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
        find_order(self._run, attempt)
        self._status = Status(self._run, attempt)
        self._tell("claimed")
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
        for stage in (*stages.list_stages(self._run.recipe), stages.RELEASE):
            saved = read_stage(store.objects, stage.name)
            if not saved or saved["key"] != stage.key(self._run.recipe, inputs):
                return None
            records[stage.name], inputs = saved["record"], str(saved["outputs"])
        if not has_release(self._run, records["release"]["release"]):
            return self._tell_pruned(records)
        self._records.update(records)
        reason = "already released; nothing was done"
        return {"status": "released", "exit_code": 0, "reason": reason, **records["release"]}

    def _tell_pruned(self, records: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Return the outcome of a run whose release was deleted: to make it anew is for whoever wants it again."""
        release = records.pop("release")["release"]
        reason = (
            f"already released as {release}, which was deleted since (store.keep_releases, "
            "`job release prune` or by hand); nothing was done. --fresh makes one anew"
        )
        self._records.update(records)
        log.warning("%s", reason)
        return {"status": "pruned", "exit_code": 0, "reason": reason, "release": None, "promoted": False}

    def _do_stage(self, attempt: Attempt, stage: Stage, inputs: str, lead: Lead) -> str:
        """Skip a committed stage or run it and commit its record; return the hash of its outputs."""
        key = stage.key(self._run.recipe, inputs)
        saved = self._node.transfer(lambda: read_stage(attempt.store.objects, stage.name, attempt.since))
        if saved and saved["key"] == key and self._has_files(attempt, stage, saved):
            log.info("%s: already committed, skipped", stage.name)
            self._records[stage.name] = saved["record"]
            return str(saved["outputs"])
        self._tell(stage.name)
        failpoint("stage-run")
        training = stage.name == "train"
        record = self._train(stage, attempt, lead) if training else self._run_stage(stage)
        files = {name: hash_file(self._run.folder / name) for name in stage.files}
        left = [files, _list_digests(record)]
        outputs = hash_json(left if any(left) else key)  # a stage without files passes on what it was made of
        self._records[stage.name] = record
        committed = {"key": key, "outputs": outputs, "files": files, "record": record}
        self._node.transfer(lambda: attempt.commit_record(stage.name, committed))
        return outputs

    def _train(self, stage: Stage, attempt: Attempt, lead: Lead) -> dict[str, Any]:
        with self._status.follow(self._run.progress) if self._status else nullcontext():
            return lead.train(stage, self._run, attempt, self._about)

    def _run_stage(self, stage: Stage) -> dict[str, Any]:
        if stage.name == "report":
            build_bundle(self._run)
            # sorted, as records of the store are: the next attempt's report must be the same, byte for byte
            self._run.write("records.json", json.loads(json.dumps(self._records, sort_keys=True)))
        return self._node.run_process(
            stage.target, self._run, {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        )

    def _has_files(self, attempt: Attempt, stage: Stage, saved: dict[str, Any]) -> bool:
        """Tell whether a committed stage's files lie here unchanged; those of training are fetched if not."""
        folder = self._run.folder
        if stage.name in ("export", "quantize"):
            digests = _list_digests(saved["record"])
            return all(has_onnx(folder / "onnx" / name, digests[name]) for name in digests)
        if stage.name in ("report", "rehearse"):
            return False
        if all(_lies_here(folder / name, digest) for name, digest in saved["files"].items()):
            return True
        return stage.name == "train" and self._fetch_trained(attempt, saved)

    def _fetch_trained(self, attempt: Attempt, saved: dict[str, Any]) -> bool:
        """Fetch the trained model; False where it is not whole any more, so that training goes on before it."""
        log.info("fetching the trained model from the store")
        pointer, weights = saved["record"]["checkpoint"], saved["record"].get("weights_file", "model.safetensors")
        wanted = {"config.json", weights}
        try:
            self._node.transfer(
                lambda: fetch_checkpoint(
                    attempt.store.objects, pointer["manifest"], pointer["manifest_sha256"], self._run.trained,
                    only=lambda path: path in wanted,
                )
            )  # fmt: skip
        except NoValidCheckpoint as error:
            log.warning("%s; training goes on from the next older checkpoint", error)
            return False
        (self._run.trained / weights).replace(self._run.trained / "model.safetensors")
        return all(_lies_here(self._run.folder / name, digest) for name, digest in saved["files"].items())

    def _release(self, attempt: Attempt, inputs: str) -> dict[str, Any]:
        """Publish the bundle and move the model's pointer where the recipe says so."""
        self._tell("release")
        failpoint("stage-run")
        proven, key = self._records["rehearse"].get("files"), stages.RELEASE.key(self._run.recipe, inputs)
        record = release_bundle(self._node, self._run, attempt, proven, key)
        self._records["release"] = record
        passed = any(target["accepted"] for target in self._records["quantize"]["targets"].values())
        reasons = [] if passed else ["no int8 target passed; fp32 is released (gate: report_only)"]
        if not record["promoted"]:
            reasons.append(f"not promoted: {record['promotion']['reason']}")
        return {"status": "released", "exit_code": 0, "reason": "; ".join(reasons), **record}

    def _tell(self, phase: str) -> None:
        """Leave a line for `job show`; nothing depends on it."""
        if status := self._status:
            self._node.transfer(lambda: status.write(phase))


def _list_records() -> list[str]:
    """Return the names of all stage records, in order."""
    return [stage.name for stage in (*stages.STAGES, stages.RELEASE)]


def _list_digests(record: dict[str, Any]) -> dict[str, str]:
    """Return file → sha256, all that belongs to it included, of the ONNX files that a stage left; else nothing."""
    exported = {record["file"]: record["model_sha256"]} if "model_sha256" in record else {}
    targets = record.get("targets", {}).values()
    return exported | {about["file"]: about["sha256"] for about in targets if about["sha256"]}


def _lies_here(path: Path, sha256: str) -> bool:
    return path.is_file() and hash_file(path) == sha256
