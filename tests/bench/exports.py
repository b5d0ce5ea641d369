"""Lane `onnx`: our int8 files and those of `optimum-cli onnxruntime quantize`, of one checkpoint; who answers first.

All files answer the same test rows on one thread, for which busy neighbours matter least: once in the same
length-sorted micro-batches, so that only the file differs; once theirs in batches of 32 in file order, as one reads in
Optimum's documentation, beside ours as we answer. How often each is right stands beside it, and a file of ours that is
right less often than its peer reaches no goal, however fast.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from racing import Turn, compare, race, run_command
from results import Bench, Row, compare_starts
from stopwatch import Stopwatch

from job.export.latency import answer_rows
from job.export.measure import Rows, compute_batch, open_sessions, run_table
from job.recipe import Run

TIMED_ROWS, BATCH = 512, 32
CLOSE, TIMES_AS_MANY = ("avx512_vnni job", "avx512_vnni optimum"), 3
"""Who have the same kernels and a goal race so many times as long: a few hundredths are between them."""
TEXT = "a moving film, full of small surprises, and acted as if nobody was watching"
PEERS = {"avx512_vnni": "--avx512_vnni", "avx2": "--avx2"}
IN_ORDER = f"its batches of {BATCH} in file order"
PAIRS = (
    ("fp32 job", "fp32 optimum", None),
    ("avx512_vnni job", "avx512_vnni optimum", 1.0),
    ("portable job", "avx2 optimum", 1.0),
    ("portable job", "avx512_vnni optimum", None),
    ("portable job", "fp32 job", None),
    ("avx512_vnni job", f"avx512_vnni optimum, {IN_ORDER}", 1.5),
    ("portable job", f"avx2 optimum, {IN_ORDER}", 1.5),
)
"""Ours, theirs, the goal; without words on batches both answer in the same shapes."""

Answer = Callable[[dict[str, np.ndarray]], Any]


def run_lane(bench: Bench) -> list[Row]:
    """Fine-tune a slice of the quickstart, export it both ways, race the files."""
    run = fine_tune(bench)
    files = list_files(run, export_by_optimum(run, bench.folder / f"optimum-{run.run_id}"))
    rows = Rows.open(run.recipe.task, str(run.tokens("test")), run.read("data.json")["pad_id"])
    if bench.tiny:
        rows = rows._replace(table=rows.table.take(np.arange(64)))
    said = {name: run_table(open_sessions(path), rows).argmax(1) for name, path in files.items()}
    right = {name: labels == np.asarray(rows.table.labels) for name, labels in said.items()}
    for name, path in files.items():
        same, size = (said[name] == said["fp32 job"]).mean(), path.stat().st_size / 2**20
        print(f"{name:<24} right {right[name].mean():.4f}, labels as fp32 {same:.4f}, {size:5.1f} MiB", flush=True)
    raced = {name for ours, peer, _ in PAIRS for name in (ours, peer)}
    count = min(TIMED_ROWS, len(rows.table))
    sample = np.linspace(0, len(rows.table) - 1, count).astype(np.int64)
    contenders = {}
    for name, path in files.items():
        opened = open_sessions(path, threads=1)
        contenders[name] = partial(take_turn, answer_rows, opened, rows, sample)
        contenders[f"{name}, {IN_ORDER}"] = partial(take_turn, answer_in_file_order, opened, rows, sample)
    turns = race_files({name: call for name, call in contenders.items() if name in raced}, bench.rounds)
    found = []
    for ours, peer, goal in PAIRS:
        if ours in turns and peer in turns:
            row = compare_files(f"{peer} ({ours})", turns[ours], turns[peer], goal)
            found.append(note_quality(row, right[ours], right[peer.partition(",")[0]]))
    return [*found, race_starts(bench, run)]


def fine_tune(bench: Bench) -> Run:
    """Return the finished run; the second call finds it done."""
    options = {
        "model.id": bench.assets / "minilm-l6", "data.source": bench.assets / "movie-reviews",
        "data.limit": 200 if bench.tiny else 2000, "export.int8.min_agreement": 0.5 if bench.tiny else 0.95,
        "store.uri": bench.folder / "store", "baselines": "[]", "export.latency": "false",
    }  # fmt: skip
    words = [word for key, value in options.items() for word in ("--set", f"{key}={value}")]
    name = "tiny" if bench.tiny else "bench"
    job = [sys.executable, "-m", "job", "run", "quickstart", "--run-id", name, "--work-dir", bench.folder, *words]
    assert run_command(job, bench.folder).numbers["status"] == "released"
    return Run.load(bench.folder / "runs" / name)


def export_by_optimum(run: Run, folder: Path) -> dict[str, Path]:
    """Do what Optimum's documentation says, with its own command line, on the same checkpoint."""
    files = {"fp32 optimum": folder / "model.onnx"}
    if not files["fp32 optimum"].exists():
        call_optimum("export", "onnx", "--model", run.bundle, "--task", "text-classification", folder)
    for name, option in PEERS.items():
        target = folder / name
        files[f"{name} optimum"] = target / "model_quantized.onnx"
        if not target.exists():
            call_optimum("onnxruntime", "quantize", "--onnx_model", folder, option, "-o", target)
    return files


