"""A decoder's other way: a token at a time, with its keys and values cached, as consumers run it.

The gates read whole rows at once. Kernels for one token are others, and were wrong where those for many were right
(onnxruntime #29853), so what a small file answers both ways must be the same.
`python -m job.export.decode TASK FOLDER PAD_ID MODEL OUTPUT` answers a few rows both ways.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from job.data import TokenTable, save_array
from job.export.gate import compare_quality
from job.export.measure import Rows, call_process, empty_cache, open_sessions, read_source, run_table, select_inputs
from job.liveness import die_with_parent
from job.recipe import Run
from job.tasks import IGNORED_LABEL, get_task

ROWS, TOKENS = 16, 24


def compare_decoding(run: Run, model: Path, split: str) -> dict[str, Any]:
    """Return drop, its margin and agreement of rows' ends decoded token by token against the same rows read at once.

    What comes before is read at once, as consumers read a prompt. Every token of an end is asked for the one that
    follows it; of a source and its target, the target's first ones.
    """
    output = run.folder / "measured" / f"{model.stem}-decoded.npy"
    output.parent.mkdir(exist_ok=True)
    words = Rows.name(run, split)
    call_process("job.export.decode", [*words, str(model), str(output)])
    read, decoded = np.load(output, allow_pickle=False)
    rows = take_ends(Rows.open(*words))
    quality = compare_quality(get_task(run.recipe.kind), read, decoded, rows.table.truth)
    return {key: quality[key] for key in ("drop", "margin", "agreement", "n")}


def take_ends(rows: Rows) -> Rows:
    """Return the first ROWS rows, of which the last TOKENS tokens are each asked for the one that follows it.

    Conversations all begin with the same words. A target is whole where it begins.
    """
    if rows.table.label_offsets is not None:
        return take_head(rows)
    table = _ask_for_next(rows.table.take(np.arange(min(ROWS, len(rows.table)))))
    for begin, end in pairwise(table.offsets):
        table.labels[begin : max(end - TOKENS, begin)] = IGNORED_LABEL
    return rows._replace(table=table)


def take_head(rows: Rows) -> Rows:
    """Return the first ROWS rows cut to TOKENS tokens, each of which is asked for the one that follows it."""
    table = rows.table.head(ROWS, TOKENS)
    return rows._replace(table=table if table.label_offsets is not None else _ask_for_next(table))


def _ask_for_next(table: TokenTable) -> TokenTable:
    """Return a table whose labels are each token's next one; a row's last token has none."""
    labels = np.append(table.tokens[1:], 0).astype(np.int32)
    labels[table.offsets[1:] - 1] = IGNORED_LABEL
    return replace(table, labels=labels)


def decode_row(sessions: list[Any], batch: dict[str, np.ndarray], read: int = 0) -> np.ndarray:
    """Return logits float32 [1, tokens, vocabulary] of a batch of one row: `read` tokens at once, then each alone."""
    *encoder, session = sessions
    batch = read_source(encoder[0], batch) if encoder else batch
    names = [output.name for output in session.get_outputs()]
    cache = {entry.name: empty_cache(entry, 1) for entry in session.get_inputs() if entry.name.startswith("past")}
    ids, logits = batch["input_ids"], []
    for begin, end in pairwise([0, *range(max(read, 1), ids.shape[1] + 1)]):
        step = {"input_ids": ids[:, begin:end], "position_ids": np.arange(begin, end)[None]}
        step |= {"attention_mask": np.ones((1, end), dtype=np.int64), "use_cache_branch": np.array([begin > 0])}
        answers = dict(zip(names, session.run(names, select_inputs(session, batch | step | cache)), strict=True))
        logits.append(answers["logits"])
        present = {name: answers[name.replace("past_key_values", "present")] for name in cache}
        # what a decoder has made of the source it gives once, at the first token
        cache |= {name: value for name, value in present.items() if begin == 0 or ".encoder." not in name}
    return np.concatenate(logits, axis=1)


def main(task: str, folder: str, pad_id: str, model: str, output: str) -> None:
    """Answer both ways in this process; the arguments are those of the command line."""
    die_with_parent()
    rows, sessions = take_ends(Rows.open(task, folder, pad_id)), open_sessions(Path(model))
    table, parts = rows.table, []
    for position in range(len(table)):
        place = np.array([position])
        labels = table.pad_labels(place)
        read = int((labels[0] != IGNORED_LABEL).argmax())  # what nobody asks about
        logits = decode_row(sessions, table.pad(place, rows.pad_id), read)
        parts.append((place, rows.task.reduce(logits, labels)))
    save_array(Path(output), np.stack([run_table(sessions, rows), table.gather(parts)]))


if __name__ == "__main__":
    main(*sys.argv[1:])
