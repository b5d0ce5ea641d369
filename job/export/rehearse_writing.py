"""The rehearsal of a model that writes: greedy continuations of sample prompts, from the bundle alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from job.errors import GateFailed
from job.export.bundle import list_onnx_files
from job.export.consumers import ask_predict, refuse_to_open
from job.recipe import Run
from job.tasks import Task, encode_prompt, open_trained


def rehearse_writing(run: Run, task: Task) -> dict[str, Any]:
    """Continue the sample prompts with transformers, Optimum and `job predict`; return how many, and how int8 does.

    In fp32 all must write, token by token, what the trained model wrote, but where that was a close call. Of the other
    files it is counted on how many prompts they do; `written` is file → prompts. Their gate was the quantize stage.
    """
    bundle, sample = run.bundle, run.read("evaluate/written.json")
    prompts, length = [row["prompt"] for row in sample["rows"]], sample["max_new_tokens"]
    for name, found in _open_as_users(bundle, task, prompts, length).items():
        _compare(name, sample["rows"], found, task)
    written = {}
    for target, about in list_onnx_files(run.read("records.json")).items():
        answers = ask_predict(bundle, target, prompts, "--max-new-tokens", str(length))
        found = [answer["ids"] for answer in answers]
        if target == "fp32":
            _compare("`job predict`", sample["rows"], found, task)
        written[about["file"]] = sum(row["ids"] == ids for row, ids in zip(sample["rows"], found, strict=True))
    return {"n": len(prompts), "tokens": length, "written": written}


def _open_as_users(bundle: Path, task: Task, prompts: list[str], length: int) -> dict[str, list[list[int]]]:
    """Return the ids that follow each prompt, by file name; raise GateFailed where one does not open."""
    import optimum.onnxruntime
    import torch
    from transformers import AutoTokenizer, GenerationConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(bundle)
        ort_class = getattr(optimum.onnxruntime, task.ort_class)
        models = {
            "model.safetensors": open_trained(bundle, task).eval(),
            "onnx/model.onnx": ort_class.from_pretrained(bundle, subfolder="onnx", file_name="model.onnx"),
        }
        written: dict[str, list[list[int]]] = {name: [] for name in models}
        for prompt in prompts:
            for name, model in models.items():
                ends = {key: getattr(model.generation_config, key) for key in ("eos_token_id", "pad_token_id")}
                greedy = GenerationConfig(do_sample=False, num_beams=1, max_new_tokens=length, **ends)
                ids = torch.tensor([encode_prompt(tokenizer, prompt, list(np.atleast_1d(ends["eos_token_id"])))])
                inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
                answer = model.generate(**inputs, generation_config=greedy, use_model_defaults=False)
                written[name].append(answer[0, ids.shape[1] :].tolist())
        return written
    except Exception as error:  # loaders of dozens of models and tokenizers raise errors of any kind
        raise refuse_to_open(error) from None


def _compare(name: str, expected: list[dict[str, Any]], found: list[list[int]], task: Task) -> None:
    for row, ids in zip(expected, found, strict=True):
        at = next((at for at, pair in enumerate(zip(row["ids"], ids, strict=False)) if pair[0] != pair[1]), None)
        if at is None and len(ids) == len(row["ids"]):
            continue
        if at is None or row["lead"][at] > 2 * task.max_abs_diff:
            raise GateFailed(
                f"release: {name} with the released tokenizer writes something else than the trained model after "
                f"{row['prompt'][:60]!r}; nothing is released, the checkpoint is kept"
            )
