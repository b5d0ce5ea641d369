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
from job.export.measure import Rows, call_process, empty_cache, open_sessions, read_source, run_table, select_inputs
from job.liveness import die_with_parent
from job.recipe import Run
from job.tasks import IGNORED_LABEL, get_task

ROWS, TOKENS = 16, 24


def compare_decoding(run: Run, model: Path, split: str) -> dict[str, Any]:
    """Return drop and agreement of a split's first rows decoded token by token against the same rows read at once.

    Every token is asked for the one that follows it, prompts too; of a source and its target, those of the target.
    """
    output = run.folder / "measured" / f"{model.stem}-decoded.npy"
    output.parent.mkdir(exist_ok=True)
    words = [run.recipe.kind, str(run.tokens(split)), str(run.read("data.json")["pad_id"]), str(model), str(output)]
    call_process("job.export.decode", words)
    read, decoded = np.load(output, allow_pickle=False)
    rows = take_head(Rows.open(*words[:3]))
    quality = compare_quality(get_task(run.recipe.kind), read, decoded, rows.table.truth)
    return {key: quality[key] for key in ("drop", "agreement", "n")}


def take_head(rows: Rows) -> Rows:
    """Return the first ROWS rows cut to TOKENS tokens, each of which is asked for the one that follows it."""
    table = rows.table.head(ROWS, TOKENS)
    if table.label_offsets is not None:
        return rows._replace(table=table)
    labels = np.append(table.tokens[1:], 0).astype(np.int32)
    labels[table.offsets[1:] - 1] = IGNORED_LABEL
    return rows._replace(table=replace(table, labels=labels))


def decode_row(sessions: list[Any], batch: dict[str, np.ndarray]) -> np.ndarray:
    """Return logits float32 [1, tokens, vocabulary] of a batch of one row, each token alone after those before it."""
    *encoder, session = sessions
    batch = read_source(encoder[0], batch) if encoder else batch
    names = [output.name for output in session.get_outputs()]
    cache = {entry.name: empty_cache(entry, 1) for entry in session.get_inputs() if entry.name.startswith("past")}
    logits = []
    for place, token in enumerate(batch["input_ids"][0]):
        step = {"input_ids": np.array([[token]]), "position_ids": np.array([[place]])}
        step |= {"attention_mask": np.ones((1, place + 1), dtype=np.int64), "use_cache_branch": np.array([place > 0])}
        answers = dict(zip(names, session.run(names, select_inputs(session, batch | step | cache)), strict=True))
        logits.append(answers["logits"][:, -1])
        present = {name: answers[name.replace("past_key_values", "present")] for name in cache}
        # what a decoder has made of the source it gives once, at the first token
        cache |= {name: value for name, value in present.items() if place == 0 or ".encoder." not in name}
    return np.stack(logits, axis=1)


def main(task: str, folder: str, pad_id: str, model: str, output: str) -> None:
    """Answer both ways in this process; the arguments are those of the command line."""
    die_with_parent()
    rows, sessions = take_head(Rows.open(task, folder, pad_id)), open_sessions(Path(model))
    table, parts = rows.table, []
    for position in range(len(table)):
        place = np.array([position])
        logits = decode_row(sessions, table.pad(place, rows.pad_id))
        parts.append((place, rows.task.reduce(logits, table.pad_labels(place))))
    np.save(output, np.stack([run_table(sessions, rows), table.gather(parts)]), allow_pickle=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
