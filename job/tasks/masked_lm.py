"""Masked language modelling: tokens that were hidden in raw text, which adapts an encoder to a domain."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from job.errors import DataError
from job.tasks.likelihood import TokenLikelihood
from job.tasks.protocol import IGNORED_LABEL, Encoded, Examples, Truth, cut_text

_HIDDEN, _MASKED, _SWAPPED = 0.15, 0.8, 0.5
"""Share of tokens asked about; of these, behind a mask; of the others, behind a random token (Devlin et al. 2019)."""
_TEXTS_AT_ONCE = 1000


class MaskedLM(TokenLikelihood):
    """What was hidden of a text, judged by the mean log-likelihood of a hidden token.

    Rows to be judged have the same tokens hidden for ever, train rows have others every epoch (`redraw`). Of a text
    that has masks itself nothing else is hidden.
    """

    name: ClassVar[str] = "masked-lm"
    auto_class: ClassVar[str] = "AutoModelForMaskedLM"
    ort_class: ClassVar[str] = "ORTModelForMaskedLM"
    architectures: ClassVar[tuple[str, ...]] = ("ForMaskedLM",)
    export_task: ClassVar[str] = "fill-mask"
    pipeline_tag: ClassVar[str] = "fill-mask"
    limits: ClassVar[str] = """It was trained on rows of at most {max_length} tokens, and is measured by the tokens that
  were hidden of test rows. log_likelihood is the mean of these, in nats; agreement the share of them that both files
  would fill in alike. It is a model to train others on."""
    redraws: ClassVar[bool] = True

    def encode(self, tokenizer: Any, examples: Examples, max_length: int) -> Iterator[Encoded]:
        """Yield rows of at most `max_length` tokens; no token of a long text is lost, no row holds two texts."""
        about = describe_tokens(tokenizer)
        for start in range(0, len(examples), _TEXTS_AT_ONCE):
            batch = tokenizer(
                examples.texts[start : start + _TEXTS_AT_ONCE],
                truncation=True, max_length=max_length, return_overflowing_tokens=True,
            )  # fmt: skip
            for ids, place in zip(batch["input_ids"], batch["overflow_to_sample_mapping"], strict=True):
                row = np.asarray(ids, dtype=np.int64)
                if about["mask_id"] in ids:
                    labels = np.where(row == about["mask_id"], row, IGNORED_LABEL)
                else:
                    # by the tokens themselves: nothing that is added to a file moves what is hidden in its other rows
                    row, labels = _hide(row, about, np.random.default_rng(zlib.crc32(row.tobytes())))
                yield Encoded(start + place, row.tolist(), None, labels.tolist(), cut=False)

    def describe(self, tokenizer: Any, examples: Examples) -> dict[str, Any]:
        """Return what `redraw` must know of the tokenizer."""
        return describe_tokens(tokenizer)

    def redraw(
        self, about: Mapping[str, Any], ids: np.ndarray, labels: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return a train row with other tokens hidden: ids and labels int64 [tokens]."""
        return _hide(np.where(labels == IGNORED_LABEL, ids, labels), about, rng)

    def sample(self, tokenizer: Any, examples: Examples, max_length: int) -> Examples:
        """Return texts that are one row, with a mask in place of the word in their middle."""
        texts = [cut_text(tokenizer, text, max_length // 2).split() for text in examples.texts]
        masked = [[*words[: len(words) // 2], tokenizer.mask_token, *words[len(words) // 2 + 1 :]] for words in texts]
        return replace(examples, texts=[" ".join(words) for words in masked])

    def confirms(self, told: Sequence[dict[str, Any]], answers: np.ndarray, truth: Truth, tolerance: float) -> bool:
        """Tell whether every mask was filled with the likeliest token."""
        said, sure = self.decide(answers), self.lead(answers) > 2 * tolerance
        filled = [token["id"] for answer in told for token in answer["filled"]]
        return len(filled) == len(said) and not (np.array(filled) != said)[sure].any()


def describe_tokens(tokenizer: Any) -> dict[str, Any]:
    """Return {mask_id, special_ids, vocabulary}; raise DataError (11) for a tokenizer without a mask."""
    if tokenizer.mask_token_id is None:
        raise DataError("model.id: its tokenizer has no mask_token; name a masked language model (BERT, RoBERTa, …)")
    about = {"mask_id": int(tokenizer.mask_token_id), "vocabulary": len(tokenizer)}
    return about | {"special_ids": sorted(map(int, tokenizer.all_special_ids))}


def _hide(ids: np.ndarray, about: Mapping[str, Any], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return ids with some tokens hidden, at least one, and the labels of these, int64 [tokens]."""
    eligible = np.flatnonzero(~np.isin(ids, about["special_ids"]))
    labels = np.full_like(ids, IGNORED_LABEL)
    if not len(eligible):
        return ids, labels
    chosen = rng.permutation(eligible)[: max(round(_HIDDEN * len(eligible)), 1)]
    labels[chosen] = ids[chosen]
    hidden, how = ids.copy(), rng.random(len(chosen))
    hidden[chosen[how < _MASKED]] = about["mask_id"]
    swapped = chosen[how >= 1 - (1 - _MASKED) * _SWAPPED]
    hidden[swapped] = rng.integers(about["vocabulary"], size=len(swapped))
    return hidden, labels
