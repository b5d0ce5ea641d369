"""What a model writes when it takes the likeliest token each time: in torch, and in Optimum's classes for ONNX.

All wishes that a base model may have of how it writes are left out but the ids below, so that runtimes can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from job.tasks.causal_lm import encode_prompt
from job.tasks.protocol import Task

_IDS = ("eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id")


def configure_greedy(wishes: Mapping[str, Any], max_new_tokens: int) -> Any:
    """Return a transformers.GenerationConfig with the ids of `wishes` (a generation_config.json) and nothing else."""
    from transformers import GenerationConfig

    told = {name: wishes[name] for name in _IDS if wishes.get(name) is not None}
    keep = {"output_logits": True, "return_dict_in_generate": True}
    return GenerationConfig(do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, **told, **keep)


def write_greedily(model: Any, tokenizer: Any, task: Task, prompt: str, greedy: Any) -> tuple[list[int], list[float]]:
    """Return the new ids, the end among them, and of each how far it was ahead of the next, in logits."""
    import torch

    if task.is_encoder_decoder:
        ids = list(tokenizer(prompt, truncation=True)["input_ids"])
    else:
        ends = greedy.eos_token_id
        ids = encode_prompt(tokenizer, prompt, ends if isinstance(ends, list) else [ends])
    prompts = torch.tensor([ids], device=model.device)
    inputs = {"input_ids": prompts, "attention_mask": torch.ones_like(prompts)}
    with torch.inference_mode():
        answer = model.generate(**inputs, generation_config=greedy, use_model_defaults=False)
    best = torch.cat(answer.logits).float().topk(2).values.cpu()
    leads = [round(lead, 5) for lead in (best[:, 0] - best[:, 1]).tolist()]
    return answer.sequences[0, -len(leads) :].tolist(), leads
