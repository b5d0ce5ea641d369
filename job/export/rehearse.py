"""The last look before a release: the bundle itself, opened as consumers open it, on texts.

Token tables and logits of earlier stages cannot show a tokenizer that does not belong to the model, a file that was
not copied, or inputs that a model does not take (optimum #1500, #1758). This can.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from job.errors import GateFailed
from job.export.gate import MAX_ABS_LOGIT_DIFF
from job.recipe import Run

log = logging.getLogger("job.export")


def rehearse_bundle(run: Run) -> dict[str, Any]:
    """Answer the sample texts from `bundle/` with transformers and with ONNX; raise GateFailed (15) on any difference.

    Both must give the logits that the trained model gave for the same rows.
    """
    import torch
    from optimum.onnxruntime import ORTModelForSequenceClassification
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    sample = run.read("sample.json")
    texts = [part for part in (sample["texts"], sample["pairs"]) if part]
    expected = np.load(run.folder / "evaluate" / "test.npy", allow_pickle=False)[: len(sample["texts"])]
    try:
        batch = AutoTokenizer.from_pretrained(run.bundle)(*texts, padding=True, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            answers = {
                "model.safetensors": AutoModelForSequenceClassification.from_pretrained(run.bundle)(**batch).logits
            }
        exported = ORTModelForSequenceClassification.from_pretrained(
            run.bundle, subfolder="onnx", file_name="model.onnx"
        )
        answers["onnx/model.onnx"] = exported(**batch).logits
    except (TypeError, ValueError, RuntimeError, OSError, KeyError) as error:
        raise GateFailed(f"release: the bundle does not open as consumers open it: {str(error)[:300]}") from None
    for name, logits in answers.items():
        _compare(name, expected, logits.numpy())
    log.info("the bundle answers %d texts as the trained model does, from safetensors and ONNX", len(expected))
    return {"n": len(expected)}


def _compare(name: str, expected: np.ndarray, found: np.ndarray) -> None:
    # padding to the longest of all rows instead of a bucket adds rounding, hence the wider tolerance
    worst = float(np.abs(expected - found).max()) if expected.shape == found.shape else float("inf")
    if not worst <= 10 * MAX_ABS_LOGIT_DIFF:
        raise GateFailed(
            f"release: {name} with the released tokenizer differs from the trained model by {worst:.3g} on test texts; "
            "nothing is released, the checkpoint is kept"
        )
