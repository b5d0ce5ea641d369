"""What a model that writes needs beside its tables: prompts to be rehearsed with, and where it stops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from job.tasks import Examples, find_end, list_turns, render_chat

_PROMPTS, _TOKENS = 16, 64


def choose_prompts(test: Examples, tokenizer: Any, max_length: int) -> list[str]:
    """Return short prompts of test rows to write on from: the ends of prompts, or the beginnings of texts.

    None is longer than half of `max_length`, for which the model has positions: what is written needs the others.
    """
    limit, prompts = max(min(_TOKENS, max_length // 2), 1), []
    whole = test.pairs is not None or test.targets is not None
    for place, text in enumerate(test.texts[:_PROMPTS]):
        if test.targets is not None:
            text = _ask(tokenizer, test.targets[place])
        prompt = text if whole else text[: len(text) // 2 + 1].rpartition(" ")[0].strip() or text
        while len(prompt) > 1 and len(tokenizer(prompt)["input_ids"]) > limit:
            half = len(prompt) // 2
            prompt = prompt[half:] if whole else prompt[:half]
        prompts.append(prompt)
    return prompts


def _ask(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """Return a conversation up to where the assistant speaks last."""
    turn = list_turns(messages)[-1]
    return render_chat(tokenizer, messages[:turn], ask=True) if turn else messages[0]["content"]


def describe_generation(folder: Path, config: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Return the generation_config.json of the release: the base model's wishes, and all ids at which it stops.

    That which ends our texts comes first, so that generate() stops where the trained model does.
    """
    path = folder / "generation_config.json"
    try:
        wishes = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        wishes = {}
    wishes = wishes if isinstance(wishes, dict) else {}
    theirs = wishes.get("eos_token_id", config.get("eos_token_id"))
    ends = [find_end(tokenizer), *(theirs if isinstance(theirs, list) else [theirs])]
    stops = list(dict.fromkeys(end for end in ends if isinstance(end, int)))
    return wishes | {"eos_token_id": stops, "pad_token_id": int(tokenizer.pad_token_id)}
