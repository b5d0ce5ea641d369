"""Causal language modelling: the next token of raw text, or of a completion after its prompt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from job.errors import DataError
from job.tasks.chat import encode_chat
from job.tasks.likelihood import TokenLikelihood
from job.tasks.protocol import IGNORED_LABEL, Encoded, Examples


class CausalLM(TokenLikelihood):
    """Next-token prediction; of prompt and completion, the completion's."""

    name: ClassVar[str] = "causal-lm"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    ort_class: ClassVar[str] = "ORTModelForCausalLM"
    architectures: ClassVar[tuple[str, ...]] = ("ForCausalLM", "LMHeadModel")
    export_task: ClassVar[str] = "text-generation-with-past"
    pipeline_tag: ClassVar[str] = "text-generation"
    generates: ClassVar[bool] = True
    trains_head: ClassVar[bool] = False

    def encode(self, tokenizer: Any, examples: Examples, max_length: int) -> Iterator[Encoded]:
        """Yield rows of at most `max_length` tokens whose labels are the tokens that follow.

        A long text becomes several rows, none of its tokens is lost, and no row holds two texts. Every text ends with
        the token at which generation stops. With pairs, texts are prompts, and only what follows them has labels; of
        conversations, what the assistant says.
        """
        end, pairs = find_end(tokenizer), examples.pairs
        for place, messages in enumerate(examples.targets or []):
            try:
                yield _shift(place, *encode_chat(tokenizer, messages, end), max_length)
            except DataError as error:
                raise DataError(f"row {examples.rows[place]}: {error}") from None
        if examples.targets:
            return
        for place, text in enumerate(examples.texts):
            ids = tokenizer(text)["input_ids"]
            ids = ids[:-1] if ids and ids[-1] == end else ids
            if pairs is None:
                yield from _cut(place, [*ids, end], max_length)
            else:
                yield _join(place, ids, [*_encode_inner(tokenizer, pairs[place]), end], max_length)


def encode_prompt(tokenizer: Any, prompt: str, ends: list[int]) -> list[int]:
    """Return the ids of a prompt to write on from: some tokenizers end every text, and a prompt has not ended."""
    ids = list(tokenizer(prompt)["input_ids"])
    while len(ids) > 1 and ids[-1] in ends:
        ids.pop()
    return ids


def find_end(tokenizer: Any) -> int:
    """Return the id of the token that ends a text; raise DataError for a tokenizer without one."""
    if tokenizer.eos_token_id is None:
        raise DataError("model.id: its tokenizer has no eos_token, so no text can end; name one in its files")
    return int(tokenizer.eos_token_id)


def _encode_inner(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a text that does not begin: without a token for the beginning."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _shift(place: int, ids: list[int], said: list[int], max_length: int) -> Encoded:
    """Return the row of a conversation; too long, it keeps its end."""
    kept = max(len(ids) - 1 - max_length, 0)
    return Encoded(place, ids[kept:-1], None, said[kept + 1 :], cut=kept > 0)


def _cut(place: int, ids: list[int], max_length: int) -> Iterator[Encoded]:
    for start in range(0, len(ids) - 1, max_length):
        part, following = ids[start : start + max_length], ids[start + 1 : start + max_length + 1]
        yield Encoded(place, part[: len(following)], None, following, cut=False)


def _join(place: int, prompt: list[int], completion: list[int], max_length: int) -> Encoded:
    """Return a row of prompt and completion; too long, the prompt keeps its end, and a quarter of the row at least."""
    whole = len(prompt) + len(completion) - 1
    kept = max(max_length + 1 - len(completion), min(len(prompt), max(max_length // 4, 1)))
    prompt = prompt[-kept:]
    ids = [*prompt, *completion][: max_length + 1]
    labels = [IGNORED_LABEL] * max(len(prompt) - 1, 0) + ids[max(len(prompt), 1) :]
    return Encoded(place, ids[:-1], None, labels, cut=whole > max_length)
