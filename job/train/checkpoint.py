"""The files of a checkpoint: safetensors and JSON, no pickle.

model.safetensors, config.json, tokenizer files    weights in fp32, gathered from all ranks     rank 0
                                                   (those that the method moves, no others)
best.safetensors                                   the weights of the best evaluation before this     rank 0
                                                   step, where the recipe wants them
trainer_state.json, steps.json                     step, epoch, log history; updates            rank 0
engine.json                                        scheduler, loss scale, DeepSpeed's counters  rank 0
shard-NNNNN.safetensors                            fragments of the optimizer's moments         every rank under
                                                   (`shards.py`)                                ZeRO 1-3, else rank 0
random-NNNNN.{safetensors,json}                    random number generators, digest of samples  every rank
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from job.errors import CheckpointMismatch, Diverged
from job.train.fragments import WEIGHTS_FILE
from job.train.snapshot import Keep
from job.train.stream import SampleDigest, seed_rank

BEST_FILE = "best.safetensors"
ENGINE_FILE = "engine.json"
STATE_FILE = "trainer_state.json"

_COUNTERS = ("global_steps", "global_samples", "skipped_steps")
_LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""DeepSpeed's DynamicLossScaler, fp16/loss_scaler.py."""


def gather_weights(model: Any, engine: Any | None, moved: set[str] | None, keep: Keep) -> dict[str, torch.Tensor]:
    """Return copies, made by `keep`, of the weights `moved` (None: all) in fp32; tied weights share one.

    Under DeepSpeed every rank must call; only rank 0 keeps them, the others get none.
    """
    if engine is not None:
        return _gather_sharded(model, moved, keep)
    if torch.distributed.is_initialized() and torch.distributed.get_rank():
        return {}
    state = {name: tensor for name, tensor in model.state_dict().items() if moved is None or name in moved}
    places = {name: (tensor.data_ptr(), tensor.shape, tensor.stride()) for name, tensor in state.items()}
    copies = {place: keep(_as_fp32(state[name])) for place, name in {places[name]: name for name in state}.items()}
    return {name: copies[place] for name, place in places.items()}


def _as_fp32(tensor: torch.Tensor) -> torch.Tensor:
    """Return floating-point numbers in fp32; integers stay."""
    return tensor.float() if tensor.is_floating_point() else tensor


def _gather_sharded(model: Any, moved: set[str] | None, keep: Keep) -> dict[str, torch.Tensor]:
    """Gather ZeRO's fp32 master weights one by one: `save_16bit_model` would round them to bf16."""
    from deepspeed.utils import safe_get_full_fp32_param

    is_first = torch.distributed.get_rank() == 0
    weights = {}
    for name, parameter in model.named_parameters():
        if moved is not None and name not in moved:
            continue
        full = safe_get_full_fp32_param(parameter)
        if full is None:  # stage 0 in fp32 keeps no master copy
            full = parameter.detach()
        if is_first:
            weights[name] = keep(_as_fp32(full))
    if is_first and moved is None:
        first = {parameter: name for name, parameter in model.named_parameters()}
        tied = model.named_parameters(remove_duplicate=False)
        weights |= {alias: weights[first[parameter]] for alias, parameter in tied}
        weights |= {name: keep(_as_fp32(buffer)) for name, buffer in model.state_dict().items() if name not in weights}
    return weights


def write_weights(model: Any, weights: dict[str, torch.Tensor], folder: Path, whole: bool) -> None:
    """Write config and weights in the Hugging Face layout; raise Diverged (14) for NaN or Inf in them.

    `whole`: these are all weights of the model, of tied ones one is written.
    """
    for name, tensor in weights.items():
        # numpy's check: torch's takes ten times the processor time, from the team of threads that trains meanwhile
        if tensor.is_floating_point() and not np.isfinite(tensor.detach().numpy()).all():
            raise Diverged(f"weight {name} holds NaN or Inf; lower training.learning_rate or use precision: fp32")
    if whole:
        model.save_pretrained(folder, state_dict=weights, safe_serialization=True, max_shard_size="1000GB")
        return
    model.config.save_pretrained(folder)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / WEIGHTS_FILE)


