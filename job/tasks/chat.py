"""Conversations as a tokenizer's chat template writes them, and which of their tokens a model is to learn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from job.errors import DataError
from job.tasks.protocol import IGNORED_LABEL

Message = dict[str, str]
"""{role, content}; what the role `assistant` says is what a model learns to say."""


def encode_chat(tokenizer: Any, messages: Sequence[Message], end: int) -> tuple[list[int], list[int]]:
    """Return ids of a conversation, and each again as a label where the assistant says it, else IGNORED_LABEL.

    Its turns end as the template ends them; `end` is added where the last token of all is no end.
    """
    whole = render_chat(tokenizer, messages)
    spans = _find_turns(tokenizer, messages, whole)
    batch = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    ids, labels = list(batch["input_ids"]), []
    for token, (first, last) in zip(ids, batch["offset_mapping"], strict=True):
        # a token that stands on the border counts: the blank before a word is often part of it
        said = any(last > start and first < stop for start, stop in spans)
        labels.append(token if said else IGNORED_LABEL)
    if end not in ids[-2:]:  # templates like to end a turn with a line break
        return [*ids, end], [*labels, end]
    return ids, labels


def render_chat(tokenizer: Any, messages: Sequence[Message], ask: bool = False) -> str:
    """Return a conversation as text, with `ask` up to where the assistant is to speak; raise DataError (11)."""
    if not tokenizer.chat_template:
        raise DataError(
            "data.columns.messages: this model's tokenizer has no chat template; name a model that has one, or use "
            "prompt and completion"
        )
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask))
    except Exception as error:  # templates are programs and raise what they like
        raise DataError(f"data.columns.messages: the chat template refuses a conversation: {error}") from None


def list_turns(messages: Sequence[Message]) -> list[int]:
    """Return the places of what the assistant says."""
    return [place for place, message in enumerate(messages) if message["role"] == "assistant"]


def _find_turns(tokenizer: Any, messages: Sequence[Message], whole: str) -> list[tuple[int, int]]:
    """Return where the assistant's turns stand in the rendered conversation, [start, stop), their ends included."""
    found = [_find_turn(tokenizer, messages, turn, whole) for turn in list_turns(messages)]
    spans = [span for span in found if span]
    return spans if len(spans) == len(found) else list(_find_words(tokenizer, messages, whole))


def _find_turn(tokenizer: Any, messages: Sequence[Message], turn: int, whole: str) -> tuple[int, int] | None:
    """Return where a turn stands by what stands before it; None where the template then writes it otherwise."""
    if not turn:
        return None
    before, with_it = render_chat(tokenizer, messages[:turn], True), render_chat(tokenizer, messages[: turn + 1])
    return (len(before), len(with_it)) if with_it.startswith(before) and whole.startswith(with_it) else None


def _find_words(tokenizer: Any, messages: Sequence[Message], whole: str) -> Iterator[tuple[int, int]]:
    """Yield where the assistant's words stand, in order, for templates that write a turn otherwise once others follow.

    They leave out thoughts, for one. The end of a turn counts to it where it comes right after the words.
    """
    place, end = 0, str(tokenizer.eos_token or "")
    for message in messages:
        words = message["content"].strip()
        start = whole.find(words, place)
        if start < 0 and message["role"] == "assistant":
            raise DataError(
                "data.columns.messages: the chat template does not write what the assistant says as it is; use prompt "
                "and completion"
            )
        if start < 0:
            continue
        place = start + len(words)
        if message["role"] == "assistant":
            rest = whole[place:].lstrip()
            stop = len(whole) - len(rest) + len(end) if end and rest.startswith(end) else place
            yield start, stop
