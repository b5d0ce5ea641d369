"""Running an ONNX file over a split in a fresh process that never imports torch.

`measure_onnx` starts `python -m job.export.measure FILE TABLE PAD_ID OUTPUT` and reads what it
leaves: logits and seconds, as a service that loads the file would see them.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from job.errors import GateFailed
from job.recipe import Run

MICRO_BATCH_ROWS = 16
_TIMED_ROWS = 512


@dataclass(frozen=True)
class Measurement:
    """logits float32 [rows, labels] in the split's order; seconds of computing `timed_rows` of them."""

    logits: np.ndarray
    seconds: float
    timed_rows: int


def measure_onnx(run: Run, model: Path, split: str) -> Measurement:
    """Run `model` over a split in a process of its own; raise GateFailed (15) when it does not run."""
    output = run.folder / "measured" / f"{model.stem}-{split}.npz"
    output.parent.mkdir(exist_ok=True)
    pad_id = run.read("data.json")["pad_id"]
    command = [sys.executable, "-m", "job.export.measure", str(model), str(run.tokens(split)), str(pad_id), str(output)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or ["killed"])[-1][:300]
        raise GateFailed(f"export: {model.name} does not run: {reason}; nothing is released, the checkpoint is kept")
    with np.load(output, allow_pickle=False) as saved:
        return Measurement(saved["logits"], float(saved["seconds"]), int(saved["timed_rows"]))


def run_table(session: Any, table: Any, pad_id: int, positions: np.ndarray) -> np.ndarray:
    """Compute rows at `positions` in micro-batches of like length; return float32 [len(positions), labels]."""
    wanted = {node.name for node in session.get_inputs()}
    order = np.argsort(-table.lengths[positions], kind="stable")
    outputs: np.ndarray | None = None
    for start in range(0, len(order), MICRO_BATCH_ROWS):
        chosen = order[start : start + MICRO_BATCH_ROWS]
        batch = table.pad(positions[chosen], pad_id)
        batch.setdefault("token_type_ids", np.zeros_like(batch["input_ids"]))
        logits = session.run(["logits"], {name: batch[name] for name in wanted})[0]
        outputs = np.empty((len(positions), logits.shape[1]), dtype=np.float32) if outputs is None else outputs
        outputs[chosen] = logits
    return outputs if outputs is not None else np.empty((0, 0), dtype=np.float32)


def main(model: str, folder: str, pad_id: str, output: str) -> None:
    """Measure once in this process; the arguments are those of the command line."""
    import onnxruntime

    from job.data.tokenize import TokenTable

    onnxruntime.set_default_logger_severity(3)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    table = TokenTable.open(Path(folder))
    logits = run_table(session, table, int(pad_id), np.arange(len(table)))  # also warms the session up
    sample = np.linspace(0, len(table) - 1, min(_TIMED_ROWS, len(table))).astype(np.int64)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        run_table(session, table, int(pad_id), sample)
        seconds.append(time.perf_counter() - started)
    np.savez(output, logits=logits, seconds=min(seconds), timed_rows=len(sample))


if __name__ == "__main__":
    main(*sys.argv[1:])