def read_weights(model: Any, folder: Path, moved: set[str] | None) -> None:
    """Put saved weights back into a model that is not wrapped yet.

    Raises CheckpointMismatch (16) where not exactly those of `moved` were saved; None: all of them may have been.
    """
    from safetensors.torch import load_model

    lacking, unknown = load_model(model, folder / WEIGHTS_FILE, strict=False)
    if moved is not None and (wrong := sorted([*moved.intersection(lacking), *unknown])):
        raise CheckpointMismatch(
            f"{WEIGHTS_FILE}: {wrong[0]} and the weights that tuning trains do not match; go on with the version "
            "that wrote the checkpoint, or begin anew with --fresh"
        )


def write_engine(engine: Any | None, scheduler: Any, scaler: Any | None, folder: Path) -> None:
    """Write what is neither weight nor moment; `scaler` is torch's GradScaler where fp16 runs without DeepSpeed."""
    plain = {key: value for key, value in scheduler.state_dict().items() if isinstance(value, (int, float, list))}
    state: dict[str, Any] = {"scheduler": plain, "scaler": scaler.state_dict() if scaler else None}
    if engine is not None:
        state["counters"] = {name: getattr(engine, name) for name in _COUNTERS}
        state["loss_scale"] = {name: getattr(owner, name) for owner, name in _find_loss_scale(engine)}
    (folder / ENGINE_FILE).write_text(json.dumps(state))


def read_engine(engine: Any | None, optimizer: torch.optim.Optimizer, scheduler: Any, folder: Path) -> None:
    """Set scheduler, learning rates and DeepSpeed's counters to what `write_engine` wrote."""
    state = json.loads((folder / ENGINE_FILE).read_text())
    scheduler.load_state_dict(state["scheduler"])
    for group, rate in zip(optimizer.param_groups, state["scheduler"]["_last_lr"], strict=True):
        group["lr"] = rate
    if engine is not None:
        for name, value in state.get("counters", {}).items():
            setattr(engine, name, value)
        for owner, name in _find_loss_scale(engine):
            setattr(owner, name, state.get("loss_scale", {}).get(name, getattr(owner, name)))


def read_scaler(scaler: Any | None, folder: Path) -> None:
    """Set torch's GradScaler to the scale that was saved, where both attempts have one."""
    saved = json.loads((folder / ENGINE_FILE).read_text())["scaler"]
    if scaler and saved:
        scaler.load_state_dict(saved)


def _find_loss_scale(engine: Any) -> list[tuple[Any, str]]:
    """Return (object, attribute) of DeepSpeed's dynamic loss scale; nothing outside fp16."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return [(scaler, name) for name in _LOSS_SCALE if hasattr(scaler, name)]


def write_random_state(rank: int, samples: SampleDigest, folder: Path) -> None:
    """Write the generators of Python, numpy, torch and CUDA of this rank, and the digest of its samples."""
    _, keys, position, has_gauss, cached = np.random.get_state()
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64))}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    save_file(tensors, folder / f"random-{rank:05d}.safetensors")
    numpy = [int(position), int(has_gauss), float(cached)]
    plain = {"python": random.getstate(), "numpy": numpy, "samples": samples.to_json()}
    (folder / f"random-{rank:05d}.json").write_text(json.dumps(plain))


def read_random_state(rank: int, fallback: tuple[int, ...], folder: Path) -> None:
    """Set the generators to what this rank wrote; a rank that is new is seeded from `fallback`."""
    if not (folder / f"random-{rank:05d}.json").exists():
        return seed_rank(*fallback)
    tensors = load_file(folder / f"random-{rank:05d}.safetensors")
    plain = json.loads((folder / f"random-{rank:05d}.json").read_text())
    version, internal, gauss = plain["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(("MT19937", tensors["numpy"].numpy().astype(np.uint32), *plain["numpy"]))
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])


def read_samples(rank: int, folder: Path) -> SampleDigest:
    """Return the digest to go on from: rank 0 has the sum of all that were saved, however many ranks they were."""
    digest = SampleDigest()
    for path in folder.glob("random-*.json") if rank == 0 else ():
        digest.merge(json.loads(path.read_text())["samples"])
    return digest
