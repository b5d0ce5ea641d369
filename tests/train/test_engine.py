"""ZeRO's automatic stage is the lowest that fits, and precision is what the processor can do."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel

from job.errors import RecipeError, ResourceExhausted
from job.recipe import Recipe
from job.recipe.schema import Distributed
from job.train.engine import check_gpus, choose_zero_stage, decide_precision, decide_zero_stage

GIB = 2**30


@pytest.mark.parametrize(
    ("parameters", "ranks", "memory", "stage"),
    [
        (66e6, 8, 16 * GIB, 0),
        (66e6, 1, 16 * GIB, 0),
        (1e9, 8, 24 * GIB, 1),
        (1.5e9, 8, 16 * GIB, 2),
        (8e9, 8, 80 * GIB, 2),
        (8e9, 64, 24 * GIB, 3),
    ],
)
def test_the_lowest_stage_that_fits_is_chosen(parameters: float, ranks: int, memory: int, stage: int) -> None:
    assert choose_zero_stage(int(parameters), ranks, memory) == stage


@pytest.mark.parametrize(
    ("distributed", "precision", "stage"),
    [
        ({"engine": "ddp", "zero_stage": 3}, "bf16", 0),
        ({"engine": "deepspeed", "zero_stage": 0}, "fp32", 0),
        ({"engine": "deepspeed", "zero_stage": 0}, "bf16", 1),
        ({"engine": "deepspeed", "zero_stage": 3}, "fp32", 3),
        ({"engine": "deepspeed"}, "fp32", 0),
        ({"engine": "deepspeed"}, "bf16", 1),
    ],
)
def test_ddp_has_no_stage_and_below_fp32_stage_0_is_1(
    smallest_recipe: Recipe, distributed: dict[str, Any], precision: str, stage: int
) -> None:
    recipe = smallest_recipe.model_copy(update={"distributed": Distributed.model_validate(distributed)})
    assert decide_zero_stage(recipe, 1000, (2, 2), precision) == stage


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """What is asked of a model's folder."""
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    return tmp_path


def test_what_is_asked_for_is_kept_and_fp16_needs_a_gpu(model: Path) -> None:
    assert decide_precision("fp32", model) == "fp32"
    assert decide_precision("auto", model) in ("bf16", "fp32")
    if not torch.cuda.is_available():
        with pytest.raises(RecipeError, match="fp16 needs a GPU"):
            decide_precision("fp16", model)


def test_a_model_that_cannot_be_computed_in_half_precision_is_trained_in_fp32(model: Path) -> None:
    tiny = {
        "vocab_size": 10,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
    }
    AutoConfig.for_model("deberta", **tiny, relative_attention=True, pos_att_type=["c2p"]).save_pretrained(model)
    assert decide_precision("auto", model) == "fp32"
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="BFloat16 without overflow"):
        AutoModel.from_config(AutoConfig.from_pretrained(model))(torch.ones(1, 3, dtype=torch.int64))


def test_a_node_whose_gpus_torch_cannot_use_is_named_instead_of_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOB_GPUS", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    check_gpus()  # this build is for CPUs
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    with pytest.raises(ResourceExhausted, match=rf"node {platform.node()}: torch can use 1 of 2 GPU"):
        check_gpus()
