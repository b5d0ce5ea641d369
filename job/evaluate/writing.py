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
    end = {"eos_token_id": data["ends"], "pad_token_id": data["pad_id"]}
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
        inputs = torch.tensor([encode_prompt(tokenizer, prompt, data["ends"])], device=model.device)
        with torch.inference_mode():
            answer = model.eval().generate(inputs, generation_config=greedy, use_model_defaults=False)
        best = torch.cat(answer.logits).float().topk(2).values.cpu()
        ids = answer.sequences[0, inputs.shape[1] :].tolist()
        rows.append(
            {"prompt": prompt, "ids": ids, "lead": [round(lead, 5) for lead in (best[:, 0] - best[:, 1]).tolist()]}
        )
    return {"max_new_tokens": MAX_NEW_TOKENS, "rows": rows}
