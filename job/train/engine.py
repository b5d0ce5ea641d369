"""From recipe to engine: TrainingArguments, precision, the DeepSpeed config and its ZeRO stage."""

from __future__ import annotations

import logging
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

from job.data.batching import BatchShape
from job.errors import JobError, RecipeError, ResourceExhausted
from job.recipe import Recipe
from job.recipe.schema import Training
from job.store.models import needs_fp32
from job.tasks import get_task
from job.train.memory import measure_device
from job.train.versions import fit_arguments

log = logging.getLogger("job.train")

EVAL_BATCH_ROWS = 64
_EVAL_ROWS_PER_TRAINED = {False: 4, True: 1}
"""Without gradients so many rows fit where one was trained; logits of every token (True) fill the memory as before."""
_BYTES_PER_PARAMETER = 16
"""fp32 weight + gradient + two Adam moments, or bf16 weight and gradient with an fp32 master copy."""
_USABLE_MEMORY = 0.6
"""Share of a device's memory for weights and optimizer; the rest is for activations."""


def check_gpus() -> None:
    """Raise ResourceExhausted (78) where torch can use fewer GPUs than this node has; it would train on the CPU.

    JOB_GPUS is how many the supervisor found. A build of torch for CPUs alone is a choice and no fault of the node.
    """
    usable, there = torch.cuda.device_count(), int(os.environ.get("JOB_GPUS", "0"))
    if torch.backends.cuda.is_built() and usable < there:
        raise ResourceExhausted(
            f"node {platform.node()}: torch can use {usable} of {there} GPU(s); see nvidia-smi and the kernel's log "
            "(Xid), drain the node, or name the good ones in CUDA_VISIBLE_DEVICES"
        )


def _check_compiler() -> None:
    """Raise RecipeError (10) where torch.compile would find no compiler: g++, for Triton on a GPU one of C."""
    variable, known = ("CC", ("gcc", "clang")) if torch.cuda.is_available() else ("CXX", ("g++",))
    wanted = [os.environ[variable]] if variable in os.environ else known
    if not any(shutil.which(name) for name in wanted):
        raise RecipeError(
            f"training.torch_compile: node {platform.node()} has no compiler ({' or '.join(wanted)}); install "
            f"one, name it in {variable}, take the CUDA image, or leave the key out"
        )


@contextmanager
def repeat_bits(asked: bool) -> Iterator[None]:
    """Have torch add up in the same order every time, so that an attempt that goes on comes to the same bits.

    Without `asked` nothing changes. Attention has two orders to choose from on a GPU, and takes the quicker one where
    others are only warned of; so a kernel that has no fixed order is an error within.
    """
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(asked)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def decide_precision(asked: str, model: Path) -> str:
    """Return bf16, fp16 or fp32; `auto` is bf16 where the processor computes it natively and this model can."""
    if asked == "fp16" and not torch.cuda.is_available():
        raise RecipeError("training.precision: fp16 needs a GPU and this node has none; use auto, bf16 or fp32")
    if asked != "auto":
        return asked
    if needs_fp32(model):
        return "fp32"
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if _cpu_computes_bf16() else "fp32"


def _cpu_computes_bf16() -> bool:
    capability = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    tiles = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool((capability and capability()) or (tiles and tiles()))


