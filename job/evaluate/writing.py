"""What a model writes of test rows: greedily, where the rehearsal wants the same, and as its users will have it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from job.data import TokenTable
from job.evaluate.inference import place_model
from job.evaluate.overlap import measure_chrf, measure_rouge_l
from job.recipe import Run
from job.tasks import configure_greedy, get_task, write_greedily

MAX_NEW_TOKENS = 32
_ROWS, _BATCH_ROWS = 200, 16


def write_on(run: Run, model: Any) -> dict[str, Any]:
    """Continue the sample prompts with a torch model; return {max_new_tokens, rows: [{prompt, ids, lead}]}.

    `ids` are the new tokens, the end among them; `lead` says of each how far it was ahead of the next, in logits.
    """
    from transformers import AutoTokenizer

    tokenizer, data = AutoTokenizer.from_pretrained(run.tokenizer), run.read("data.json")
    # prompts have the other half of what fits for certain
    length = max(min(MAX_NEW_TOKENS, data["max_length"] // 2), 1)
    task, greedy, rows = get_task(run.recipe.kind), configure_greedy(data["generation"], length), []
    for prompt in run.read("sample.json")["prompts"]:
        ids, leads = write_greedily(model.eval(), tokenizer, task, prompt, greedy)
        rows.append({"prompt": prompt, "ids": ids, "lead": leads})
    return {"max_new_tokens": length, "rows": rows}


def score_written(run: Run, model: Any) -> dict[str, float]:
    """Return {chrf, rouge_l} of what a model writes of up to 200 sources of the test split, held against their targets.

    It writes as generate() of the released folder does, with the base model's wishes (beams, a length penalty …) but
    without chance, and no more than the longest target of the train split.
    """
    from transformers import AutoTokenizer, GenerationConfig

    test = run.read("test.json")
    chosen = np.linspace(0, len(test["texts"]) - 1, min(_ROWS, len(test["texts"]))).astype(np.int64)
    sources, targets = ([test[column][row] for row in chosen] for column in ("texts", "pairs"))
    longest = int(TokenTable.open(run.tokens("train")).label_lengths.max())
    wishes = GenerationConfig.from_dict(run.read("data.json")["generation"])
    wishes.update(do_sample=False, max_new_tokens=longest, max_length=None)
    tokenizer = AutoTokenizer.from_pretrained(run.tokenizer)
    written = list(_write_batches(place_model(model), tokenizer, wishes, sources))
    return {
        "chrf": round(measure_chrf(written, targets), 6),
        "rouge_l": round(measure_rouge_l(written, targets), 6),
    }


def _write_batches(model: Any, tokenizer: Any, wishes: Any, sources: list[str]) -> Iterator[str]:
    for start in range(0, len(sources), _BATCH_ROWS):
        batch = tokenizer(sources[start : start + _BATCH_ROWS], padding=True, truncation=True, return_tensors="pt")
        ids = model.generate(**batch.to(model.device), generation_config=wishes, use_model_defaults=False)
        yield from tokenizer.batch_decode(ids, skip_special_tokens=True)
