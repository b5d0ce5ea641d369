"""The export stage: Optimum writes one ONNX file, or two; parity with torch is measured on every test row.

Optimum only warns when torch and ONNX disagree, and looks at dummy inputs. Here real rows decide,
in a fresh process, and a difference beyond the tolerance ends the run with 15.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from job.data import TokenTable
from job.errors import GateFailed, blames_node
from job.export.bundle import find_exported, hash_onnx
from job.export.gate import check_parity, list_by_length
from job.export.measure import compute_answers
from job.export.supported import check_exportable
from job.recipe import Run
from job.tasks import get_task, list_parts

log = logging.getLogger("job.export")

UNMERGED, FIRST, FOLLOWING = "unmerged", "decoder_model.onnx", "decoder_with_past_model.onnx"
"""Folder and files of a decoder as it begins and as it goes on with what is cached; consumers take both in one."""


def export_run(run: Run) -> dict[str, Any]:
    """Export `final/` to `onnx/` and compare it with torch on the whole test split."""
    from optimum.exporters.onnx import main_export

    folder, task = run.folder / "onnx", get_task(run.recipe.kind)
    shutil.rmtree(folder, ignore_errors=True)
    log.info("exporting to ONNX")
    check_exportable(run.base_model, task)
    try:
        main_export(
            str(run.final_model),
            folder,
            task=task.export_task,
            do_validation=False,
            trust_remote_code=False,
            device="cpu",
        )
    except (ValueError, NotImplementedError, RuntimeError, TypeError, LookupError, AttributeError) as error:
        if blames_node(error):
            raise
        raise GateFailed(
            f"export: this model does not export to ONNX: {' '.join(str(error).split())[:300]}; "
            "the checkpoint is kept, nothing is released"
        ) from None
    model = find_exported(run)
    if task.is_encoder_decoder:
        set_aside(folder)
    found = compute_answers(run, model, "test")
    expected = np.load(run.folder / "evaluate" / "test.npy", allow_pickle=False)
    table = TokenTable.open(run.tokens("test"))
    positions = table.unit_positions
    parity = check_parity(task, expected, found, np.asarray(table.rows)[positions])
    parity["by_length"] = list_by_length(task, expected, found, table.lengths[positions])
    log.info(
        "ONNX fp32 equals torch on %(n)d rows: max |Δlogit| %(max_abs_logit_diff).2g, agreement %(agreement).4f", parity
    )
    return parity | {"file": model.name, "model_sha256": hash_onnx(model), "size": onnx_size(model)}


def set_aside(folder: Path) -> None:
    """Move the two decoders of which Optimum has merged one to where the quantizer looks for them."""
    unmerged = folder / UNMERGED
    unmerged.mkdir()
    for path in (path for name in (FIRST, FOLLOWING) for path in folder.glob(f"{name}*")):
        shutil.move(path, unmerged / path.name)


def move_model(source: Path, target: Path) -> None:
    """Move a model's ONNX files; external data come along as `<target>_data`, which consumers look for."""
    for part, place in zip(list_parts(source), list_parts(target), strict=True):
        _move_file(part, place)


def _move_file(source: Path, target: Path) -> None:
    import onnx

    parts = [path for path in source.parent.glob(f"{source.name}?*") if path.is_file()]
    if not parts:
        shutil.move(source, target)
        return
    target.with_name(f"{target.name}_data").unlink(missing_ok=True)  # onnx would append to it
    onnx.save_model(onnx.load(str(source)), str(target), save_as_external_data=True, location=f"{target.name}_data")
    for path in (source, *parts):
        path.unlink()


def onnx_size(path: Path) -> int:
    """Return the bytes of an ONNX file and its external data, and of the encoder before a decoder."""
    return sum(file.stat().st_size for part in list_parts(path) for file in part.parent.glob(f"{part.name}*"))
