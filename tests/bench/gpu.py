"""Training on one GPU beside transformers.Trainer: real tokens a second, share of the GPU's peak, memory, checkpoints.

`python tests/bench/gpu.py [MODEL…]` needs an NVIDIA GPU and the packages of training, no network, no files, about nine
minutes, and 50 GiB in TMPDIR for checkpoints. Weights are random, rows have the lengths of IMDB (cap 512, mean 263).

Turns are interleaved; a first turn is dropped where another follows, and a ratio is of the rounds in which both sides
took turns. The clock runs between two synchronized steps: setting up does not count, nor do the steps before, which are
as many more as a turn has where the model is compiled, so that rows of all lengths were there. What they took is
printed, and how many graphs were compiled while the clock ran. What is compiled is meant for rows of any length at once
(ACCELERATE_DYNAMO_USE_DYNAMIC). No attention weights are dropped, for anybody. With OUT set, numbers go to /gpu.json
after each turn; who fails says why and takes no further ones. `--tiny` runs all of it on a processor, to see that it
runs.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from functools import partial
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
from job.recipe import Recipe, Run, write_json
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

LARGEST = "llama-1b"

# What is wanted: how many times as fast as the best Trainer of a kind, and the share of the peak for each model.
AGAINST = {"fp32": 6.0, "dynamic padding": 2.5, "Trainer": 1.3}
SHARES = {"distilbert": 0.35, "bert-base": 0.45, "llama-1b": 0.50}

WARM_UP = 5
"""Steps before the clock runs; what is compiled takes those of a whole turn more."""

Make = Callable[[TokenTable, Path], Any]
"""Sets a trainer up anew, from rows and an empty folder."""


@dataclass(frozen=True)
class Turn:
    """What a contender did in one turn: seconds for so many steps, and the lengths of the rows in them.

    `warm_up_s`: seconds of the steps before. `compiled`: graphs that torch compiled in those, and while the clock ran.
    """

    seconds: float
    steps: int
    lengths: np.ndarray
    peak_bytes: int = 0
    warm_up_s: float = 0.0
    compiled: tuple[int, int] = (0, 0)

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
    times: list[float] = field(default_factory=lambda: [time.perf_counter()])
    graphs: list[int] = field(default_factory=lambda: [count_graphs()])
    rows: list[torch.Tensor] = field(default_factory=list)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start or stop."""
        if state.global_step == self.first:
            self.ready()
            self._note()
            self.rows = []
            if GPU:
                torch.cuda.reset_peak_memory_stats()
        if state.global_step == self.last:
            self._note()
            control.should_training_stop = True  # at its own end a Trainer saves

    def _note(self) -> None:
        synchronize()
        self.times.append(time.perf_counter())
        self.graphs.append(count_graphs())

    def read(self) -> Turn:
        """Return the turn; lengths are fetched from the device only now."""
        lengths = torch.cat([part.to("cpu") for part in self.rows]).numpy()
        peak = torch.cuda.max_memory_allocated() if GPU else 0
        warm_up_s, seconds = np.diff(self.times).tolist()
        before, within = np.diff(self.graphs).tolist()
        return Turn(seconds, self.last - self.first, lengths, peak, warm_up_s, (before, within))


