"""The released folder: what every consumer opens as it is (DESIGN §7)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from job.export.triton import write_triton
from job.recipe import Run, hash_json
from job.store.manifest import hash_file
from job.tasks import MODEL, get_task, list_parts, name_file

_MODEL_FILES = ("config.json", "model.safetensors")


def list_onnx_files(records: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Return precision → {file, sha256} of the ONNX files that have passed, from the stages' records.

    A model of two files has the name of its decoder, and one sha256.
    """
    files = {"fp32": {"file": records["export"]["file"], "sha256": records["export"]["model_sha256"]}}
    passed = {target: about for target, about in records["quantize"]["targets"].items() if about["accepted"]}
    return files | {target: {"file": about["file"], "sha256": about["sha256"]} for target, about in passed.items()}


def hash_onnx(path: Path) -> str:
    """Return the sha256 (hex) of an ONNX file, or of it and what belongs to it: external data, a decoder's encoder."""
    files = [file for part in list_parts(path) for file in (part, part.with_name(f"{part.name}_data"))]
    digests = [hash_file(file) for file in files if file.suffix == ".onnx" or file.exists()]
    return digests[0] if len(digests) == 1 else hash_json(digests)


def has_onnx(path: Path, sha256: str) -> bool:
    """Tell whether the files of the model that `path` names lie there and have this digest."""
    return all(part.is_file() for part in list_parts(path)) and hash_onnx(path) == sha256


def _say_if_unanswerable(config: Path, labels: list[str]) -> None:
    """Say whether "" may be an answer, by the name of the option that transformers' pipeline has for it."""
    about, option = json.loads(config.read_text()), {"handle_impossible_answer": "no answer" in labels}
    about["task_specific_params"] = {"question-answering": option}
    config.write_text(json.dumps(about, indent=2) + "\n")


def find_exported(run: Run) -> Path:
    """Return the ONNX file in fp32 by which the exported model is named."""
    return run.folder / "onnx" / name_file(get_task(run.recipe.kind).onnx_file, "fp32")


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
    for path in sorted((run.folder / "onnx").glob("*.onnx*")):
        shutil.copyfile(path, bundle / "onnx" / path.name)
    if run.recipe.tuning.method == "lora":
        shutil.copytree(run.final_model / "adapter", bundle / "adapter")
    if run.recipe.export.triton:
        best = bundle / "onnx" / name_file(MODEL, "portable")
        fp32 = best.with_name(name_file(MODEL, "fp32"))
        write_triton(best if best.exists() else fp32, bundle / "triton", run.recipe.name)
    return bundle
