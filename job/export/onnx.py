"""The export stage: Optimum writes onnx/model.onnx; parity with torch is measured on every test row.

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
from job.errors import GateFailed, lacks_memory
from job.export.bundle import hash_onnx
from job.export.gate import check_parity, list_by_length
from job.export.measure import compute_answers
from job.recipe import Run
from job.tasks import get_task

log = logging.getLogger("job.export")


def export_run(run: Run) -> dict[str, Any]:
    """Export `final/` to `onnx/model.onnx` and compare it with torch on the whole test split."""
    from optimum.exporters.onnx import main_export

    folder, task = run.folder / "onnx", get_task(run.recipe.kind)
    shutil.rmtree(folder, ignore_errors=True)
    log.info("exporting to ONNX")
    try:
        main_export(
            str(run.final_model),
            folder,
            task=task.export_task,
            do_validation=False,
            trust_remote_code=False,
            device="cpu",
        )
    except (ValueError, NotImplementedError, RuntimeError, KeyError) as error:
        if lacks_memory(error):
            raise
        raise GateFailed(
            f"export: this model does not export to ONNX: {' '.join(str(error).split())[:300]}; "
            "the checkpoint is kept, nothing is released"
        ) from None
    found = compute_answers(run, folder / "model.onnx", "test")
    expected = np.load(run.folder / "evaluate" / "test.npy", allow_pickle=False)
    table = TokenTable.open(run.tokens("test"))
    positions = table.unit_positions
    parity = check_parity(task, expected, found, np.asarray(table.rows)[positions])
    parity["by_length"] = list_by_length(task, expected, found, table.lengths[positions])
    log.info(
        "ONNX fp32 equals torch on %(n)d rows: max |Δlogit| %(max_abs_logit_diff).2g, agreement %(agreement).4f", parity
    )
    return parity | {"model_sha256": hash_onnx(folder / "model.onnx"), "size": onnx_size(folder / "model.onnx")}


def move_model(source: Path, target: Path) -> None:
    """Move an ONNX file; external data comes along as `<target>_data`, which consumers look for."""
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
    """Return the bytes of an ONNX file and its external data."""
    return sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*"))
