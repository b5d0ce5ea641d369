"""The quantize stage: int8 candidates per target, the rung chosen on validation, judged once on test.

A target's rungs (`ladder.py`) are tried in order, and the first that passes on validation rows is the
candidate. Test rows decide, once, whether it is released.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from job.data import TokenTable
from job.errors import GateFailed, ResourceExhausted, blames_node
from job.export.bundle import find_exported, hash_onnx
from job.export.decode import compare_decoding
from job.export.encoder_decoder import EncoderDecoderQuantizer
from job.export.gate import compare_quality, decodes_alike, describe_quality, list_faults, looks_good, passes
from job.export.ladder import Rung, list_rungs
from job.export.latency import find_real, measure_latency
from job.export.measure import compute_answers
from job.export.onnx import move_model, onnx_size
from job.export.quantizer import Quantizer
from job.processor import can_judge, describe_processor
from job.recipe import Run
from job.tasks import Truth, get_task, list_parts, name_file

log = logging.getLogger("job.export")


AnyQuantizer = Quantizer | EncoderDecoderQuantizer

MAX_SIZE_RATIO = 0.9
"""An int8 file that is hardly smaller than fp32's is nothing that anybody wants, however right its answers."""


def quantize_run(run: Run) -> dict[str, Any]:
    """Quantize for every target of the recipe; return numbers per target.

    Raises GateFailed (15) when no target that this processor can judge passes, unless the gate only reports.
    """
    _clear(run)
    judge, quantizer = Judge(run), _open_quantizer(run)
    gate = run.recipe.export.int8
    targets: dict[str, Any] = {target: _climb(run, target, judge, quantizer) for target in gate.targets}
    if gate.gate == "fail" and not any(result["accepted"] for result in targets.values()):
        tried = "; ".join(_explain(target, result, judge) for target, result in targets.items())
        raise GateFailed(
            f"export.int8: no target passed ({tried}; limits: bound ≤ {gate.max_metric_drop:g}, agreement ≥ "
            f"{gate.min_agreement:g}); nothing is released, the checkpoint is kept. Change the limits, or set "
            "export.int8.gate: report_only, and run again: the training is not repeated"
        )
    shutil.rmtree(run.folder / "rungs", ignore_errors=True)
    cells = _add_speed(run, targets)
    exported = find_exported(run)
    fp32 = {"ms_per_row": find_real(cells)["fp32"], "size": onnx_size(exported), "file": exported.name}
    return {"targets": targets, "fp32": fp32 | judge.score_fp32("test"), "latency": cells}


def _clear(run: Run) -> None:
    """Remove what an attempt before has left for targets that are not asked for any more, or half-written."""
    shutil.rmtree(run.folder / "rungs", ignore_errors=True)
    kept = {name for part in list_parts(find_exported(run)) for name in (part.name, f"{part.name}_data")}
    for path in (run.folder / "onnx").glob("*.onnx*"):
        if path.name not in kept:
            path.unlink()


def _open_quantizer(run: Run) -> AnyQuantizer:
    if get_task(run.recipe.kind).is_encoder_decoder:
        return EncoderDecoderQuantizer(run)
    return Quantizer(run, find_exported(run))


class Judge:
    """Compares int8 files with the fp32 file, whose answers are computed once per split."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._task = get_task(run.recipe.kind)
        self._fp32: dict[str, np.ndarray] = {}

    def score_fp32(self, split: str) -> dict[str, Any]:
        """Return the task's metrics of the fp32 file."""
        return self._task.score(self._fp32_answers(split), self._truth(split))

    def compare(self, model: Path, split: str) -> dict[str, Any]:
        """Return metric, drop, bound, agreement and n of an int8 file against fp32."""
        int8 = compute_answers(self._run, model, split)
        return compare_quality(self._task, self._fp32_answers(split), int8, self._truth(split))

    def try_out(self, model: Path) -> dict[str, Any]:
        """Return `compare` on validation rows, for a decoder that looks good also how it answers token by token."""
        quality = self.compare(model, "validation")
        promising = looks_good(quality, self._run.recipe.export.int8)
        return quality | (self._decode(model, "validation") if promising else {})

    def judge(self, model: Path) -> dict[str, Any]:
        """Return `compare` on test rows, of a decoder also how it answers token by token."""
        return self.compare(model, "test") | self._decode(model, "test")

    def _decode(self, model: Path, split: str) -> dict[str, Any]:
        return {"decoding": compare_decoding(self._run, model, split)} if self._task.generates else {}

    def accepts(self, quality: dict[str, Any]) -> bool:
        """Tell whether what `compare` says of the test rows meets the recipe's limits."""
        gate = self._run.recipe.export.int8
        return passes(quality, gate, self._task.min_rows(gate.max_metric_drop))

    def list_faults(self, quality: dict[str, Any]) -> list[str]:
        """Return which of the recipe's limits it does not meet."""
        gate = self._run.recipe.export.int8
        return list_faults(quality, gate, self._task.min_rows(gate.max_metric_drop))

    def _fp32_answers(self, split: str) -> np.ndarray:
        if split not in self._fp32:
            self._fp32[split] = compute_answers(self._run, find_exported(self._run), split)
        return self._fp32[split]

    def _truth(self, split: str) -> Truth:
        return TokenTable.open(self._run.tokens(split)).truth