def count_graphs() -> int:
    """Return how many graphs this process has compiled so far; one that is compiled for other shapes counts again."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


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
    """A collator that pads to a multiple of 8 tokens, or to `width`; language models learn every token."""

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
    """Return the trainer of a run, by the same steps as `job.train.rank`.

    A step is one micro-batch of as many rows as the shape says, in bf16; two processes load them, as for Trainer; there
    is neither an evaluation nor a save. All else is what a recipe has where it says nothing.
    """
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
    trainer.repeats = GPU and not compiled and trainer.try_repeating()
    return trainer


def take_turn(trainer: Any, steps: int) -> Turn:
    """Train through warm-up and `steps` more, and leave the loop."""
    compiled = trainer.args.torch_compile
    first = WARM_UP + (WARM_UP + steps if compiled else 0)
    trainer.clock = Clock(first, first + steps)
    if isinstance(trainer, JobTrainer):  # its memory for checkpoints is allocated beside the first steps
        trainer.clock.ready = lambda: trainer._snapshot.begin()
    trainer.add_callback(trainer.clock)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.args.max_steps = 10_000
    try:
        trainer.train()
        if trainer.accelerator.mixed_precision != ("bf16" if trainer.args.bf16 else "no"):
            raise RuntimeError(f"asked for bf16: {trainer.args.bf16}, not {trainer.accelerator.mixed_precision}")
        turn = trainer.clock.read()
    finally:
        let_go(trainer)
    if compiled != bool(turn.compiled[0]):
        raise RuntimeError(f"torch_compile: {compiled}, but {turn.compiled[0]} graphs were compiled")
    return turn


def let_go(trainer: Any) -> None:
    """Leave neither loading processes nor memory to whose turn is next."""
    loader = trainer.callback_handler.train_dataloader
    if loader is not None:  # left to the garbage collector, each of its processes is waited for in vain, 5 s
        loader._iterator = None
    trainer.model = trainer.model_wrapped = trainer.optimizer = trainer.lr_scheduler = None


def list_contenders(shape: Shape) -> dict[str, Make]:
    """Return who takes part, by name: `batch` and the rows of a step, `compiled` where torch compiles the model."""
    pad = Pad(get_task(shape.task).per_token)
    fixed = {"pad": replace(pad, width=512), "per_device_train_batch_size": 8}
    narrow = {"pad": pad, "bf16": True, "per_device_train_batch_size": shape.batch}
    found: dict[str, Make] = {
        "Trainer, pad to 512, fp32, batch 8": partial(make_trainer, shape, **fixed),
        f"Trainer, dynamic padding, batch {shape.batch}": partial(make_trainer, shape, **narrow),
    }
    for size in (shape, replace(shape, batch=shape.widened * shape.batch)):
        how = narrow | {"per_device_train_batch_size": size.batch, "grouped": True}
        grouped = partial(make_trainer, size, **how)
        padded, varlen = (partial(make_job, size, attention=each) for each in ("padded", "varlen"))
        rows = f"batch {size.batch}"
        found |= {
            f"Trainer, group_by_length, {rows}": grouped,
            f"job, padded, {rows}": padded,
            f"job, varlen, {rows}": varlen,
            f"Trainer, group_by_length, {rows}, compiled": partial(grouped, torch_compile=True),
            f"job, padded, {rows}, compiled": partial(padded, compiled=True),
            f"job, varlen, {rows}, compiled": partial(varlen, compiled=True),
        }
    return found


@dataclass(frozen=True)
class Scale:
    """What the operations of a model are counted by, and `peak`, those that the GPU can do in a second.

    Forward and backward need 6 a weight and token, and beside that `per_square` for each row's length²: attention's, 12
    for each layer and its width, half of them where it is causal. Embeddings are looked up, not multiplied.
    """

    weights: int
    per_square: int
    peak: float

    def find_share(self, turn: Turn) -> float:
        """Return what a turn computed as a share of the peak."""
        squares = float((turn.lengths.astype(np.float64) ** 2).sum())
        operations = 6 * self.weights * float(turn.lengths.sum()) + self.per_square * squares
        return operations / turn.seconds / self.peak


def make_scale(shape: Shape, peak: float) -> Scale:
    """Return the scale of a model on a GPU that does `peak` operations a second."""
    model = shape.make()
    looked_up = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    weights = sum(p.numel() for p in model.parameters()) - sum(m.weight.numel() for m in looked_up)
    each = 6 if shape.task == "causal-lm" else 12
    return Scale(weights, each * model.config.num_hidden_layers * model.config.hidden_size, peak)


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


def find_obstacle() -> str:
    """Compile a function; return why torch cannot (no compiler, no headers of Python, no Triton), "" where it can."""
    began, refused = time.perf_counter(), {}
    compiled = torch.compile(lambda rows: torch.nn.functional.gelu(rows).sum(1), dynamic=True)
    attempt("a compiled function", lambda: compiled(torch.ones(6, 10, device=DEVICE)).cpu(), refused)
    if refused:
        return refused["a compiled function"]["why"]
    print(f"torch can compile here: a function took {time.perf_counter() - began:.0f} s", flush=True)
    return ""


def release() -> None:
    """Give memory back before the next one takes its turn."""
    gc.collect()
    torch.compiler.reset()  # it counts how often a kind of model was compiled, and gives up
    for name in ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_MIXED_PRECISION"):
        os.environ.pop(name, None)  # transformers 4 leaves there what a Trainer asked for, and the next would get it
    if GPU:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # left on by a compiled one
        torch.cuda.empty_cache()


Failures = dict[str, dict[str, str]]
"""Who failed: `why`, a line, and `where`, the end of what Python says of it."""


def attempt(name: str, do: Callable[[], Any], failed: Failures) -> Any:
    """Return what `do` returns; None where it fails, with a note in `failed` and on the screen."""
    try:
        return do()
    except Exception as error:  # no compiler, no Python.h, no memory, a kernel that does not take this: all of them
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        why = f"{type(error).__name__}: {' '.join(lines[:3])[:400]}"
        failed[name] = {"why": why, "where": traceback.format_exc()[-4000:]}
        print(f"  {name} failed: {why}", flush=True)
        return None


@dataclass
class Results:
    """Turns by contender, of the rounds from the first on, and who failed."""

    turns: dict[str, list[Turn]]
    failed: Failures = field(default_factory=dict)


def race(
    contenders: dict[str, Callable[[], Turn]], rounds: int, until: float, note: Callable[[Results], None]
) -> Results:
    """Let all take turns, forwards and backwards; `note` is called after each.

    No turn begins after `until`, by time.perf_counter(), nor one that would end later if it took as long as the one
    before. Who failed takes no further ones.
    """
    found, costs = Results({each: [] for each in contenders}), dict.fromkeys(contenders, 0.0)
    for number in range(rounds):
        late = []
        for each in list(contenders)[:: 1 if number % 2 == 0 else -1]:
            began = time.perf_counter()
            if each in found.failed:
                continue
            if began + costs[each] > until:
                late.append(each)
                continue
            turn = attempt(each, contenders[each], found.failed)
            release()
            costs[each] = time.perf_counter() - began
            if turn:
                found.turns[each].append(turn)
                print(f"  {number + 1}/{rounds} {each}: {turn.tokens_per_second:,.0f} tokens/s; warm-up took "
                      f"{turn.warm_up_s:.0f} s, all {costs[each]:.0f} s", flush=True)  # fmt: skip
            note(found)
        if late:
            print(f"  {number + 1}/{rounds}: no time was left for {'; '.join(late)}", flush=True)
    return found


def judge(model: str, found: Results, scale: Scale) -> list[dict[str, Any]]:
    """Return a line of numbers for each that took turns; the first is dropped, where there are more.

    `speeds` and `warm_up_s` are those of all rounds, from the first on.
    """
    lines = []
    for each, taken in found.turns.items():
        if not taken:
            continue
        kept = taken[1:] or taken
        speeds = [turn.tokens_per_second for turn in taken]
        lines.append({
            "model": model, "contender": each, "rows": int(each.partition("batch ")[2].partition(",")[0]),
            "compiled": each.endswith("compiled"), "rounds": len(kept), "first_dropped": len(taken) > 1,
            "tokens_per_second": median(turn.tokens_per_second for turn in kept), "speeds": speeds,
            "lowest": min(speeds[-len(kept):]), "highest": max(speeds[-len(kept):]),
            "mfu": median(map(scale.find_share, kept)), "peak_gib": max(turn.peak_bytes for turn in kept) / 2**30,
            "step_ms": 1000 * median(turn.seconds / turn.steps for turn in kept),
            "warm_up_s": [turn.warm_up_s for turn in taken], "recompiled": sum(turn.compiled[1] for turn in kept),
        })  # fmt: skip
    return lines


def measure_checkpoints(shape: Shape, failed: Failures) -> list[dict[str, Any]]:
    """Return how long a save keeps the training loop of each, and how much it writes; the first save is dropped."""
    arguments = {"pad": Pad(get_task(shape.task).per_token), "per_device_train_batch_size": shape.batch, "bf16": True}
    makers: dict[str, Make] = {
        "Trainer's save": partial(make_trainer, shape, **arguments),
        "job's save": partial(make_job, shape, attention="varlen"),
    }
    lines, table = [], make_table(shape)
    for name, make in makers.items():
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            line = attempt(name, partial(measure_saves, make, table, Path(folder)), failed)
        if line:
            lines.append({"contender": name} | line)
            print(f"{name}: the loop waits {line['stall_s']:.2f} s for {line['gib']:.1f} GiB", flush=True)
        release()
    return lines


def measure_saves(make: Make, table: TokenTable, folder: Path) -> dict[str, float]:
    """Return how many seconds the second save of a training keeps its loop, and how many GiB it writes."""
    trainer = make(table, folder)
    saves = Saves(trainer, folder)
    trainer.add_callback(saves)
    take_turn(trainer, 3)
    return {"stall_s": saves.seconds[-1], "gib": saves.bytes / 2**30}


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
    print(f"{'':<58}{'rounds':>7}{'tokens/s':>10}{'range':>20}{'MFU':>7}{'GiB':>7}{'ms/step':>9}{'warm-up':>9}"
          f"{'job is':>8}")  # fmt: skip
    ours = {
        line["rows"]: line["tokens_per_second"]
        for line in lines
        if "job, padded" in line["contender"] and not line["compiled"]
    }
    for line in lines:
        speed = ours.get(line["rows"], ours[min(ours)] if ours else None)
        ratio = f"{speed / line['tokens_per_second']:.2f}×" if speed else "–"
        spread, rounds = f"{line['lowest']:,.0f}–{line['highest']:,.0f}", line["rounds"]
        print(
            f"{line['model'] + ': ' + line['contender']:<58}{rounds if line['first_dropped'] else 'first':>7}"
            f"{line['tokens_per_second']:>10,.0f}{spread:>20}{line['mfu']:>7.1%}{line['peak_gib']:>7.1f}"
            f"{line['step_ms']:>9.1f}{max(line['warm_up_s']):>7.0f} s{ratio:>8}"
        )
    for line in lines:
        if line["recompiled"]:
            print(f"  {line['contender']} is too slow: torch compiled {line['recompiled']} graphs while its clock ran")


def print_goals(lines: list[dict[str, Any]]) -> None:
    """Print what is wanted and what was reached on a model, by ours as torch runs it and by ours compiled.

    The fastest of ours is held against the fastest of a kind of Trainer, where both took turns with as many rows;
    beside 8 of the tutorial's ours have the fewest that they have.
    """
    for compiled in (False, True):
        ours = [line for line in lines if "job" in line["contender"] and line["compiled"] == compiled]
        for kind, goal in AGAINST.items():
            if rivals := find_rivals(ours, lines, kind):
                ratio, said = compare(*rivals)
                one, other = (line["contender"] for line in rivals)
                print(f"  {ratio:.2f}x of {other}, by {one}: {say_met(ratio, goal)}, wanted {goal}x ({said})")
        if ours:
            best = max(ours, key=itemgetter("mfu"))
            share, wanted = best["mfu"], SHARES[best["model"]]
            print(f"  {share:.1%} MFU, by {best['contender']}: {say_met(share, wanted)}, wanted {wanted:.0%}")


def say_met(reached: float, wanted: float) -> str:
    """Return the word for it."""
    return "met" if reached >= wanted else "missed"


def find_rivals(
    ours: list[dict[str, Any]], lines: list[dict[str, Any]], kind: str
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return the fastest of ours and the fastest Trainer of a kind with as many rows, None where one is missing."""
    speed, rows = itemgetter("tokens_per_second"), {line["rows"] for line in ours}
    theirs = [line for line in lines if "Trainer" in line["contender"] and kind in line["contender"]]
    if kind != "fp32":
        theirs = [line for line in theirs if line["rows"] in rows]
    if not (ours and theirs):
        return None
    best = max(theirs, key=speed)
    like = min(rows) if kind == "fp32" else best["rows"]
    return max((line for line in ours if line["rows"] == like), key=speed), best


