"""A token classifier's answers: the label of every word of a text, and the entities that the labels spell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding

from job.errors import DataError
from job.predict.reader import LabelReader
from job.predict.tokens import Text
from job.tasks import find_entities, share_out


class Word(NamedTuple):
    """A word of a text, [start, end) in characters, and the logits of its first token, float64 [labels]."""

    start: int
    end: int
    logits: np.ndarray


class Tagger(LabelReader):
    """Answers {"text", "entities", "words"}, entities as {entity, text, start, end, score}, words as {label, …}.

    A word is what its first token says, as in training; the score of an entity is the mean probability of its words.
    """

    def encode(self, texts: Sequence[Text], start: int) -> list[list[Encoding]]:
        """Return the rows of each text: a long one becomes several, and none of its tokens is lost."""
        for row, text in enumerate(texts, start):
            if not isinstance(text, str):
                raise DataError(f"text {row}: is a pair; a token classifier reads one text")
        return [[encoding, *encoding.overflowing] for encoding in self.tokenizer.encode(texts)]

    def answer(self, text: Text, rows: Sequence[tuple[Encoding, np.ndarray]]) -> dict[str, Any]:
        """Return the answer to one text."""
        found = list(_find_words(str(text), rows))
        shares = share_out(np.array([word.logits for word in found]).reshape(len(found), len(self.labels)))
        labels = [self.labels[int(share.argmax())] for share in shares]
        words = [
            {"start": word.start, "end": word.end, "label": label, "score": round(float(share.max()), 6)}
            for word, label, share in zip(found, labels, shares, strict=True)
        ]
        entities = []
        for first, last, kind in find_entities(labels, self.labels):
            start, end = found[first].start, found[last].end
            score = round(float(shares[first : last + 1].max(axis=1).mean()), 6)
            entities.append({"entity": kind, "text": str(text)[start:end], "start": start, "end": end, "score": score})
        return {"text": text, "entities": entities, "words": words}


def _find_words(text: str, rows: Sequence[tuple[Encoding, np.ndarray]]) -> Iterator[Word]:
    """Yield the words of a text: tokens that the tokenizer has cut out of one, or that no white space parts."""
    word, number = None, None
    for encoding, logits in rows:
        for token, (start, end) in enumerate(encoding.offsets):
            start += len(text[start:end]) - len(text[start:end].lstrip())  # some count the blank before to a word
            if start >= end or encoding.special_tokens_mask[token]:
                continue
            if word and encoding.word_ids[token] == number and not text[word.end : start].isspace():
                word = word._replace(end=end)
                continue
            if word:
                yield word
            word, number = Word(start, end, logits[token]), encoding.word_ids[token]
    if word:
        yield word
