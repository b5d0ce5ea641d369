"""The rehearsal of a model that writes: greedy continuations of sample prompts, from the bundle alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from job.errors import GateFailed
from job.export.bundle import list_onnx_files
from job.export.consumers import ask_predict, refuse_to_open
from job.export.genai import offer_genai
from job.recipe import Run
from job.tasks import Task, configure_greedy, name_file, open_trained, write_greedily


def rehearse_writing(run: Run, task: Task) -> dict[str, Any]:
    """Continue the sample prompts with transformers, Optimum and `job predict`; return how many, and how int8 does.

    In fp32 all must write, token by token, what the trained model wrote, but where that was a close call. Of the other
    files it is counted on how many prompts they do; `written` is file → prompts. Their gate was the quantize stage. The
    smallest of them is also what onnxruntime-genai is given.
    """
    bundle, sample = run.bundle, run.read("evaluate/written.json")
    prompts, length = [row["prompt"] for row in sample["rows"]], sample["max_new_tokens"]
    for name, found in _open_as_users(bundle, task, prompts, length).items():
        _compare(name, sample["rows"], found, task)
    files, wrote = list_onnx_files(run.read("records.json")), {}
    for target in files:
        answers = ask_predict(bundle, target, prompts, "--max-new-tokens", str(length))
        wrote[target] = [answer["ids"] for answer in answers]
        if target == "fp32":
            _compare("`job predict`", sample["rows"], wrote[target], task)
    expected = [row["ids"] for row in sample["rows"]]
    written = {
        files[target]["file"]: sum(ids == right for ids, right in zip(found, expected, strict=True))
        for target, found in wrote.items()
    }
    seen = {"n": len(prompts), "tokens": length, "written": written}
    smallest = next(target for target in ("int4", "portable", "fp32") if target in files)
    genai = None if task.is_encoder_decoder else offer_genai(bundle, prompts, files[smallest]["file"], wrote[smallest])
    return seen | ({"genai": genai} if genai else {})


def _open_as_users(bundle: Path, task: Task, prompts: list[str], length: int) -> dict[str, list[list[int]]]:
    """Return the ids that follow each prompt, by file name; raise GateFailed where one does not open."""
    import optimum.onnxruntime
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(bundle)
        ort_class = getattr(optimum.onnxruntime, task.ort_class)
        fp32 = name_file(task.onnx_file, "fp32")
        file = {} if task.is_encoder_decoder else {"file_name": fp32}
        models = {
            "model.safetensors": open_trained(bundle, task).eval(),
            f"onnx/{fp32}": ort_class.from_pretrained(bundle, subfolder="onnx", **file),
        }
        written: dict[str, list[list[int]]] = {name: [] for name in models}
        for prompt in prompts:
            for name, model in models.items():
                greedy = configure_greedy(model.generation_config.to_dict(), length)
                written[name].append(write_greedily(model, tokenizer, task, prompt, greedy)[0])
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
