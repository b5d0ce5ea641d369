"""Lane `train`: our loop beside plain Trainer scripts, on real sentences in documents as long as IMDB's.

All train the same weights with the same hyper-parameters, on one thread; what counts is real tokens (no padding) in a
second of processor time. In the first round, which is dropped, all take as many steps, and it is asked what they have
learned. Later those that pad in random order take fewer: a token costs them the same in every step.

python tests/bench/training.py FOLDER CONTENDER PRECISION STEPS LATER is one contender, a worker of `racing.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from corpus import cut_model, write_documents
from ours import Rank, read_settings, write_recipe
from racing import Turn, Worker, compare, race, serve_turns
from results import Bench, Row
from stopwatch import Stopwatch

from job.processor import describe_processor

BATCH, LEARNING_RATE, SEED, MAX_LENGTH, LAYERS = 8, 1e-3, 42, 512, 1
ROWS = {"train": 1600, "test": 128}
STEPS, RANDOM_STEPS = 45, 10
"""Of 1,600 rows 160 are held out; of 1,440 Trainer sorts 45 batches at a time by length, the longest first."""
TOLERANCE, UNTAUGHT = 0.15, 0.3
"""Of the loss on held-out rows, in nats: so early it depends on the order of rows; who has learned nothing has 0.69."""

JOB, RANDOM = "job", ("max", "dynamic")
CONTENDERS = {
    "job, fp32": ("job", "fp32"),
    "job, bf16": ("job", "bf16"),
    "Trainer, all padded to 512": ("max", "fp32"),
    "Trainer, dynamic padding": ("dynamic", "fp32"),
    "Trainer, group_by_length": ("grouped", "fp32"),
    "Trainer, group_by_length, bf16": ("grouped", "bf16"),
}
GOALS = (
    ("job, fp32", "Trainer, all padded to 512", 2.3),
    ("job, fp32", "Trainer, dynamic padding", 2.0),
    ("job, fp32", "Trainer, group_by_length", 1.0),
    ("job, bf16", "Trainer, group_by_length, bf16", 1.0),
    ("job, bf16", "Trainer, group_by_length", 1.2),
    ("job, bf16", "Trainer, all padded to 512", 2.3),
)


def run_lane(bench: Bench) -> list[Row]:
    """Race all contenders; bf16 only where the processor computes it."""
    data = write_documents(bench.assets, bench.folder / "data", ROWS)
    cut_model(bench.assets / "minilm-l6", bench.folder / "model", LAYERS)
    can_bf16 = any(flag in describe_processor() for flag in ("avx512_bf16", "amx_"))
    chosen = {name: how for name, how in CONTENDERS.items() if can_bf16 or how[1] == "fp32"}
    steps, later = (3, 3) if bench.tiny else (STEPS, RANDOM_STEPS)
    write_job_recipes(bench.folder, data, steps)
    one = {"OMP_NUM_THREADS": "1"}
    workers = {
        name: Worker(
            "training.py",
            [bench.folder, *how, steps, later if how[0] in RANDOM else steps],
            bench.folder / "-".join(how),
            one | (read_settings() if how[0] == JOB else {}),
        )
        for name, how in chosen.items()
    }
    turns = race({name: worker.take_turn for name, worker in workers.items()}, bench.rounds)
    for worker in workers.values():
        worker.close()
    losses = {name: taken[0].numbers["loss"] for name, taken in turns.items()}
    print("held-out loss:", ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()), flush=True)
    return [
        judge_pair(turns, losses, ours, theirs, goal)
        for ours, theirs, goal in GOALS
        if ours in turns and theirs in turns
    ]


def judge_pair(turns: dict[str, list[Turn]], losses: dict[str, float], ours: str, theirs: str, goal: float) -> Row:
    """Return how much less time a real token takes us."""
    cpu, wall = (
        [[getattr(turn, key) / turn.numbers["tokens"] for turn in turns[name]] for name in (theirs, ours)]
        for key in ("cpu_s", "wall_s")
    )
    other, mine = (1 / np.median(values) for values in cpu)
    note = (
        f"{mine:,.0f} : {other:,.0f} real tokens/CPU s; wall {compare(*wall)} ×; "
        f"held-out loss {losses[ours]:.3f} : {losses[theirs]:.3f}"
    )
    return Row(f"{theirs} ({ours})", "×", compare(*cpu), goal, note, has_learned(losses[ours], losses[theirs]))


def write_job_recipes(folder: Path, data: Path, steps: int) -> None:
    """Write our recipes: never a save or an evaluation inside the loop that is measured."""
    for precision in ("fp32", "bf16"):
        write_recipe(
            folder / f"{precision}.yaml", folder / "model", {"source": str(data), "max_length": MAX_LENGTH},
            str(folder / "store"), max_steps=steps, global_batch_size=BATCH, learning_rate=LEARNING_RATE, seed=SEED,
            precision=precision, save_steps=100_000, eval_steps=100_000,
        )  # fmt: skip


def has_learned(ours: float, theirs: float) -> bool:
    """Tell whether ours has learned, and no less than theirs; a speed says nothing of a side that has not."""
    return ours < UNTAUGHT and ours - theirs < TOLERANCE


class Contender:
    """Trains in every turn; after the first one it measures the loss of its weights on held-out rows."""

    def __init__(self, folder: Path, how: str, precision: str, steps: list[int]) -> None:
        from job.data import TokenTable

        self._rank = Rank(folder / f"{precision}.yaml", folder / "work", f"{how}-{precision}")
        self._how, self._precision, self._model, self._steps = how, precision, folder / "model", steps
        self._train, self._test = (TokenTable.open(self._rank.run.tokens(split)) for split in ("train", "test"))
        self._rows = None if how == JOB else list_rows(self._train)
        self._turns, self._loss = 0, 0.0

    def take_turn(self) -> Turn:
        """Return what the training loop used; the model is loaded before it begins."""
        turn, trained = self._train_ours() if self._how == JOB else self._train_plainly()
        self._turns += 1
        self._loss = self._loss or measure_loss(trained(), self._test)
        return Turn(turn.cpu_s, turn.wall_s, {"loss": self._loss, "tokens": turn.numbers["tokens"]})

    def _train_ours(self) -> tuple[Turn, Any]:
        from transformers import AutoModelForSequenceClassification

        turn = self._rank.take_turn()
        return turn, lambda: AutoModelForSequenceClassification.from_pretrained(self._rank.run.trained)

    def _train_plainly(self) -> tuple[Turn, Any]:
        from transformers import AutoTokenizer, DataCollatorWithPadding, Trainer

        tokens = 0

        class CountingTrainer(Trainer):
            def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
                nonlocal tokens
                tokens += int(inputs["attention_mask"].sum())
                return super().training_step(model, inputs, *args, **kwargs)

        model = load_plain_model(self._model)
        padding = "max_length" if self._how == "max" else True
        trainer = CountingTrainer(
            model,
            self._write_arguments(),
            train_dataset=self._rows,
            data_collator=DataCollatorWithPadding(AutoTokenizer.from_pretrained(self._model), padding, MAX_LENGTH),
        )
        with Stopwatch() as used:
            trainer.train()
        return Turn(used.cpu_s, used.wall_s, {"tokens": tokens}), lambda: model

    def _write_arguments(self) -> Any:
        """Return Trainer's arguments: our hyper-parameters, its own defaults (fused AdamW is one), another order."""
        from transformers import TrainingArguments

        return TrainingArguments(
            str(self._rank.run.folder / "plain"), per_device_train_batch_size=BATCH, learning_rate=LEARNING_RATE,
            max_steps=self._steps[min(self._turns, 1)], seed=SEED, data_seed=SEED + self._turns, use_cpu=True,
            group_by_length=self._how == "grouped", bf16=self._precision == "bf16",
            save_strategy="no", report_to=[], disable_tqdm=True,
        )  # fmt: skip


