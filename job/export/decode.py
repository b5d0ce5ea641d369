"""A decoder's other way: a token at a time, with its keys and values cached, as consumers run it.

The gates read whole rows at once. Kernels for one token are others, and were wrong where those for many were right
(onnxruntime #29853), so what a small file answers both ways must be the same.
`python -m job.export.decode TASK FOLDER PAD_ID MODEL OUTPUT` answers a few rows both ways.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from job.export.gate import compare_quality
from job.export.measure import Rows, call_process, empty_cache, open_session, run_table, select_inputs
from job.liveness import die_with_parent
from job.recipe import Run
from job.tasks import IGNORED_LABEL, get_task

ROWS, TOKENS = 16, 24


def compare_decoding(run: Run, model: Path, split: str) -> dict[str, Any]:
    """Return drop and agreement of a split's first rows decoded token by token against the same rows read at once.

    Every token is asked for the one that follows it, prompts too.
    """
    output = run.folder / "measured" / f"{model.stem}-decoded.npy"
    output.parent.mkdir(exist_ok=True)
    words = [run.recipe.kind, str(run.tokens(split)), str(run.read("data.json")["pad_id"]), str(model), str(output)]
    call_process("job.export.decode", words)
    read, decoded = np.load(output, allow_pickle=False)
    rows = _head(Rows.open(*words[:3]))
    quality = compare_quality(get_task(run.recipe.kind), read, decoded, rows.table.truth)
    return {key: quality[key] for key in ("drop", "agreement", "n")}


def _head(rows: Rows) -> Rows:
    table = rows.table.head(ROWS, TOKENS)
    labels = np.append(table.tokens[1:], 0).astype(np.int32)
    labels[table.offsets[1:] - 1] = IGNORED_LABEL
    return rows._replace(table=replace(table, labels=labels))


def decode_row(session: Any, ids: np.ndarray) -> np.ndarray:
    """Return logits float32 [1, tokens, vocabulary] of one row, each token given alone after those before it."""
    names = [output.name for output in session.get_outputs()]
    cache = {entry.name: empty_cache(entry, 1) for entry in session.get_inputs() if entry.name.startswith("past")}
    logits = []
    for place, token in enumerate(ids):
        mask = np.ones((1, place + 1), dtype=np.int64)
        step = {"input_ids": np.array([[token]], dtype=np.int64), "position_ids": np.array([[place]], dtype=np.int64)}
        inputs = select_inputs(session, {"attention_mask": mask, **step, **cache})
        answers = dict(zip(names, session.run(names, inputs), strict=True))
        logits.append(answers["logits"][:, -1])
        cache = {name: answers[name.replace("past_key_values", "present")] for name in cache}
    return np.stack(logits, axis=1)


def main(task: str, folder: str, pad_id: str, model: str, output: str) -> None:
    """Answer both ways in this process; the arguments are those of the command line."""
    die_with_parent()
    rows, session = _head(Rows.open(task, folder, pad_id)), open_session(Path(model))
    table, parts = rows.table, []
    for position in range(len(table)):
        place = np.array([position])
        logits = decode_row(session, table.pad(place, rows.pad_id)["input_ids"][0])
        parts.append((place, rows.task.reduce(logits, table.pad_labels(place))))
    np.save(output, np.stack([run_table(session, rows), table.gather(parts)]), allow_pickle=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
