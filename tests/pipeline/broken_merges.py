"""Merge stages that are the house's, with a tool that loses or changes something."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from job.recipe import Run


def merge_headless(run: Run) -> dict[str, Any]:
    """The merged model is written without its head (peft #577)."""
    return _write_changed(run, lambda name, tensor: None if "classifier" in name else tensor)


def merge_new_head(run: Run) -> dict[str, Any]:
    """The head that is written is one that was drawn anew."""
    import torch

    def draw(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn_like(tensor) if "classifier" in name else tensor

    return _write_changed(run, draw)


def merge_nothing(run: Run) -> dict[str, Any]:
    """The factors are taken away, and not added to the weights."""
    import peft

    from job.train import merge_run

    peft.LoraModel.merge_and_unload = peft.LoraModel.unload  # type: ignore[method-assign]
    return merge_run(run)


def merge_other_scale(run: Run) -> dict[str, Any]:
    """The factors are added with half their scale."""
    from peft.tuners.lora import Linear

    from job.train import merge_run

    inner = Linear.get_delta_weight
    Linear.get_delta_weight = lambda self, adapter: inner(self, adapter) / 2  # type: ignore[method-assign]
    return merge_run(run)


def _write_changed(run: Run, change: Callable[[str, Any], Any]) -> dict[str, Any]:
    """Write what `change` makes of each weight; None: it is left out."""
    from job.train import merge

    inner = merge.write_weights

    def write(model: Any, weights: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        changed = {name: change(name, tensor) for name, tensor in weights.items()}
        inner(model, {name: tensor for name, tensor in changed.items() if tensor is not None}, *args, **kwargs)

    merge.write_weights = write
    return merge.merge_run(run)
