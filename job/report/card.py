"""The report stage: metrics.json, report.html and the model card, beside the files they describe."""

from __future__ import annotations

import json
from typing import Any

from job import __version__
from job.recipe import Run
from job.report.page import render_page
from job.report.result import assemble_result, hide_paths

_CARD = """---
library_name: transformers
pipeline_tag: {task}
tags: [onnx, finetune-job]
---

# {name}

`{base}` fine-tuned for {task} on `{source}` ({rows} train rows, labels: {labels}).

| on {n} test rows | {metric} | 95 % interval |
|---|---|---|
{quality}

## Exports

ONNX fp32 equals torch on all {parity_n} test rows (max |Δlogit| {difference:.1e}).

| file | {metric} | agreement with fp32 | drop, one-sided 95 % bound | size | measured on |
|---|---|---|---|---|---|
{exports}

## Use

```python
from optimum.onnxruntime import {ort_class}
model = {ort_class}.from_pretrained(folder, subfolder="onnx", file_name="{best}")

from transformers import {auto_class}
model = {auto_class}.from_pretrained(folder)
```

Texts are cut after {max_length} tokens. Numbers hold for rows like those of the test split, and int8 numbers for the
processor that is named. The licences of `{base}` and of the data apply.

Made by finetune-job {version}, run `{run_id}`; base model {base_commit}, data {data_commit}. `manifest.json` has the
sha256 of every file; `metrics.json` all numbers; `report.html` the curves and the recipe.
"""


def write_report(run: Run) -> dict[str, Any]:
    """Write metrics.json, README.md (the model card) and report.html into the bundle; return nothing to record."""
    records = run.read("records.json")
    result = assemble_result(run.run_id, records)
    (run.bundle / "metrics.json").write_text(
        json.dumps({**result, "stages": records}, indent=1) + "\n", encoding="utf-8"
    )
    (run.bundle / "README.md").write_text(render_card(run, records, result), encoding="utf-8")
    (run.bundle / "report.html").write_text(render_page(run, records, result), encoding="utf-8")
    return {}


def render_card(run: Run, records: dict[str, Any], result: dict[str, Any]) -> str:
    """Return the model card in Markdown."""
    recipe, data, sources = run.recipe, run.read("data.json"), run.read("sources.json")
    metric = "accuracy"
    scores = {**result["metrics"]["baselines"], "fine-tuned": result["metrics"]["test"]}
    quality = [f"| {name} | {s[metric]:.4f} | {s[f'{metric}_interval']} |" for name, s in scores.items()]
    return _CARD.format(
        name=recipe.name, task=recipe.task, base=hide_paths(recipe.model.id), source=hide_paths(recipe.data.source),
        rows=data["rows"]["train"], labels=", ".join(data["labels"]), n=result["metrics"]["test"]["n"], metric=metric,
        quality="\n".join(quality), parity_n=result["onnx"]["n"], difference=result["onnx"]["max_abs_logit_diff"],
        exports="\n".join(_export_rows(result, metric)), max_length=data["max_length"], version=__version__,
        run_id=run.run_id, base_commit=sources["model"]["commit"] or "without a commit",
        data_commit=sources["data"]["commit"] or "without a commit",
        best="model_quantized.onnx" if _has_portable(result) else "model.onnx",
        ort_class="ORTModelForSequenceClassification", auto_class="AutoModelForSequenceClassification",
    )  # fmt: skip


def _has_portable(result: dict[str, Any]) -> bool:
    return bool(result["int8"].get("portable", {}).get("accepted"))


def _export_rows(result: dict[str, Any], metric: str) -> list[str]:
    fp32 = result["onnx"]["fp32"]
    rows = [f"| `onnx/model.onnx` | {fp32[metric]:.4f} | 1 | 0 | {fp32['size'] >> 20} MiB | |"]
    for target, numbers in result["int8"].items():
        name = "model_quantized.onnx" if target == "portable" else f"model_int8_{target}.onnx"
        if numbers["accepted"]:
            rows.append(
                f"| `onnx/{name}` | {numbers['metric']:.4f} | {numbers['agreement']:.4f} "
                f"| {numbers['drop_bound']:+.4f} | {numbers['size'] >> 20} MiB | {numbers['measured_on']} |"
            )
    return rows
