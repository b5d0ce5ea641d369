"""chrF and ROUGE-L: what the published tools say of the same texts."""

from __future__ import annotations

import pytest

from job.evaluate.overlap import measure_chrf, measure_rouge_l

WRITTEN = ["The cat sat on the mat.", "Es ist kein Hund hier"]
EXPECTED = ["A cat was sitting on the mat.", "Hier ist kein Hund"]


def test_chrf_is_that_of_sacrebleu() -> None:
    """sacrebleu 2.6.0: CHRF().corpus_score(WRITTEN, [EXPECTED]).score / 100."""
    assert measure_chrf(WRITTEN, EXPECTED) == pytest.approx(0.5258049419177792, abs=1e-12)
    assert measure_chrf(["你好 世界"], ["你好，世界"]) == pytest.approx(0.3399581589958159, abs=1e-12)


def test_rouge_l_is_that_of_rouge_score() -> None:
    """rouge-score 0.1.2: RougeScorer(["rougeL"]), the mean of fmeasure."""
    assert measure_rouge_l(WRITTEN, EXPECTED) == pytest.approx((8 / 13 + 2 / 3) / 2, abs=1e-12)


def test_equal_texts_have_all_in_common_and_strange_ones_nothing() -> None:
    for measure in (measure_chrf, measure_rouge_l):
        assert measure(EXPECTED, EXPECTED) == pytest.approx(1.0)
        assert measure(["xyz", ""], ["abc", "def"]) == 0.0


def test_long_texts_have_the_common_words_that_counting_by_hand_finds() -> None:
    first = [str(number) for number in range(300)]
    assert measure_rouge_l([" ".join(first[::2])], [" ".join(first)]) == pytest.approx(2 * 150 / 450)
    assert measure_rouge_l([" ".join(reversed(first))], [" ".join(first)]) == pytest.approx(2 * 1 / 600)
