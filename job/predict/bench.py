"""`job predict --bench`: how fast a bundle answers on this processor."""

from __future__ import annotations

import time
from collections.abc import Iterable
from itertools import islice
from typing import Any

from job.errors import DataError
from job.predict.predictor import Predictor
from job.predict.tokens import Input
from job.processor import describe_processor
from job.tasks import list_parts

_SECONDS = 3.0


def measure_speed(predictor: Predictor, texts: Iterable[Input]) -> dict[str, Any]:
    """Answer the first texts again and again for some seconds; return rows and milliseconds of the fastest turn.

    Tokenizing is part of it. Raises DataError (11) where there is no text.
    """
    rows = list(islice(texts, predictor.bench_rows))
    if not rows:
        raise DataError("--bench: no text to answer; give texts, --file, or lines on stdin")
    predictor.predict(rows)  # the first turn fills caches
    best, turns, started = float("inf"), 0, time.perf_counter()
    while turns < 3 or time.perf_counter() - started < _SECONDS:
        began = time.perf_counter()
        predictor.predict(rows)
        best, turns = min(best, time.perf_counter() - began), turns + 1
    return {
        "file": predictor.model_path.name,
        "mib": round(sum(part.stat().st_size for part in list_parts(predictor.model_path)) / (1 << 20), 1),
        "rows": len(rows),
        "turns": turns,
        "rows_per_second": round(len(rows) / best, 1),
        "ms_per_row": round(1000 * best / len(rows), 3),
        "threads": predictor.threads,
        "processor": describe_processor(),
    }
