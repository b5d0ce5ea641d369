"""`job check`: what a run would do, said before it does anything. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from job.data.batching import derive_micro_batch
from job.errors import DataError, RecipeError
from job.export import check_exportable
from job.launch import Topology, find_place, find_topology
from job.recipe import Recipe
from job.store import RunStore
from job.tasks import get_task

_TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "mlflow": ("mlflow",), "wandb": ("wandb",)}
"""Packages of which transformers needs one; the last is the smallest."""
_BYTES_PER_WEIGHT, _BYTES_PER_TRAINED = 4, 12
"""In memory: fp32 weights; of those that are trained gradient and two Adam moments as well."""
_CHECKPOINT_BYTES_PER_PARAMETER = 12
"""fp32 weight and two Adam moments."""


def print_plan(recipe: Recipe, work: Path, offline: bool) -> None:
    """Print the plan to stdout; raise the JobError that the run would end with."""
    refuse_missing_trackers(recipe)
    topology = find_topology(recipe.distributed, find_place())
    for line in describe_batches(recipe, topology):
        print(line)
    if offline:
        print("offline: data, model and store were not probed")
        return
    store = RunStore(recipe.store.uri, "probe", allow_http=recipe.store.allow_http)
    store.prove_reachable()
    print(f"store:        {recipe.store.uri} answers")
    for line in describe_sources(recipe, work, topology):
        print(line)


def count_needed_rows(recipe: Recipe) -> int:
    """Return the fewest test rows on which the int8 gate can prove anything."""
    return get_task(recipe.kind).min_rows(recipe.export.int8.max_metric_drop)


def refuse_few_rows(recipe: Recipe, rows: int) -> None:
    """Raise DataError (11) where `rows` test rows can prove nothing, unless the gate only reports."""
    gate, needed = recipe.export.int8, count_needed_rows(recipe)
    if gate.gate == "fail" and rows < needed:
        raise DataError(
            f"data.test: {rows} rows cannot prove a drop of at most {gate.max_metric_drop:g} "
            f"(export.int8.max_metric_drop); give at least {needed} rows, or set export.int8.gate: report_only"
        )


def refuse_precision(recipe: Recipe, folder: Path) -> None:
    """Raise RecipeError (10) where transformers cannot compute the model in `folder` as the recipe wants it."""
    from job.store.models import needs_fp32

    asked = recipe.training.precision
    if asked in ("bf16", "fp16") and needs_fp32(folder):
        raise RecipeError(
            f"training.precision: transformers cannot compute this model in {asked} mixed precision; use auto or fp32"
        )


def refuse_missing_trackers(recipe: Recipe) -> None:
    """Raise RecipeError (10) where the recipe reports to something whose package is not installed here."""
    for name in recipe.training.report_to:
        packages = _TRACKERS[name]
        if not any(find_spec(package) for package in packages):
            raise RecipeError(
                f"training.report_to: {name}, but its package is not installed here; pip install {packages[-1]}, or "
                "take it out"
            )


def describe_batches(recipe: Recipe, topology: Topology) -> list[str]:
    """Return lines on ranks and batches; raise RecipeError for a batch that the ranks cannot share."""
    training, distributed = recipe.training, recipe.distributed
    shape = derive_micro_batch(training.global_batch_size, topology.world_size, training.max_micro_batch_size)
    zero = f", ZeRO stage {distributed.zero_stage}" if distributed.engine == "deepspeed" else ""
    return [
        f"recipe:       {recipe.name}: {recipe.task}, {recipe.tuning.method} fine-tuning of {recipe.model.id}",
        f"world size:   {topology.world_size} ({topology.nodes} node × {topology.processes_per_node} processes), "
        f"{distributed.engine}{zero}",
        f"global batch: {shape.global_batch} = {shape.micro_batch} rows × {shape.accumulation} accumulation × "
        f"{shape.world_size} ranks",
        f"gate:         bound of the drop ≤ {recipe.export.int8.max_metric_drop:g}, agreement ≥ "
        f"{recipe.export.int8.min_agreement:g}, needs ≥ {count_needed_rows(recipe)} test rows "
        f"({recipe.export.int8.gate}), targets {', '.join(recipe.export.int8.targets)}",
    ]


def describe_sources(recipe: Recipe, work: Path, topology: Topology) -> list[str]:
    """Fetch model and data into the cache, read them as a run would, and return lines on what they are."""
    from job.data.fetch import check_max_length, find_model_class, read_splits
    from job.data.sources import locate_data
    from job.store.models import count_parameters, fetch_model, read_config

    cache, task = work.absolute() / "cache", get_task(recipe.kind)
    model = fetch_model(recipe.model.id, recipe.model.revision, cache, allow_http=recipe.store.allow_http)
    source = locate_data(recipe.data, cache, allow_http=recipe.store.allow_http)
    config = read_config(model.path)
    check_max_length(recipe.data.max_length, config)
    _, labels, counts = read_splits(recipe, source, config)
    rows = counts["rows"]
    refuse_few_rows(recipe, rows["test"])
    least = "at least " if task.per_token else ""  # long texts become several rows
    refuse_precision(recipe, model.path)
    find_model_class(model.path, task)
    check_exportable(model.path, task)
    parameters = count_parameters(model.path)
    trained = parameters if recipe.tuning.method == "full" else _estimate_trained(recipe, model.path, labels.names)
    per_epoch = math.ceil(rows["train"] / recipe.training.global_batch_size)
    steps = recipe.training.max_steps or math.ceil(per_epoch * recipe.training.num_train_epochs)
    saves = math.ceil(steps / (recipe.training.save_steps or per_epoch))  # the last step is saved too
    each = _CHECKPOINT_BYTES_PER_PARAMETER + (_BYTES_PER_WEIGHT if recipe.training.load_best_model_at_end else 0)
    stored_gib = saves * each * trained / 2**30
    early = ", or fewer: early stopping" if recipe.training.early_stopping_patience else ""
    return [
        f"model:        {model.origin} at {model.commit or 'no commit'}: {parameters / 1e6:.1f} M parameters",
        f"data:         {source.origin} at {source.commit or 'no commit'}: "
        + ", ".join(f"{count} {name}" for name, count in rows.items())
        + (f"; labels {', '.join(labels.names)}" if labels.names else "")
        + (f"; set aside {counts['set_aside']}" if counts["set_aside"] else ""),
        f"tuning:       {recipe.tuning.method}: {trained / 1e6:.2f} M parameters are trained",
        f"steps:        {least}{steps} ({per_epoch} per epoch){early}",
        describe_memory(recipe, topology, model.path, (parameters, trained)),
        f"to the store: {least}≈ {stored_gib:.2g} GiB in {saves} "
        f"checkpoint{'s' * (saves > 1)}, of which {min(saves, recipe.store.keep_checkpoints)} stay",
        suggest_interval(recipe, topology, model.path, (parameters, trained)),
    ]


def describe_memory(recipe: Recipe, topology: Topology, folder: Path, counts: tuple[int, int]) -> str:
    """Return a line on what a rank will hold; `counts`: parameters, and how many of them are trained.

    Activations are measured; where both do not fit into the device, the line says what would.
    """
    from job.train import HOST, measure_activations, measure_device

    training, task = recipe.training, get_task(recipe.kind)
    shape = derive_micro_batch(training.global_batch_size, topology.world_size, training.max_micro_batch_size)
    tokens = _find_longest(recipe, folder)
    row = measure_activations(folder, task, tokens, training.gradient_checkpointing)
    name, room = measure_device(topology.processes_per_node)
    states, what = _BYTES_PER_WEIGHT * counts[0] + _BYTES_PER_TRAINED * counts[1], "weights, gradients and optimizer"
    if name == HOST:  # beside a GPU the copy lies on the host
        states, what = states + _CHECKPOINT_BYTES_PER_PARAMETER * counts[1], f"{what}, and a copy of them to save"
    kept, whole_gib = shape.micro_batch * row, (states + shape.micro_batch * row) / 2**30
    said = (
        f"memory:       ≤ {whole_gib:.1f} of {room / 2**30:.1f} GiB ({name}): {states / 2**30:.1f} GiB of {what}, "
        f"{kept / 2**30:.1f} GiB of activations ({shape.micro_batch} rows of {tokens} tokens)"
    )
    if states + kept <= room:
        return said
    if fitting := int((room - states) // row) if room > states else 0:
        return f"{said}: may not fit; training.max_micro_batch_size: {fitting} does (the global batch stays)"
    way_out = "training.gradient_checkpointing: true, tuning.method: lora, or distributed.engine: deepspeed"
    return f"{said}: does not fit; lower data.max_length, or use {way_out}"


def suggest_interval(recipe: Recipe, topology: Topology, folder: Path, counts: tuple[int, int]) -> str:
    """Return a line on how often a checkpoint is best saved, in time and, roughly, in steps.

    `counts`: parameters of the model in `folder`, and how many of them are trained.
    """
    from job.train import HOST, ON_GPUS, ON_PROCESSORS, Saved, estimate_cost, measure_device

    ranks, (name, _) = topology.world_size, measure_device(topology.processes_per_node)
    cluster = replace(ON_PROCESSORS if name == HOST else ON_GPUS, ranks_per_node=topology.processes_per_node)
    stage = _find_stage(recipe, topology, folder, counts[0])
    cost = estimate_cost(Saved(counts[1], ranks, stage, recipe.training.load_best_model_at_end), cluster)
    interval, stall, lag = map(_say_time, (cost.interval_s, cost.stall_s, cost.lag_s))
    step_s = _estimate_step(recipe, topology, folder, counts[0])
    return (
        f"saves:        one in {interval} loses least (Young, Daly: {stall} a save, {cluster.mtbf_h / ranks:,.0f} h to "
        f"a failure; durable {lag} after it began); training.save_steps: {cost.count_steps(step_s)} if a step takes ≈ "
        f"{step_s:.1f} s"
    )


def _estimate_step(recipe: Recipe, topology: Topology, folder: Path, parameters: int) -> float:
    """Return the seconds of a step, every row of which is as long as one may be."""
    from job.train import estimate_step, measure_flops

    tokens = recipe.training.global_batch_size * _find_longest(recipe, folder) // topology.world_size
    return estimate_step(parameters, tokens, measure_flops())


def _find_stage(recipe: Recipe, topology: Topology, folder: Path, parameters: int) -> int:
    """Return the ZeRO stage of the run, as far as it can be told here: `auto` depends on what ranks compute on."""
    from job.train import decide_precision, decide_zero_stage

    asked = recipe.training.precision
    precision = decide_precision(asked, folder) if asked == "auto" else asked
    return decide_zero_stage(recipe, parameters, (topology.world_size, topology.processes_per_node), precision)


def _say_time(seconds: float) -> str:
    if seconds >= 120:
        return f"{seconds / 60:.0f} min"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


def _find_longest(recipe: Recipe, folder: Path) -> int:
    """Return how many tokens a row may have."""
    from job.data.fetch import DEFAULT_MAX_LENGTH, check_max_length
    from job.store.models import read_config

    return recipe.data.max_length or min(DEFAULT_MAX_LENGTH, check_max_length(None, read_config(folder)))


def _estimate_trained(recipe: Recipe, folder: Path, labels: list[str]) -> int:
    from job.train import estimate_trained  # torch: only where the model's parts must be known

    return estimate_trained(folder, get_task(recipe.kind), labels, recipe.tuning)