def list_rows(table: Any) -> Any:
    """Return a tokenized split as a script has it: a datasets.Dataset of lists."""
    from datasets import Dataset

    spans = [slice(start, end) for start, end in zip(table.offsets[:-1], table.offsets[1:], strict=True)]
    ids = [table.tokens[span].tolist() for span in spans]
    masks = [[1] * len(row) for row in ids]
    return Dataset.from_dict({"input_ids": ids, "attention_mask": masks, "labels": table.labels.tolist()})


def load_plain_model(folder: Path) -> Any:
    """Load as a script does: seeded, two labels."""
    from transformers import AutoModelForSequenceClassification, set_seed

    set_seed(SEED)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)


def measure_loss(model: Any, table: Any) -> float:
    """Return the mean loss on the rows of a table, in fp32."""
    import torch

    total, order = 0.0, np.argsort(-table.lengths, kind="stable")
    model.eval().float()
    with torch.inference_mode():
        for start in range(0, len(order), BATCH):
            part = order[start : start + BATCH]
            batch = {name: torch.from_numpy(array) for name, array in table.pad(part, 0).items()}
            logits = model(**batch).logits
            labels = torch.from_numpy(np.asarray(table.labels[part], dtype=np.int64))
            total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
    return total / len(order)


if __name__ == "__main__":
    serve_turns(Contender(Path(sys.argv[1]), sys.argv[2], sys.argv[3], [int(word) for word in sys.argv[4:]]).take_turn)
