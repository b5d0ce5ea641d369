"""Where an engine keeps what: DDP and ZeRO stage 0 whole, 1 and 2 in flat fp32 partitions, 3 all in shards.

The layouts are those of DeepSpeed 0.19 (`stage_1_and_2.py`, `stage3.py`, `utils/tensor_fragment.py`). Its
own checkpoints are pickles and tied to the number of ranks, so neither is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.distributed import get_rank

from job.errors import CheckpointMismatch, JobError
from job.train.shards import Fragment

WEIGHTS_FILE = "model.safetensors"


def find_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return torch's own optimizer inside accelerate's and DeepSpeed's wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def is_sharded(engine: Any | None) -> bool:
    """Tell whether each rank keeps a part of the optimizer's state of its own."""
    return engine is not None and engine.zero_optimization_stage() > 0


def list_fragments(model: Any, engine: Any | None) -> list[Fragment]:
    """Return this rank's fragments of all trained parameters; `engine` is DeepSpeed's, None under DDP."""
    names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not is_sharded(engine):
        return [Fragment(name, p.numel(), 0, p.numel(), p, 0) for p, name in names.items()]
    zero = engine.optimizer  # type: ignore[union-attr]
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        return list(_list_stage3(names, zero))
    if hasattr(zero, "single_partition_of_fp32_groups"):
        return list(_list_stage12(names, zero))
    raise JobError(f"distributed: {type(zero).__name__} is no optimizer whose state this version can save")


def _list_stage12(names: dict[Any, str], zero: Any) -> Iterator[Fragment]:
    """Each rank has one stretch of all parameters of a group, laid end to end."""
    for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is not None:
                low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield Fragment(names[parameter], parameter.numel(), low.start, low.numel, flat, high.start)


def _list_stage3(names: dict[Any, str], zero: Any) -> Iterator[Fragment]:
    """Each rank has one stretch of every parameter; the last ranks' stretches end in padding."""
    for parameter, name in names.items():
        group, offset, padded = zero.grad_position[zero.get_param_id(parameter)]
        start = min(get_rank() * padded, parameter.ds_numel)
        length = min(padded, parameter.ds_numel - start)
        yield Fragment(name, parameter.ds_numel, start, length, zero.fp32_partitioned_groups_flat[group], offset)


def name_flats(model: Any, engine: Any | None) -> dict[str, torch.Tensor]:
    """Return parameter name → the tensor of this rank whose step count is that of the parameter."""
    if is_sharded(engine) and hasattr(engine.optimizer, "bit16_groups"):  # type: ignore[union-attr]
        zero = engine.optimizer  # type: ignore[union-attr]
        names = {parameter: name for name, parameter in model.named_parameters()}
        groups = zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True)
        return {names[parameter]: flat for group, flat in groups for parameter in group}
    return {fragment.name: fragment.flat for fragment in list_fragments(model, engine)}


def read_engine_weights(
    model: Any, engine: Any, fragments: list[Fragment], folder: Path, moved: set[str] | None
) -> None:
    """Put saved fp32 weights (`moved`; None: all) into DeepSpeed's master fragments, its working copies, the buffers.

    Raises CheckpointMismatch (16) naming a weight that the file lacks or that has another shape.
    """
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file, torch.no_grad():
        saved = set(file.keys())
        kept = {name: p for name, p in model.named_parameters() if moved is None or name in moved}
        shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in kept.items()}
        for name, shape in shapes.items():
            if name not in saved or tuple(file.get_slice(name).get_shape()) != tuple(shape):
                raise CheckpointMismatch(f"{WEIGHTS_FILE}: {name} is missing or has another shape than the model's")
        for name, buffer in model.named_buffers():
            if name in saved:
                buffer.copy_(file.get_tensor(name))
        if engine.zero_optimization_stage() == 3:
            _fill_partitions(engine.optimizer, kept, fragments, file)
            return
        for name, parameter in kept.items():
            parameter.copy_(file.get_tensor(name))
        if is_sharded(engine):
            for fragment in fragments:
                _fill_master(fragment, file)


def _fill_master(fragment: Fragment, file: Any) -> torch.Tensor:
    """Copy a fragment's saved weights into its master copy; return them."""
    whole = file.get_tensor(fragment.name).view(-1)
    part: torch.Tensor = whole[fragment.start : fragment.start + fragment.length]
    fragment.view(fragment.flat).copy_(part)
    return part


def _fill_partitions(zero: Any, parameters: dict[str, Any], fragments: list[Fragment], file: Any) -> None:
    """Stage 3: fill master and working partitions, then gather anew the small weights that every rank keeps whole."""
    for fragment in fragments:
        part = _fill_master(fragment, file)
        parameters[fragment.name].ds_tensor.data.view(-1).narrow(0, 0, fragment.length).copy_(part)
    kept_whole = zero.persistent_parameters
    if kept_whole:
        kept_whole[0].partition(kept_whole)
        kept_whole[0].all_gather(kept_whole)
