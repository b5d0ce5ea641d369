"""What makes two attempts the same run, and a checkpoint fit for it: 16 where they are not.

`run.json` fixes what decides the training; every checkpoint's manifest carries its digest, the
engine and the versions that wrote it. What may change between attempts is logged and goes on.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterable
from importlib import metadata
from typing import Any

from job import __version__
from job.errors import CheckpointMismatch
from job.recipe import Recipe, hash_json
from job.recipe.schema import DEFINES_TRAINING
from job.store.manifest import Manifest

log = logging.getLogger("job.pipeline")

IMMATERIAL = {
    "training": ("logging_steps", "eval_steps", "save_steps", "max_micro_batch_size", "report_to", "torch_compile"),
    "data": ("revision", "num_workers"),
    "model": ("revision",),
}
"""Keys that may change between attempts of one run; a revision is judged by the commit that it names.

`eval_steps` may not where evaluations decide which model is taken, or when training stops.
"""

CHECKPOINT_FORMAT = 4
"""Layout of a checkpoint's files; another one cannot be resumed from."""

_PACKAGES = (
    "torch", "transformers", "accelerate", "deepspeed", "datasets", "tokenizers", "peft", "optimum-onnx", "onnxruntime",
)  # fmt: skip
_SERIALIZES = ("torch", "transformers", "deepspeed")
"""Packages whose next major version may read a training state otherwise."""


def name_run(recipe: Recipe) -> str:
    """Return `<name>-<8 hex of what decides training and its ranks>`."""
    revisions = [recipe.model.revision, recipe.data.revision]
    digest = hash_json([material_sections(recipe, (*DEFINES_TRAINING, "distributed")), revisions])
    return f"{recipe.name}-{digest[:8]}"


def describe_run(run_id: str, recipe: Recipe, identity: dict[str, Any], parent: str | None) -> dict[str, Any]:
    """Return what run.json holds: recipe, what decides the training, sources, versions.

    `parent` is the release that is trained from, if it is one: another attempt takes the same.
    """
    return {
        "run_id": run_id,
        "parent": parent,
        "recipe": recipe.model_dump(mode="json"),
        "material": material_sections(recipe, DEFINES_TRAINING),
        "identity": identity,
        "versions": find_versions(),
    }


def describe_checkpoint(about: dict[str, Any]) -> dict[str, Any]:
    """Return what every checkpoint's manifest says beside step and epoch; `about` is that of `describe_run`."""
    return {
        "run_id": about["run_id"],
        "engine": about["recipe"]["distributed"]["engine"],
        "tuning": about["recipe"]["tuning"]["method"],
        "base_model": about["identity"]["model"],
        "format": CHECKPOINT_FORMAT,
        "material_sha256": hash_json([about["material"], about["identity"]]),
        "versions": about["versions"],
    }


def compare_runs(found: dict[str, Any], about: dict[str, Any]) -> None:
    """Raise CheckpointMismatch (16) when the run began with other sources or another training; log the rest."""
    try:
        _check_identity(found["identity"], about["identity"], about["run_id"])
        changed = _differences(found["material"], about["material"])
        harmless = _differences(found["recipe"], about["recipe"])
    except (KeyError, TypeError, AttributeError):
        raise CheckpointMismatch(
            f"run.json of run {about['run_id']!r} is not what this version writes; use another --run-id, or --fresh"
        ) from None
    if changed:
        raise CheckpointMismatch(
            f"{'; '.join(changed[:3])}: changed since run {about['run_id']!r} began, so what it has stored does "
            "not fit; restore the old, or train anew with another --run-id (or --fresh)"
        )
    if harmless:
        log.info("changed since this run began, and does not matter for the training: %s", "; ".join(harmless[:10]))


def _check_identity(recorded: dict[str, Any], found: dict[str, Any], run_id: str) -> None:
    """Raise CheckpointMismatch (16) when model, data or tokenizer are not those that the run began with."""
    for part, hint in (("model", "model.revision"), ("data", "data.revision")):
        before, now = recorded[part], found[part]
        if before["commit"] != now["commit"]:
            raise CheckpointMismatch(
                f"{hint}: the revision moved from {before['commit']} to {now['commit']} since run {run_id!r} began; "
                f"go on with --run-id {run_id} --set {hint}={before['commit']}, or train anew with another --run-id"
            )
    if recorded != found:
        changed = ", ".join(part for part in found if recorded.get(part) != found[part])
        raise CheckpointMismatch(
            f"{changed}: changed since run {run_id!r} began, so what it has stored does not fit; "
            "restore the old, or train anew with another --run-id (or --fresh)"
        )


def check_checkpoint(manifest: Manifest, expected: dict[str, Any]) -> None:
    """Raise CheckpointMismatch (16) when a verified checkpoint cannot go on as `expected` (`describe_checkpoint`)."""
    about = manifest.about
    for key, hint in (
        ("run_id", "it belongs to another run"),
        ("format", "it was written by another version of finetune-job; go on with that one"),
        ("engine", "set distributed.engine back"),
        ("tuning", "it holds the weights that this method moves; set tuning.method back"),
        ("base_model", "the weights that it does not hold are those of this model; restore it"),
        ("material_sha256", "recipe, model, tokenizer or data changed; restore the old"),
    ):
        if about.get(key) != expected[key]:
            raise CheckpointMismatch(
                f"checkpoint of step {about.get('step')}: {key} is {about.get(key)!r}, this attempt's "
                f"{expected[key]!r}; {hint}, or begin anew with another --run-id (or --fresh)"
            )
    versions = about.get("versions")
    _compare_versions(versions if isinstance(versions, dict) else {}, expected["versions"], about["step"])


def material_sections(recipe: Recipe, names: Iterable[str]) -> dict[str, Any]:
    """Return recipe sections without the keys that may change between attempts."""
    dumped = recipe.model_dump(mode="json")
    decides = ("eval_steps",) if recipe.training.watches_metric else ()
    free = {section: [key for key in keys if key not in decides] for section, keys in IMMATERIAL.items()}
    return {name: _without(dumped[name], free.get(name, [])) for name in names}


def find_versions() -> dict[str, str]:
    """Return the versions of this package, Python, and the libraries that decide what is computed."""
    own = {"finetune-job": __version__, "python": platform.python_version()}
    return own | {package: metadata.version(package) for package in _PACKAGES}


def _compare_versions(old: dict[str, str], new: dict[str, str], step: object) -> None:
    changed = {name: (old.get(name), new[name]) for name in new if old.get(name) != new[name]}
    for name in _SERIALIZES:
        before, now = changed.get(name, ("", ""))
        if name in changed and str(before).partition(".")[0] != now.partition(".")[0]:
            raise CheckpointMismatch(
                f"checkpoint of step {step} was written with {name} {before}, this is {now}: another major version may "
                "read it otherwise; use the image that wrote it, or begin anew with --fresh"
            )
    if changed:
        listed = ", ".join(f"{name} {before} → {now}" for name, (before, now) in changed.items())
        log.warning("versions changed since the checkpoint was written (bits may differ from here on): %s", listed)


def _without(section: Any, keys: list[str]) -> Any:
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
