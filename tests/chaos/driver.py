"""Kill real trainings with real signals at random moments, start them again, and compare the weights at the end.

    python tests/chaos/driver.py ASSETS --kills 20 --seed 1     (`make chaos N=20 SEED=1`)

Each run trains a small BERT through `job run`: on one and on two ranks, into a local folder and into an S3 server. It
is killed several times (everything, the supervisor alone, or one rank), each time started again on an empty disk, and
must end released, with the weights of the run that nobody disturbed, bit for bit, without ever having begun anew.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from cases import is_training

from job.store import RunStore
from job.store.commit import read_pointer
from job.store.restore import fetch_checkpoint
from job.store.server import DEFAULT_BUCKET, serve

KILLS_PER_RUN = 5
RUNS = 20  # at most; more kills than five in each of them go into the same runs
STEPS, SAVE_STEPS = 48, 6
LATEST_KILL_S = 25.0
UPLOAD_S = 5.0


@dataclass
class Report:
    """What was done and seen, for the table at the end."""

    kills: Counter[str] = field(default_factory=Counter)
    restarts: int = 0
    runs: int = 0
    lost_steps: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Chaos:
    """One run to disturb: where it stores, on how many ranks, and its own random numbers."""

    recipe: Path
    store: str
    run_id: str
    place: Path
    rng: random.Random
    report: Report

    @property
    def objects(self) -> Any:
        return RunStore(self.store, self.run_id).objects

    def committed_step(self) -> int:
        pointer = read_pointer(self.objects)
        return int(pointer["step"]) if pointer else 0


class Attempt:
    """One `job run` on an empty disk; reads its log meanwhile."""

    def __init__(self, chaos: Chaos, number: int) -> None:
        work = chaos.place / f"work-{number}"
        # the cache may stay: it holds downloads and tokens, by content
        command = [sys.executable, "-m", "job", "run", str(chaos.recipe), "--run-id", chaos.run_id]
        options = ["--work-dir", str(work), "--set", f"store.uri={chaos.store}"]
        self.process = subprocess.Popen(
            command + options, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        self.log: list[str] = []
        self.last_step, self.work = 0, work
        self.upload_steps = 0  # most steps that were done between a checkpoint and its commit
        self.reached: dict[int, float] = {}  # step → when
        self.killed = 0.0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line.rstrip())
            if found := re.search(r'"step": (\d+)', line):
                self.last_step = max(self.last_step, int(found.group(1)))
                self.reached[int(found.group(1))] = time.monotonic()
            if found := re.search(r"checkpoint of step (\d+) committed", line):
                self.upload_steps = max(self.upload_steps, self.last_step - int(found.group(1)))

    def resumed_from(self) -> int:
        found = re.search(r"resuming from the checkpoint of step (\d+)", "\n".join(self.log))
        return int(found.group(1)) if found else 0

    def uploading_s(self, committed: int) -> float:
        """Return for how long the checkpoint after the committed one had been under way when the kill came."""
        due = [when for step, when in self.reached.items() if step >= committed + SAVE_STEPS]
        return self.killed - min(due) if due else 0.0

    def wait_for_step(self, step: int, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while self.last_step < step and self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)

    def kill(self, what: str) -> str:
        """SIGKILL the supervisor and everything below it, the supervisor alone, or one of the ranks; return which.

        Before there is any rank, the supervisor is killed instead.
        """
        children = list_children(self.process.pid)
        self.killed = time.monotonic()
        if what == "one rank" and children:
            with suppress(ProcessLookupError):
                os.kill(random.choice(children), signal.SIGKILL)
            return what
        for pid in [self.process.pid, *(children if what == "everything" else [])]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return what if what == "everything" else "supervisor"

    def end(self, timeout_s: float = 300) -> tuple[int, str]:
        assert self.process.stdout is not None
        stdout = self.process.stdout.read()
        code = self.process.wait(timeout=timeout_s)
        self._reader.join(timeout=10)
        shutil.rmtree(self.work, ignore_errors=True)
        return code, stdout


def list_children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def disturb(chaos: Chaos, kills: int) -> int:
    """Kill and restart up to `kills` times, as long as the run is not over; return how often it was killed."""
    for number in range(kills):
        before, rng = chaos.committed_step(), chaos.rng
        attempt = Attempt(chaos, number)
        if rng.random() < 0.6:
            attempt.wait_for_step(before + rng.randrange(1, 2 * SAVE_STEPS), 60)
            time.sleep(rng.uniform(0, 0.5))
        else:
            attempt.wait_for_step(STEPS + 1, rng.uniform(0, LATEST_KILL_S))
        what = attempt.kill(rng.choice(["everything", "everything", "supervisor", "one rank"]))
        code, _ = attempt.end()
        if code == 0:
            return number
        chaos.report.kills[what] += 1
        judge_kill(chaos, attempt, before, (what, code))
    return kills


def judge_kill(chaos: Chaos, attempt: Attempt, before: int, how: tuple[str, int]) -> None:
    """Note what may not be after a kill: a wrong code, a fresh start, more lost work than the contract allows.

    It allows the save interval and the steps that are done while the upload runs. An upload that the kill cut off was
    not seen to its end; on a busy machine it may have been under way for `UPLOAD_S`, whatever number of steps that is.
    """
    report, after = chaos.report, chaos.committed_step()
    what, code = how
    if code not in ((-9, 18) if what != "one rank" else (79, 18)):
        report.problems.append(f"{chaos.run_id}: {what} killed, exit code {code}: {attempt.log[-3:]}")
    trained = any(map(is_training, attempt.log))
    if trained and before and attempt.resumed_from() < before:
        report.problems.append(f"{chaos.run_id}: step {before} was committed, resumed from {attempt.resumed_from()}")
    if after < before:
        report.problems.append(f"{chaos.run_id}: committed step fell from {before} to {after}")
    if attempt.last_step:
        lost = max(attempt.last_step - after, 0)
        report.lost_steps.append(lost)
        if lost > SAVE_STEPS + max(attempt.upload_steps, SAVE_STEPS) and attempt.uploading_s(after) > UPLOAD_S:
            report.problems.append(
                f"{chaos.run_id}: {lost} steps lost, uploads took {attempt.upload_steps} steps, the last was cut off "
                f"after {attempt.uploading_s(after):.1f} s"
            )


def finish(chaos: Chaos) -> str:
    """Let a run end undisturbed; return the sha256 of its trained weights."""
    code = 18
    for number in (98, 99):
        if code == 18:  # three kills before the first new checkpoint; by contract a start by hand gives three more
            attempt = Attempt(chaos, number)
            code, stdout = attempt.end(600)
            chaos.report.restarts += 1
    if code != 0:
        chaos.report.problems.append(f"{chaos.run_id}: ended with {code}: {attempt.log[-5:]}")
        return ""
    result = json.loads(stdout.strip().splitlines()[-1])
    if not result["release"]:
        chaos.report.problems.append(f"{chaos.run_id}: nothing was released")
    return hash_weights(chaos)


def hash_weights(chaos: Chaos) -> str:
    pointer, folder = read_pointer(chaos.objects), chaos.place / "weights"
    assert pointer is not None
    name = "model.safetensors"
    fetch_checkpoint(
        chaos.objects, pointer["manifest"], pointer["manifest_sha256"], folder, only=lambda path: path == name
    )
    return hashlib.sha256((folder / name).read_bytes()).hexdigest()


def make_model(assets: Path, folder: Path) -> Path:
    """Save a two-layer BERT with dropout and MiniLM's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets / "minilm-l6")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    torch.manual_seed(0)
    config = AutoConfig.for_model("bert", vocab_size=len(tokenizer), max_position_embeddings=128, **sizes)
    AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_data(assets: Path, folder: Path) -> Path:
    """Save a slice of the movie reviews."""
    folder.mkdir()
    for split, count in (("train", 400), ("test", 160)):
        with (assets / "movie-reviews" / f"{split}.csv").open(encoding="utf-8", newline="") as file:
            rows = list({row["text"]: row for row in csv.DictReader(file)}.values())[:count]
        with (folder / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
    return folder


def write_recipe(place: Path, model: Path, data: Path, ranks: int) -> Path:
    recipe = {
        "name": f"chaos-{ranks}",
        "task": "text-classification",
        "model": {"id": str(model)},
        "data": {"source": str(data), "max_length": 64, "num_workers": 2 if ranks == 1 else 0},
        "training": {
            "max_steps": STEPS, "save_steps": SAVE_STEPS, "eval_steps": 16, "global_batch_size": 16, "logging_steps": 1,
            "max_micro_batch_size": 4, "learning_rate": 1e-3,
        },
        "distributed": {"processes_per_node": ranks},
        "baselines": [],
        "export": {"int8": {"targets": ["portable"], "gate": "report_only"}},
        "store": {"uri": "set by the driver", "lease_ttl_s": 2},
    }  # fmt: skip
    path = place / f"recipe-{ranks}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def main(words: list[str]) -> int:
    """Run the chaos; print what was done and found; 0 when nothing is wrong."""
    parser = argparse.ArgumentParser()
    parser.add_argument("assets", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(words)
    report = Report()
    with tempfile.TemporaryDirectory() as folder, serve(Path(folder) / "s3") as variables:
        os.environ.update(variables)
        unleash(options, Path(folder), report)
    return tell(options, report)


def unleash(options: argparse.Namespace, place: Path, report: Report) -> None:
    model, data = make_model(options.assets, place / "model"), make_data(options.assets, place / "data")
    expected: dict[int, str] = {}
    left, number = options.kills, 0
    while left > 0:
        began, ranks, remote = time.monotonic(), 1 + number % 2, number // 2 % 2
        recipe = write_recipe(place, model, data, ranks)
        if ranks not in expected:
            quiet = Chaos(recipe, str(place / "store"), f"undisturbed-{ranks}", place, random.Random(0), report)
            expected[ranks] = finish(quiet)
        store = f"s3://{DEFAULT_BUCKET}/chaos" if remote else str(place / "store")
        rng = random.Random(f"{options.seed}-{number}")
        chaos = Chaos(recipe, store, f"chaos-{options.seed}-{number}", place, rng, report)
        kills = disturb(chaos, min(max(KILLS_PER_RUN, options.kills // RUNS), left))
        weights = finish(chaos)
        same = weights == expected[ranks] != ""
        if not same:
            report.problems.append(f"{chaos.run_id}: other weights than the undisturbed run")
        print(f"{chaos.run_id}: {ranks} rank(s), {'S3' if remote else 'folder'}, {kills} kills, "
              f"{'equal' if same else 'OTHER'} weights, {time.monotonic() - began:.0f} s", flush=True)  # fmt: skip
        report.runs, left, number = report.runs + 1, left - kills, number + 1


def tell(options: argparse.Namespace, report: Report) -> int:
    kills = ", ".join(f"{count} {what}" for what, count in sorted(report.kills.items()))
    lost = max(report.lost_steps, default=0)
    done = f"{report.runs} runs, {report.kills.total()} kills ({kills}), {report.restarts} undisturbed ends"
    print(f"chaos: seed {options.seed}, {done}, at most {lost} steps lost with a checkpoint every {SAVE_STEPS}, "
          f"{len(report.problems)} problems")  # fmt: skip
    for problem in report.problems:
        print(f"  {problem}")
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
