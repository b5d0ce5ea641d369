"""Loading a model folder for a task: fp32 weights, our labels, a seeded new head where one is needed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from job.errors import DataError, GateFailed, raise_lack
from job.tasks.protocol import Task


def load_model(folder: Path, task: Task, labels: list[str], seed: int) -> tuple[Any, list[str]]:
    """Return the task's model from `folder` with fp32 weights, and the names of weights that are new, sorted.

    A head that is missing or of another size is new and depends on `seed` only. Nothing is executed
    that the folder brings (safetensors, no remote code).
    """
    import torch
    import transformers
    from transformers.integrations import is_deepspeed_zero3_enabled

    transformers.set_seed(seed)
    model_class = getattr(transformers, task.auto_class)
    named = {"num_labels": len(labels), "id2label": dict(enumerate(labels))}
    named["label2id"] = {name: index for index, name in enumerate(labels)}
    try:
        model, loading = model_class.from_pretrained(
            folder,
            **(named if task.classifies or task.problem_type else {}),
            use_safetensors=True,
            trust_remote_code=False,
            # under ZeRO-3 every weight is a shard of size 0 here, and all would count as mismatched
            ignore_mismatched_sizes=not is_deepspeed_zero3_enabled(),
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        raise_lack(error)
        if isinstance(error, (torch.OutOfMemoryError, FileNotFoundError)) or _comes_of_sharing(error):
            raise  # of safetensors, FileNotFoundError says that a file, which was there, cannot be opened
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise DataError(
            f"model.id: {folder} does not load as {task.auto_class}: {reason}; name a model of this kind"
        ) from None
    if model.config.pad_token_id is None:
        ends = model.config.eos_token_id
        model.config.pad_token_id = ends[0] if isinstance(ends, list) else ends
    if task.generates:  # the base model's wishes come back with the bundle; invalid ones would not be saved
        model.generation_config = transformers.GenerationConfig()
        # some stand in config.json; transformers 5 takes them out when it loads one
        list_wishes = getattr(model.config, "_get_non_default_generation_parameters", list)
        for wish in list_wishes():
            if wish != "decoder_start_token_id":  # no wish: whoever trains on needs it
                setattr(model.config, wish, None)
    if task.problem_type:
        model.config.problem_type = task.problem_type
    computed = _freeze_positions(model)
    new = sorted({*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])} - computed)
    if new and not task.trains_head:
        raise DataError(
            f"model.id: {folder} has no weight {new[0]} of the size that its config.json gives, and training would "
            f"begin with random ones; name a {task.name} model"
        )
    return model, new


def _comes_of_sharing(error: Exception) -> bool:
    """Tell whether an error arose where ranks share the weights out as they load (ZeRO-3), and not in the weights."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    if not isinstance(error, RuntimeError) or not is_deepspeed_zero3_enabled():
        return False
    return not re.search("loading state_dict|ignore_mismatched_sizes", str(error))


def _freeze_positions(model: Any) -> set[str]:
    """Let nothing train sines of positions (Pegasus, Marian), and return their names: files may lack them.

    They never get a gradient, and Pegasus lets them want one, for which distributed training waits in vain.
    """
    sines = [(n, m) for n, m in model.named_modules() if type(m).__name__.endswith("SinusoidalPositionalEmbedding")]
    for _, module in sines:
        module.requires_grad_(False)
    return {f"{name}.weight" for name, _ in sines}


def open_trained(folder: Path, task: Task) -> Any:
    """Return the task's model as it was trained, or released; raise GateFailed (15) where weights are missing.

    transformers would draw them anew (peft #577).
    """
    import torch
    import transformers

    model_class = getattr(transformers, task.auto_class)
    model, loading = model_class.from_pretrained(
        folder, use_safetensors=True, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
    )
    if loading["missing_keys"]:
        raise GateFailed(
            f"{folder.name}/model.safetensors lacks {sorted(loading['missing_keys'])[0]}; nothing is released, the "
            "checkpoint is kept"
        )
    return model
