"""The story of a run: resolve and fetch → train → evaluate → export → quantize → report → rehearse →
release.

Each stage is a process of its own that writes into the run's folder. After it, this process (which
never imports torch) commits a record to the store: the hash of what the stage read, of what it
wrote, and its numbers. A restart skips a stage whose hashes are equal and whose files are here or
can be fetched. What a crash between two stages leaves: the records so far, and nothing released.
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from job import __version__
from job.data import derive_micro_batch
from job.data.fetch import check_identity
from job.errors import CheckpointMismatch, DataError, JobError
from job.export import build_bundle, int8_file_name
from job.launch import StopRequest, Supervisor, Topology, find_topology, judge_error
from job.recipe import Recipe, Run, hash_json, write_json
from job.recipe.schema import DEFINES_TRAINING
from job.report import assemble_result
from job.store import RunStore, promote_release, publish_release
from job.store.manifest import hash_file

log = logging.getLogger("job.pipeline")

IMMATERIAL = {
    "training": ("logging_steps", "eval_steps", "save_steps", "max_micro_batch_size"),
    "data": ("revision", "num_workers"),
    "model": ("revision",),
}
"""Keys that may change between attempts of one run; a revision is judged by the commit that it names."""


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


def default_run_id(recipe: Recipe, environment: Mapping[str, str]) -> str:
    """Return JOB_RUN_ID, or `<name>-<8 hex of what decides training and its ranks>`."""
    revisions = [recipe.model.revision, recipe.data.revision]
    digest = hash_json([_sections(recipe, (*DEFINES_TRAINING, "distributed")), revisions])
    return environment.get("JOB_RUN_ID") or f"{recipe.name}-{digest[:8]}"


class Pipeline:
    """One attempt of one run on this node."""

    def __init__(self, run: Run, stop: StopRequest, fresh: bool, records: dict[str, dict[str, Any]]) -> None:
        self._run, self._fresh, self._records = run, fresh, records
        recipe = run.recipe
        self._supervisor = Supervisor(stop, recipe.launch.grace_s)
        self._store: RunStore | None = None

    def run(self) -> dict[str, Any]:
        """Check what can be checked early, run the stages, release."""
        recipe, run = self._run.recipe, self._run
        topology = find_topology(recipe.distributed)
        derive_micro_batch(recipe.training.global_batch_size, topology.world_size, recipe.training.max_micro_batch_size)
        store = RunStore(recipe.store.uri, run.run_id, allow_http=recipe.store.allow_http)
        store.prove_reachable()
        self._store = store
        log.info("run %s, store %s", run.run_id, store.uri)
        run.save()
        identity = self._process("job.data:fetch_sources", {"TOKENIZERS_PARALLELISM": "true"})
        self._check_rows()
        self._claim(store, identity)
        self._status("claimed")
        inputs = hash_json(identity)
        if finished := self._find_finished(store, inputs):
            return finished
        for stage in STAGES:
            inputs = self._do_stage(store, stage, inputs, topology)
        return self._release(store, inputs)

    def leave_result(self, result: dict[str, Any]) -> None:
        """Write result.json into the run's folder and, where the store was reached, its prefix; never raises."""
        try:
            write_json(self._run.folder / "result.json", result)
            if self._store and result["exit_code"] != CheckpointMismatch.exit_code:
                self._store.write_json("result.json", result)
                self._status(result["status"])
        except (JobError, OSError) as error:
            log.warning("result.json could not be written: %s", error)

    def _process(self, target: str, environment: Mapping[str, str] = {}) -> dict[str, Any]:
        return self._processes(target, [environment])

    def _processes(self, target: str, environments: Iterable[Mapping[str, str]]) -> dict[str, Any]:
        """Run a stage's processes; raise the error that they report."""
        verdict = self._supervisor.run(target, self._run.folder, environments)
        if verdict.code:
            raise _as_error(verdict.code, verdict.reason)
        return verdict.record

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

    def _claim(self, store: RunStore, identity: dict[str, Any]) -> None:
        """Write run.json, which fixes what decides the training, or compare with the one that is there (16)."""
        about = {
            "run_id": self._run.run_id,
            "recipe": self._run.recipe.model_dump(mode="json"),
            "material": _sections(self._run.recipe, DEFINES_TRAINING),
            "identity": identity,
            "versions": _versions(),
        }
        if self._fresh:
            store.start_over(about, [stage.name for stage in STAGES])
            return
        found = store.write_once("run.json", about)
        try:
            self._compare(found, about)
        except CheckpointMismatch as mismatch:
            if store.current_checkpoint() or store.read_json("stages/train.json"):
                raise
            log.warning("%s. Nothing was trained yet, so the run begins with what is there now", mismatch)
            store.write_json("run.json", about)

    def _compare(self, found: dict[str, Any], about: dict[str, Any]) -> None:
        """Raise CheckpointMismatch (16) when the run began with other sources or another training."""
        check_identity(found["identity"], about["identity"], self._run.run_id)
        changed = _differences(found["material"], about["material"])
        if changed:
            raise CheckpointMismatch(
                f"{'; '.join(changed[:3])}: changed since run {self._run.run_id!r} began, so what it has stored does "
                "not fit; restore the old, or train anew with another --run-id (or --fresh)"
            )

    def _find_finished(self, store: RunStore, inputs: str) -> dict[str, Any] | None:
        """Return the outcome when every stage is committed for these inputs, whatever lies on this disk."""
        records = {}
        for name, reads in [*((stage.name, stage.reads) for stage in STAGES), ("release", _RELEASE_READS)]:
            saved = store.read_json(f"stages/{name}.json")
            if not saved or saved["key"] != self._key(name, inputs, reads):
                return None
            records[name], inputs = saved["record"], str(saved["outputs"])
        self._records.update(records)
        reason = "already released; nothing was done"
        return {"status": "released", "exit_code": 0, "reason": reason, **records["release"]}

    def _key(self, name: str, inputs: str, reads: tuple[str, ...]) -> str:
        """Return the hash of all that a stage reads."""
        return hash_json([name, inputs, _sections(self._run.recipe, reads)])

    def _do_stage(self, store: RunStore, stage: Stage, inputs: str, topology: Topology) -> str:
        """Skip a committed stage or run it and commit its record; return the hash of its outputs."""
        key = self._key(stage.name, inputs, stage.reads)
        saved = store.read_json(f"stages/{stage.name}.json")
        if saved and saved["key"] == key and self._has_files(store, stage, saved):
            log.info("%s: already committed, skipped", stage.name)
            self._records[stage.name] = saved["record"]
            return str(saved["outputs"])
        self._status(stage.name)
        record = self._train(store, topology) if stage.name == "train" else self._run_stage(stage)
        files = {name: hash_file(self._run.folder / name) for name in stage.files}
        outputs = hash_json([files, _int8_digests(record)])
        self._records[stage.name] = record
        store.write_json(
            f"stages/{stage.name}.json", {"key": key, "outputs": outputs, "files": files, "record": record}
        )
        return outputs

    def _run_stage(self, stage: Stage) -> dict[str, Any]:
        if stage.name == "report":
            build_bundle(self._run)
            self._run.write("records.json", self._records)
        return self._process(stage.target, {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})

    def _has_files(self, store: RunStore, stage: Stage, saved: dict[str, Any]) -> bool:
        """Tell whether a committed stage's files lie here unchanged; those of training are fetched if not."""
        folder = self._run.folder
        if stage.name == "quantize":
            digests = _int8_digests(saved["record"])
            return all(_lies_here(folder / "onnx" / int8_file_name(target), digests[target]) for target in digests)
        if stage.name in ("report", "rehearse"):
            return False
        if all(_lies_here(folder / name, digest) for name, digest in saved["files"].items()):
            return True
        if stage.name != "train":
            return False
        log.info("fetching the trained model from the store")
        wanted = {Path(name).name for name in stage.files}
        store.fetch_checkpoint(saved["record"]["checkpoint"], self._run.final_model, lambda path: path in wanted)
        return all(_lies_here(folder / name, digest) for name, digest in saved["files"].items())

    def _train(self, store: RunStore, topology: Topology) -> dict[str, Any]:
        """Start the ranks, from the newest checkpoint where there is one; return the training's record."""
        folder = self._run.folder / "train"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        pointer = store.current_checkpoint()
        resume = self._fetch_resume(store, pointer, topology) if pointer else None
        recipe = self._run.recipe
        attempt = {
            "epoch": store.next_epoch(),
            "nonce": uuid.uuid4().hex,
            "keep": recipe.store.keep_checkpoints,
            "peer_timeout_s": recipe.launch.hang_timeout_s,
            "resume": str(resume) if resume else None,
            "resumed_from": int(pointer["step"]) if pointer and resume else None,
        }
        self._run.write("attempt.json", attempt)
        common = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        record = self._processes("job.train:run_rank", [common | rank for rank in topology.rank_environments()])
        shutil.rmtree(folder / "resume", ignore_errors=True)
        return record | {"checkpoint": store.current_checkpoint()}

    def _fetch_resume(self, store: RunStore, pointer: dict[str, Any], topology: Topology) -> Path | None:
        """Download the newest checkpoint; None where it was written by other ranks or another engine."""
        folder = self._run.folder / "train" / "resume"
        about = store.fetch_checkpoint(pointer, folder, lambda path: True).about
        wanted = {"world_size": topology.world_size, "engine": self._run.recipe.distributed.engine}
        if any(about[key] != value for key, value in wanted.items()):
            log.warning(
                "the checkpoint of step %s has another number of ranks or engine: training begins anew", about["step"]
            )
            shutil.rmtree(folder)
            return None
        log.info("resuming from the checkpoint of step %s", about["step"])
        return folder

    def _release(self, store: RunStore, inputs: str) -> dict[str, Any]:
        """Publish the bundle and move the model's pointer."""
        recipe = self._run.recipe
        self._status("release")
        uri, allow_http = recipe.store.uri, recipe.store.allow_http
        version = publish_release(uri, recipe.name, self._run.run_id, self._run.bundle, allow_http=allow_http)
        promoted = recipe.release.promote_if == "proven"
        if promoted:
            promote_release(uri, recipe.name, version, allow_http=allow_http)
        record = {"release": f"{recipe.store.uri}/models/{recipe.name}/{version}", "promoted": promoted}
        store.upload_report(self._run.bundle / "report.html", "report.html")
        key = self._key("release", inputs, _RELEASE_READS)
        store.write_json("stages/release.json", {"key": key, "outputs": version, "record": record})
        self._records["release"] = record
        passed = any(target["accepted"] for target in self._records["quantize"]["targets"].values())
        reason = "" if passed else "no int8 target passed; fp32 is released (gate: report_only)"
        return {"status": "released", "exit_code": 0, "reason": reason, **record}

    def _status(self, phase: str) -> None:
        """Leave a line for `job show`."""
        if self._store:
            about = {"run_id": self._run.run_id, "name": self._run.recipe.name, "phase": phase, "host": platform.node()}
            self._store.write_json("status.json", about | {"pid": os.getpid()})


