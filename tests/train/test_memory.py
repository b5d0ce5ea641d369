"""The memory plan: what a row keeps, as the whole model would say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from job.tasks import get_task
from job.train.memory import _count_saved, measure_activations, measure_device

KINDS = [
    ("bert", "text-classification"), ("distilbert", "token-classification"), ("roberta", "masked-lm"),
    ("llama", "causal-lm"), ("gpt2", "causal-lm"), ("modernbert", "text-classification"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "task"), KINDS)
def test_two_layers_tell_what_all_keep(kind: str, task: str, tmp_path: Path) -> None:
    import transformers

    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 4, "vocab_size": 90}
    if kind == "modernbert":
        sizes |= {"global_attn_every_n_layers": 1, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2}
    config = transformers.AutoConfig.for_model(kind, **sizes, max_position_embeddings=64)
    config.save_pretrained(tmp_path)
    whole = getattr(transformers, get_task(task).auto_class).from_config(config).train()
    found = measure_activations(tmp_path, get_task(task), 24, checkpointing=False)
    assert found == pytest.approx(_count_saved(whole, 24), rel=0.1)
    assert measure_activations(tmp_path, get_task(task), 24, checkpointing=True) < 0.6 * found


def test_a_longer_row_keeps_more_and_the_device_has_a_name(assets: Path) -> None:
    task, model = get_task("text-classification"), assets / "minilm-l6"
    short, long = (measure_activations(model, task, tokens, checkpointing=False) for tokens in (32, 128))
    assert 3.5 * short < long < 8 * short
    name, room = measure_device(2)
    assert name and (torch.cuda.is_available() or room * 2 >= 1 << 30)
