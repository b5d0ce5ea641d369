"""Training on one GPU beside transformers.Trainer: real tokens a second, share of the GPU's peak, memory, checkpoints.

`python tests/bench/gpu.py [MODEL…]` needs an NVIDIA GPU and the packages of training, no network, no files, about nine
minutes, and 50 GiB in TMPDIR for checkpoints. Weights are random, rows have the lengths of IMDB (cap 512, mean 263).
Turns are interleaved, the first round is dropped where there is another, the clock runs between two synchronized
steps; setting up does not count, nor does compiling, for rows of any length at once (ACCELERATE_DYNAMO_USE_DYNAMIC).
No attention weights are dropped, for anybody. With OUT set, numbers go to $OUT/gpu.json. `--tiny` runs all of it on a
processor, to see that it runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import transformers
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from job.data.batching import derive_micro_batch
from job.data.tokenize import TokenTable
from job.recipe import Recipe, Run
from job.tasks import get_task
from job.train.attention import choose_attention
from job.train.engine import build_arguments
from job.train.snapshot import Written
from job.train.trainer import JobTrainer, TrainingData

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
NO_DROPOUT = {"attention_dropout": 0.0, "attention_probs_dropout_prob": 0.0}


@dataclass(frozen=True)
class Shape:
    """A model by its configuration; `batch` rows a step for all but the tutorial, `steps` of them in a turn, and once
    `widened` times as many rows.
    """

    kind: str
    task: str
    sizes: dict[str, int]
    batch: int
    steps: int
    rounds: int = 3
    widened: int = 4

    def make(self) -> Any:
        """Return the model with random weights, on the device."""
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(self.kind, **self.sizes, **NO_DROPOUT, pad_token_id=0)
        with DEVICE:
            model = getattr(transformers, get_task(self.task).auto_class).from_config(config, dtype=torch.float32)
        return model.to(DEVICE).train()


SHAPES = {
    "distilbert": Shape("distilbert", "text-classification", {}, batch=64, steps=45),
    "bert-base": Shape("bert", "text-classification", {}, batch=64, steps=45),
    "llama-1b": Shape(
        "llama",
        "causal-lm",
        {
            "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
            "intermediate_size": 8192, "vocab_size": 32000,
        },
        batch=16, steps=10, widened=2,
    ),
}  # fmt: skip
TINY = {
    "distilbert": {"dim": 32, "n_heads": 4, "n_layers": 2, "hidden_dim": 64, "vocab_size": 1000},
    "bert-base": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
                  "vocab_size": 1000},
    "llama-1b": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                 "intermediate_size": 64, "vocab_size": 1000},
}  # fmt: skip

# What is wanted: how many times as fast as the best Trainer of a kind, and the share of the peak for each model.
AGAINST = {"fp32": 6.0, "dynamic padding": 2.5, "Trainer": 1.3}
SHARES = {"distilbert": 0.35, "bert-base": 0.45, "llama-1b": 0.50}


@dataclass(frozen=True)
class Turn:
    """What a contender did in one turn: seconds for so many steps, and the lengths of the rows in them."""

    seconds: float
    lengths: np.ndarray
    peak_bytes: int

    @property
    def tokens_per_second(self) -> float:
        """Real tokens, padding left out."""
        return float(self.lengths.sum()) / self.seconds


@dataclass
class Clock(TrainerCallback):
    """Runs from the end of step `first`, once all is `ready`, to that of step `last`, both waited for."""

    first: int
    last: int
    ready: Callable[[], None] = lambda: None
    began: float = 0.0
    seconds: float = 0.0
    rows: list[torch.Tensor] = field(default_factory=list)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start or stop."""
        if state.global_step == self.first:
            self.ready()
            synchronize()
            self.began, self.rows = time.perf_counter(), []
            if GPU:
                torch.cuda.reset_peak_memory_stats()
        if state.global_step == self.last:
            synchronize()
            self.seconds = time.perf_counter() - self.began
            control.should_training_stop = True  # at its own end a Trainer saves

    def read(self) -> Turn:
        """Return the turn; lengths are fetched from the device only now."""
        lengths = torch.cat([part.to("cpu") for part in self.rows]).numpy()
        return Turn(self.seconds, lengths, torch.cuda.max_memory_allocated() if GPU else 0)


def synchronize() -> None:
    """Wait for the GPU."""
    if GPU:
        torch.cuda.synchronize()


