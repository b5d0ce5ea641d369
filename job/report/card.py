"""The report stage: metrics.json, report.html, its plots and the model card, beside the files they describe."""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePath
from typing import Any

from job import __version__
from job.recipe import Recipe, Run
from job.report.console import spell_question
from job.report.images import write_pictures
from job.report.markup import escape
from job.report.page import render_page
from job.report.plots import Numbers, draw_plots
from job.report.result import assemble_result, hide_paths
from job.tasks import Task, get_task, list_parts, name_file

_CARD = """---
library_name: transformers
pipeline_tag: {tag}
tags: [onnx, finetune-job]
---

# {name}

`{base}` fine-tuned for {task} on `{source}` ({rows} train rows{labels}).

| on {n} test rows | {metric} | 95 % interval |
|---|---|---|
{quality}

![Test {metric} of baselines, the fine-tuned model and its exports](plots/quality.png)

## Exports

ONNX fp32 equals torch on all {parity_n} test rows (max |Δlogit| {difference:.1e}).

| file | {metric} | agreement with fp32 | drop, one-sided 95 % bound | size | measured on |
|---|---|---|---|---|---|
{exports}

## Use

```python
from transformers import {auto_class}                      # torch
model = {auto_class}.from_pretrained(folder)

from optimum.onnxruntime import {ort_class}
model = {ort_class}.from_pretrained(folder, subfolder="onnx"{files})

import onnxruntime, tokenizers                             # nothing else
{sessions}
tokenizer = tokenizers.Tokenizer.from_file(f"{{folder}}/tokenizer.json")
```

```js
{javascript}
```

`job predict {folder_or_model} {question}` answers from the shell, without torch.{triton}

## Limits

- {limits}
- Numbers hold for rows like those of the test split.{processors}
- Licence of the base model: {licence}. The licence of the data (`{source}`) applies as well.

Made by finetune-job {version}, run `{run_id}`; base model {base_commit}, data {data_commit}. `manifest.json` has the
sha256 of every file and where all came from; `metrics.json` all numbers; `report.html` the curves, the recipe and the
worst mistakes with their texts; `plots/` its charts as pictures.
"""


_PROCESSORS = """ int8 numbers hold for the processor that is named: another one
  computes int8 otherwise"""
_PORTABLE = "; `onnx/model_quantized.onnx` is the file that overflows on none"
_PIPELINE = """import {{ pipeline }} from '@huggingface/transformers';
const answer = await pipeline('{tag}', folder, {{ dtype: '{dtype}' }});"""
_LOGITS = """import {{ AutoModelForSequenceClassification, AutoTokenizer }} from '@huggingface/transformers';
const tokenizer = await AutoTokenizer.from_pretrained(folder);
const model = await AutoModelForSequenceClassification.from_pretrained(folder, {{ dtype: '{dtype}' }});
const {{ logits }} = await model(tokenizer(text));         // the number; a pipeline would give its softmax, 1"""
_MARKDOWN = re.compile(r"[\\`*_\[\]|~]")
"""What begins a link, code, emphasis or a cell."""
_LICENCE = re.compile(r"\A---\n(?:(?!---).*\n)*?licen[sc]e:\s*(.+)\n", re.IGNORECASE)