def compare(one: dict[str, Any], other: dict[str, Any]) -> tuple[float, str]:
    """Return how many times as fast `one` was in the rounds in which both took turns, and which those are."""
    both = min(len(one["speeds"]), len(other["speeds"]))
    kept = slice(min(1, both - 1), both)
    said = f"{both - 1} of {both} rounds count" if both > 1 else "the first round alone counts, in which all is new"
    return median(one["speeds"][kept]) / median(other["speeds"][kept]), said


def read_words(words: list[str] | None = None) -> argparse.Namespace:
    """Return what was asked for on the command line; what names nothing ends the process with 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(SHAPES))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", action="append", default=[], metavar="PART",
                        help="a part of the names of those that take turns: 'job', 'batch 256'; or again")  # fmt: skip
    parser.add_argument("--compiled", action="store_true", help="with those whose model torch compiles: takes long")
    parser.add_argument("--minutes", type=float, default=7,
                        help="no turn begins that would end later, by its last one; saves come after")  # fmt: skip
    parser.add_argument("--saves", action="store_true", help="no turns, only the checkpoints of the largest model")
    asked = parser.parse_args(words)
    if unknown := [name for name in asked.models if name not in SHAPES]:
        parser.error(f"there is no model {', '.join(unknown)}; there are {', '.join(SHAPES)}")
    if asked.saves and LARGEST not in asked.models:
        parser.error(f"--saves measures {LARGEST}, which is not among the models that are named")
    names = [each for shape in find_shapes(asked).values() for each in list_contenders(shape)]
    for part in asked.only:
        named = [each for each in names if part in each]
        if not named:
            parser.error(f"--only {part!r} is in no name; there are {'; '.join(dict.fromkeys(names))}")
        if not asked.compiled and all(each.endswith("compiled") for each in named):
            parser.error(f"--only {part!r} names those alone that take part with --compiled")
    return asked


def find_shapes(asked: argparse.Namespace) -> dict[str, Shape]:
    """Return the shapes of the models that are asked for, by name."""
    shapes = {name: SHAPES[name] for name in asked.models}
    if not asked.tiny:
        return shapes
    return {name: replace(each, sizes=TINY[name], batch=2, steps=1, rounds=2) for name, each in shapes.items()}


def choose_contenders(shape: Shape, asked: argparse.Namespace) -> dict[str, Make]:
    """Return those that were asked for, by name."""
    return {
        each: make
        for each, make in list_contenders(shape).items()
        if (asked.compiled or not each.endswith("compiled"))
        and (not asked.only or any(part in each for part in asked.only))
    }


@dataclass
class Report:
    """What goes to $OUT/gpu.json: the machine, a line for each in a race, saves, and who failed, by model."""

    device: str
    torch: str
    transformers: str
    peak_flops: float
    no_compiler: str = ""
    race: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    failed: dict[str, Failures] = field(default_factory=dict)

    def write(self) -> None:
        """Write what is there; a lease may end at any time."""
        if out := os.environ.get("OUT"):
            write_json(Path(out) / "gpu.json", asdict(self))


def race_model(name: str, shape: Shape, contenders: dict[str, Make], until: float, report: Report) -> None:
    """Race on one model, and print who reached what."""
    table, scale, before = make_table(shape), make_scale(shape, report.peak_flops), report.race
    release()

    def turn(make: Make) -> Turn:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            return take_turn(make(table, Path(folder)), shape.steps)

    def note(found: Results) -> None:
        report.race = before + judge(name, found, scale)
        report.failed[name] = found.failed
        report.write()

    turns = {each: partial(turn, make) for each, make in contenders.items()}
    lines = judge(name, race(turns, shape.rounds, until, note), scale)
    print_table(lines)
    print_goals(lines)


def start_report(asked: argparse.Namespace) -> Report:
    """Measure the machine and print what it is; without a compiler nobody who needs one will take part."""
    peak = measure_peak(256 if asked.tiny else 8192)
    device = torch.cuda.get_device_name() if GPU else "this processor"
    print(f"{device}: {peak / 1e12:.0f} TFLOP/s (bf16 matrix product), torch {torch.__version__}, "
          f"transformers {transformers.__version__}", flush=True)  # fmt: skip
    report = Report(device, torch.__version__, transformers.__version__, peak)
    if asked.compiled:
        torch._dynamo.config.fail_on_recompile_limit_hit = True  # else torch would go on without, and not say so
        report.no_compiler = find_obstacle()
        if report.no_compiler:
            print("torch cannot compile here: those that are compiled take no turns", flush=True)
            asked.compiled = False
    return report


def main() -> None:
    """Race on each model that is named, then save the largest."""
    asked = read_words()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    os.environ["ACCELERATE_DYNAMO_USE_DYNAMIC"] = "true"
    deadline, shapes = time.perf_counter() + 60 * asked.minutes, find_shapes(asked)
    report = start_report(asked)
    for number, (name, shape) in enumerate(shapes.items()):
        began = time.perf_counter()
        contenders = {} if asked.saves else choose_contenders(shape, asked)
        if contenders:
            until = began + (deadline - began) / (len(shapes) - number)
            race_model(name, shape, contenders, until, report)
        elif not asked.saves:
            print(f"{name}: nobody who can take a turn was asked for", flush=True)
        if name == LARGEST:
            report.checkpoints = measure_checkpoints(shape, report.failed.setdefault(name, {}))
        report.write()
        print(f"{name}: {time.perf_counter() - began:.0f} s in all", flush=True)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # on an H200 the interpreter took more than 20 s to end
