"""Latency of the exported files and of torch, on made-up shapes, on the test split's real lengths, and of writing.

`python -m job.export.latency TASK FOLDER PAD_ID THREADS SHAPES OUTPUT NAME=PATH…` races contenders against each
other in a fresh process, turn by turn, so that a busy machine slows all alike, and keeps each one's
fastest turn. A path that is a folder is a torch model. Times are milliseconds of wall clock.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from job.data import TokenTable
from job.errors import JobError
from job.export.decode import decode_row, take_head
from job.export.measure import Rows, call_process, compute_batch, open_sessions, run_micro_batches
from job.liveness import die_with_parent
from job.recipe import Run
from job.tasks import Task, open_trained

log = logging.getLogger("job.export")

BATCHES, TOKENS = (1, 8), (16, 128, 512)
_ROWS = 64
_TURN_S, _LONG_S = 0.3, 10.0
"""A contender has as many turns as fit into the first, three at least; one is enough where it takes this long."""

Answer = Callable[[dict[str, np.ndarray]], Any]


class Contender(NamedTuple):
    """How a model answers a padded batch at once, and how it writes a row's tokens, each after those before it."""

    answer: Answer
    write: Answer


def measure_latency(run: Run, files: dict[str, Path]) -> list[dict[str, Any]]:
    """Race the ONNX `files` (by name), and torch where the recipe wants all shapes; return a list of cells.

    A cell is {threads, batch, tokens, ms: {name: milliseconds of a batch}}, or, on real lengths in length-sorted
    micro-batches, {threads, rows, ms: {name: milliseconds of a row}}; of a model that writes, {threads, written, ms:
    {name: milliseconds of a token}} for so many, one at a time. threads: 1, and 0 for all processors.
    """
    if not run.recipe.export.latency:
        return _race(run, files, threads=1, shapes=False)
    cells = []
    for threads in (1, 0):
        raced = _race(run, files, threads, shapes=True)
        for cell, torch in zip(raced, _race_torch(run, threads) or [{"ms": {}}] * len(raced), strict=True):
            cells.append(cell | {"ms": torch["ms"] | cell["ms"]})
    return cells


def _race_torch(run: Run, threads: int) -> list[dict[str, Any]]:
    """Return torch's cells, none where it does not run: they inform, nothing is decided by them."""
    try:
        return _race(run, {"torch": run.final_model}, threads, shapes=True)
    except JobError as error:
        log.warning("latency: torch was not measured (%s)", error)
        return []


def find_real(cells: list[dict[str, Any]]) -> dict[str, float]:
    """Return name → milliseconds of a row on real lengths with one thread, for which busy neighbours matter least."""
    return next(cell["ms"] for cell in cells if "rows" in cell and cell["threads"] == 1)


def _race(run: Run, contenders: dict[str, Path], threads: int, shapes: bool) -> list[dict[str, Any]]:
    output = run.folder / "measured" / "latency.json"
    output.parent.mkdir(exist_ok=True)
    longest = run.read("data.json")["max_length"]
    lengths = ",".join(str(tokens) for tokens in TOKENS if tokens <= longest) if shapes else ""
    words = [str(threads), lengths, str(output), *(f"{name}={path}" for name, path in contenders.items())]
    call_process("job.export.latency", [*Rows.name(run, "test"), *words])
    return list(json.loads(output.read_text()))


def _open_torch(folder: Path, task: Task, threads: int) -> Contender:
    import torch

    if threads:
        torch.set_num_threads(threads)
    model = open_trained(folder, task).eval()

    def answer(batch: dict[str, np.ndarray]) -> Any:
        with torch.inference_mode():
            return model(**{name: torch.from_numpy(array) for name, array in batch.items()})

    def write(batch: dict[str, np.ndarray]) -> None:
        row = {name: torch.from_numpy(array) for name, array in batch.items()}
        tokens, source, name = row["input_ids"], {}, "input_ids"
        with torch.inference_mode():
            if task.is_encoder_decoder:
                read = {key: row[key] for key in ("input_ids", "attention_mask")}
                source = {"encoder_outputs": model.get_encoder()(**read), "attention_mask": row["attention_mask"]}
                tokens, name = row["decoder_input_ids"], "decoder_input_ids"
            cache = None
            for place in range(tokens.shape[1]):
                step = {name: tokens[:, place : place + 1], "past_key_values": cache, "use_cache": True}
                cache = model(**step, **source).past_key_values

    return Contender(answer, write)


