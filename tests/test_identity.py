"""What makes two attempts one run: every key of the recipe, and the versions of what wrote a checkpoint."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from job.errors import CheckpointMismatch
from job.identity import check_checkpoint, compare_runs, describe_checkpoint, describe_run
from job.recipe import Recipe
from job.store import Manifest, ManifestEntry

RECIPE: dict[str, Any] = {
    "name": "reviews",
    "task": "text-classification",
    "model": {"id": "some/model"},
    "data": {"source": "some/data"},
    "store": {"uri": "s3://bucket/prefix"},
}
IDENTITY = {"model": {"commit": "1"}, "data": {"commit": "2"}, "tokenizer_sha256": "3"}
ONE_VALUE = {"task"}
"""Keys that this version accepts with one value only."""
MAY_CHANGE = {
    "training.logging_steps", "training.eval_steps", "training.save_steps", "training.max_micro_batch_size",
    "training.report_to", "training.torch_compile",
    "data.revision", "data.num_workers", "model.revision",
}  # fmt: skip
"""Of what defines a training: neither rows nor, but for last bits, weights depend on them (a revision: its commit)."""
LORA = ("r", "alpha", "dropout", "targets", "rslora", "dora")
BESIDE: dict[str, dict[str, Any]] = {"training.packing": {"task": "causal-lm"}}
BESIDE["training.early_stopping_threshold"] = {"training": {"early_stopping_patience": 2}}
BESIDE |= {f"tuning.{key}": {"tuning": {"method": "partial"}} for key in ("unfreeze", "embeddings")}
BESIDE |= {f"tuning.{key}": {"tuning": {"method": "lora"}} for key in LORA}
"""What else a recipe must say for a key to have a meaning."""
CANDIDATES: list[Any] = [
    "lora", "last-2-layers", "trained", "multi_label_classification",
    True, False, 3, 7, 16, 0.25, 0.5, 2.0, "other", "cosine", "fp32", "padded", "deepspeed", 2, "dynamic",
    "report_only", "never", "balanced", ["portable"], ["majority"], ["wandb"], ["no", "yes"], {"text": "body"}, "s3://bucket/other",
]  # fmt: skip


def list_keys(model: type[BaseModel] = Recipe, path: str = "") -> list[str]:
    """Return every key that holds a value, as `section.key`."""
    found = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found += list_keys(inner, f"{path}{name}.")
        else:
            found.append(path + name)
    return found


def describe(recipe: dict[str, Any]) -> dict[str, Any]:
    return describe_run("run-1", Recipe.model_validate(recipe), IDENTITY, None)


def recipe_with(key: str) -> dict[str, Any]:
    """Return the recipe as it must be for `key` to have a meaning."""
    return RECIPE | BESIDE.get(key, {})


def change(key: str) -> dict[str, Any] | None:
    """Return the description of the recipe with another valid value under `key`, None where there is no other."""
    *sections, last = key.split(".")
    before = describe(recipe_with(key))
    for candidate in CANDIDATES:
        recipe: dict[str, Any] = {name: dict(v) if isinstance(v, dict) else v for name, v in recipe_with(key).items()}
        place = recipe
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = candidate
        try:
            about = describe(recipe)
        except ValidationError:
            continue
        if about["recipe"] != before["recipe"]:
            return about
    return None


@pytest.mark.parametrize("key", sorted(set(list_keys()) - ONE_VALUE))
def test_46_a_changed_key_is_16_where_it_decides_the_training_and_logged_elsewhere(
    key: str, caplog: pytest.LogCaptureFixture
) -> None:
    changed = change(key)
    assert changed is not None, "no other value is known; add one to CANDIDATES"
    decides = key.split(".")[0] in ("task", "model", "data", "tuning", "training") and key not in MAY_CHANGE
    logging.getLogger("job").propagate = True
    caplog.set_level(logging.INFO, "job")
    if decides:
        with pytest.raises(CheckpointMismatch, match=f"{key}.*: changed since run 'run-1' began.*--run-id") as caught:
            compare_runs(describe(recipe_with(key)), changed)
        assert caught.value.exit_code == 16
    else:
        compare_runs(describe(RECIPE), changed)
        assert f"does not matter for the training: {key}" in caplog.text


@pytest.mark.parametrize("watching", [{"early_stopping_patience": 2}, {"load_best_model_at_end": True}])
def test_46_evaluations_that_decide_which_model_is_taken_may_not_be_moved(watching: dict[str, Any]) -> None:
    one, other = (describe(RECIPE | {"training": watching | {"eval_steps": steps}}) for steps in (50, 100))
    with pytest.raises(CheckpointMismatch, match=r"training\.eval_steps: 50 → 100: changed"):
        compare_runs(one, other)


@pytest.mark.parametrize("key", sorted(ONE_VALUE))
def test_a_key_with_one_value_has_no_other(key: str) -> None:
    assert change(key) is None


@pytest.mark.parametrize("part", ["model", "data", "tokenizer_sha256"])
def test_48_52_another_model_other_data_or_another_tokenizer_is_16(part: str) -> None:
    before = describe(RECIPE)
    other = "9" if part == "tokenizer_sha256" else {"commit": "9"}
    with pytest.raises(CheckpointMismatch):
        compare_runs(before, before | {"identity": IDENTITY | {part: other}})


def checkpoint(**changes: Any) -> Manifest:
    about = describe_checkpoint(describe(RECIPE)) | {"step": 5, "world_size": 1} | changes
    return Manifest("checkpoint", {"model.safetensors": ManifestEntry(1, "0" * 64, "k")}, about)


def test_a_checkpoint_of_this_run_fits() -> None:
    check_checkpoint(checkpoint(), describe_checkpoint(describe(RECIPE)))


@pytest.mark.parametrize(
    ("versions", "fits"),
    [
        ({"torch": "1.13.1"}, False),
        ({"torch": "2.0.0"}, True),
        ({"deepspeed": "9.0"}, False),
        ({"datasets": "1"}, True),
    ],
)
def test_47_another_major_version_of_what_reads_a_checkpoint_is_16_and_a_minor_one_is_told(
    versions: dict[str, str], fits: bool, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("job").propagate = True
    expected = describe_checkpoint(describe(RECIPE))
    written = checkpoint(versions=expected["versions"] | versions)
    if fits:
        check_checkpoint(written, expected)
        assert "bits may differ" in caplog.text
    else:
        with pytest.raises(CheckpointMismatch, match="another major version"):
            check_checkpoint(written, expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"run_id": "other"},
        {"format": 1},
        {"engine": "deepspeed"},
        {"tuning": "lora"},
        {"base_model": {"commit": "9"}},
        {"material_sha256": "0"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_checkpoint_of_something_else_is_16(changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointMismatch):
        check_checkpoint(checkpoint(**changes), describe_checkpoint(describe(RECIPE)))
