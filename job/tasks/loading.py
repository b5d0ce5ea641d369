"""Loading a model folder for a task: fp32 weights, our labels, a seeded new head where one is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from job.errors import DataError
from job.tasks.text_classification import TextClassification


def load_model(folder: Path, task: TextClassification, labels: list[str], seed: int) -> tuple[Any, list[str]]:
    """Return the task's model from `folder` with fp32 weights, and the names of weights that are new.

    A head that is missing or of another size is new and depends on `seed` only. Nothing is executed
    that the folder brings (safetensors, no remote code).
    """
    import torch
    import transformers
    from transformers.integrations import is_deepspeed_zero3_enabled

    transformers.set_seed(seed)
    model_class = getattr(transformers, task.auto_class)
    try:
        model, loading = model_class.from_pretrained(
            folder,
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={name: index for index, name in enumerate(labels)},
            use_safetensors=True,
            trust_remote_code=False,
            # under ZeRO-3 every weight is a shard of size 0 here, and all would count as mismatched
            ignore_mismatched_sizes=not is_deepspeed_zero3_enabled(),
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise DataError(
            f"model.id: {folder} does not load as {task.auto_class}: {reason}; name a model of this kind"
        ) from None
    if model.config.pad_token_id is None:
        model.config.pad_token_id = model.config.eos_token_id
    model.config.problem_type = "single_label_classification"
    return model, sorted(loading["missing_keys"])
