"""The quantize stage: int8 candidates per target, the rung chosen on validation, judged once on test.

A rung is one way to quantize; a target's rungs are tried in order, and the first that passes on
validation rows is the candidate. Test rows decide whether it is released.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from job.data.tokenize import TokenTable
from job.errors import GateFailed
from job.export.gate import compare_quality, passes
from job.export.measure import Measurement, measure_onnx
from job.export.onnx import onnx_size
from job.export.processor import can_judge, describe_processor
from job.recipe import Run
from job.store.manifest import hash_file
from job.tasks import get_task

log = logging.getLogger("job.export")


@dataclass(frozen=True)
class Rung:
    """One way to quantize weights and activations dynamically; `operators` None means all that can be."""

    name: str
    unsigned_weights: bool = False
    per_channel: bool = True
    reduce_range: bool = False
    operators: tuple[str, ...] | None = None


_MATMUL_ONLY = ("MatMul", "Gemm")
_SAFE = (
    # 7-bit weights cannot overflow the 16-bit sums of AVX2 and AVX-512 without VNNI
    Rung("u8s8 per-channel reduced range", reduce_range=True),
    Rung("u8s8 per-channel reduced range, MatMul only", reduce_range=True, operators=_MATMUL_ONLY),
    Rung("u8u8 per-tensor", unsigned_weights=True, per_channel=False),
)
_FULL = (
    Rung("u8s8 per-channel"),
    Rung("u8s8 per-tensor", per_channel=False),
    Rung("u8s8 per-channel, MatMul only", operators=_MATMUL_ONLY),
)
LADDERS: dict[str, tuple[Rung, ...]] = {"portable": _SAFE, "avx2": _SAFE[::-1], "avx512_vnni": _FULL, "arm64": _FULL}

FILE_NAMES = {"portable": "model_quantized.onnx"}
"""The portable file has the name that consumers look for; other targets carry theirs."""


def quantize_run(run: Run) -> dict[str, Any]:
    """Quantize for every target of the recipe; return numbers per target.

    Raises GateFailed (15) when no target that this processor can judge passes, unless the gate only reports.
    """
    measure = Measurer(run)
    gate = run.recipe.export.int8
    targets = {target: _climb(run, target, measure) for target in gate.targets}
    if gate.gate == "fail" and not any(result["accepted"] for result in targets.values()):
        tried = "; ".join(_explain(target, result) for target, result in targets.items())
        raise GateFailed(
            f"export.int8: no target passed ({tried}; limits: bound ≤ {gate.max_metric_drop:g}, agreement ≥ "
            f"{gate.min_agreement:g}); nothing is released, the checkpoint is kept. Change the limits, or set "
            "export.int8.gate: report_only, and run again: the training is not repeated"
        )
    return {"targets": targets, "fp32": measure.fp32("test"), "measured_on": describe_processor()}


class Measurer:
    """Measures files on splits, fp32 once per split, and compares int8 with it."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._task = get_task(run.recipe.task)
        self._fp32: dict[str, Measurement] = {}

    def fp32(self, split: str) -> dict[str, Any]:
        """Return the metric, seconds per row and size of the fp32 file."""
        measured = self._measure_fp32(split)
        return self._task.score(measured.logits, self._labels(split)) | {
            "ms_per_row": round(1000 * measured.seconds / measured.timed_rows, 3),
            "size": onnx_size(self._run.folder / "onnx" / "model.onnx"),
        }

    def compare(self, model: Path, split: str) -> dict[str, Any]:
        """Return quality, size ratio and speed-up of an int8 file against fp32."""
        fp32, int8 = self._measure_fp32(split), measure_onnx(self._run, model, split)
        fp32_size = onnx_size(self._run.folder / "onnx" / "model.onnx")
        return compare_quality(self._task, fp32.logits, int8.logits, self._labels(split)) | {
            "size": onnx_size(model),
            "size_ratio": round(onnx_size(model) / fp32_size, 4),
            "speedup": round(fp32.seconds / int8.seconds, 2),
            "ms_per_row": round(1000 * int8.seconds / int8.timed_rows, 3),
        }

    def _measure_fp32(self, split: str) -> Measurement:
        if split not in self._fp32:
            self._fp32[split] = measure_onnx(self._run, self._run.folder / "onnx" / "model.onnx", split)
        return self._fp32[split]

    def _labels(self, split: str) -> np.ndarray:
        return np.asarray(TokenTable.open(self._run.tokens(split)).labels)


