"""How much a written text has in common with the one that was expected: chrF and ROUGE-L, between 0 and 1.

Both count; what a text means they cannot tell. chrF compares characters, which works in every script; ROUGE-L compares
words, so it tells nothing of texts in scripts that put no blanks between them.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

_ORDER, _BETA = 6, 2.0


def measure_chrf(written: Sequence[str], expected: Sequence[str]) -> float:
    """Return chrF2 of all texts together: runs of 1 to 6 characters, white space left out, recall counts twice.

    Popović 2015, https://aclanthology.org/W15-3049; counts are summed over texts and orders averaged as sacrebleu does.
    """
    precisions, recalls = [], []
    for size in range(1, _ORDER + 1):
        said = asked = matched = 0
        for ours, theirs in zip(written, expected, strict=True):
            found, wanted = _count_runs(ours, size), _count_runs(theirs, size)
            said += found.total() if wanted else 0
            asked += wanted.total()
            matched += (found & wanted).total()
        if said and asked:
            precisions.append(matched / said)
            recalls.append(matched / asked)
    if not sum(precisions):
        return 0.0
    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return (1 + _BETA**2) * precision * recall / (_BETA**2 * precision + recall)


def measure_rouge_l(written: Sequence[str], expected: Sequence[str]) -> float:
    """Return the mean F1 of the longest common subsequence of words, capitals and punctuation left out.

    Lin 2004, https://aclanthology.org/W04-1013.
    """
    scores = []
    for ours, theirs in zip(written, expected, strict=True):
        said, asked = _list_words(ours), _list_words(theirs)
        scores.append(2 * _measure_common(said, asked) / max(len(said) + len(asked), 1))
    return sum(scores) / len(scores)


def _count_runs(text: str, size: int) -> Counter[str]:
    text = "".join(text.split())
    return Counter(text[start : start + size] for start in range(len(text) - size + 1))


def _list_words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _measure_common(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, a row of the table at a time as bits (Hyyrö 2004)."""
    places: defaultdict[str, int] = defaultdict(int)
    for place, word in enumerate(first):
        places[word] |= 1 << place
    row = whole = (1 << len(first)) - 1
    for word in second:
        matching = row & places[word]
        row = (row + matching) | (row - matching)
    return len(first) - (row & whole).bit_count()
