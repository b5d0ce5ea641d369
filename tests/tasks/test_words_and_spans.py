"""Tags of words and answers in contexts: how they become tokens, and how they are scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from job.data.targets import has_answer, join_words, read_answers, read_tags
from job.tasks import Examples, Truth, Window, find_entities, find_spans, get_task
from job.tasks.question_answering import score_answer

TAGS, ANSWERS = get_task("token-classification"), get_task("question-answering")
NAMES = ("O", "B-PER", "I-PER", "B-LOC")


@pytest.fixture(scope="module")
def tokenizer(assets: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(assets / "minilm-l6")


def examples(texts: list[str], pairs: list[str] | None, targets: list[Any], names: tuple[str, ...]) -> Examples:
    nothing = np.zeros(len(texts), dtype=np.int64)
    return Examples(texts, pairs, nothing, np.arange(len(texts)) + 1, 0, targets, names)


# --- words


@pytest.mark.parametrize(
    ("tags", "names", "spelled"),
    [
        (["B-PER", "I-PER", "O", "B-LOC"], NAMES, [(0, 1, "PER"), (3, 3, "LOC")]),
        (["B-PER", "B-PER"], NAMES, [(0, 0, "PER"), (1, 1, "PER")]),
        (["I-PER", "B-LOC", "I-PER"], NAMES, [(0, 0, "PER"), (1, 1, "LOC"), (2, 2, "PER")]),
        (["B-PER", "E-PER", "S-LOC", "S-LOC"], ("O", "B-PER", "E-PER", "S-LOC"),
         [(0, 1, "PER"), (2, 2, "LOC"), (3, 3, "LOC")]),
        (["PER", "PER", "O", "PER"], ("O", "PER"), [(0, 1, "PER"), (3, 3, "PER")]),
        (["NOUN", "NOUN", "VERB"], ("NOUN", "VERB"), [(0, 0, "NOUN"), (1, 1, "NOUN"), (2, 2, "VERB")]),
        ([], NAMES, []),
    ],
)  # fmt: skip
def test_tags_spell_entities_as_conll_reads_them(
    tags: list[str], names: tuple[str, ...], spelled: list[tuple[int, int, str]]
) -> None:
    assert [tuple(entity) for entity in find_entities(tags, names)] == spelled


@given(st.lists(st.sampled_from(["O", "B-A", "I-A", "B-B", "I-B", "E-A", "S-B"])))
def test_entities_never_overlap_and_hold_no_word_outside(tags: list[str]) -> None:
    last = -1
    for entity in find_entities(tags, tags):
        assert last < entity.first <= entity.last < len(tags)
        assert all(tags[place].endswith(f"-{entity.kind}") for place in range(entity.first, entity.last + 1))
        last = entity.last


def test_f1_is_that_of_all_entities_and_its_interval_that_of_texts() -> None:
    labels = np.array([1, 2, 0, 3, 1, 0], dtype=np.int64)
    said = np.array([1, 2, 0, 0, 1, 3])
    truth = Truth(labels, np.array([0, 0, 0, 0, 1, 1]), {"names": list(NAMES)})
    answers = np.eye(4, dtype=np.float32)[said]
    scores = TAGS.score(answers, truth)
    assert (scores["entities"], scores["n"]) == (3, 2)
    assert scores["precision"] == scores["recall"] == pytest.approx(2 / 3, abs=1e-6)
    assert scores["f1"] == pytest.approx(2 / 3, abs=1e-6)
    assert TAGS.per_row_score(answers, truth).mean() == pytest.approx(2 / 3)
    assert TAGS.score(np.eye(4, dtype=np.float32)[labels], truth)["f1"] == 1.0


def test_every_word_has_one_label_however_long_the_text_is(tokenizer: Any) -> None:
    words = ["Unbelievably", "Zaphod", "Beeblebrox's", "(", "spaceship", ")"] * 20
    text, _ = join_words(words)
    target = read_tags(words, [index % 4 for index in range(120)], lambda tag: tag)
    rows = list(TAGS.encode(tokenizer, examples([text], None, [target], NAMES), 32))
    assert len(rows) > 1 and all(len(row.ids) <= 32 for row in rows)
    labels = [label for row in rows for label in row.labels if label != -100]  # type: ignore[union-attr]
    assert labels == [index % 4 for index in range(120)]


def test_tags_are_read_from_lists_and_from_text() -> None:
    def find(tag: Any) -> int | None:
        return {"O": 0, "PER": 1}.get(tag)

    expected = [[0, 3, 1], [4, 10, 0]]
    assert read_tags(["Ada", "laughs"], ["PER", "O"], find) == expected
    assert read_tags("Ada  laughs", "PER O", find) == expected
    assert read_tags(["Ada", "laughs"], '["PER", "O"]', find) == expected
    with pytest.raises(ValueError, match="2 tokens and 1 tags"):
        read_tags(["Ada", "laughs"], ["PER"], find)
    with pytest.raises(ValueError, match="'LOC' is not among"):
        read_tags(["Ada", "laughs"], ["PER", "LOC"], find)
    with pytest.raises(ValueError, match="no list of words"):
        read_tags(7, ["PER"], find)


# --- answers


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ({"text": ["Rome"], "answer_start": [12]}, [[12, "Rome"]]),
        ({"text": ["Rome"], "answer_start": [3]}, [[5, "Rome"]]),
        ([{"text": "Rome", "answer_start": 12}], [[12, "Rome"]]),
        ('{"text": ["Rome", "In"], "answer_start": [12, 2]}', [[12, "Rome"], [0, "In"]]),
        ("Rome", [[5, "Rome"]]),
        (["Rome", "In"], [[5, "Rome"], [0, "In"]]),
        ({"text": [], "answer_start": []}, []),
        (None, []),
        ("", []),
    ],
)
def test_answers_are_read_as_people_write_them(value: Any, found: list[Any]) -> None:
    context = "In   Rome,  Rome"
    assert read_answers(context, value) == found
    assert has_answer(value) == bool(found)


@pytest.mark.parametrize("value", ["Paris", {"text": ["Paris"], "answer_start": [0]}, {"text": [" "]}, [7]])
def test_an_answer_outside_its_context_is_a_bad_row(value: Any) -> None:
    with pytest.raises(ValueError, match="answer"):
        read_answers("In Rome", value)


def test_each_window_knows_where_its_answer_is_and_that_others_have_none(tokenizer: Any) -> None:
    context = " ".join(f"word{n}" for n in range(200)) + " the answer is blue cheese indeed"
    target = [[context.index("blue"), "blue cheese"]]
    rows = list(ANSWERS.encode(tokenizer, examples(["what is it?"], [context], [target], ("answer",)), 64))
    assert len(rows) > 5 and all(len(row.ids) <= 64 for row in rows)
    found = []
    for row in rows:
        window = Window.unpack(np.array([row.labels]))
        assert 0 < window.context[0] < window.end[0] <= len(row.ids)
        if window.last[0]:
            assert row.spans is not None
            found.append(context[row.spans[window.start[0]][0] : row.spans[window.last[0]][1]])
    assert found and set(found) == {"blue cheese"}


@given(st.data())
def test_the_best_span_is_the_best_of_all_spans(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(3, 12))
    context = data.draw(st.integers(1, tokens - 1))
    end = data.draw(st.integers(context + 1, tokens))
    numbers = st.floats(-5, 5, width=32)
    logits = np.array(data.draw(st.lists(numbers, min_size=2 * tokens, max_size=2 * tokens)), np.float32)
    logits = logits.reshape(1, tokens, 2)
    window = Window.unpack(np.array([Window(context, end, 0, 0).pack()]))
    every = [logits[0, s, 0] + logits[0, e, 1] for s in range(context, end) for e in range(s, end)]
    answer = find_spans(logits, window)[0]
    assert answer[2] == pytest.approx(max(every), abs=1e-5)
    assert context <= answer[5] <= answer[6] < end
    if len(every) > 1:
        assert answer[3] == pytest.approx(sorted(every)[-2], abs=1e-5)


def test_the_loss_knows_neither_padding_nor_question() -> None:
    torch.manual_seed(0)
    logits, label = torch.randn(1, 12, 2), torch.tensor([Window(4, 10, 5, 7).pack()])
    longer = torch.cat([logits, torch.full((1, 30, 2), 9.0)], dim=1)
    longer[:, 1:4] = 50.0
    for smoothing in (0.0, 0.1):
        one, other = ANSWERS.sum_loss(logits, label, smoothing), ANSWERS.sum_loss(longer, label, smoothing)
        assert one.item() == pytest.approx(other.item(), abs=1e-5)
    filled = torch.cat([label, torch.tensor([-100])])
    assert ANSWERS.sum_loss(logits.expand(2, -1, -1), filled, 0.0).item() == pytest.approx(
        ANSWERS.sum_loss(logits, label, 0.0).item(), abs=1e-6
    )


@pytest.mark.parametrize(
    ("said", "right", "exact", "f1"),
    [
        ("The blue cheese!", ["blue cheese"], 1, 1),
        ("blue", ["blue cheese", "cheese"], 0, 2 / 3),
        ("", [], 1, 1),
        ("blue", [], 0, 0),
        ("", ["blue"], 0, 0),
        ("東京都", ["東京"], 0, 0.8),
        ("Москва", ["москва"], 1, 1),
    ],
)
def test_an_answer_is_scored_as_squad_does_in_any_script(said: str, right: list[str], exact: float, f1: float) -> None:
    assert score_answer(said, right) == pytest.approx((exact, f1))


def test_no_answer_is_an_answer_only_where_the_training_had_such_questions() -> None:
    about = {"texts": [{"context": "In Rome", "answers": []}], "spans": [np.array([[0, 0], [0, 2], [3, 7]])]}
    answers = np.array([[0, 0, 1.0, 0.5, 2.0, 2, 2]], dtype=np.float32)
    for answerable, said in ((True, "Rome"), (False, "")):
        truth = Truth(np.zeros(1, np.int64), np.zeros(1, np.int64), about | {"answerable": answerable})
        assert ANSWERS.say(answers, truth) == [said]  # type: ignore[attr-defined]


# --- what a release is asked before it is published


def test_texts_are_asked_in_one_row_however_long_they_are(tokenizer: Any) -> None:
    words = ["Unbelievably", "Zaphod", "Beeblebrox's", "spaceship"] * 40
    text, _ = join_words(words)
    target = read_tags(words, [index % 4 for index in range(160)], lambda tag: tag)
    cases = [
        (TAGS, examples([text], None, [target], NAMES)),
        (get_task("masked-lm"), examples([text], None, [None], ())),
        (ANSWERS, examples([text], [text], [[[0, "Unbelievably"]]], ("answer",))),
    ]
    for task, long in cases:
        rows = list(task.encode(tokenizer, task.sample(tokenizer, long, 32), 32))
        assert len(rows) == 1 and len(rows[0].ids) <= 32, task.name


def test_a_word_whose_first_letter_is_nothing_to_the_tokenizer_is_no_false_alarm() -> None:
    truth = Truth(np.array([1, 0]), np.array([0, 0]), {"names": list(NAMES), "texts": [[(0, 6), (7, 9)]]})
    answers = np.eye(4, dtype=np.float32)[[1, 0]] * 9
    words = [{"start": 1, "end": 6, "label": "B-PER"}, {"start": 7, "end": 9, "label": "O"}]
    assert TAGS.confirms([{"words": words}], answers, truth, 1e-3)
    wrong = [{"start": 1, "end": 6, "label": "B-LOC"}, {"start": 7, "end": 9, "label": "O"}]
    assert not TAGS.confirms([{"words": wrong}], answers, truth, 1e-3)


def test_tokens_of_a_csv_cell_may_be_json() -> None:
    assert join_words('["EU", "rejects"]') == join_words(["EU", "rejects"]) == join_words("EU rejects")