def _climb(run: Run, target: str, measure: Measurer) -> dict[str, Any]:
    """Try a target's rungs on validation rows; judge the first that passes on test rows."""
    final = run.folder / "onnx" / FILE_NAMES.get(target, f"model_int8_{target}.onnx")
    final.unlink(missing_ok=True)
    if not can_judge(target):
        rung = LADDERS[target][0]
        _quantize(run, rung, final)
        return {"accepted": None, "rung": rung.name, "measured_on": describe_processor(), "sha256": hash_file(final)}
    rung, candidate, tried = _choose_rung(run, target, measure)
    judged = measure.compare(candidate, "test")
    result = judged | {"accepted": passes(judged, run.recipe.export.int8), "rung": rung.name, "tried": tried}
    log.info("int8 %s (%s)", _explain(target, result), rung.name)
    if result["accepted"]:
        shutil.move(candidate, final)
    return result | {"measured_on": describe_processor(), "sha256": hash_file(final) if result["accepted"] else None}


def _choose_rung(run: Run, target: str, measure: Measurer) -> tuple[Rung, Path, list[dict[str, Any]]]:
    """Return the first rung that passes on validation rows, else the one with the smallest bound; and all numbers."""
    gate = run.recipe.export.int8
    candidates: list[tuple[float, Rung, Path]] = []
    tried = []
    for number, rung in enumerate(LADDERS[target]):
        candidate = _quantize(run, rung, run.folder / "rungs" / f"{target}-{number}.onnx")
        quality = measure.compare(candidate, "validation")
        tried.append({"rung": rung.name, "validation": quality})
        # few validation rows cannot prove a rung, but they can choose one: n is demanded of the test rows alone
        if passes(quality | {"n": gate.min_rows}, gate):
            return rung, candidate, tried
        candidates.append((quality["drop_bound"], rung, candidate))
    _, rung, candidate = min(candidates, key=lambda entry: entry[0])
    return rung, candidate, tried


def _quantize(run: Run, rung: Rung, output: Path) -> Path:
    """Write the int8 model of one rung through Optimum's ORTQuantizer."""
    from onnxruntime.quantization import QuantFormat, QuantizationMode, QuantType
    from optimum.onnxruntime import ORTQuantizer
    from optimum.onnxruntime.configuration import QuantizationConfig

    config = QuantizationConfig(
        is_static=False,
        format=QuantFormat.QOperator,
        mode=QuantizationMode.IntegerOps,
        activations_dtype=QuantType.QUInt8,
        weights_dtype=QuantType.QUInt8 if rung.unsigned_weights else QuantType.QInt8,
        per_channel=rung.per_channel,
        reduce_range=rung.reduce_range,
        operators_to_quantize=list(rung.operators or ()),
    )
    scratch = output.parent / f"{output.stem}-scratch"
    large = onnx_size(run.folder / "onnx" / "model.onnx") > 7 << 30
    quantizer = ORTQuantizer.from_pretrained(run.folder / "onnx", file_name="model.onnx")
    quantizer.quantize(config, scratch, use_external_data_format=large)
    shutil.move(scratch / "model_quantized.onnx", output)
    shutil.rmtree(scratch)
    return output


def _explain(target: str, result: dict[str, Any]) -> str:
    if result["accepted"] is None:
        return f"{target}: this processor cannot judge it"
    verdict = "accepted" if result["accepted"] else "left out"
    return (
        f"{target} {verdict}: drop {result['drop']:+.4f}, bound {result['drop_bound']:+.4f}, "
        f"agreement {result['agreement']:.4f} on {result['n']} rows"
    )
