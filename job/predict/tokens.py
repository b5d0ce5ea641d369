"""From texts to padded arrays, as transformers would make them, with nothing but `tokenizers`.

What a text is cut to and padded with comes from tokenizer.json, tokenizer_config.json and, where
those are silent, config.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from job.errors import DataError, NotFound, NoValidCheckpoint
from job.predict.chat import Message

Text = str | tuple[str, str]
"""A text, or a pair of texts."""
Input = Text | list[Message]
"""What may be given to a model: a conversation to one that writes alone."""

MAX_ROWS = 32
"""Rows of a micro-batch, at most."""

_DEFAULT_MAX_LENGTH = 512
_ABSURD_LENGTH = 1_000_000  # transformers writes int(1e30) where a tokenizer knows no limit


class BundleTokenizer:
    """The tokenizer of one bundle folder; raises NoValidCheckpoint (17) for files that do not load."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        options = read_json(folder / "tokenizer_config.json", {})
        self._tokenizer = _load(folder / "tokenizer.json", _max_length(options, config), options)
        padding = self._tokenizer.padding or {}
        self._tokenizer.no_padding()
        known = self._find_id(options.get("pad_token") or padding.get("pad_token"))
        pad_id = known if known is not None else padding.get("pad_id", config.get("pad_token_id"))
        self.end_id = self._find_id(options.get("eos_token"))
        self.mask = _token_text(options.get("mask_token")) or ""
        self.mask_id = self._find_id(self.mask)
        self._left = options.get("padding_side", padding.get("direction")) == "left"
        self._filling = {"input_ids": pad_id or 0, "attention_mask": 0, "token_type_ids": padding.get("pad_type_id", 0)}
        # Without a pad token a model may count the filling as text: then no row ever gets any.
        self.max_rows = MAX_ROWS if pad_id is not None else 1

    def _find_id(self, token: object) -> int | None:
        text = _token_text(token)
        return self._tokenizer.token_to_id(text) if text else None

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens."""
        return self._tokenizer.decode(list(ids))

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the arrays that `pad` makes."""
        return tuple(self._filling)

    def encode_prompt(self, text: str, special_tokens: bool = True) -> list[int]:
        """Return the ids of one text to write on from; too long, it keeps its end."""
        if self._tokenizer.truncation:
            self._tokenizer.enable_truncation(self._tokenizer.truncation["max_length"], direction="left")
        return list(self._tokenizer.encode(text, add_special_tokens=special_tokens).ids)

    def encode(self, texts: Sequence[Text]) -> list[Encoding]:
        """Tokenize texts or pairs, cut to the bundle's limit and not padded."""
        return self._tokenizer.encode_batch(list(texts))

    def cut_second(self, measure_stride: Callable[[int], int]) -> int:
        """Cut only the second of two texts from now on, into rows that overlap; return how long a row may be."""
        truncation = self._tokenizer.truncation
        length = int(truncation["max_length"]) if truncation else _DEFAULT_MAX_LENGTH
        self._tokenizer.enable_truncation(length, stride=measure_stride(length), strategy="only_second")
        return length

    def find_spans(self, text: str) -> list[tuple[int, int]]:
        """Return where the tokens of a text stand in it, uncut; special tokens are left out."""
        truncation = self._tokenizer.truncation
        self._tokenizer.no_truncation()
        spans = self._tokenizer.encode(text, add_special_tokens=False).offsets
        self._tokenizer.enable_truncation(**truncation)
        return list(spans)

    def place(self, encoding: Encoding, width: int) -> slice:
        """Return where a row stands among `width` tokens."""
        length = len(encoding.ids)
        return slice(width - length, width) if self._left else slice(0, length)

    def pad(self, encodings: Sequence[Encoding]) -> dict[str, np.ndarray]:
        """Return int64 [rows, longest] for every input that a classifier can have."""
        width = max(1, *(len(encoding.ids) for encoding in encodings))
        arrays = {name: np.full((len(encodings), width), value, np.int64) for name, value in self._filling.items()}
        for row, encoding in enumerate(encodings):
            place, length = self.place(encoding, width), len(encoding.ids)
            arrays["input_ids"][row, place] = encoding.ids
            arrays["token_type_ids"][row, place] = encoding.type_ids
            # A text without any token keeps one padding token: attention over nothing is NaN.
            arrays["attention_mask"][row, place if length else 0] = 1
        return arrays


def check_text(text: Input, row: int) -> Text:
    """Return a string, or a tuple of two, that UTF-8 can hold; raise DataError (11) naming a row that is none."""
    for part in text if isinstance(text, tuple) and len(text) == 2 else (text,):
        if not isinstance(part, str):
            raise DataError(f"text {row}: is a {type(part).__name__}; give a string, or a tuple of two strings")
        try:
            part.encode()
        except UnicodeEncodeError:
            raise DataError(
                f"text {row}: holds a lone surrogate, so it is not Unicode; read the input as UTF-8"
            ) from None
    return text  # type: ignore[return-value]  # a list has been refused


def read_json(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return a JSON object of the bundle, or `default` where there is no such file."""
    if default is not None and not path.is_file():
        return default
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFound(f"{path}: no such file; name a bundle folder") from None
    except (ValueError, OSError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise NoValidCheckpoint(f"{path}: is not a JSON object (damaged); fetch or export the bundle again")
    return value


def _load(path: Path, max_length: int, options: dict[str, Any]) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.enable_truncation(max_length, direction=options.get("truncation_side", "right"))
    except Exception as error:  # the Rust side raises bare Exception
        reason = str(error).partition("\n")[0]
        raise NoValidCheckpoint(f"{path}: does not load: {reason}; fetch or export the bundle again") from None
    return tokenizer


def _max_length(options: dict[str, Any], config: dict[str, Any]) -> int:
    """Tokens that a text is cut to: the tokenizer's own limit; where it knows none, 512 or what the model has."""
    limit = options.get("model_max_length")
    if isinstance(limit, int) and 0 < limit < _ABSURD_LENGTH:
        return limit
    positions = config.get("max_position_embeddings")
    return min(_DEFAULT_MAX_LENGTH, positions) if isinstance(positions, int) and positions > 0 else _DEFAULT_MAX_LENGTH


def _token_text(token: object) -> str | None:
    """A special token is written as its text, or as {"content": text, …}."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None