def write_report(run: Run) -> dict[str, Any]:
    """Write metrics.json, README.md (the model card), report.html and plots/*.png into the bundle; return nothing."""
    records, analysis = run.read("records.json"), run.read("evaluate/analysis.json")
    result = assemble_result(run.run_id, records)
    numbers = Numbers(get_task(run.recipe.kind).metric, records, result, analysis)
    told = {**result, "analysis": _leave_out_texts(analysis), "stages": records}
    (run.bundle / "metrics.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    (run.bundle / "README.md").write_text(render_card(run, result), encoding="utf-8")
    plots = draw_plots(numbers)
    (run.bundle / "report.html").write_text(render_page(run, numbers, plots), encoding="utf-8")
    write_pictures(plots.values(), run.bundle / "plots")
    return {}


def _leave_out_texts(analysis: dict[str, Any]) -> dict[str, Any]:
    """Return the analysis without quotations: the report has them, for people."""
    mistakes = [
        {key: value for key, value in each.items() if key not in ("text", "pair")}
        for each in analysis.get("mistakes", [])
    ]
    return analysis | {"mistakes": mistakes}


def render_card(run: Run, result: dict[str, Any]) -> str:
    """Return the model card in Markdown."""
    recipe, data, sources = run.recipe, run.read("data.json"), run.read("sources.json")
    task = get_task(recipe.kind)
    metric = task.metric
    scores = {**result["metrics"]["baselines"], "fine-tuned": result["metrics"]["test"]}
    quality = [f"| {name} | {s[metric]:.4f} | {s[f'{metric}_interval']} |" for name, s in scores.items()]
    named = ", ".join(_write_text(label) for label in data["labels"])
    labels = f", labels: {named}" if task.classifies else ""
    best, dtype = ("portable", "q8") if _has_portable(result) else ("fp32", "fp32")
    return _CARD.format(
        name=recipe.name, task=recipe.task, tag=task.pipeline_tag, base=hide_paths(recipe.model.id), labels=labels,
        source=hide_paths(recipe.data.source), rows=data["rows"]["train"], n=result["metrics"]["test"]["n"],
        metric=metric, quality="\n".join(quality), parity_n=result["onnx"]["n"],
        difference=result["onnx"]["max_abs_logit_diff"], exports="\n".join(_export_rows(result, metric)),
        limits=task.limits.format(**data | {"labels": named}), run_id=run.run_id,
        version=__version__,
        base_commit=sources["model"]["commit"] or "without a commit",
        javascript=(_LOGITS if task.standardizes else _PIPELINE).format(tag=task.pipeline_tag, dtype=dtype),
        data_commit=sources["data"]["commit"] or "without a commit", folder_or_model=f"…/models/{recipe.name}",
        question=_spell_question(recipe), processors=_warn_of_processors(result),
        triton="\n`triton/` is a model repository for a Triton server." if recipe.export.triton else "",
        licence=_write_text(find_licence(run.base_model)), ort_class=task.ort_class, auto_class=task.auto_class,
        **_describe_files(task, best),
    )  # fmt: skip


def _write_text(text: str) -> str:
    """Return words of the data, or of somebody else's card, on one line and without markup."""
    return _MARKDOWN.sub(r"\\\g<0>", escape(" ".join(text.split())))


_DECODERS = ("decoder_file_name", "decoder_with_past_file_name")


def _describe_files(task: Task, precision: str) -> dict[str, str]:
    """Return how Optimum and onnxruntime open the files of a precision; see `_CARD`."""
    parts = list_parts(PurePath(name_file(task.onnx_file, precision)))
    opened = [f'onnxruntime.InferenceSession(f"{{folder}}/onnx/{part.name}")' for part in parts]
    named = {"file_name": parts[-1].name}
    if task.is_encoder_decoder:  # Optimum asks for a second decoder where it is told the first; this one is both
        encoder, decoder = (part.name for part in parts)
        named = {"encoder_file_name": encoder} | dict.fromkeys(_DECODERS, decoder)
    return {
        "files": "".join(f', {name}="{file}"' for name, file in named.items()),
        "sessions": f"{'session' if len(parts) == 1 else 'encoder, decoder'} = {', '.join(opened)}",
    }


def find_licence(folder: Path) -> str:
    """Return what the front matter of a model folder's README.md says of its licence."""
    path = folder / "README.md"
    found = _LICENCE.search(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else None
    return f"{found.group(1).strip()} (its own card says so)" if found else "not said in its folder"


def _spell_question(recipe: Recipe) -> str:
    words = spell_question(recipe, "TEXT", "QUESTION" if recipe.task == "question-answering" else "ANOTHER")
    return words.replace('"TEXT"', "TEXT")


def _warn_of_processors(result: dict[str, Any]) -> str:
    """Return what is to be said of int8 numbers, nothing where no int8 file is released."""
    if not any(numbers["accepted"] for numbers in result["int8"].values()):
        return ""
    return f"{_PROCESSORS}{_PORTABLE if _has_portable(result) else ''}."


def _has_portable(result: dict[str, Any]) -> bool:
    return bool(result["int8"].get("portable", {}).get("accepted"))


def _export_rows(result: dict[str, Any], metric: str) -> list[str]:
    fp32 = result["onnx"]["fp32"]
    rows = [f"| `onnx/{fp32['file']}` | {fp32[metric]:.4f} | 1 | 0 | {fp32['size'] >> 20} MiB | |"]
    for numbers in result["int8"].values():
        if numbers["accepted"]:
            rows.append(
                f"| `onnx/{numbers['file']}` | {numbers['metric']:.4f} | {numbers['agreement']:.4f} "
                f"| {numbers['drop_bound']:+.4f} | {numbers['size'] >> 20} MiB | {numbers['measured_on']} |"
            )
    return rows
