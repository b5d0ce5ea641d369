"""The training state on disk: safetensors and JSON, no pickle of our own.

model.safetensors, config.json, tokenizer files    weights in fp32, gathered from all ranks   rank 0
trainer_state.json                                 step, epoch, log history                   rank 0
optimizer.safetensors, scheduler.json              DDP: moments by parameter name             rank 0
global_stepN/…                                     DeepSpeed: its own shards (pickles, read   every rank
                                                   back only under a verified manifest)
random-NNNNN.{safetensors,json}                    random number generators                   every rank
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from job.errors import CheckpointMismatch, Diverged

OPTIMIZER_FILE = "optimizer.safetensors"
SCHEDULER_FILE = "scheduler.json"
STATE_FILE = "trainer_state.json"


def gather_weights(model: Any, engine: Any | None) -> dict[str, torch.Tensor]:
    """Return all weights in fp32 on the CPU. Under DeepSpeed every rank must call; only rank 0 keeps them."""
    if engine is None:
        return {name: _as_fp32(tensor) for name, tensor in model.state_dict().items()}
    return _gather_sharded(model)


def _as_fp32(tensor: torch.Tensor) -> torch.Tensor:
    """Return a CPU copy with floating-point numbers in fp32; integers stay."""
    copy = tensor.detach().cpu()
    return copy.float() if copy.is_floating_point() else copy


def _gather_sharded(model: Any) -> dict[str, torch.Tensor]:
    """Gather ZeRO's fp32 master weights one by one: `save_16bit_model` would round them to bf16."""
    from deepspeed.utils import safe_get_full_fp32_param

    keep = torch.distributed.get_rank() == 0
    weights = {}
    for name, parameter in model.named_parameters():
        full = safe_get_full_fp32_param(parameter)
        if full is None:  # stage 0 in fp32 keeps no master copy
            full = parameter.detach()
        if keep:
            weights[name] = _as_fp32(full).clone()
    if keep:
        weights |= {name: buffer.detach().cpu() for name, buffer in model.state_dict().items() if name not in weights}
    return weights


def write_weights(model: Any, weights: dict[str, torch.Tensor], tokenizer: Path, folder: Path) -> None:
    """Write config, weights and tokenizer in the Hugging Face layout; raise Diverged (14) for NaN or Inf in them."""
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise Diverged(f"weight {name} holds NaN or Inf; lower training.learning_rate or use precision: fp32")
    model.save_pretrained(folder, state_dict=weights, safe_serialization=True, max_shard_size="1000GB")
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)


def read_weights(model: Any, folder: Path) -> None:
    """Put saved weights back into a model that is not wrapped yet."""
    from safetensors.torch import load_model

    load_model(model, folder / "model.safetensors", strict=False)


def write_optimizer(optimizer: torch.optim.Optimizer, scheduler: Any, names: dict[int, str], folder: Path) -> None:
    """Write moments and step counts as `<parameter name>|<field>` tensors; `names` is id(parameter) → name."""
    tensors = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for field, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{names[id(parameter)]}|{field}"] = torch.as_tensor(value).detach().cpu().contiguous()
    save_file(tensors, folder / OPTIMIZER_FILE)
    plain = {key: value for key, value in scheduler.state_dict().items() if isinstance(value, (int, float, list))}
    (folder / SCHEDULER_FILE).write_text(json.dumps(plain))


def read_optimizer(optimizer: torch.optim.Optimizer, scheduler: Any, names: dict[int, str], folder: Path) -> None:
    """Put the saved moments back; raise CheckpointMismatch (16) when a parameter has none."""
    tensors = load_file(folder / OPTIMIZER_FILE)
    fields: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, field = key.rpartition("|")
        fields.setdefault(name, {})[field] = tensor
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            if name not in fields:
                raise CheckpointMismatch(f"{OPTIMIZER_FILE}: no state for {name}; the checkpoint is of another model")
            optimizer.state[parameter] = {
                field: tensor if field == "step" else tensor.to(parameter.device)
                for field, tensor in fields[name].items()
            }
    plain = json.loads((folder / SCHEDULER_FILE).read_text())
    scheduler.load_state_dict(plain)
    for group, rate in zip(optimizer.param_groups, plain["_last_lr"], strict=True):
        group["lr"] = rate


def write_random_state(rank: int, folder: Path) -> None:
    """Write the generators of Python, numpy, torch and CUDA of this rank."""
    _, keys, position, has_gauss, cached = np.random.get_state()
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64))}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    save_file(tensors, folder / f"random-{rank:05d}.safetensors")
    plain = {"python": random.getstate(), "numpy": [int(position), int(has_gauss), float(cached)]}
    (folder / f"random-{rank:05d}.json").write_text(json.dumps(plain))


def read_random_state(rank: int, folder: Path) -> None:
    """Set the generators to what `write_random_state` wrote."""
    tensors = load_file(folder / f"random-{rank:05d}.safetensors")
    plain = json.loads((folder / f"random-{rank:05d}.json").read_text())
    version, internal, gauss = plain["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(("MT19937", tensors["numpy"].numpy().astype(np.uint32), *plain["numpy"]))
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
