"""The released folder: what every consumer opens as it is (DESIGN §7)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from job.export.triton import write_triton
from job.recipe import Run

INT8_FILE = "model_quantized.onnx"
"""The portable int8 file, by the name that consumers look for."""
_FIXED = {"portable": INT8_FILE, "int4": "model_q4.onnx"}
_MODEL_FILES = ("config.json", "model.safetensors")
_GENERATION_FILE = "generation_config.json"


def int8_file_name(target: str) -> str:
    """Return a target's file name in onnx/: portable and int4 have the names that consumers look for."""
    return _FIXED.get(target, f"model_int8_{target}.onnx")


def list_onnx_files(records: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Return precision → {file, sha256} of the ONNX files that have passed, from the stages' records."""
    files = {"fp32": {"file": "model.onnx", "sha256": records["export"]["model_sha256"]}}
    passed = {target: about for target, about in records["quantize"]["targets"].items() if about["accepted"]}
    return files | {target: {"file": about["file"], "sha256": about["sha256"]} for target, about in passed.items()}


def build_bundle(run: Run) -> Path:
    """Lay out `bundle/` from the final model, the tokenizer, and the ONNX files that stages left; return it.

    Report, model card and metrics are added by the report stage, the manifest by the release.
    """
    bundle = run.bundle
    shutil.rmtree(bundle, ignore_errors=True)
    (bundle / "onnx").mkdir(parents=True)
    for name in _MODEL_FILES:
        shutil.copyfile(run.final_model / name, bundle / name)
    if (run.base_model / _GENERATION_FILE).is_file():
        shutil.copyfile(run.base_model / _GENERATION_FILE, bundle / _GENERATION_FILE)
    for path in sorted(run.tokenizer.iterdir()):
        shutil.copyfile(path, bundle / path.name)
    for path in sorted((run.folder / "onnx").glob("model*.onnx*")):
        shutil.copyfile(path, bundle / "onnx" / path.name)
    if run.recipe.export.triton:
        best = bundle / "onnx" / INT8_FILE
        write_triton(best if best.exists() else best.with_name("model.onnx"), bundle / "triton", run.recipe.name)
    return bundle
