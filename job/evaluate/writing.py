"""What a trained model writes on from prompts of the test split, greedily; the rehearsal wants the same."""

from __future__ import annotations

from typing import Any

import torch

from job.recipe import Run

MAX_NEW_TOKENS = 32


def write_on(run: Run, model: Any) -> dict[str, Any]:
    """Continue the sample prompts with a torch model; return {max_new_tokens, rows: [{prompt, ids, lead}]}.

    `ids` are the new tokens, the end among them; `lead` says of each how far it was ahead of the next, in logits.
    """
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(run.tokenizer)
    end = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    greedy = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=MAX_NEW_TOKENS,
        output_logits=True,
        return_dict_in_generate=True,
        **end,
    )
    rows = []
    for prompt in run.read("sample.json")["prompts"]:
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        with torch.inference_mode():
            answer = model.eval().generate(**inputs, generation_config=greedy)
        best = torch.cat(answer.logits).float().topk(2).values.cpu()
        ids = answer.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        rows.append(
            {"prompt": prompt, "ids": ids, "lead": [round(lead, 5) for lead in (best[:, 0] - best[:, 1]).tolist()]}
        )
    return {"max_new_tokens": MAX_NEW_TOKENS, "rows": rows}
