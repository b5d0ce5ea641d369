"""The result of a run: one JSON object, the last line of `job run` (DESIGN §6)."""

from __future__ import annotations

from typing import Any

_INT8_KEYS = (
    "accepted", "metric", "drop", "drop_bound", "agreement", "n", "size_ratio", "speedup", "measured_on", "rung"
)  # fmt: skip


def assemble_result(run_id: str, records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the result from the records of the stages that have finished, by stage name."""
    result: dict[str, Any] = {"run_id": run_id, "status": "running", "exit_code": None, "reason": ""}
    release = records.get("release", {})
    result |= {"release": release.get("release"), "promoted": release.get("promoted", False)}
    if evaluated := records.get("evaluate"):
        result["metrics"] = {part: evaluated[part] for part in ("test", "validation", "baselines")}
    if exported := records.get("export"):
        result["onnx"] = {key: exported[key] for key in ("max_abs_logit_diff", "agreement", "n")}
    if quantized := records.get("quantize"):
        result["onnx"] = result.get("onnx", {}) | {"fp32": quantized["fp32"]}
        result["int8"] = {target: _pick(numbers) for target, numbers in quantized["targets"].items()}
        if "written" in (rehearsed := records.get("rehearse", {})):
            result["onnx"]["written"] = {
                key: rehearsed[key] for key in ("n", "tokens", "written", "genai") if key in rehearsed
            }
    if trained := records.get("train"):
        keys = (
            "steps", "model_step", "stopped_by", "samples_per_second", "tokens_per_second", "resumed_from",
            "world_size", "precision", "attention", "seconds", "trainable_parameters", "checkpoint_bytes",
            "peak_memory_bytes",
        )  # fmt: skip
        result["train"] = {key: trained.get(key) for key in keys}  # a stage may be of an older version
    return result


def list_other_scores(scores: dict[str, Any], metric: str) -> list[str]:
    """Return the names of the scores that tables show beside the task's metric and its interval."""
    return [key for key, value in scores.items() if key != metric and isinstance(value, float)]


def hide_paths(value: Any) -> Any:
    """Return `value` with local paths cut to their last part: a release is read where they do not exist."""
    if isinstance(value, dict):
        return {key: hide_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [hide_paths(inner) for inner in value]
    is_path = isinstance(value, str) and value.startswith(("/", "./", "../", "~", "file://"))
    return value.rstrip("/").rpartition("/")[2] if is_path else value


def _pick(numbers: dict[str, Any]) -> dict[str, Any]:
    decoding = {"decoding": numbers["decoding"]} if "decoding" in numbers else {}
    return {key: numbers.get(key) for key in (*_INT8_KEYS, "ms_per_row", "size", "file")} | decoding
