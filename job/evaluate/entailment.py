"""Zero-shot by entailment: a model of natural-language inference is asked whether a text is of a label (Yin 2019)."""

from __future__ import annotations

from typing import Any

import numpy as np

from job.data import TokenTable
from job.evaluate.inference import open_base
from job.recipe import Run

_HYPOTHESIS = "This example is {}."
"""As of transformers' zero-shot-classification pipeline."""
_ROWS_AT_ONCE = 16


def find_entailment(config: dict[str, Any]) -> int | None:
    """Return the label of entailment in a config.json; None for a model that knows none."""
    named = config.get("label2id")
    found = [label for name, label in named.items() if name.lower().startswith("entail")] if named else []
    return int(found[0]) if found else None


def score_entailment(run: Run, test: TokenTable, entailment: int) -> np.ndarray:
    """Return float32 [test rows, labels]: the base model's logit for that the text entails the hypothesis."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = open_base(AutoModelForSequenceClassification, run)
    tokenizer = AutoTokenizer.from_pretrained(run.base_model)
    hypotheses = [_HYPOTHESIS.format(name) for name in run.read("data.json")["labels"]]
    rows = [test.tokens[test.offsets[place] : test.offsets[place + 1]] for place in range(len(test))]
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    pairs = [(text, hypothesis) for text in texts for hypothesis in hypotheses]
    scores = []
    for start in range(0, len(pairs), _ROWS_AT_ONCE):
        part = pairs[start : start + _ROWS_AT_ONCE]
        batch = tokenizer(part, padding=True, truncation="only_first", return_tensors="pt").to(model.device)
        with torch.inference_mode():
            scores.append(model(**batch).logits[:, entailment].float().cpu().numpy())
    return np.concatenate(scores).reshape(len(texts), len(hypotheses))
