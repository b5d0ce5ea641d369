"""Token classification: a label for every word of a text, judged by the entities that the labels spell."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import numpy as np

from job.tasks.intervals import normal_interval, spread_ratio
from job.tasks.one_label import OneLabel
from job.tasks.protocol import IGNORED_LABEL, Encoded, Examples, Truth, cut_text

_TEXTS_AT_ONCE = 1000
_SCHEME = re.compile(r"([BIESLU])[-_](.+)")


class Entity(NamedTuple):
    """Words from `first` to `last`, both included, that are one thing of a kind."""

    first: int
    last: int
    kind: str


class TokenClassification(OneLabel):
    """Token classification with cross-entropy, judged by the F1 of entities over all texts (micro-average).

    A word's label stands on its first token; its other tokens have none. A long text becomes several rows.
    """

    name: ClassVar[str] = "token-classification"
    auto_class: ClassVar[str] = "AutoModelForTokenClassification"
    ort_class: ClassVar[str] = "ORTModelForTokenClassification"
    architectures: ClassVar[tuple[str, ...]] = ("ForTokenClassification",)
    export_task: ClassVar[str] = "token-classification"
    pipeline_tag: ClassVar[str] = "token-classification"
    metric: ClassVar[str] = "f1"
    limits: ClassVar[str] = """Long texts are read in pieces of at most {max_length} tokens that do not see each other.
  A word has the label of its first token, one of {labels}. Agreement is the share of words."""
    classifies: ClassVar[bool] = True
    per_token: ClassVar[bool] = True

    def encode(self, tokenizer: Any, examples: Examples, max_length: int) -> Iterator[Encoded]:
        """Yield rows of at most `max_length` tokens; no token of a long text is lost, no row holds two texts."""
        targets = examples.targets or []
        for start in range(0, len(examples), _TEXTS_AT_ONCE):
            batch = tokenizer(
                examples.texts[start : start + _TEXTS_AT_ONCE],
                truncation=True, max_length=max_length, return_overflowing_tokens=True, return_offsets_mapping=True,
            )  # fmt: skip
            seen: set[tuple[int, int]] = set()
            for line, place in enumerate(batch["overflow_to_sample_mapping"]):
                labels = _label_tokens(batch["offset_mapping"][line], targets[start + place], place, seen)
                yield Encoded(start + place, batch["input_ids"][line], None, labels, cut=False)

    def sample(self, tokenizer: Any, examples: Examples, max_length: int) -> Examples:
        """Return texts that are one row, with the words that are left."""
        texts = [cut_text(tokenizer, text, max_length // 2) for text in examples.texts]
        targets = [
            [word for word in target if word[1] <= len(text)]
            for text, target in zip(texts, examples.targets or [], strict=True)
        ]
        return replace(examples, texts=texts, targets=targets)

    def describe(self, tokenizer: Any, examples: Examples) -> dict[str, Any]:
        """Return the names of the labels, which say what an entity is, and of each text where its words stand."""
        words = [[(first, end) for first, end, _ in target] for target in examples.targets or []]
        return {"names": list(examples.names), "texts": words}

    def per_row_score(self, answers: np.ndarray, truth: Truth) -> np.ndarray:
        """Return for each text what it adds to F1, so that their mean is the F1 of all.

        F1 is 2 · hits over entities said and there, a ratio of sums.
        """
        return self.weigh_counts(self.per_row_counts(answers, truth))

    def score(self, answers: np.ndarray, truth: Truth) -> dict[str, Any]:
        """Return F1, precision and recall of entities, and the share of words that are labelled rightly."""
        counts = self.per_row_counts(answers, truth)
        texts, (hits, said, there) = self.weigh_counts(counts), (int(count) for count in counts.sum(axis=0))
        return {
            "f1": round(float(texts.mean()), 6),
            "f1_interval": normal_interval(texts, (0.0, 1.0)),
            "precision": round(hits / max(said, 1), 6),
            "recall": round(hits / max(there, 1), 6),
            "token_accuracy": round(float((self.decide(answers) == truth.labels).mean()), 6),
            "entities": there,
            "n": len(texts),
        }

    def confirms(self, told: Sequence[dict[str, Any]], answers: np.ndarray, truth: Truth, tolerance: float) -> bool:
        """Tell whether every word has its label."""
        said, sure = self.decide(answers), self.lead(answers) > 2 * tolerance
        names = truth.about["names"]
        for text, words in enumerate(truth.about["texts"]):
            units = np.flatnonzero(truth.rows == text)
            if len(units) != len(words):  # some word is nothing to the tokenizer
                continue
            for unit, (first, end) in zip(units, words, strict=True):
                # the first piece of the word: its first letter may be nothing to the tokenizer
                inside = (word["label"] for word in told[text]["words"] if word["end"] > first and word["start"] < end)
                if sure[unit] and next(inside, None) != names[said[unit]]:
                    return False
        return True

    def per_row_counts(self, answers: np.ndarray, truth: Truth) -> np.ndarray:
        """Return int64 [texts, 3]: entities that are right, said, there."""
        names, counts = truth.about["names"], []
        tags = [*names, "O"]  # the last: what another model says that is no label of ours
        for said, there in zip(*map(truth.split, (self.decide(answers), truth.labels)), strict=True):
            found, wanted = (set(find_entities([tags[i] for i in ids], names)) for ids in (said, there))
            counts.append((len(found & wanted), len(found), len(wanted)))
        return np.array(counts, dtype=np.int64)

    def weigh_counts(self, counts: np.ndarray) -> np.ndarray:
        """Return what each text adds to F1."""
        hits, said, there = counts.T
        return spread_ratio(2.0 * hits, said + there)


def find_entities(tags: Sequence[str], names: Sequence[str]) -> Iterator[Entity]:
    """Yield what the tags of a text's words spell; `names` are all labels, which show the scheme.

    B- begins, I- goes on (IOB2; E-, L- end, S-, U- stand alone), as in CoNLL's evaluation: what goes on without a
    beginning begins. Without such prefixes words of one label in a row are one entity where there is an O, and each
    word is its own where there is none (parts of speech).
    """
    whole = "O" in names or any(map(_SCHEME.fullmatch, names))
    first, kind = 0, ""
    for place, tag in enumerate([*tags, "O"]):
        matched = _SCHEME.fullmatch(tag)
        prefix, found = (matched.group(1), matched.group(2)) if matched else ("I", "" if tag == "O" and whole else tag)
        if place == len(tags):
            found = ""
        if kind and (found != kind or prefix in "BSU" or not whole):
            yield Entity(first, place - 1, kind)
            kind = ""
        if found and not kind:
            first, kind = place, found
        if kind and prefix in "ELSU":
            yield Entity(first, place, kind)
            kind = ""


def _label_tokens(
    offsets: Sequence[tuple[int, int]], words: Sequence[Sequence[int]], place: int, seen: set[tuple[int, int]]
) -> list[int]:
    """Return the label of each token: a word's on the first token that ends in it, in whatever row that is."""
    labels, word = [IGNORED_LABEL] * len(offsets), 0
    for token, (first, end) in enumerate(offsets):
        if first == end:  # a special token, or nothing of the text
            continue
        while word < len(words) and words[word][1] < end:
            word += 1
        # some tokenizers count the blank before a word to it, so its end tells
        if word < len(words) and words[word][0] < end and (place, word) not in seen:
            seen.add((place, word))
            labels[token] = words[word][2]
    return labels