def call_optimum(*words: object) -> None:
    """Run optimum-cli of this environment."""
    command = [Path(sys.executable).with_name("optimum-cli"), *words]
    subprocess.run([str(word) for word in command], check=True, capture_output=True)


def list_files(run: Run, theirs: dict[str, Path]) -> dict[str, Path]:
    """Return the files of both sides that there are, by name."""
    names = {"fp32": "model.onnx", "portable": "model_quantized.onnx", "avx512_vnni": "model_int8_avx512_vnni.onnx"}
    ours = {f"{name} job": run.bundle / "onnx" / file for name, file in names.items()}
    return {name: path for name, path in (ours | theirs).items() if path.exists()}


def take_turn(answer_all: Callable[..., None], sessions: list[Any], rows: Rows, sample: np.ndarray) -> Turn:
    """Answer the rows at positions `sample` in one way; what is measured includes filling batches up."""
    with Stopwatch() as used:
        answer_all(partial(compute_batch, sessions, rows.task), rows, sample)
    return Turn(used.cpu_s, used.wall_s, {"rows": len(sample)})


def race_files(contenders: dict[str, Callable[[], Turn]], rounds: int) -> dict[str, list[Turn]]:
    """Return the turns of all; those that are close go on against each other."""
    turns = race(contenders, rounds)
    if turns.keys() >= set(CLOSE):
        again = race({name: contenders[name] for name in CLOSE}, (TIMES_AS_MANY - 1) * rounds)
        turns |= {name: turns[name] + taken for name, taken in again.items()}
    return turns


def answer_in_file_order(answer: Answer, rows: Rows, sample: np.ndarray) -> None:
    """Answer in batches of 32 as they come, each filled up to its longest row."""
    for start in range(0, len(sample), BATCH):
        answer(rows.table.pad(sample[start : start + BATCH], rows.pad_id))


def compare_files(name: str, ours: list[Turn], theirs: list[Turn], goal: float | None) -> Row:
    """Return how much less processor time a row takes us."""
    pairs = zip(ours, theirs, strict=False)  # some raced longer, against each other
    mine, other = zip(*((turn.cpu_s, peer.cpu_s) for turn, peer in pairs), strict=True)
    pace = (ours[0].numbers["rows"] / np.median(seconds) for seconds in (mine, other))
    return Row(name, "×", compare(other, mine), goal, "{:,.0f} : {:,.0f} documents/CPU s".format(*pace))


def note_quality(row: Row, ours: np.ndarray, theirs: np.ndarray) -> Row:
    """Add how often both are right; a file that is right less often, beyond chance (paired, 95 %), is no equal."""
    lost = theirs.astype(float) - ours
    worse = lost.mean() - 1.96 * lost.std() / np.sqrt(len(lost)) > 0
    note = f"{row.note}; right {ours.mean():.4f} : {theirs.mean():.4f}"
    return replace(row, note=note, equal=not worse)


ORT_SCRIPT = """
import json, sys
from optimum.onnxruntime import ORTModelForSequenceClassification
from transformers import AutoTokenizer
folder, file, text = sys.argv[1:]
model = ORTModelForSequenceClassification.from_pretrained(folder, subfolder="onnx", file_name=file)
logits = model(**AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")).logits
print(json.dumps({"label": model.config.id2label[int(logits.argmax())]}))
"""


def race_starts(bench: Bench, run: Run) -> Row:
    """Race from the command line to the first answer of the same file in a local folder."""
    job = [sys.executable, "-m", "job", "predict", run.bundle, "--precision", "int8", TEXT]
    plain = [sys.executable, "-c", ORT_SCRIPT, run.bundle, "model_quantized.onnx", TEXT]
    commands = {"job": job, "optimum": plain}
    turns = race({name: partial(run_command, words, bench.folder) for name, words in commands.items()}, bench.rounds)
    said = {turn.numbers["label"] for taken in turns.values() for turn in taken}
    row = compare_starts("ORTModelForSequenceClassification: first answer (job predict)", turns, 5.0)
    return replace(row, note=f"{row.note}; both say {' and '.join(sorted(said))}", equal=len(said) == 1)
