"""Running an ONNX file over a split in a fresh process that never imports torch.

`python -m job.export.measure TASK FOLDER PAD_ID MODEL OUTPUT` computes every row once.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from job.data import TokenTable, save_array
from job.errors import GateFailed, ResourceExhausted, blames_node, lacks_memory
from job.liveness import die_with_parent
from job.processor import limit_threads
from job.recipe import Run
from job.tasks import Task, get_task, join_outputs, list_parts

MICRO_BATCH_ROWS = 16


class Rows(NamedTuple):
    """A split of a task, and what fills its short rows up."""

    task: Task
    table: TokenTable
    pad_id: int

    @staticmethod
    def open(task: str, folder: str, pad_id: str) -> Rows:
        """Return what three words of a command line name, those of `name`."""
        return Rows(get_task(task), TokenTable.open(Path(folder)), int(pad_id))

    @staticmethod
    def name(run: Run, split: str) -> list[str]:
        """Return the words TASK FOLDER PAD_ID for a run's split."""
        return [run.recipe.kind, str(run.tokens(split)), str(run.read("data.json")["pad_id"])]


def compute_answers(run: Run, model: Path, split: str) -> np.ndarray:
    """Return the task's answers float32 [units, k] of an ONNX file on a split, from a process of its own.

    Raises GateFailed (15) when the file does not run, ResourceExhausted (78) for what this node lacks.
    """
    output = run.folder / "measured" / f"{model.stem}-{split}.npy"
    output.parent.mkdir(exist_ok=True)
    call_process("job.export.measure", [*Rows.name(run, split), str(model), str(output)])
    return np.asarray(np.load(output, allow_pickle=False))


def call_process(module: str, words: list[str]) -> None:
    """Run a module of this room as a process of its own; see `compute_answers` for what it raises."""
    result = subprocess.run([sys.executable, "-m", module, *words], capture_output=True, text=True)
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or ["killed"])[-1][:300]
        names = ", ".join(Path(word).name for word in words if ".onnx" in word)
        if result.returncode == -signal.SIGKILL or lacks_memory(result.stderr):
            raise ResourceExhausted(f"export: memory is too small to run {names} ({reason}); use a larger machine")
        if blames_node(result.stderr):
            raise ResourceExhausted(
                f"export: this node lacks what it takes to run {names} ({reason}); free space, or raise its limits"
            )
        raise GateFailed(f"export: {names} does not run: {reason}; nothing is released, the checkpoint is kept")


def open_session(path: Path, threads: int = 0) -> Any:
    """Return an ONNX Runtime session on the processor; `threads` 0: one for each core, or as many as a quota allows."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads or limit_threads(), 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def open_sessions(model: Path, threads: int = 0) -> list[Any]:
    """Return the sessions of a model's files: one, or its encoder's and its decoder's."""
    return [open_session(part, threads) for part in list_parts(model)]


def run_micro_batches(
    answer: Callable[[dict[str, np.ndarray]], Any], rows: Rows, positions: np.ndarray
) -> Iterator[tuple[np.ndarray, Any]]:
    """Yield (positions, answer) of micro-batches of like length, longest first."""
    for part in rows.table.cut(positions, rows.task.max_batch_tokens, MICRO_BATCH_ROWS):
        yield part, answer(rows.table.pad(part, rows.pad_id))


def select_inputs(session: Any, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return of a padded batch what a session takes; texts without segments are all of the first, nothing is cached."""
    mask = batch["attention_mask"]
    filled = {
        "token_type_ids": np.zeros_like(mask),
        "position_ids": np.maximum(mask.cumsum(axis=1) - 1, 0),
        "use_cache_branch": np.array([False]),
        **batch,
    }
    return {
        entry.name: filled[entry.name] if entry.name in filled else empty_cache(entry, len(mask))
        for entry in session.get_inputs()
    }


def empty_cache(entry: Any, rows: int) -> np.ndarray:
    """Return keys or values of no token, float32 [rows, heads, 0, size], for an input of a decoder."""
    _, *others = entry.shape
    return np.zeros([rows, *(size if isinstance(size, int) else 0 for size in others)], dtype=np.float32)


def read_source(encoder: Any, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return what a decoder takes of a padded batch, whose sources the encoder reads."""
    (hidden,) = encoder.run(["last_hidden_state"], select_inputs(encoder, batch))
    ids = batch["decoder_input_ids"]
    source = {"encoder_attention_mask": batch["attention_mask"], "encoder_hidden_states": hidden}
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)} | source


def compute_batch(sessions: list[Any], task: Task, batch: dict[str, np.ndarray]) -> np.ndarray:
    """Return the logits [rows, …, k] of a padded batch."""
    *encoder, last = sessions
    inputs = read_source(encoder[0], batch) if encoder else batch
    outputs = last.run(list(task.outputs), select_inputs(last, inputs))
    return np.asarray(join_outputs(task, dict(zip(task.outputs, outputs, strict=True))))


def run_table(sessions: list[Any], rows: Rows) -> np.ndarray:
    """Compute every row; return the task's answers float32 [units, k]."""
    table, answer = rows.table, partial(compute_batch, sessions, rows.task)
    parts = run_micro_batches(answer, rows, np.arange(len(table)))
    return table.gather((part, rows.task.reduce(logits, table.pad_labels(part))) for part, logits in parts)


def main(task: str, folder: str, pad_id: str, model: str, output: str) -> None:
    """Measure once in this process; the arguments are those of the command line."""
    die_with_parent()
    rows = Rows.open(task, folder, pad_id)
    save_array(Path(output), run_table(open_sessions(Path(model)), rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
