"""Tuning methods: which weights of a loaded model are trained, and which stay what the base model has.

A frozen weight gets no gradient, so neither decay nor a place in the optimizer, and checkpoints leave it out.
Nothing here trains, saves or merges. What a model's parts are called differs; they are found by their place: the
body is what transformers calls `base_model`, its layers its longest list of modules, the head all that stands outside
of it, and the body's pooler.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from job.errors import RecipeError
from job.recipe.schema import Training, Tuning
from job.tasks import Task

ADAPTER = "default"
"""peft's name of the one adapter."""


@dataclass(frozen=True)
class Anatomy:
    """Names of modules: of the head, of the body's embeddings and layers, and of the norm behind the last layer.

    `new_head` is the head where it is made for the task; that of a language model was pre-trained with the body.
    """

    head: list[str]
    new_head: list[str]
    embeddings: list[str]
    layers: list[str]
    behind: list[str]

    @staticmethod
    def of(model: Any) -> Anatomy:
        """Find the parts of a transformers model."""
        body, output = model.base_model, model.get_output_embeddings()
        names = {module: name for name, module in model.named_modules()}
        inside = [(names[child], child) for child in body.children() if _has_weights(child)]
        stack = _find_layers(body)
        pooler = getattr(body, "pooler", None)
        apart = [output, pooler, *stack]
        plain = [(name, part) for name, part in inside if not any(other in apart for other in part.modules())]
        outside = [output] if body is model else [child for child in model.children() if child is not body]
        head = [names[part] for part in (*outside, pooler) if part is not None and _has_weights(part)]
        return Anatomy(
            head,
            head if output is None else [],
            [name for name, part in plain if _is_embedding(part)],
            [names[layer] for layer in stack],
            [name for name, part in plain if not _is_embedding(part)],
        )


def _find_layers(body: Any) -> list[nn.Module]:
    """Return the longest list of modules that no other list holds; of two equally long ones the later (a decoder)."""
    lists: list[Any] = [module for module in body.modules() if isinstance(module, nn.ModuleList)]
    nested = {inner for outer in lists for inner in outer.modules() if inner is not outer}
    outer = [module for module in lists if module not in nested and len(module)]
    longest = max(map(len, outer), default=0)
    return next((list(stack) for stack in reversed(outer) if len(stack) == longest), [])


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _is_embedding(module: nn.Module) -> bool:
    return any(isinstance(part, nn.Embedding) for part in module.modules())


def apply_method(model: Any, tuning: Tuning, seed: int) -> Any | None:
    """Leave `requires_grad` on what is trained alone; return peft's tuner for `lora`, which has changed the model.

    New factors depend on `seed` only. Raises RecipeError (10) where the model has not what the recipe names.
    """
    if tuning.method == "full":
        return None
    anatomy = Anatomy.of(model)
    if tuning.method == "partial":
        _train_alone(model, list(_choose_modules(model, anatomy, tuning)), tuning.embeddings == "trained")
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise RecipeError(
                f"tuning.unfreeze: {tuning.unfreeze}: {type(model).__name__} has no head of its own (its weights are "
                "the embeddings'); write last-N-layers, or embeddings: trained"
            )
        return None
    return _add_factors(model, anatomy, tuning, seed)


def _choose_modules(model: Any, anatomy: Anatomy, tuning: Tuning) -> Iterator[nn.Module]:
    count = tuning.last_layers
    if count > len(anatomy.layers):
        raise RecipeError(
            f"tuning.unfreeze: {tuning.unfreeze}: {type(model).__name__} has {len(anatomy.layers)} layers; name "
            "so many or fewer"
        )
    names = [*anatomy.head, *(anatomy.embeddings if tuning.embeddings == "trained" else [])]
    if count:
        names += [*anatomy.layers[-count:], *anatomy.behind]
    yield from map(model.get_submodule, names)


def _train_alone(model: Any, modules: list[nn.Module], with_embeddings: bool) -> None:
    """Freeze all but `modules`. A head that shares the embeddings' weights is frozen with them."""
    chosen = {parameter for module in modules for parameter in module.parameters()}
    if not with_embeddings:
        chosen -= set(model.get_input_embeddings().parameters())
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and parameter in chosen)