def _climb(run: Run, target: str, judge: Judge, quantizer: AnyQuantizer) -> dict[str, Any]:
    """Try a target's rungs on validation rows; judge the first that passes on test rows."""
    final = run.folder / "onnx" / name_file(get_task(run.recipe.kind).onnx_file, target)
    about: dict[str, Any] = dict.fromkeys(("sha256", "size", "size_ratio", "ms_per_row", "speedup", "rung"))
    about |= {"file": final.name, "measured_on": describe_processor()}
    if not can_judge(target):  # what nobody has judged is not released either
        return about | {"accepted": None}
    chosen, tried = _choose_rung(run, target, judge, quantizer)
    if chosen is None:
        return about | {"accepted": False, "tried": tried}
    rung, candidate = chosen
    judged = judge.judge(candidate)
    result = about | judged | {"accepted": judge.accepts(judged), "rung": rung.name, "tried": tried}
    result["size"] = onnx_size(candidate)
    result["size_ratio"] = round(result["size"] / onnx_size(find_exported(run)), 4)
    log.info("int8 %s (%s)", _explain(target, result, judge), rung.name)
    if result["accepted"]:
        move_model(candidate, final)
        result["sha256"] = hash_onnx(final)
    return result


def _add_speed(run: Run, targets: dict[str, Any]) -> list[dict[str, Any]]:
    """Race fp32 and the accepted files; write ms_per_row and speedup into their numbers, return all cells."""
    folder = run.folder / "onnx"
    files = {target: folder / result["file"] for target, result in targets.items() if result["accepted"]}
    cells = measure_latency(run, {"fp32": find_exported(run), **files})
    real = find_real(cells)
    for target in files:
        targets[target] |= {"ms_per_row": real[target], "speedup": round(real["fp32"] / real[target], 2)}
    return cells


def _choose_rung(
    run: Run, target: str, judge: Judge, quantizer: AnyQuantizer
) -> tuple[tuple[Rung, Path] | None, list[dict[str, Any]]]:
    """Return the first rung that looks good on validation rows, else the one with the smallest bound, and its file;
    None where none could be written and run. And all numbers.
    """
    gate, fp32_size, task = run.recipe.export.int8, onnx_size(find_exported(run)), get_task(run.recipe.kind)
    candidates: list[tuple[float, int, Rung, Path]] = []
    tried: list[dict[str, Any]] = []
    for number, rung in enumerate(list_rungs(target, gate.mode, task.generates, task.is_encoder_decoder)):
        if rung.kind == "static" and task.is_encoder_decoder:  # a decoder's ranges differ with what is cached
            continue
        path = run.folder / "rungs" / f"{task.onnx_file}-{target}-{number}.onnx"
        about, quality = _try_rung(rung, path, judge, quantizer)
        tried.append(about)
        if quality is None:
            continue
        about["size_ratio"] = round(onnx_size(path) / fp32_size, 4)
        # the first rung of an encoder is as small as any other; weights alone may leave most of a model as it is
        useless = (
            gate.mode == "auto" and about["size_ratio"] > MAX_SIZE_RATIO and (candidates or rung.kind == "weights")
        )
        # what 4 bits lose comes near any limit, and a target whose rung fails on test rows is not made at all
        if looks_good(quality, gate, margins=1 if rung.bits == 8 else 2) and not useless:
            return (rung, path), tried
        said = f"{describe_quality(quality)}, {about['size_ratio']:.2f} of the size"
        log.info("int8 %s: no (%s): %s", target, rung.name, said)
        if not useless and decodes_alike(quality, gate):
            candidates.append((quality["drop_bound"], number, rung, path))
    return min(candidates)[2:] if candidates else None, tried


def _try_rung(
    rung: Rung, path: Path, judge: Judge, quantizer: AnyQuantizer
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return what is to be recorded of a rung, and its quality on validation rows; None where it does not run."""
    try:
        quality = judge.try_out(quantizer.write(rung, path))
    except Exception as error:  # of quantizers, which meet models that they were not made for; the next rung may work
        if isinstance(error, ResourceExhausted) or blames_node(error):
            raise
        log.warning("int8: no (%s): %s", rung.name, " ".join(str(error).split())[:300])
        return {"rung": rung.name, "error": type(error).__name__}, None
    return {"rung": rung.name, "validation": quality}, quality


def _explain(target: str, result: dict[str, Any], judge: Judge) -> str:
    if result["accepted"] is None:
        return f"{target}: this processor cannot judge it"
    if result["rung"] is None and not any("validation" in rung for rung in result["tried"]):
        return f"{target} left out: no way to quantize runs with this model"
    if result["rung"] is None:
        return f"{target} left out: what runs is hardly smaller than fp32, or answers otherwise token by token"
    verdict = "accepted" if result["accepted"] else f"left out, {' and '.join(judge.list_faults(result))}"
    return f"{target} {verdict}: {describe_quality(result)}"
