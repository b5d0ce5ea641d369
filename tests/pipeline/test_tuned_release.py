"""A model of which a part was trained is released whole: the base's weights, what training moved, and a LoRA's adapter.

On real MiniLM, few rows and steps: what is released is asked, not how good it is.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from conftest import ACCIDENTAL_JOB, Answer, assert_refused, call_job, write_recipe
from safetensors.numpy import load_file
from trainings import Trial

from job.store import open_store

PREFIX = "bert."
"""What the head's model has before the names of MiniLM's own weights."""
POOLER = {"pooler.dense.weight", "pooler.dense.bias"}

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory, assets: Path, reviews: Path) -> Write:
    """Return a function that writes the recipe of a short training of MiniLM by a method, with a store beside it."""

    def write_tuned(**tuning: Any) -> Path:
        folder = tmp_path_factory.mktemp(str(tuning["method"]))
        return write_recipe(
            folder / "recipe.yaml",
            name="tuned",
            task="text-classification",
            model={"id": str(assets / "minilm-l6")},
            data={"source": str(reviews), "max_length": 48},
            tuning=tuning,
            training={"max_steps": 12, "global_batch_size": 16, "learning_rate": 2e-3, "save_steps": 6},
            baselines=[],
            export={"int8": {"targets": ["portable"], "gate": "report_only"}, "latency": False},
            store={"uri": str(folder / "store")},
        )

    return write_tuned


def load_base(assets: Path) -> dict[str, np.ndarray]:
    """MiniLM's weights; its file has a list of positions as well, which transformers makes anew."""
    weights = load_file(assets / "minilm-l6/model.safetensors")
    return {name: tensor for name, tensor in weights.items() if name != "embeddings.position_ids"}


def run(recipe: Path, work: str, *options: str, env: dict[str, str] | None = None) -> Answer:
    words = [word for option in options for word in ("--set", option)]
    place = ("--run-id", "tuned", "--work-dir", str(recipe.with_name(work)))
    return call_job("run", str(recipe), *place, *words, env=env)


@pytest.fixture(scope="module")
def lora(write: Write) -> tuple[Path, Answer, Answer]:
    """The recipe, an attempt that was killed after its merge, and the one after it, on another disk."""
    recipe = write(method="lora", r=4)
    killed = run(recipe, "first", env={"JOB_FAILPOINT": "stage-recorded=kill@2"})
    return recipe, killed, run(recipe, "second")


def test_another_disk_goes_on_after_the_training_of_a_lora(lora: tuple[Path, Answer, Answer]) -> None:
    recipe, killed, done = lora
    assert killed.code == -9, killed.stderr
    assert recipe.with_name("first").joinpath("runs/tuned/merged/model.safetensors").exists()
    assert done.code == 0, done.stderr
    assert "train: already committed, skipped" in done.stderr
    assert done.result["train"]["trainable_parameters"] < 1_000_000
    again = run(recipe, "third")
    assert again.code == 0, again.stderr
    assert again.result["reason"] == "already released; nothing was done"


def test_the_release_is_the_base_with_the_factors_added_and_the_adapter_beside_it_says_the_same(
    lora: tuple[Path, Answer, Answer], assets: Path
) -> None:
    release = Path(str(lora[2].result["release"]))
    base, merged = load_base(assets), load_file(release / "model.safetensors")
    changed = {name for name in base if (base[name] != merged[PREFIX + name]).any()}
    layers = {
        name
        for name in base
        if name.startswith("encoder.layer.")
        and name.endswith(("dense.weight", "query.weight", "key.weight", "value.weight"))
    }
    assert changed == layers | POOLER

    folder, tokenizer = str(release), transformers.AutoTokenizer.from_pretrained(release)
    whole = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(assets / "minilm-l6", num_labels=2)
    adapted = peft.PeftModel.from_pretrained(plain, str(release / "adapter")).eval()
    batch = tokenizer(["a film to remember", "what a waste of a good cast"], padding=True, return_tensors="pt")
    with torch.inference_mode():
        torch.testing.assert_close(adapted(**batch).logits, whole(**batch).logits, rtol=0, atol=1e-4)
    assert adapted.peft_config["default"].base_model_name_or_path == "minilm-l6"
    assert call_job("verify", folder, "--work-dir", str(lora[0].with_name("verify"))).code == 0


@pytest.mark.slow
def test_a_frozen_body_is_released_bit_equal(write: Write, assets: Path) -> None:
    done = run(write(method="partial", unfreeze="head"), "work")
    assert done.code == 0, done.stderr
    base, release = load_base(assets), Path(str(done.result["release"]))
    released = load_file(release / "model.safetensors")
    changed = {name for name in base if base[name].tobytes() != released[PREFIX + name].tobytes()}
    assert changed == POOLER
    assert {name for name in released if not name.startswith(PREFIX)} == {"classifier.weight", "classifier.bias"}
    assert not (release / "adapter").exists()


def test_a_checkpoint_of_the_head_is_a_fiftieth_of_one_of_all_weights(write: Write, tmp_path: Path) -> None:
    sizes = {}
    for method in ("full", "partial"):
        trial = Trial(write(method=method), tmp_path / method, "training.max_steps=2", "training.save_steps=1")
        assert trial.attempt() == 0, trial.reason
        store = open_store(str(tmp_path / method / "store/runs/trial"))
        sent: dict[str, int] = {}
        for item in store.list("checkpoints/"):
            folder = item.key.split("/")[1]
            sent[folder] = sent.get(folder, 0) + item.size
        sizes[method] = sorted(sent.values())
    assert len(sizes["full"]) == len(sizes["partial"]) == 2
    assert sizes["partial"][-1] * 50 < sizes["full"][0]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("merge_headless", "lacks classifier"),
        pytest.param("merge_new_head", "is not the trained one", marks=pytest.mark.slow),
        pytest.param("merge_nothing", "differ by", marks=pytest.mark.slow),
        pytest.param("merge_other_scale", "differ by", marks=pytest.mark.slow),
    ],
)
def test_a_merge_that_loses_something_releases_nothing_and_the_training_is_kept(
    write: Write, function: str, words: str
) -> None:
    recipe = write(method="lora")
    place = ("--run-id", "tuned", "--work-dir", str(recipe.with_name("work")))
    env = {"JOB_STAND_INS": f"merge=broken_merges:{function}"}
    answer = call_job("run", str(recipe), *place, env=env, timeout_s=300, program=ACCIDENTAL_JOB)
    assert_refused(answer, 15, words, "the checkpoint is kept")
    assert answer.result["release"] is None
    assert list(open_store(str(recipe.with_name("store"))).list("models/")) == []
    again = run(recipe, "work", env={"JOB_FAILPOINT": "stage-recorded=kill"})
    assert again.code == -9, again.stderr
    assert "train: already committed, skipped" in again.stderr
    assert "merged: 32 answers as before" in again.stderr
