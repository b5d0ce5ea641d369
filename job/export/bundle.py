"""The released folder: what every consumer opens as it is (DESIGN §7)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from job.export.triton import write_triton
from job.recipe import Run, hash_json
from job.store.manifest import hash_file

INT8_FILE = "model_quantized.onnx"
"""The portable int8 file, by the name that consumers look for."""
_FIXED = {"portable": INT8_FILE, "int4": "model_q4.onnx"}
_MODEL_FILES = ("config.json", "model.safetensors")


def int8_file_name(target: str) -> str:
    """Return a target's file name in onnx/: portable and int4 have the names that consumers look for."""
    return _FIXED.get(target, f"model_int8_{target}.onnx")


def list_onnx_files(records: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Return precision → {file, sha256} of the ONNX files that have passed, from the stages' records."""
    files = {"fp32": {"file": "model.onnx", "sha256": records["export"]["model_sha256"]}}
    passed = {target: about for target, about in records["quantize"]["targets"].items() if about["accepted"]}
    return files | {target: {"file": about["file"], "sha256": about["sha256"]} for target, about in passed.items()}


def hash_onnx(path: Path) -> str:
    """Return the sha256 (hex) of an ONNX file, or of it and the external data beside it, where its weights are."""
    data = path.with_name(f"{path.name}_data")
    return hash_json([hash_file(path), hash_file(data)]) if data.exists() else hash_file(path)


def _say_if_unanswerable(config: Path, labels: list[str]) -> None:
    """Say whether "" may be an answer, by the name of the option that transformers' pipeline has for it."""
    about, option = json.loads(config.read_text()), {"handle_impossible_answer": "no answer" in labels}
    about["task_specific_params"] = {"question-answering": option}
    config.write_text(json.dumps(about, indent=2) + "\n")


def build_bundle(run: Run) -> Path:
    """Lay out `bundle/` from the final model, the tokenizer, and the ONNX files that stages left; return it.

    Report, model card and metrics are added by the report stage, the manifest by the release.
    """
    bundle = run.bundle
    shutil.rmtree(bundle, ignore_errors=True)
    (bundle / "onnx").mkdir(parents=True)
    for name in _MODEL_FILES:
        shutil.copyfile(run.final_model / name, bundle / name)
    if run.recipe.task == "question-answering":
        _say_if_unanswerable(bundle / "config.json", run.read("data.json")["labels"])
    if generation := run.read("data.json").get("generation"):
        for place in (bundle, bundle / "onnx"):  # Optimum looks beside the ONNX file
            (place / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n", encoding="utf-8")
    for path in sorted(run.tokenizer.iterdir()):
        shutil.copyfile(path, bundle / path.name)
    for path in sorted((run.folder / "onnx").glob("model*.onnx*")):
        shutil.copyfile(path, bundle / "onnx" / path.name)
    if run.recipe.tuning.method == "lora":
        shutil.copytree(run.final_model / "adapter", bundle / "adapter")
    if run.recipe.export.triton:
        best = bundle / "onnx" / INT8_FILE
        write_triton(best if best.exists() else best.with_name("model.onnx"), bundle / "triton", run.recipe.name)
    return bundle