def _open_onnx(path: Path, task: Task, threads: int) -> Contender:
    sessions = open_sessions(path, threads)
    return Contender(partial(compute_batch, sessions, task), partial(decode_row, sessions))


def _take_turns(work: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Return name → milliseconds of the fastest turn."""
    best = dict.fromkeys(work, float("inf"))
    turns, started = 0, time.perf_counter()
    while True:
        for name, call in work.items():
            began = time.perf_counter()
            call()
            best[name] = min(best[name], 1000 * (time.perf_counter() - began))
        turns, spent = turns + 1, time.perf_counter() - started
        if spent > _LONG_S * len(work) or (turns >= 3 and spent > _TURN_S * len(work)):
            return best


def _make_batch(table: TokenTable, rows: int, tokens: int) -> dict[str, np.ndarray]:
    ids = np.resize(table.tokens, rows * tokens).astype(np.int64).reshape(rows, tokens)
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    return batch if table.label_offsets is None else batch | {"decoder_input_ids": ids}


def _measure_shapes(answers: dict[str, Answer], table: TokenTable, lengths: list[int]) -> Iterator[dict[str, Any]]:
    for rows in BATCHES:
        for tokens in lengths:
            batch = _make_batch(table, rows, tokens)
            turns = {name: partial(answer, batch) for name, answer in answers.items()}
            yield {"batch": rows, "tokens": tokens, "ms": _take_turns(turns)}


def _measure_real(answers: dict[str, Answer], rows: Rows) -> dict[str, Any]:
    sample = np.linspace(0, len(rows.table) - 1, min(_ROWS, len(rows.table))).astype(np.int64)
    turns = {name: partial(answer_rows, answer, rows, sample) for name, answer in answers.items()}
    return {"rows": len(sample), "ms": {name: total / len(sample) for name, total in _take_turns(turns).items()}}


def _measure_writing(contenders: dict[str, Contender], rows: Rows) -> Iterator[dict[str, Any]]:
    """Yield one cell for a model that writes; the tokens are those of the test split's longest beginning."""
    if not rows.task.generates:
        return
    head = take_head(rows)
    batch = head.table.pad(np.array([head.table.lengths.argmax()]), head.pad_id)
    tokens = batch.get("decoder_input_ids", batch["input_ids"]).shape[1]
    turns = _take_turns({name: partial(each.write, batch) for name, each in contenders.items()})
    yield {"written": tokens, "ms": {name: total / tokens for name, total in turns.items()}}


def answer_rows(answer: Answer, rows: Rows, sample: np.ndarray) -> None:
    """Answer the rows at positions `sample` in length-sorted micro-batches."""
    for _ in run_micro_batches(answer, rows, sample):
        pass


def main(task: str, folder: str, pad_id: str, threads: str, lengths: str, output: str, *contenders: str) -> None:
    """Measure in this process; the arguments are those of the command line."""
    die_with_parent()
    rows, opened = Rows.open(task, folder, pad_id), {}
    for name, _, path in (contender.partition("=") for contender in contenders):
        place, number = Path(path), int(threads)
        open_contender = _open_torch if place.is_dir() else _open_onnx
        opened[name] = open_contender(place, rows.task, number)
    answers = {name: contender.answer for name, contender in opened.items()}
    shapes = _measure_shapes(answers, rows.table, [int(tokens) for tokens in lengths.split(",") if tokens])
    measured = (*shapes, _measure_real(answers, rows), *_measure_writing(opened, rows))
    cells = [{"threads": int(threads)} | cell for cell in measured]
    for cell in cells:
        cell["ms"] = {name: float(f"{value:.4g}") for name, value in cell["ms"].items()}
    Path(output).write_text(json.dumps(cells))


if __name__ == "__main__":
    main(*sys.argv[1:])
