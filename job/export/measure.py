"""Running an ONNX file over a split in a fresh process that never imports torch.

`python -m job.export.measure FOLDER PAD_ID MODEL OUTPUT` computes every row once.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from job.data.tokenize import TokenTable
from job.errors import GateFailed, ResourceExhausted, lacks_memory
from job.liveness import die_with_parent
from job.recipe import Run

MICRO_BATCH_ROWS = 16


def compute_logits(run: Run, model: Path, split: str) -> np.ndarray:
    """Return float32 [rows, labels] of an ONNX file on a split, in the split's order, from a process of its own.

    Raises GateFailed (15) when the file does not run, ResourceExhausted (78) for lack of memory.
    """
    output = run.folder / "measured" / f"{model.stem}-{split}.npy"
    output.parent.mkdir(exist_ok=True)
    pad_id = str(run.read("data.json")["pad_id"])
    call_process("job.export.measure", [str(run.tokens(split)), pad_id, str(model), str(output)])
    return np.asarray(np.load(output, allow_pickle=False))


def call_process(module: str, words: list[str]) -> None:
    """Run a module of this room as a process of its own; see `compute_logits` for what it raises."""
    result = subprocess.run([sys.executable, "-m", module, *words], capture_output=True, text=True)
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or ["killed"])[-1][:300]
        names = ", ".join(Path(word).name for word in words if ".onnx" in word)
        if result.returncode == -signal.SIGKILL or lacks_memory(result.stderr):
            raise ResourceExhausted(f"export: memory is too small to run {names} ({reason}); use a larger machine")
        raise GateFailed(f"export: {names} does not run: {reason}; nothing is released, the checkpoint is kept")


def open_session(path: Path, threads: int = 0) -> Any:
    """Return an ONNX Runtime session on the processor; `threads` 0: one for each core."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_micro_batches(
    answer: Callable[[dict[str, np.ndarray]], Any], table: TokenTable, pad_id: int, positions: np.ndarray
) -> Iterator[tuple[np.ndarray, Any]]:
    """Yield (places in `positions`, answer) of micro-batches of like length, longest first."""
    order = np.argsort(-table.lengths[positions], kind="stable")
    for start in range(0, len(order), MICRO_BATCH_ROWS):
        places = order[start : start + MICRO_BATCH_ROWS]
        yield places, answer(table.pad(positions[places], pad_id))


def select_inputs(session: Any, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return of a padded batch what a session takes; texts without segments are all of the first."""
    filled = {"token_type_ids": np.zeros_like(batch["input_ids"]), **batch}
    return {entry.name: filled[entry.name] for entry in session.get_inputs()}


def compute_batch(session: Any, batch: dict[str, np.ndarray]) -> np.ndarray:
    """Return the logits [rows, labels] of a padded batch."""
    return np.asarray(session.run(["logits"], select_inputs(session, batch))[0])


def run_table(session: Any, table: TokenTable, pad_id: int, positions: np.ndarray) -> np.ndarray:
    """Compute rows at `positions`; return float32 [len(positions), labels]."""
    parts = list(run_micro_batches(partial(compute_batch, session), table, pad_id, positions))
    outputs = np.empty((len(positions), *parts[0][1].shape[1:]), dtype=np.float32)
    for places, logits in parts:
        outputs[places] = logits
    return outputs


def main(folder: str, pad_id: str, model: str, output: str) -> None:
    """Measure once in this process; the arguments are those of the command line."""
    die_with_parent()
    table = TokenTable.open(Path(folder))
    logits = run_table(open_session(Path(model)), table, int(pad_id), np.arange(len(table)))
    np.save(output, logits, allow_pickle=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