def build_arguments(
    recipe: Recipe, shape: BatchShape, precision: str, folder: Path, parameters: int
) -> TrainingArguments:
    """Return the TrainingArguments of one rank; Trainer neither saves nor shuffles on its own."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for `repeat_bits`; read at cuBLAS's first call
    training, per_token = recipe.training, get_task(recipe.kind).per_token
    if training.torch_compile:
        _check_compiler()
    in_group = shape.world_size > 1 or recipe.distributed.engine == "deepspeed"
    if not in_group:  # accelerate would wrap the model for a group of one, which keeps every gradient twice
        os.environ.pop("LOCAL_RANK", None)
    deepspeed = None
    if recipe.distributed.engine == "deepspeed":
        deepspeed = build_deepspeed_config(recipe, shape, parameters, precision)
    options = {
        "output_dir": str(folder),
        "ddp_timeout": recipe.launch.hang_timeout_s,
        "per_device_train_batch_size": shape.micro_batch,
        "gradient_accumulation_steps": shape.accumulation,
        "per_device_eval_batch_size": min(EVAL_BATCH_ROWS, shape.micro_batch * _EVAL_ROWS_PER_TRAINED[per_token]),
        "average_tokens_across_devices": True,
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "use_cpu": not torch.cuda.is_available(),
        "ddp_backend": "gloo" if in_group and not torch.cuda.is_available() else None,
        "ddp_find_unused_parameters": False,
        "deepspeed": deepspeed,
        "dataloader_num_workers": recipe.data.num_workers,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "report_to": sorted(set(training.report_to)) if os.environ.get("RANK", "0") == "0" else [],
        "run_name": folder.parent.name,
        "logging_dir": str(folder.parent / "tensorboard"),
        "save_strategy": "steps" if training.save_steps else "epoch",
        "save_steps": training.save_steps or 500,
        "eval_strategy": "steps" if training.eval_steps else "epoch",
        "eval_steps": training.eval_steps,
        "max_steps": training.max_steps or -1,
        "torch_compile": training.torch_compile,
        "tf32": False if training.torch_compile else None,  # else Trainer would take 10 bits for the 23 of fp32
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if training.gradient_checkpointing else None,
        **_same_names(training),
    }
    args = TrainingArguments(**fit_arguments(options))
    if not in_group:
        args._n_gpu = min(args.n_gpu, 1)  # one rank on a node of many GPUs takes one; Trainer would take all
    return args


def join_group(args: TrainingArguments, world_size: int) -> None:
    """Join the process group of this training; raise JobError when it has not the ranks that were started."""
    if args.world_size != world_size:  # asking for it is what makes transformers join
        raise JobError(f"joined a group of {args.world_size} ranks instead of {world_size}; see the log")
    if args.deepspeed:
        from deepspeed import comm

        # on a CPU accelerate joins torch's group only, and zero.Init would believe in a world of one
        comm.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", auto_mpi_discovery=False)


def init_sharded_weights(model: Any, names: list[str], seed: int) -> None:
    """Initialise the weights `names` where ZeRO-3 has sharded them; elsewhere transformers has done it.

    transformers 4.57 gathers copies that carry no shard, so a new head would train from whatever lay in memory.
    """
    if not is_deepspeed_zero3_enabled() or not names:
        return
    from deepspeed import zero

    modules = {name.rpartition(".")[0] for name in names}
    with torch.no_grad(), zero.GatheredParameters([model.get_parameter(name) for name in names], modifier_rank=0):
        set_seed(seed)
        for name, module in model.named_modules():
            if name in modules:
                model._init_weights(module)


def _same_names(training: Training) -> dict[str, Any]:
    """The keys that Trainer and recipe share by name and meaning."""
    names = (
        "num_train_epochs", "learning_rate", "weight_decay", "warmup_ratio", "warmup_steps", "lr_scheduler_type",
        "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon", "gradient_checkpointing", "logging_steps", "seed",
    )  # fmt: skip
    return {name: getattr(training, name) for name in names}


def build_deepspeed_config(recipe: Recipe, shape: BatchShape, parameters: int, precision: str) -> dict[str, Any]:
    """Return DeepSpeed's config. The optimizer is torch's AdamW, so that no op is compiled at run time."""
    ranks = (shape.world_size, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    stage = decide_zero_stage(recipe, parameters, ranks, precision)
    log.info("DeepSpeed ZeRO stage %s on %d ranks", stage, shape.world_size)
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "contiguous_gradients": True, "overlap_comm": torch.cuda.is_available()},
    }


def decide_zero_stage(recipe: Recipe, parameters: int, ranks: tuple[int, int], precision: str) -> int:
    """Return the ZeRO stage of a training, 0 under DDP; `ranks`: all of them, and those of a node.

    Stage 0 below fp32 becomes stage 1: DeepSpeed's stage 0 shows no one its fp32 master weights.
    """
    if recipe.distributed.engine != "deepspeed":
        return 0
    asked, (_, room) = recipe.distributed.zero_stage, measure_device(ranks[1])
    stage = choose_zero_stage(parameters, ranks[0], room) if asked == "auto" else asked
    return max(stage, 0 if precision == "fp32" else 1)


def choose_zero_stage(parameters: int, world_size: int, memory_bytes: int) -> int:
    """Return the lowest ZeRO stage whose weights, gradients and optimizer fit (ZeRO costs small models time).

    Per rank: stage 0 holds 16 bytes a parameter, 1 shards the 8 of the moments, 2 the 4 of the
    gradients as well, 3 everything (Rajbhandari et al. 2020, fp32 states).
    """
    whole = _BYTES_PER_PARAMETER * parameters
    for stage, sharded in ((0, 0), (1, 8), (2, 12)):
        need = whole - sharded * parameters * (1 - 1 / world_size)
        if need <= _USABLE_MEMORY * memory_bytes:
            return stage
    return 3
