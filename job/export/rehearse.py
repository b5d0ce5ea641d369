"""The last look before a release: the bundle itself, opened as consumers open it, on texts.

Token tables and answers of earlier stages cannot show a tokenizer that does not belong to the model, a file
that was not copied, labels in another order, or inputs that a model does not take (optimum #1500, #1758).
This can. Whatever it finds ends the run with 15. What is asked of a classifier stands in `rehearse_answers.py`, of a
model that writes in `rehearse_writing.py`.
"""

from __future__ import annotations

import logging
from typing import Any

from job.errors import GateFailed
from job.export.bundle import has_onnx, list_onnx_files
from job.export.rehearse_answers import rehearse_answers
from job.export.rehearse_writing import rehearse_writing
from job.recipe import Run
from job.store.manifest import hash_file, list_files
from job.tasks import get_task, list_parts

log = logging.getLogger("job.export")


def rehearse_bundle(run: Run) -> dict[str, Any]:
    """Ask the bundle with transformers, Optimum and `job predict`; return what was seen and every file's sha256.

    Each ONNX file must be the one that its gate has let through.
    """
    _check_files(run)
    task = get_task(run.recipe.kind)
    seen = rehearse_writing(run, task) if task.generates else rehearse_answers(run, task)
    log.info("the bundle answers %d texts as the trained model does: transformers, Optimum and job predict", seen["n"])
    return seen | {"files": {path: hash_file(run.bundle / path) for path in list_files(run.bundle)}}


def _check_files(run: Run) -> None:
    """Hold every ONNX file of the bundle against the digest with which it passed."""
    folder, passed = run.bundle / "onnx", list_onnx_files(run.read("records.json")).values()
    proven = {part.name for about in passed for part in list_parts(folder / about["file"])}
    wrong = sorted({path.name for path in folder.glob("*.onnx")} - proven)
    wrong += [about["file"] for about in passed if not has_onnx(folder / about["file"], about["sha256"])]
    if wrong:
        raise GateFailed(
            f"release: onnx/{wrong[0]} is not the file that passed its gate; nothing is released, the "
            "checkpoint is kept"
        )
