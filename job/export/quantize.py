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
from job.export.measure import compute_logits, time_models
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


def int8_file_name(target: str) -> str:
    """Return a target's file name in onnx/: the portable one has the name that consumers look for."""
    return "model_quantized.onnx" if target == "portable" else f"model_int8_{target}.onnx"


def quantize_run(run: Run) -> dict[str, Any]:
    """Quantize for every target of the recipe; return numbers per target.

    Raises GateFailed (15) when no target that this processor can judge passes, unless the gate only reports.
    """
    judge = Judge(run)
    gate = run.recipe.export.int8
    targets: dict[str, Any] = {target: _climb(run, target, judge) for target in gate.targets}
    if gate.gate == "fail" and not any(result["accepted"] for result in targets.values()):
        tried = "; ".join(_explain(target, result) for target, result in targets.items())
        raise GateFailed(
            f"export.int8: no target passed ({tried}; limits: bound ≤ {gate.max_metric_drop:g}, agreement ≥ "
            f"{gate.min_agreement:g}); nothing is released, the checkpoint is kept. Change the limits, or set "
            "export.int8.gate: report_only, and run again: the training is not repeated"
        )
    return {"targets": targets, "fp32": _add_speed(run, targets) | judge.score_fp32("test")}


class Judge:
    """Compares int8 files with the fp32 file, whose logits are computed once per split."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._task = get_task(run.recipe.task)
        self._fp32: dict[str, np.ndarray] = {}

    def score_fp32(self, split: str) -> dict[str, Any]:
        """Return the task's metrics of the fp32 file."""
        return self._task.score(self._fp32_logits(split), self._labels(split))

    def compare(self, model: Path, split: str) -> dict[str, Any]:
        """Return metric, drop, bound, agreement and n of an int8 file against fp32."""
        int8 = compute_logits(self._run, model, split)
        return compare_quality(self._task, self._fp32_logits(split), int8, self._labels(split))

    def _fp32_logits(self, split: str) -> np.ndarray:
        if split not in self._fp32:
            self._fp32[split] = compute_logits(self._run, self._run.folder / "onnx" / "model.onnx", split)
        return self._fp32[split]

    def _labels(self, split: str) -> np.ndarray:
        return np.asarray(TokenTable.open(self._run.tokens(split)).labels)


def _climb(run: Run, target: str, judge: Judge) -> dict[str, Any]:
    """Try a target's rungs on validation rows; judge the first that passes on test rows."""
    final = run.folder / "onnx" / int8_file_name(target)
    final.unlink(missing_ok=True)
    about: dict[str, Any] = dict.fromkeys(("sha256", "size", "size_ratio", "ms_per_row", "speedup"))
    about["measured_on"] = describe_processor()
    if not can_judge(target):  # what nobody has judged is not released either
        return about | {"accepted": None, "rung": None}
    rung, candidate, tried = _choose_rung(run, target, judge)
    judged = judge.compare(candidate, "test")
    result = about | judged | {"accepted": passes(judged, run.recipe.export.int8), "rung": rung.name, "tried": tried}
    result["size"] = onnx_size(candidate)
    result["size_ratio"] = round(result["size"] / onnx_size(run.folder / "onnx" / "model.onnx"), 4)
    log.info("int8 %s (%s)", _explain(target, result), rung.name)
    if result["accepted"]:
        shutil.move(candidate, final)
        result["sha256"] = hash_file(final)
    return result


def _add_speed(run: Run, targets: dict[str, Any]) -> dict[str, Any]:
    """Race fp32 and the accepted files; write ms_per_row and speedup into their numbers, return fp32's and its size."""
    folder = run.folder / "onnx"
    accepted = [target for target, result in targets.items() if result["accepted"]]
    files = [int8_file_name(target) for target in accepted]
    fp32, *others = time_models(run, [folder / "model.onnx", *(folder / name for name in files)])
    for target, milliseconds in zip(accepted, others, strict=True):
        targets[target] |= {"ms_per_row": round(milliseconds, 3), "speedup": round(fp32 / milliseconds, 2)}
    return {"ms_per_row": round(fp32, 3), "size": onnx_size(folder / "model.onnx")}


def _choose_rung(run: Run, target: str, judge: Judge) -> tuple[Rung, Path, list[dict[str, Any]]]:
    """Return the first rung that passes on validation rows, else the one with the smallest bound; and all numbers."""
    gate = run.recipe.export.int8
    candidates: list[tuple[float, Rung, Path]] = []
    tried = []
    for number, rung in enumerate(LADDERS[target]):
        candidate = _quantize(run, rung, run.folder / "rungs" / f"{target}-{number}.onnx")
        quality = judge.compare(candidate, "validation")
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
