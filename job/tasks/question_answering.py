"""Extractive question answering: the words of a context that answer a question, or none."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from job.tasks.intervals import normal_interval
from job.tasks.protocol import Encoded, Examples, Task, Truth, cut_at, cut_text

if TYPE_CHECKING:
    import torch

_BITS = 15
_MASK = (1 << _BITS) - 1
_SPECIAL_TOKENS = 4
"""At most so many stand around and between two texts: RoBERTa has <s> question </s></s> context </s>."""
_MAX_STRIDE, _MAX_ANSWER_TOKENS, _EXAMPLES_AT_ONCE = 128, 30, 200
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")
"""Letters and digits in a row; Chinese and Japanese are written without blanks, so each character is one."""


class SpanColumn(IntEnum):
    """Columns of an answer: see `QuestionAnswering`."""

    START, END, BEST, SECOND, NONE, FIRST, LAST = range(7)


class Window(NamedTuple):
    """Where answers may stand in a row of tokens, [context, end), and where the right one does; 0, 0: nowhere.

    All are packed into the row's label, 15 bits each, so that padding and the question never count.
    """

    context: Any
    end: Any
    start: Any
    last: Any

    def pack(self) -> int:
        """Return the label of the row."""
        return int((((self.context << _BITS | self.end) << _BITS | self.start) << _BITS) | self.last)

    @staticmethod
    def unpack(labels: Any) -> Window:
        """Return int64 [rows] four times; rows that only fill up a batch have a context of no token."""
        labels = labels * (labels >= 0)
        return Window(*(labels >> shift & _MASK for shift in (3 * _BITS, 2 * _BITS, _BITS, 0)))


class QuestionAnswering(Task):
    """Extractive QA, judged by SQuAD's F1 of words (Rajpurkar et al. 2016, 2018 where questions have no answer).

    A long context becomes several rows that overlap. A row's answer has seven columns: logits of the right first and
    last token; score of the best span, of the second, and of none (the first token); the best span's two tokens.
    """

    name: ClassVar[str] = "question-answering"
    auto_class: ClassVar[str] = "AutoModelForQuestionAnswering"
    ort_class: ClassVar[str] = "ORTModelForQuestionAnswering"
    architectures: ClassVar[tuple[str, ...]] = ("ForQuestionAnswering",)
    outputs: ClassVar[tuple[str, ...]] = ("start_logits", "end_logits")
    export_task: ClassVar[str] = "question-answering"
    pipeline_tag: ClassVar[str] = "question-answering"
    metric: ClassVar[str] = "f1"
    limits: ClassVar[str] = """Contexts are read in windows of at most {max_length} tokens. An answer is a piece of the
  context of at most 30 tokens, whether or not it is right; it is scored by SQuAD's F1 of words."""
    truncation: ClassVar[str] = "only_second"
    per_window: ClassVar[bool] = True

    def encode(self, tokenizer: Any, examples: Examples, max_length: int) -> Iterator[Encoded]:
        """Yield windows of at most `max_length` tokens over each context, the question before each of them."""
        for start in range(0, len(examples), _EXAMPLES_AT_ONCE):
            span = slice(start, start + _EXAMPLES_AT_ONCE)
            questions = _cut_questions(tokenizer, examples.texts[span], measure_question(max_length))
            batch = tokenizer(
                questions, (examples.pairs or [])[span], truncation=self.truncation, max_length=max_length,
                stride=measure_stride(max_length), return_overflowing_tokens=True, return_offsets_mapping=True,
            )  # fmt: skip
            types = batch.get("token_type_ids")
            for line, place in enumerate(batch["overflow_to_sample_mapping"]):
                target = (examples.targets or [])[start + place]
                inside = np.flatnonzero([part == 1 for part in batch.sequence_ids(line)])
                spans = batch["offset_mapping"][line]
                label = _find_window(spans, inside, target[0] if target else None).pack()
                ids, segments = batch["input_ids"][line], types[line] if types else None
                yield Encoded(start + place, ids, segments, label, False, spans)

    def sample(self, tokenizer: Any, examples: Examples, max_length: int) -> Examples:
        """Return questions and contexts that are one row, with the answers that are left."""
        texts = [cut_text(tokenizer, text, max_length // 4) for text in examples.texts]
        pairs = [cut_text(tokenizer, text, max_length // 2) for text in examples.pairs or []]
        targets = [
            [answer for answer in target if answer[0] + len(answer[1]) <= len(text)]
            for text, target in zip(pairs, examples.targets or [], strict=True)
        ]
        return replace(examples, texts=texts, pairs=pairs, targets=targets)

    def describe(self, tokenizer: Any, examples: Examples) -> dict[str, Any]:
        """Return of each question its context and right answers, and whether one has to be given (SQuAD 1.1)."""
        texts = [
            {"context": context, "answers": [text for _, text in target]}
            for context, target in zip(examples.pairs or [], examples.targets or [], strict=True)
        ]
        return {"texts": texts, "answerable": "no answer" not in examples.names}

    def sum_loss(
        self, logits: torch.Tensor, labels: torch.Tensor, smoothing: float, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the mean cross-entropy of first and last token, summed over rows; logits float [rows, tokens, 2]."""
        import torch

        window = Window.unpack(labels)
        allowed = _list_allowed(torch.arange(logits.shape[1], device=logits.device), window)
        logs = logits.float().masked_fill(~allowed[..., None], -torch.inf).log_softmax(dim=1)
        right = torch.stack([window.start, window.last], dim=-1)[:, None]
        loss = -logs.gather(1, right).squeeze(1)
        if smoothing:
            even = -logs.masked_fill(~allowed[..., None], 0.0).sum(dim=1) / allowed.sum(dim=1)[:, None]
            loss = (1 - smoothing) * loss + smoothing * even
        return loss.mean(dim=-1).masked_fill(labels < 0, 0.0).sum()

    def reduce(self, logits: Any, labels: Any) -> Any:
        """Return answers float32 [rows, 7] of logits float [rows, tokens, 2]."""
        if isinstance(logits, np.ndarray):
            return find_spans(logits, Window.unpack(labels))
        import torch

        answers = find_spans(logits.float().cpu().numpy(), Window.unpack(labels.cpu().numpy()))
        return torch.from_numpy(answers).to(logits.device)

    def logits_of(self, answers: np.ndarray) -> np.ndarray:
        """Return the five columns that are logits or sums of two."""
        return answers[:, : SpanColumn.FIRST]

    def decide(self, answers: np.ndarray) -> np.ndarray:
        """Return the best span's tokens, packed, or 0 where none is likelier, int64 [rows]."""
        span = answers[:, SpanColumn.FIRST].astype(np.int64) << _BITS | answers[:, SpanColumn.LAST].astype(np.int64)
        return np.where(answers[:, SpanColumn.BEST] > answers[:, SpanColumn.NONE], span, 0)

    def lead(self, answers: np.ndarray) -> np.ndarray:
        """Return how far what is decided is ahead of the next."""
        best = np.sort(answers[:, [SpanColumn.BEST, SpanColumn.SECOND, SpanColumn.NONE]], axis=1)
        return np.asarray(best[:, -1] - best[:, -2])

    def per_row_score(self, answers: np.ndarray, truth: Truth) -> np.ndarray:
        """Return the F1 of each question's answer, float64 [questions]."""
        return self._compare(answers, truth)[:, 1]

    def score(self, answers: np.ndarray, truth: Truth) -> dict[str, Any]:
        """Return F1 and the share of answers that are right to the word."""
        exact, f1 = self._compare(answers, truth).T
        return {
            "f1": round(float(f1.mean()), 6),
            "f1_interval": normal_interval(f1, (0.0, 1.0)),
            "exact_match": round(float(exact.mean()), 6),
            "n": len(f1),
        }

    def confirms(self, told: Sequence[dict[str, Any]], answers: np.ndarray, truth: Truth, tolerance: float) -> bool:
        """Tell whether every question has its answer; each has one row."""
        said, sure = self.say(answers, truth), self.lead(answers) > 2 * tolerance
        return all(answer["answer"] == text for answer, text, s in zip(told, said, sure, strict=True) if s)

    def _compare(self, answers: np.ndarray, truth: Truth) -> np.ndarray:
        """Return exact match and F1 of each question's answer, float64 [questions, 2]."""
        said = self.say(answers, truth)
        texts = truth.about["texts"]
        return np.array([score_answer(text, about["answers"]) for text, about in zip(said, texts, strict=True)])

    def say(self, answers: np.ndarray, truth: Truth) -> list[str]:
        """Return the answer to each question: the best of its windows, "" for none where some have none."""
        about, said = truth.about, []
        for question, windows in enumerate(truth.split(np.arange(len(answers)))):
            best = windows[int(answers[windows, SpanColumn.BEST].argmax())]
            none = answers[windows, SpanColumn.NONE].min() >= answers[best, SpanColumn.BEST]
            if none and not about["answerable"]:
                said.append("")
                continue
            spans = about["spans"][best]
            first, last = (int(answers[best, column]) for column in (SpanColumn.FIRST, SpanColumn.LAST))
            context = about["texts"][question]["context"]
            said.append(context[spans[first][0] : spans[last][1]].strip() if last else "")
        return said


def find_spans(logits: np.ndarray, window: Window) -> np.ndarray:
    """Return answers float32 [rows, 7] of logits [rows, tokens, 2]: the best spans of at most 30 tokens of a context.

    Where a context has no token, the best span is none.
    """
    rows, tokens = logits.shape[:2]
    inside = _list_allowed(np.arange(tokens), window)
    inside[:, 0] = False
    start, end = (np.where(inside, logits[..., part], -np.inf).astype(np.float32) for part in (0, 1))
    scores = np.full((rows, min(_MAX_ANSWER_TOKENS, tokens), tokens), -np.inf, dtype=np.float32)
    for more in range(scores.shape[1]):
        scores[:, more, : tokens - more] = start[:, : tokens - more] + end[:, more:]
    flat, line = scores.reshape(rows, -1), np.arange(rows)
    place = flat.argmax(axis=1)
    best = flat[line, place].copy()
    flat[line, place] = -np.inf
    none = logits[:, 0].sum(axis=-1)
    found = np.isfinite(best)
    first = np.where(found, place % tokens, 0)
    last = np.where(found, first + place // tokens, 0)
    best = np.where(found, best, none)
    second = np.where(np.isfinite(flat.max(axis=1)), flat.max(axis=1), np.minimum(best, none))
    right = [logits[line, window.start, 0], logits[line, window.last, 1]]
    return np.stack([*right, best, second, none, first, last], axis=1).astype(np.float32)


def score_answer(said: str, right: Sequence[str]) -> tuple[float, float]:
    """Return (exact match, F1 of words) of an answer against the best fitting right one; none right: "" is."""
    scores = [_compare_words(_list_words(said), _list_words(text)) for text in right or [""]]
    return max(exact for exact, _ in scores), max(f1 for _, f1 in scores)


def _compare_words(said: list[str], right: list[str]) -> tuple[float, float]:
    if not said or not right:
        return float(said == right), float(said == right)
    common = sum((Counter(said) & Counter(right)).values())
    return float(said == right), 2.0 * common / (len(said) + len(right))


def _list_words(text: str) -> list[str]:
    """Return the words that count, as SQuAD's evaluation does: no case, no punctuation, no English article."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return [word for word in _WORD.findall(plain) if word not in ("a", "an", "the")]


def _list_allowed(positions: Any, window: Window) -> Any:
    """Return bool [rows, tokens]: the first token, which says that there is no answer, and those of the context."""
    return (positions == 0) | ((positions >= window.context[:, None]) & (positions < window.end[:, None]))


def _find_window(spans: Sequence[Sequence[int]], inside: np.ndarray, answer: Sequence[Any] | None) -> Window:
    """Return the window of a row whose context tokens are `inside`; an answer that is cut by its edge is none."""
    if not len(inside):
        return Window(0, 0, 0, 0)
    context, end = int(inside[0]), int(inside[-1]) + 1
    if answer is None:
        return Window(context, end, 0, 0)
    first, last = answer[0], answer[0] + len(answer[1])
    if spans[context][0] > first or spans[end - 1][1] < last:
        return Window(context, end, 0, 0)
    start = next(token for token in range(context, end) if spans[token][1] > first)
    stop = next(token for token in range(end - 1, context - 1, -1) if spans[token][0] < last)
    return Window(context, end, start, stop) if start <= stop else Window(context, end, 0, 0)


def measure_question(max_length: int) -> int:
    """Return how many tokens of a row a question may take; at least two are left for its context."""
    return min(max_length // 2, max_length - _SPECIAL_TOKENS - 2)


def measure_stride(max_length: int) -> int:
    """Return by how many tokens rows of `max_length` tokens overlap: fewer than are left for the context."""
    return min(_MAX_STRIDE, max_length // 4, max_length - measure_question(max_length) - _SPECIAL_TOKENS - 1)


def _cut_questions(tokenizer: Any, texts: list[str], max_tokens: int) -> list[str]:
    spans = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [cut_at(text, found, max_tokens) for text, found in zip(texts, spans, strict=True)]
