"""From a prompt to what a decoder writes on, greedily, a token at a time with its keys and values cached.

One prompt at a time: nothing is padded, so what is written does not depend on the company that a prompt is in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from job.errors import DataError, NoValidCheckpoint
from job.predict.bundle import choose_model, list_bundle
from job.predict.chat import ChatTemplate, check_messages
from job.predict.runtime import count_threads, first_line, open_session
from job.predict.tokens import BundleTokenizer, Input, check_text, read_json

MAX_NEW_TOKENS = 64
_PAST, _PRESENT, _OF_SOURCE = "past_key_values", "present", ".encoder."


class Writer:
    """A language model: tokenizer and ONNX decoder of one local bundle folder, on `threads` (0: all) processors.

    Raises NoValidCheckpoint (17) for files that do not load.
    """

    bench_rows = 8

    def __init__(self, folder: Path, precision: str, threads: int, max_new_tokens: int) -> None:
        self.config = read_json(folder / "config.json")
        self.tokenizer = BundleTokenizer(folder, self.config)
        self._template = ChatTemplate(folder, read_json(folder / "tokenizer_config.json", {}))
        self._ends = _find_ends(folder, self.config, self.tokenizer)
        self._max_new_tokens = max_new_tokens
        self._positions = self.count_positions()
        self.model_path = folder / choose_model(list_bundle(folder), precision, str(folder))
        self.threads = count_threads(threads)
        self._session = open_session(self.model_path, self.threads)
        self._cache = {
            entry.name: [1, *(size if isinstance(size, int) else 0 for size in entry.shape[1:])]
            for entry in self._session.get_inputs()
            if entry.name.startswith(_PAST)
        }
        self._names = [output.name for output in self._session.get_outputs()]
        if not self._cache or "logits" not in self._names:
            raise NoValidCheckpoint(f"{self.model_path}: is no decoder with a cache; export the model again")

    def predict(self, texts: Sequence[Input]) -> list[dict[str, Any]]:
        """Return {"text", "written", "ids", "ended"} for each prompt: what follows, its token ids, and why it ends.

        `ended` is "end" where the model ended its text, "length" after `max_new_tokens` or at its last position.
        A conversation is written on by the chat template of the bundle. Raises DataError (11) naming a row that is no
        text, or has no token.
        """
        return list(self.stream(texts))

    def stream(self, texts: Iterable[Input]) -> Iterator[dict[str, Any]]:
        """Yield an answer for each prompt as `predict` does."""
        for row, text in enumerate(texts):
            yield self.answer(text, self.encode(text, row))

    def count_positions(self) -> int:
        """Return how many tokens the model can tell apart by place."""
        return int(self.config.get("max_position_embeddings") or self.config.get("n_positions") or 1 << 20)

    def encode(self, text: Input, row: int) -> list[int]:
        """Return the ids of a prompt: without an end that the tokenizer may give it, and with room for an answer."""
        if isinstance(text, list):
            rendered = self._template.render(check_messages(text, row), row)
            check_text(rendered, row)
            return self._fit(self.tokenizer.encode_prompt(rendered, special_tokens=False))
        prompt_text = check_text(text, row)
        if not isinstance(prompt_text, str):
            raise DataError(f"text {row}: is a pair; a language model writes on from one text")
        prompt = self.tokenizer.encode_prompt(prompt_text)
        while len(prompt) > 1 and prompt[-1] in self._ends:
            prompt.pop()
        if not prompt:
            raise DataError(f"text {row}: is empty; give a language model a text to write on from")
        return self._fit(prompt)

    def _fit(self, prompt: list[int]) -> list[int]:
        return prompt[-max(self._positions - self._max_new_tokens, self._positions // 2) :]

    def answer(self, text: Input, prompt: list[int]) -> dict[str, Any]:
        """Return what follows a prompt with these ids."""
        ids, said, ended = self.write(prompt, {})
        before, whole = self.tokenizer.decode(prompt), self.tokenizer.decode([*prompt, *said])
        # decoded alone, some tokenizers drop the space before the first word
        written = whole.removeprefix(before) if whole.startswith(before) else self.tokenizer.decode(said)
        return {"text": text, "written": written, "ids": ids, "ended": ended}

    def write(self, begun: list[int], source: dict[str, np.ndarray]) -> tuple[list[int], list[int], str]:
        """Return the ids that follow those `begun`, the same without an end, and how they end; see `predict`."""
        ids = list(self._write_on(begun, source))
        ended = "end" if ids and ids[-1] in self._ends else "length"
        return ids, ids[:-1] if ended == "end" else ids, ended

    def choose(self, logits: np.ndarray, place: int) -> int:
        """Return the new token at `place` (from 0), of logits float [vocabulary]: the likeliest."""
        return int(logits.argmax())

    def _write_on(self, begun: list[int], source: dict[str, np.ndarray]) -> Iterator[int]:
        cache = {name: np.zeros(shape, np.float32) for name, shape in self._cache.items()}
        ids, seen = np.array([begun], dtype=np.int64), 0
        for place in range(min(self._max_new_tokens, self._positions - len(begun))):
            seen += ids.shape[1]
            answers = self._step(ids, seen, source | cache)
            token = self.choose(answers["logits"][0, -1], place)
            yield token
            if token in self._ends:
                return
            ids = np.array([[token]], dtype=np.int64)
            present = {name: answers[name.replace(_PAST, _PRESENT)] for name in cache}
            # what a decoder has made of a source it gives once, at the first token
            cache |= {name: value for name, value in present.items() if place == 0 or _OF_SOURCE not in name}

    def _step(self, ids: np.ndarray, seen: int, others: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        feed = {
            "input_ids": ids,
            "attention_mask": np.ones((1, seen), dtype=np.int64),
            "position_ids": np.arange(seen - ids.shape[1], seen, dtype=np.int64)[None],
            "use_cache_branch": np.array([seen > ids.shape[1]]),
            **others,
        }
        answers = dict(zip(self._names, run_session(self._session, feed, self.model_path), strict=True))
        if not np.isfinite(answers["logits"][0, -1]).all():
            raise NoValidCheckpoint(f"{self.model_path}: answers NaN or Inf; train or export the model again")
        return answers


def run_session(session: Any, feed: dict[str, np.ndarray], path: Path) -> list[np.ndarray]:
    """Return all outputs of a session for what it takes of `feed`."""
    try:
        return list(session.run(None, {entry.name: feed[entry.name] for entry in session.get_inputs()}))
    except Exception as error:  # ONNX Runtime's exceptions share no other base
        raise NoValidCheckpoint(f"{path}: {first_line(error)}; export the model again") from None


def _find_ends(folder: Path, config: dict[str, Any], tokenizer: BundleTokenizer) -> set[int]:
    """Return the ids after which nothing is written: those of generation_config.json, as generate() takes them."""
    named = read_json(folder / "generation_config.json", {}).get("eos_token_id", config.get("eos_token_id"))
    ends = set(named if isinstance(named, list) else [named]) - {None} or {tokenizer.end_id}
    return {int(end) for end in ends if isinstance(end, int)}
