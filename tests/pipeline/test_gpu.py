"""What only a GPU can show: 16 bits, kernels for rows without padding, the same bits after a kill, memory that ends.

`make test-gpu`. Model and texts are made up here, so that nothing but the packages of training must be at hand.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import write_recipe
from trainings import Trial

from job.launch import Place, find_topology
from job.recipe.schema import Distributed
from job.store import RunStore

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not find_topology(Distributed(), Place()).gpus, reason="needs an NVIDIA GPU"),
]

MakeRecipe = Callable[..., Path]

WORDS = [first + second for first in ("ba", "de", "fi", "go", "ku", "la") for second in ("n", "r", "s", "t", "l")]
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def write_texts(folder: Path) -> Path:
    """Write texts of 4 to 240 words; a text of either label has words of its own."""
    rng = random.Random(2)
    for split, count in (("train", 600), ("test", 200)):
        lines = ["text,label"]
        for _ in range(count):
            label = rng.random() < 0.5
            words = rng.choices(WORDS[label::2], k=min(4 + int(rng.expovariate(1 / 60)), 240))
            lines.append(f"{' '.join(words)},{'good' if label else 'bad'}")
        (folder / f"{split}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_model(folder: Path, **changes: Any) -> Path:
    """Write a BERT of random weights, large enough that its matrices take the kernels of real ones."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(special + WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    sizes = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
    config = transformers.BertConfig(vocab_size=len(special + WORDS), pad_token_id=0, **(sizes | changes))
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def make_recipe(tmp_path: Path) -> MakeRecipe:
    """Return a function that writes a recipe of 24 steps, a save every 4; what it is given changes model and keys."""

    def make(changes: dict[str, Any], **training: Any) -> Path:
        for name in ("texts", "model"):
            (tmp_path / name).mkdir()
        steps = {"max_steps": 24, "save_steps": 4, "eval_steps": 8, "logging_steps": 1, "learning_rate": 3e-4}
        return write_recipe(
            tmp_path / "recipe.yaml",
            name="gpu",
            task="text-classification",
            model={"id": str(write_model(tmp_path / "model", **changes))},
            data={"source": str(write_texts(tmp_path / "texts")), "max_length": 256, "validation": 0.1},
            training={"global_batch_size": 32, "max_micro_batch_size": 16, "seed": 3} | steps | training,
            baselines=[],
            store={"uri": str(tmp_path / "store")},
        )

    return make


def list_losses(record: dict[str, Any]) -> list[float]:
    return [entry["loss"] for entry in record["history"] if "loss" in entry]


def assert_like_losses(one: Trial, other: Trial) -> None:
    """Train both; in 16 bits they part slowly."""
    for trial in (one, other):
        assert trial.attempt() == 0, trial.reason
    losses, wanted = list_losses(one.record), list_losses(other.record)
    assert losses[0] == pytest.approx(wanted[0], abs=2e-3), "before anything is learned"
    assert losses == pytest.approx(wanted, abs=0.1), (losses, wanted)


@pytest.mark.parametrize(
    ("asked", "precision", "attention", "dropped"),
    [("auto", "bf16", "varlen", 0.0), ("auto", "bf16", "padded", 0.1), ("fp16", "fp16", "varlen", 0.0)],
)
def test_a_training_that_is_killed_and_stopped_ends_with_the_bits_of_the_undisturbed(
    tmp_path: Path, make_recipe: MakeRecipe, asked: str, precision: str, attention: str, dropped: float
) -> None:
    """Other dropout is on. Where the attention's is, rows are padded: the kernel has none."""
    path = make_recipe({"attention_probs_dropout_prob": dropped}, precision=asked, group_by_length=False)
    straight, broken = (Trial(path, tmp_path / name) for name in ("straight", "broken"))
    assert straight.attempt() == 0, straight.reason
    assert (straight.record["precision"], straight.record["attention"]) == (precision, attention)
    losses = list_losses(straight.record)
    assert len(losses) == 24 and all(0.1 < loss < 2 for loss in losses), losses
    assert broken.attempt(accident="training_step:kill:10") in (78, 79)
    assert broken.pointer["step"] == 8
    assert broken.attempt(accident="training_step:term:17") == 75, broken.reason
    assert broken.pointer["step"] == 18, "the step that was on is finished"
    assert broken.attempt() == 0, broken.reason
    assert broken.record["resumed_from"] == 18
    assert list_losses(broken.record) == losses
    assert broken.digest == straight.digest


def test_rows_without_padding_have_the_loss_of_padded_ones(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    path = make_recipe(STILL, precision="bf16")
    trials = [Trial(path, tmp_path / each, f"training.attention={each}") for each in ("varlen", "padded")]
    assert_like_losses(*trials)
    assert [trial.record["attention"] for trial in trials] == ["varlen", "padded"]


@pytest.mark.parametrize("attention", ["padded", "varlen"])
def test_compiled_kernels_have_the_losses_of_torchs_own(
    tmp_path: Path, make_recipe: MakeRecipe, attention: str
) -> None:
    path = make_recipe(STILL, precision="bf16", attention=attention)
    trials = [Trial(path, tmp_path / each, f"training.torch_compile={each}") for each in ("true", "false")]
    assert_like_losses(*trials)
    assert [trial.record["attention"] for trial in trials] == [attention, attention]


def test_memory_for_checkpoints_is_pinned_and_no_more_than_is_asked_for() -> None:
    import torch

    from job.train.snapshot import Snapshot

    weights = torch.randn(3, 1000, device="cuda")
    snapshot = Snapshot(3 << 20)
    snapshot.begin()
    before = torch.cuda.host_memory_stats()["allocated_bytes.current"]
    copy = snapshot.keep(weights)
    snapshot.write(list).result(60)
    assert copy.is_pinned() and torch.equal(copy, weights.cpu())
    assert torch.cuda.host_memory_stats()["allocated_bytes.current"] == before == 0


def test_memory_that_ends_halves_the_micro_batch_and_keeps_the_global_one(
    tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    """The GPU is made smaller than what 32 rows took, larger than 16. What follows the training is not asked for."""
    large = {"max_micro_batch_size": 32, "group_by_length": False, "max_steps": 4, "attention": "padded"}
    path, peaks = make_recipe({"num_hidden_layers": 8}, **large), []
    for rows in (32, 16):
        trial = Trial(path, tmp_path / f"rows-{rows}", f"training.max_micro_batch_size={rows}")
        assert trial.attempt() == 0, trial.reason
        peaks.append(trial.record["peak_memory_bytes"])
    assert peaks[0] > 1.2 * peaks[1], peaks
    command = [sys.executable, str(Path(__file__).with_name("accidental_job.py")), "run", str(path)]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1", "JOB_STAND_INS": "train=trainings:run_trial_rank",
        "TRIAL_MEMORY_MIB": str((sum(peaks) // 2) >> 20),
    }  # fmt: skip
    done = subprocess.run(
        [*command, "--run-id", "small", "--work-dir", str(tmp_path / "work")],
        capture_output=True, text=True, env=environment, timeout=400,
    )  # fmt: skip
    assert "GPU memory is too small for 32 rows of" in done.stderr, done.stderr
    assert "with training.max_micro_batch_size: 16" in done.stderr, done.stderr
    assert "global batch 32 = 1 ranks × 2 accumulation × 16 rows" in done.stderr, done.stderr
    assert RunStore(str(tmp_path / "store"), "small").read_json("stages/train.json") is not None, done.stderr
