"""Lane `start`: how long one waits: for the first optimizer step, for a refusal, for help.

The quickstart's model and rows; models, rows and tokens are cached on both sides. The wall clock is what one waits for;
processor time, of all processes, stands beside it.
"""

from __future__ import annotations

import shutil
import sys
from functools import partial

import numpy as np
from ours import write_recipe
from racing import HERE, Turn, measure, race, run_command, run_until
from results import Bench, Row, compare_starts


def run_lane(bench: Bench) -> list[Row]:
    """Race to the first step, then time what must be answered at once."""
    return [race_first_steps(bench), *time_answers(bench)]


def race_first_steps(bench: Bench) -> Row:
    """Race from the command line to the first optimizer step of a new run."""
    work, plain, marker = bench.folder / "work", bench.folder / "plain", bench.folder / "plain-marker"
    model, data = bench.assets / "minilm-l6", bench.assets / "movie-reviews"
    recipe = write_recipe(
        bench.folder / "recipe.yaml", model, {"source": str(data), "max_length": 128}, str(bench.folder / "store"),
        max_steps=1000, global_batch_size=32, learning_rate=1e-4, save_steps=1000, eval_steps=1000,
    )  # fmt: skip
    job = [sys.executable, "-m", "job", "run", recipe, "--run-id", "first", "--work-dir", work]
    script = [sys.executable, HERE / "plain_script.py", model, data / "train.csv", plain, "--marker", marker]

    def start_ours() -> Turn:
        shutil.rmtree(work / "runs", ignore_errors=True)
        shutil.rmtree(bench.folder / "store", ignore_errors=True)
        return run_until(work / "runs" / "first" / "train" / "progress.json", job, bench.folder)

    turns = race({"job": start_ours, "plain": partial(run_until, marker, script, bench.folder)}, bench.rounds)
    return compare_starts("plain Trainer script: first optimizer step", turns, 2.0)


def time_answers(bench: Bench) -> list[Row]:
    """Return how long a refusal and help take."""
    bad = bench.folder / "bad.yaml"
    bad.write_text((bench.folder / "recipe.yaml").read_text().replace("learning_rate", "lerning_rate"))
    job = [sys.executable, "-m", "job"]
    turns = race(
        {
            "a bad recipe is refused (job run)": partial(run_command, [*job, "run", bad], bench.folder, code=10),
            "a bad recipe is refused (job check)": partial(run_command, [*job, "check", bad], bench.folder, code=10),
            "job --help": partial(run_command, [*job, "--help"], bench.folder),
        },
        bench.rounds,
    )
    rows = []
    for name, taken in turns.items():
        goal = 0.3 if "help" in name else 0.5
        note = f"CPU {np.median([turn.cpu_s for turn in taken]):.2f} s"
        rows.append(Row(name, "s", measure([turn.wall_s for turn in taken]), goal, note))
    return rows
