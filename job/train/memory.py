"""How much memory a training takes: what each parameter costs, and what one micro-batch keeps for its backward pass.

The second is measured: models of one and of two layers, made of the configuration alone, run one row forward, and what
autograd saves is counted; the other layers are like the second, the other rows like the first.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from job.tasks import Task

HOST = "this host's share for a rank"
"""What a rank computes on where it has no GPU."""


def measure_device(ranks: int) -> tuple[str, int]:
    """Return name and bytes of memory of what a rank computes on: a GPU, or its share of this host's memory."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", 0)))
        return device.name, int(device.total_memory)
    return HOST, psutil.virtual_memory().total // max(ranks, 1)


def measure_activations(folder: Path, task: Task, tokens: int, checkpointing: bool) -> int:
    """Return the bytes that a row of so many tokens keeps for its backward pass, in fp32.

    `folder`: a model's; `checkpointing`: a layer keeps its input alone, and one layer at a time the rest.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    layers = int(getattr(config, "num_hidden_layers", 0) or 0)
    few = (1, 2) if layers > 2 and not config.is_encoder_decoder else (layers,)
    counted = [_count_saved(_make_model(config, task, number), tokens) for number in few]
    if len(few) == 1:
        return counted[0]
    width = int(getattr(config, "hidden_size", 0) or 0)
    return counted[0] + (layers - 1) * (4 * tokens * width if checkpointing else counted[1] - counted[0])


def _make_model(config: Any, task: Task, layers: int) -> Any:
    """Return a model of random weights with so many layers."""
    import transformers

    small = copy.deepcopy(config)
    small.num_hidden_layers = layers
    for name in ("layer_types", "attn_layers"):  # one entry for each layer
        if isinstance(getattr(small, name, None), list):
            setattr(small, name, getattr(small, name)[:layers])
    return getattr(transformers, task.auto_class).from_config(small).train()


def _count_saved(model: Any, tokens: int) -> int:
    """Return the bytes that autograd saves in one forward pass of a row, but for the weights themselves."""
    weights = {weight.untyped_storage()._cdata for weight in model.parameters()}
    saved: dict[int, int] = {}
    kept: list[torch.Tensor] = []  # else a storage that was freed could be counted for another

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage.nbytes()
            kept.append(tensor)
        return tensor

    unpack: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor  # noqa: E731
    ids = torch.ones((1, tokens), dtype=torch.long)
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        outputs = model(input_ids=ids, attention_mask=torch.ones_like(ids), **extra)
    logits = next(value for name, value in outputs.items() if "logits" in name)
    return sum(saved.values()) + 2 * logits.numel() * 4  # cross-entropy keeps the probabilities as well