def _add_factors(model: Any, anatomy: Anatomy, tuning: Tuning, seed: int) -> Any:
    """Put trained factors beside the body's linear layers, in place; a head that is made for the task is trained."""
    import peft

    targets = _find_targets(model, anatomy, tuning.targets)
    config = peft.LoraConfig(
        r=tuning.r,
        lora_alpha=tuning.alpha,
        lora_dropout=tuning.dropout,
        target_modules=targets,
        use_rslora=tuning.rslora,
        use_dora=tuning.dora,
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in targets),
    )
    transformers.set_seed(seed)
    tuner = peft.LoraModel(model, {ADAPTER: config}, ADAPTER)
    for name in anatomy.new_head:
        model.get_submodule(name).requires_grad_(True)
    return tuner


def _find_targets(model: Any, anatomy: Anatomy, wanted: list[str] | None) -> list[str]:
    """Return the names of the body's linear layers, or of those whose names end as `wanted` says."""
    linear = [
        name
        for name, module in model.base_model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not model.get_output_embeddings()
    ]
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    heads = tuple(f"{name}." for name in anatomy.head)
    linear = [prefix + name for name in linear if not f"{prefix}{name}.".startswith(heads)]
    if wanted is None:
        return linear
    for end in wanted:
        if not any(f".{name}".endswith(f".{end}") for name in linear):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise RecipeError(
                f"tuning.targets: {end!r} is how no linear layer's name ends in {type(model).__name__}; it has {known}"
            )
    return [name for name in linear if any(f".{name}".endswith(f".{end}") for end in wanted)]


def name_moved(model: Any, tuning: Tuning) -> set[str] | None:
    """Return the names of the weights that training moves, which checkpoints hold; None: all that the model has."""
    if tuning.method == "full":
        return None
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def list_frozen(model: Any, tuning: Tuning) -> list[nn.Module]:
    """Return the largest modules of a partly trained model that are frozen as a whole.

    They are to answer as they will when they are used: a dropout in them would be noise that nothing learns from.
    """
    return list(_walk_frozen(model)) if tuning.method == "partial" else []


def _walk_frozen(module: nn.Module) -> Iterator[nn.Module]:
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        yield module
        return
    for child in module.children():
        yield from _walk_frozen(child)


def find_depths(model: Any) -> dict[str, int]:
    """Return for each parameter how far it is from the output: 0 for head and last norm, 1 for the last layer, …

    What is in none of these (embeddings, and what all layers share) is behind the first layer.
    """
    anatomy = Anatomy.of(model)
    count = len(anatomy.layers)
    depths = {f"{layer}.": count - index for index, layer in enumerate(anatomy.layers)}
    depths |= {f"{part}.": 0 for part in (*anatomy.head, *anatomy.behind)}
    return {
        name: next((depth for part, depth in depths.items() if name.startswith(part)), count + 1)
        for name, _ in model.named_parameters()
    }


def group_weights(model: Any, training: Training, decayed: set[str]) -> list[dict[str, Any]]:
    """Return the optimizer's groups of trained weights, those nearest to the output first; none is empty.

    `decayed` names the weights that `weight_decay` is for. DeepSpeed would drop an empty group, and its rate not.
    """
    rate, depths = training.layerwise_lr_decay, find_depths(model)
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((depths[name] if rate else 0, name not in decayed), []).append(parameter)
    return [
        {
            "params": groups[depth, bare],
            "lr": training.learning_rate * (rate or 1.0) ** depth,
            "weight_decay": 0.0 if bare else training.weight_decay,
        }
        for depth, bare in sorted(groups)
    ]


def count_trained(model: Any) -> int:
    """Return the number of trained weights, whole where ZeRO-3 shards them."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)


def estimate_trained(folder: Path, task: Task, labels: list[str], tuning: Tuning) -> int:
    """Return how many weights a method would train of a model folder, without loading any."""
    config = transformers.AutoConfig.from_pretrained(
        folder, trust_remote_code=False, **({"num_labels": len(labels)} if task.classifies or task.problem_type else {})
    )
    with torch.device("meta"):
        model = getattr(transformers, task.auto_class).from_config(config)
        apply_method(model, tuning, 0)
    return count_trained(model)