def _as_error(code: int, reason: str) -> JobError:
    error = JobError(reason)
    error.exit_code = code
    return error


def _sections(recipe: Recipe, names: Iterable[str]) -> dict[str, Any]:
    """Return recipe sections without the keys that may change between attempts."""
    dumped = recipe.model_dump(mode="json")
    return {name: _without(dumped[name], IMMATERIAL.get(name, ())) for name in names}


def _without(section: Any, keys: tuple[str, ...]) -> Any:
    return {key: value for key, value in section.items() if key not in keys} if keys else section


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Return `key: old → new` for every leaf that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in {**old, **new}
            for line in _differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))
        ]
    return [] if old == new else [f"{path}: {old!r} → {new!r}"]


def _int8_digests(record: dict[str, Any]) -> dict[str, str]:
    """Return target → sha256 of the files that the quantize stage left; nothing for other stages."""
    return {target: about["sha256"] for target, about in record.get("targets", {}).items() if about["sha256"]}


def _lies_here(path: Path, sha256: str) -> bool:
    return path.is_file() and hash_file(path) == sha256


def _versions() -> dict[str, str]:
    packages = (
        "torch",
        "transformers",
        "accelerate",
        "deepspeed",
        "datasets",
        "tokenizers",
        "optimum-onnx",
        "onnxruntime",
    )
    return {"finetune-job": __version__, "python": platform.python_version()} | {
        package: metadata.version(package) for package in packages
    }
