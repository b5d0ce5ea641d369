"""Running ONNX files over a split in a fresh process that never imports torch.

`python -m job.export.measure logits …` computes every row once; `… time …` races several files
against each other on the same rows, turn by turn, so that a busy machine slows all alike.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from job.data.tokenize import TokenTable
from job.errors import GateFailed, ResourceExhausted, lacks_memory
from job.liveness import die_with_parent
from job.recipe import Run

MICRO_BATCH_ROWS = 16
_TIMED_ROWS = 256
_ROUNDS = 5


def compute_logits(run: Run, model: Path, split: str) -> np.ndarray:
    """Return float32 [rows, labels] of an ONNX file on a split, in the split's order, from a process of its own.

    Raises GateFailed (15) when the file does not run, ResourceExhausted (78) for lack of memory.
    """
    output = run.folder / "measured" / f"{model.stem}-{split}.npy"
    output.parent.mkdir(exist_ok=True)
    _call(run, split, ["logits", str(output), str(model)])
    return np.asarray(np.load(output, allow_pickle=False))


def time_models(run: Run, models: list[Path]) -> list[float]:
    """Return milliseconds per test row of each file: the fastest of rounds in which all take turns."""
    output = run.folder / "measured" / "times.json"
    _call(run, "test", ["time", str(output), *map(str, models)])
    return [float(value) for value in json.loads(output.read_text())]


def _call(run: Run, split: str, words: list[str]) -> None:
    pad_id = run.read("data.json")["pad_id"]
    command = [sys.executable, "-m", "job.export.measure", str(run.tokens(split)), str(pad_id), *words]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or ["killed"])[-1][:300]
        names = ", ".join(Path(word).name for word in words[2:])
        if result.returncode == -signal.SIGKILL or lacks_memory(result.stderr):
            raise ResourceExhausted(f"export: memory is too small to run {names} ({reason}); use a larger machine")
        raise GateFailed(f"export: {names} does not run: {reason}; nothing is released, the checkpoint is kept")


def run_table(session: Any, table: TokenTable, pad_id: int, positions: np.ndarray) -> np.ndarray:
    """Compute rows at `positions` in micro-batches of like length; return float32 [len(positions), labels]."""
    wanted = {node.name for node in session.get_inputs()}
    order = np.argsort(-table.lengths[positions], kind="stable")
    parts = []
    for start in range(0, len(order), MICRO_BATCH_ROWS):
        batch = table.pad(positions[order[start : start + MICRO_BATCH_ROWS]], pad_id)
        batch.setdefault("token_type_ids", np.zeros_like(batch["input_ids"]))
        parts.append(session.run(["logits"], {name: batch[name] for name in wanted})[0])
    outputs = np.empty_like(sorted_outputs := np.concatenate(parts))
    outputs[order] = sorted_outputs
    return np.asarray(outputs, dtype=np.float32)


def _race(sessions: list[Any], table: TokenTable, pad_id: int) -> list[float]:
    """Return milliseconds per row of each session, the minimum over rounds."""
    sample = np.linspace(0, len(table) - 1, min(_TIMED_ROWS, len(table))).astype(np.int64)
    best = [float("inf")] * len(sessions)
    for _ in range(_ROUNDS):
        for index, session in enumerate(sessions):
            started = time.perf_counter()
            run_table(session, table, pad_id, sample)
            best[index] = min(best[index], 1000 * (time.perf_counter() - started) / len(sample))
    return best


def main(folder: str, pad_id: str, mode: str, output: str, *models: str) -> None:
    """Measure once in this process; the arguments are those of the command line."""
    die_with_parent()
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    table = TokenTable.open(Path(folder))
    sessions = [onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]) for model in models]
    if mode == "time":
        Path(output).write_text(json.dumps([round(value, 4) for value in _race(sessions, table, int(pad_id))]))
    else:
        np.save(output, run_table(sessions[0], table, int(pad_id), np.arange(len(table))), allow_pickle=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
