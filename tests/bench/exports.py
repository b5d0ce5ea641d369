"""Side by side with optimum-cli: the int8 files of `job` and of `optimum-cli onnxruntime quantize`, of one checkpoint.

`make bench ONLY=export`. All files answer the same test rows in the same length-sorted micro-batches;
turns are interleaved forwards and backwards, the first round is dropped, and the ratio of processor
seconds has a bootstrap interval of 95 %. Judged on one thread, for which busy neighbours matter least;
the wall clock of all threads stands beside it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from job.export.latency import answer_rows
from job.export.measure import Rows, compute_batch, open_sessions, run_table
from job.processor import describe_processor
from job.recipe import Run

ROUNDS, ROWS = 9, 256
PAIRS = (
    ("fp32 job", "fp32 optimum"),
    ("avx512_vnni job", "avx512_vnni optimum"),
    ("portable job", "avx512_vnni optimum"),
    ("portable job", "avx2 optimum"),
    ("portable job", "fp32 job"),
)
PEERS = {"avx512_vnni": "--avx512_vnni", "avx2": "--avx2"}


def main(assets: str, work: str) -> None:
    """Fine-tune a slice of the quickstart, export it both ways, print the comparison."""
    folder = Path(work).absolute()
    run = fine_tune(Path(assets).absolute(), folder)
    files = list_files(run, export_by_optimum(run, folder / "optimum"))
    rows = Rows.open(run.recipe.task, str(run.tokens("test")), run.read("data.json")["pad_id"])
    table = rows.table
    print(f"{describe_processor()}; {len(table)} test rows, {ROWS} of them timed, load {os.getloadavg()[0]:.1f}")
    fp32 = run_table(open_sessions(files["fp32 job"]), rows)
    quality = {}
    for name, path in files.items():
        logits = run_table(open_sessions(path), rows)
        right, same = logits.argmax(1) == table.labels, logits.argmax(1) == fp32.argmax(1)
        quality[name] = (float(right.mean()), float(same.mean()), path.stat().st_size / (1 << 20))
    one = race(files, rows, 1, time.process_time)
    all_ = race(files, rows, 0, time.perf_counter)
    print(
        f"{'file':<28}{'accuracy':>9}{'agreement':>11}{'MiB':>7}{'1 thread, CPU ms/row':>22}{'all threads, ms/row':>21}"
    )
    for name, (accuracy, agreement, size) in quality.items():
        times = f"{np.median(one[name]):>22.3f}{np.median(all_[name]):>21.3f}"
        print(f"{name:<28}{accuracy:>9.4f}{agreement:>11.4f}{size:>7.1f}{times}")
    for ours, theirs in PAIRS:
        if ours in files and theirs in files:
            middle, low, high = compare(one[theirs], one[ours])
            print(f"{ours} is {middle:.2f}× as fast as {theirs} (95 %: {low:.2f} – {high:.2f}; processor time)")


def fine_tune(assets: Path, folder: Path) -> Run:
    """Return the finished run; the second call finds it done."""
    options = {
        "model.id": assets / "minilm-l6", "data.source": assets / "movie-reviews", "data.limit": 2000,
        "store.uri": folder / "store", "baselines": "[]", "export.latency": "false",
    }  # fmt: skip
    words = [word for key, value in options.items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "job", "run", "quickstart", "--run-id", "bench", "--work-dir", str(folder), *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1])["status"] == "released"
    return Run.load(folder / "runs" / "bench")


def export_by_optimum(run: Run, folder: Path) -> dict[str, Path]:
    """Do what Optimum's documentation says, with its own command line, on the same checkpoint."""
    files = {"fp32 optimum": folder / "model.onnx"}
    if not files["fp32 optimum"].exists():
        call_optimum("export", "onnx", "--model", str(run.bundle), "--task", "text-classification", str(folder))
    for name, option in PEERS.items():
        target = folder / name
        files[f"{name} optimum"] = target / "model_quantized.onnx"
        if not target.exists():
            call_optimum("onnxruntime", "quantize", "--onnx_model", str(folder), option, "-o", str(target))
    return files


def call_optimum(*words: str) -> None:
    subprocess.run([str(Path(sys.executable).with_name("optimum-cli")), *words], check=True, capture_output=True)


def list_files(run: Run, theirs: dict[str, Path]) -> dict[str, Path]:
    names = {"fp32": "model.onnx", "portable": "model_quantized.onnx", "avx512_vnni": "model_int8_avx512_vnni.onnx"}
    ours = {f"{name} job": run.bundle / "onnx" / file for name, file in names.items()}
    return {name: path for name, path in (ours | theirs).items() if path.exists()}


def race(files: dict[str, Path], rows: Rows, threads: int, clock: Callable[[], float]) -> dict[str, np.ndarray]:
    """Return milliseconds of a row in every round but the first, by file."""
    sessions = {name: open_sessions(path, threads) for name, path in files.items()}
    sample = np.linspace(0, len(rows.table) - 1, min(ROWS, len(rows.table))).astype(np.int64)
    times: dict[str, list[float]] = {name: [] for name in files}
    for number in range(ROUNDS):
        for name in list(files)[:: 1 if number % 2 else -1]:
            began = clock()
            answer_rows(partial(compute_batch, sessions[name]), rows, sample)
            times[name].append(1000 * (clock() - began) / len(sample))
    return {name: np.array(values[1:]) for name, values in times.items()}


def compare(theirs: np.ndarray, ours: np.ndarray) -> tuple[float, float, float]:
    """Return median ratio of paired rounds and its bootstrap interval."""
    ratios = theirs / ours
    drawn = np.random.default_rng(0).choice(ratios, size=(2000, len(ratios)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return float(np.median(ratios)), float(low), float(high)


if __name__ == "__main__":
    main(*sys.argv[1:])
