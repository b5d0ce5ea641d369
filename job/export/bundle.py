"""The released folder: what every consumer opens as it is (DESIGN §7)."""

from __future__ import annotations

import shutil
from pathlib import Path

from job.export.triton import write_triton
from job.recipe import Run

INT8_FILE = "model_quantized.onnx"
"""The portable int8 file, by the name that consumers look for."""
_MODEL_FILES = ("config.json", "model.safetensors")


def int8_file_name(target: str) -> str:
    """Return a target's file name in onnx/: the portable one has the name that consumers look for."""
    return INT8_FILE if target == "portable" else f"model_int8_{target}.onnx"


def build_bundle(run: Run) -> Path:
    """Lay out `bundle/` from the final model, the tokenizer, and the ONNX files that stages left; return it.

    Report, model card and metrics are added by the report stage, the manifest by the release.
    """
    bundle = run.bundle
    shutil.rmtree(bundle, ignore_errors=True)
    (bundle / "onnx").mkdir(parents=True)
    for name in _MODEL_FILES:
        shutil.copyfile(run.final_model / name, bundle / name)
    for path in sorted(run.tokenizer.iterdir()):
        shutil.copyfile(path, bundle / path.name)
    for path in sorted((run.folder / "onnx").glob("model*.onnx*")):
        shutil.copyfile(path, bundle / "onnx" / path.name)
    if run.recipe.export.triton:
        best = bundle / "onnx" / INT8_FILE
        write_triton(best if best.exists() else best.with_name("model.onnx"), bundle / "triton", run.recipe.name)
    return bundle