def make_table(shape: Shape) -> TokenTable:
    """Return rows of random tokens with IMDB's lengths: log-normal, cut at 512, mean 263.

    They are so many that a turn is one of the lots which Trainer sorts by length, from the longest on.
    """
    rows = 4 * shape.batch * (5 + shape.steps)
    rng, vocabulary = np.random.default_rng(0), shape.sizes.get("vocab_size", 30522)
    lengths = np.clip(rng.lognormal(5.44, 0.7, rows).astype(np.int64), 16, 512)
    tokens = rng.integers(1000 % vocabulary, vocabulary, lengths.sum()).astype(np.uint16)
    per_token = get_task(shape.task).per_token
    labels = tokens.astype(np.int32) if per_token else rng.integers(0, 2, rows)
    return TokenTable(tokens, None, np.cumsum([0, *lengths]), labels, np.arange(rows), per_token=per_token)


class Rows(Dataset[Any]):
    """A table's rows as a tutorial has them: lists of ids, and a label."""

    def __init__(self, table: TokenTable) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        span = slice(self._table.offsets[index], self._table.offsets[index + 1])
        label = 0 if self._table.per_token else int(self._table.labels[index])
        return {"input_ids": self._table.tokens[span].tolist(), "label": label}


@dataclass(frozen=True)
class Pad:
    """A collator that pads to the longest row, or to `width`; language models learn every token."""

    per_token: bool
    width: int | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        lengths = [len(row["input_ids"]) for row in rows]
        ids = torch.zeros((len(rows), self.width or -(-max(lengths) // 8) * 8), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for line, row in enumerate(rows):
            ids[line, : lengths[line]] = torch.tensor(row["input_ids"])
            mask[line, : lengths[line]] = 1
        labels = ids.masked_fill(mask == 0, -100) if self.per_token else torch.tensor([row["label"] for row in rows])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class Counted(Trainer):
    """transformers.Trainer as it is, and a note of the rows' lengths, for which nothing is waited."""

    clock: Clock

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Note, then train."""
        self.clock.rows.append(inputs["attention_mask"].sum(1))
        return super().training_step(model, inputs, *args, **kwargs)


class CountedJob(JobTrainer):
    """The trainer of the house as it is, and the same note."""

    clock: Clock

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Note, then train."""
        mask = inputs.get("attention_mask")
        self.clock.rows.append(inputs["cu_seqlens"].diff() if mask is None else mask.sum(1))
        return super().training_step(model, inputs, num_items_in_batch)


def make_trainer(shape: Shape, table: TokenTable, folder: Path, **how: Any) -> Counted:
    """Return a Trainer: `pad`, its collator, and what else its arguments say."""
    pad, grouped, arguments = how.pop("pad"), how.pop("grouped", False), dict(how)
    if grouped and int(transformers.__version__.split(".")[0]) < 5:
        arguments["group_by_length"] = True
    elif grouped:
        arguments["train_sampling_strategy"] = "group_by_length"
    args = TrainingArguments(
        output_dir=str(folder), report_to=[], save_strategy="no", logging_steps=10, disable_tqdm=True, use_cpu=not GPU,
        dataloader_pin_memory=GPU, dataloader_num_workers=2, remove_unused_columns=False, **arguments,
    )  # fmt: skip
    return Counted(shape.make(), args, train_dataset=Rows(table), data_collator=pad)


def make_job(shape: Shape, table: TokenTable, folder: Path, attention: str, compiled: bool = False) -> CountedJob:
    """Return the trainer of a run with a recipe's defaults, by the same steps as `job.train.rank`."""
    recipe = Recipe.model_validate({
        "name": "bench", "task": shape.task, "model": {"id": "random"}, "data": {"source": "random", "num_workers": 2},
        "training": {"global_batch_size": shape.batch, "max_micro_batch_size": shape.batch, "max_steps": 10_000,
                     "attention": attention, "eval_steps": 100_000, "save_steps": 100_000, "torch_compile": compiled},
        "store": {"uri": str(folder / "store")},
    })  # fmt: skip
    run, task, model = Run("bench", recipe, folder), get_task(shape.task), shape.make()
    run.tokenizer.mkdir(parents=True, exist_ok=True)
    batches = derive_micro_batch(shape.batch, 1, shape.batch)
    precision = "bf16"
    args = build_arguments(recipe, batches, precision, run.folder / "train", model.num_parameters())
    flat = choose_attention(attention, precision, model, task, table)
    few = table.take(np.arange(8))
    data = TrainingData(table, few, 0, 512, batches, flat=flat)
    trainer = CountedJob(model, args, run, data, task)
    trainer.repeats = GPU and trainer.try_repeating()
    return trainer


def take_turn(trainer: Any, steps: int) -> Turn:
    """Train through warm-up and `steps` more, and leave the loop."""
    trainer.clock = Clock(first=5, last=5 + steps)
    if isinstance(trainer, JobTrainer):  # its memory for checkpoints is allocated beside the first steps
        trainer.clock.ready = lambda: trainer._snapshot.begin()
    trainer.add_callback(trainer.clock)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.args.max_steps = 10_000
    trainer.train()
    if trainer.accelerator.mixed_precision != ("bf16" if trainer.args.bf16 else "no"):
        raise RuntimeError(f"asked for bf16: {trainer.args.bf16}, computed in {trainer.accelerator.mixed_precision}")
    turn = trainer.clock.read()
    # loading processes that stay are told to end now: left to the garbage collector, each is waited for in vain, 5 s
    trainer.callback_handler.train_dataloader._iterator = None
    # in the last turns' memory nothing else may lie
    trainer.model = trainer.model_wrapped = trainer.optimizer = trainer.lr_scheduler = None
    return turn


def list_contenders(shape: Shape, table: TokenTable, folder: Path) -> dict[str, Callable[[], Any]]:
    """Return who takes part, by name; each call sets one up anew."""
    per_token = get_task(shape.task).per_token
    wide = replace(shape, batch=shape.widened * shape.batch)
    pad, halves = Pad(per_token), {"bf16": True}
    fixed = {"pad": Pad(per_token, 512), "per_device_train_batch_size": 8}
    narrow = halves | {"pad": pad, "per_device_train_batch_size": shape.batch}
    widened = halves | {"pad": pad, "per_device_train_batch_size": wide.batch, "grouped": True}

    def trainer(**how: Any) -> Callable[[], Any]:
        return lambda: make_trainer(shape, table, folder, **how)

    def job(size: Shape, attention: str, compiled: bool = False) -> Callable[[], Any]:
        return lambda: make_job(size, table, folder, attention, compiled)

    return {
        "Trainer, pad to 512, fp32, batch 8": trainer(**fixed),
        f"Trainer, dynamic padding, batch {shape.batch}": trainer(**narrow),
        f"Trainer, group_by_length, batch {shape.batch}": trainer(**narrow, grouped=True),
        f"Trainer, group_by_length, batch {wide.batch}": trainer(**widened),
        f"Trainer, group_by_length, batch {wide.batch}, compiled": trainer(**widened, torch_compile=True),
        f"job, padded, batch {shape.batch}": job(shape, "padded"),
        f"job, varlen, batch {shape.batch}": job(shape, "varlen"),
        f"job, padded, batch {wide.batch}": job(wide, "padded"),
        f"job, varlen, batch {wide.batch}": job(wide, "varlen"),
        f"job, padded, batch {wide.batch}, compiled": job(wide, "padded", compiled=True),
        f"job, varlen, batch {wide.batch}, compiled": job(wide, "varlen", compiled=True),
    }


def count_flops(model: Any, lengths: np.ndarray, causal: bool) -> float:
    """Return the operations that forward and backward need: 6 a weight and token, 12·layers·width·length² beside.

    The latter are attention's, of which half is needed where it is causal. Embeddings are looked up, not multiplied.
    """
    looked_up = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    weights = sum(p.numel() for p in model.parameters()) - sum(m.weight.numel() for m in looked_up)
    config = model.config
    squares = float((lengths.astype(np.float64) ** 2).sum())
    return 6 * weights * float(lengths.sum()) + (6 if causal else 12) * (
        config.num_hidden_layers * config.hidden_size * squares
    )


def measure_peak(size: int = 8192) -> float:
    """Return operations a second of a bf16 matrix product of random numbers: what this GPU can do at most."""
    one, other = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(12):
        synchronize()
        began = time.perf_counter()
        for _ in range(8):
            one @ other
        synchronize()
        times.append((time.perf_counter() - began) / 8)
    return 2 * size**3 / median(times[2:])


def release() -> None:
    """Give memory back before the next one takes its turn."""
    gc.collect()
    torch.compiler.reset()  # it counts how often a kind of model was compiled, and gives up
    for name in ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_MIXED_PRECISION"):
        os.environ.pop(name, None)  # transformers 4 leaves there what a Trainer asked for, and the next would get it
    if GPU:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # left on by a compiled one
        torch.cuda.empty_cache()


def race(contenders: dict[str, Callable[[], Any]], shape: Shape, until: float) -> dict[str, list[Turn]]:
    """Let all take turns, forwards and backwards; no round begins that would not end before `until`."""
    turns: dict[str, list[Turn]] = {each: [] for each in contenders}
    for number in range(shape.rounds):
        started = time.perf_counter()
        for each in list(contenders)[:: 1 if number % 2 == 0 else -1]:
            began = time.perf_counter()
            turns[each].append(take_turn(contenders[each](), shape.steps))
            speed, whole = turns[each][-1].tokens_per_second, time.perf_counter() - began
            print(f"  {number + 1}/{shape.rounds} {each}: {speed:,.0f} tokens/s, {whole:.0f} s in all", flush=True)
            release()
        if 2 * time.perf_counter() - started > until:
            break
    return turns


def judge(name: str, turns: dict[str, list[Turn]], shape: Shape, peak: float) -> list[dict[str, Any]]:
    """Return a line of numbers for each that took turns; the first is dropped, where there are more."""
    model, lines = shape.make(), []
    for each, taken in turns.items():
        kept = taken[1:] or taken
        mfu = median(count_flops(model, t.lengths, shape.task == "causal-lm") / t.seconds / peak for t in kept)
        speeds = [turn.tokens_per_second for turn in kept]
        lines.append({
            "model": name, "contender": each, "rows": int(each.partition("batch ")[2].partition(",")[0]),
            "rounds": len(kept), "tokens_per_second": median(speeds), "lowest": min(speeds),
            "highest": max(speeds), "mfu": mfu, "peak_gib": max(t.peak_bytes for t in kept) / 2**30,
            "step_ms": 1000 * median(turn.seconds for turn in kept) / shape.steps,
        })  # fmt: skip
    return lines


def measure_checkpoints(shape: Shape, table: TokenTable, folder: Path) -> list[dict[str, Any]]:
    """Return how long a save keeps the training loop of each, and how much it writes; the first save is dropped."""
    per_token = get_task(shape.task).per_token
    arguments = {"pad": Pad(per_token), "per_device_train_batch_size": shape.batch, "bf16": True}
    lines = []
    for name, make in (
        ("Trainer's save", lambda: make_trainer(shape, table, folder, **arguments)),
        ("job's save", lambda: make_job(shape, table, folder, "varlen")),
    ):
        trainer = make()
        saves = Saves(trainer, folder)
        trainer.add_callback(saves)
        take_turn(trainer, 3)
        lines.append({"contender": name, "stall_s": saves.seconds[-1], "gib": saves.bytes / 2**30})
        print(f"{name}: the loop waits {saves.seconds[-1]:.2f} s for {saves.bytes / 2**30:.1f} GiB", flush=True)
        del trainer, saves
        release()
    return lines


class Saves(TrainerCallback):
    """Saves after the steps 3 and 6, and throws away what was written."""

    def __init__(self, trainer: Any, folder: Path) -> None:
        self._trainer, self._folder, self.seconds, self.bytes = trainer, folder, [], 0
        self._writing: list[tuple[Path, Future[Written]]] = []
        if isinstance(trainer, JobTrainer):
            trainer.on_checkpoint = lambda *save: self._writing.append(save)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save, and note for how long that took from an idle GPU on."""
        if state.global_step not in (3, 6):
            return
        synchronize()
        began = time.perf_counter()
        self._trainer._save_checkpoint(self._trainer.model, None)
        self.seconds.append(time.perf_counter() - began)
        for written in self._folder.glob("checkpoint-*"):
            self._throw_away(written)
        while self._writing:  # ours is written beside the loop: that is no part of the stall
            ours, until = self._writing.pop()
            held = until.result().held
            self._throw_away(ours, sum(file.size for file in held))
            for file in held:
                file.drop()

    def _throw_away(self, folder: Path, held: int = 0) -> None:
        self.bytes = held + sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        shutil.rmtree(folder)


def print_table(lines: list[dict[str, Any]]) -> None:
    """Print a table of the race, with what `job, padded` of as many rows is of each; of 64 rows for those of 8."""
    print(f"{'':<58}{'rounds':>7}{'tokens/s':>10}{'range':>20}{'MFU':>7}{'GiB':>7}{'ms/step':>9}{'job is':>8}")
    ours = {line["rows"]: line["tokens_per_second"] for line in lines[::-1] if "job, padded" in line["contender"]}
    for line in lines:
        speed = ours.get(line["rows"], ours[min(ours)] if ours else None)
        ratio = f"{speed / line['tokens_per_second']:.2f}×" if speed else "–"
        spread = f"{line['lowest']:,.0f}–{line['highest']:,.0f}"
        print(
            f"{line['model'] + ': ' + line['contender']:<58}{line['rounds']:>7}{line['tokens_per_second']:>10,.0f}"
            f"{spread:>20}{line['mfu']:>7.1%}{line['peak_gib']:>7.1f}{line['step_ms']:>9.1f}{ratio:>8}"
        )


def print_goals(lines: list[dict[str, Any]]) -> None:
    """Print what is wanted and what was reached on a model: the fastest of ours by the fastest of a kind of Trainer.

    Both have as many rows; beside 8 of the tutorial's ours have the fewest that they have.
    """
    ours, speed = [line for line in lines if "job" in line["contender"]], itemgetter("tokens_per_second")
    rows = {line["rows"] for line in ours}
    for kind, goal in AGAINST.items():
        theirs = max((line for line in lines if kind in line["contender"]), key=speed)
        like = theirs["rows"] if theirs["rows"] in rows else min(rows)
        ratio = max(speed(line) for line in ours if line["rows"] == like) / speed(theirs)
        print(f"  {ratio:.2f}x of {theirs['contender']}: {'met' if ratio >= goal else 'missed'}, wanted {goal}x")
    share, wanted = max(line["mfu"] for line in ours), SHARES[lines[0]["model"]]
    print(f"  {share:.1%} MFU: {'met' if share >= wanted else 'missed'}, wanted {wanted:.0%}")


def read_words() -> argparse.Namespace:
    """Return what was asked for on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(SHAPES))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", default="", help="a part of the names of those that take turns: 'job', 'batch 256'")
    parser.add_argument("--compiled", action="store_true", help="with those whose model torch compiles: takes long")
    parser.add_argument("--minutes", type=float, default=7, help="no second round would end later; saves come after")
    parser.add_argument("--saves", action="store_true", help="no turns, only the checkpoints of the largest model")
    return parser.parse_args()


def main() -> None:
    """Race on each model that is named, then save the largest."""
    asked = read_words()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    os.environ["ACCELERATE_DYNAMO_USE_DYNAMIC"] = "true"
    deadline, shapes = time.perf_counter() + 60 * asked.minutes, {name: SHAPES[name] for name in asked.models}
    if asked.tiny:
        shapes = {name: replace(s, sizes=TINY[name], batch=2, steps=1, rounds=2) for name, s in shapes.items()}
    peak = measure_peak(256 if asked.tiny else 8192)
    device = torch.cuda.get_device_name() if GPU else "this processor"
    print(f"{device}: {peak / 1e12:.0f} TFLOP/s (bf16 matrix product), torch {torch.__version__}, "
          f"transformers {transformers.__version__}", flush=True)  # fmt: skip
    found: dict[str, Any] = {"device": device, "peak_flops": peak, "race": [], "checkpoints": []}
    with tempfile.TemporaryDirectory() as place:
        for number, (name, shape) in enumerate(shapes.items()):
            began, table = time.perf_counter(), make_table(shape)
            until = began + (deadline - began) / (len(shapes) - number)
            contenders = list_contenders(shape, table, Path(place))
            some = [each for each in contenders if asked.only in each and (asked.compiled or "compiled" not in each)]
            if not asked.saves:
                lines = judge(name, race({each: contenders[each] for each in some}, shape, until), shape, peak)
                found["race"] += lines
                print_table(lines)
                if not asked.only:
                    print_goals(lines)
            if name == "llama-1b":
                found["checkpoints"] = measure_checkpoints(shape, table, Path(place))
            print(f"{name}: {time.perf_counter() - began:.0f} s in all", flush=True)
            if out := os.environ.get("OUT"):  # after each: the lease may end
                (Path(out) / "gpu.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # on an H200 the interpreter took more than 20 s to end
