"""What a trained model writes on from prompts of the test split, greedily; the rehearsal wants the same."""

from __future__ import annotations

from typing import Any

import torch

from job.recipe import Run
from job.tasks import encode_prompt

MAX_NEW_TOKENS = 32


def write_on(run: Run, model: Any) -> dict[str, Any]:
    """Continue the sample prompts with a torch model; return {max_new_tokens, rows: [{prompt, ids, lead}]}.

    `ids` are the new tokens, the end among them; `lead` says of each how far it was ahead of the next, in logits.
    """
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer, data = AutoTokenizer.from_pretrained(run.tokenizer), run.read("data.json")
    length = max(
        min(MAX_NEW_TOKENS, data["max_length"] // 2), 1
    )  # prompts have the other half of what fits for certain
    told = {key: data["generation"][key] for key in ("eos_token_id", "pad_token_id")}
    told |= {"output_logits": True, "return_dict_in_generate": True}
    greedy = GenerationConfig(do_sample=False, num_beams=1, max_new_tokens=length, **told)
    rows = []
    for prompt in run.read("sample.json")["prompts"]:
        ids = torch.tensor([encode_prompt(tokenizer, prompt, told["eos_token_id"])], device=model.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.inference_mode():
            answer = model.eval().generate(**inputs, generation_config=greedy, use_model_defaults=False)
        best = torch.cat(answer.logits).float().topk(2).values.cpu()
        leads = [round(lead, 5) for lead in (best[:, 0] - best[:, 1]).tolist()]
        rows.append({"prompt": prompt, "ids": answer.sequences[0, ids.shape[1] :].tolist(), "lead": leads})
    return {"max_new_tokens": length, "rows": rows}
