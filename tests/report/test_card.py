"""The model card of a release says what the data says as text, whatever stands in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from page_numbers import NASTY, make_numbers, make_run

from job.report.card import render_card


@pytest.fixture
def card(tmp_path: Path) -> str:
    labels = [
        *NASTY,
        "[free](https://evil.example) `a` *b* c|d not_spam \\",
        "two\nlines\u2028\n# of a label",
        "don't & know",
    ]
    run, numbers = make_run(tmp_path, labels), make_numbers(labels)
    data = run.read("data.json")
    run.write("data.json", data | {"max_length": 64, "truncated_share": 0.0125})
    run.write("sources.json", {"model": {"commit": None, "path": str(tmp_path)}, "data": {"commit": None}})
    (tmp_path / "README.md").write_text("---\nlicense: mit <img src=x>\n---\n")
    numbers.result["onnx"]["fp32"]["file"] = "model.onnx"
    return render_card(run, numbers.result)


def test_a_label_is_text_on_one_line(card: str) -> None:
    escaped = "&lt;/title&gt;&lt;script src=&quot;https://evil.example/x.js&quot;&gt;alert(1)&lt;/script&gt;"
    named, limits = (
        next(line for line in card.splitlines() if beginning in line) for beginning in ("labels: ", "The labels are ")
    )
    plain = r"\[free\](https://evil.example) \`a\` \*b\* c\|d not\_spam \\"
    for line in (named, limits):
        for label in (escaped, plain, NASTY[2], NASTY[3], "two lines # of a label", "don&#x27;t &amp; know"):
            assert label in line
    assert "<script" not in card and "<b " not in card
    assert card.encode(), "a lone surrogate is no Unicode"


def test_what_the_base_model_says_of_its_licence_is_text(card: str) -> None:
    assert "Licence of the base model: mit &lt;img src=x&gt; (its own card says so)" in card


def test_the_card_asks_as_the_task_is_asked_and_names_no_file_that_is_not_there(tmp_path: Path) -> None:
    run, numbers = make_run(tmp_path, ["a", "b"]), make_numbers(["a", "b"])
    run.write("data.json", run.read("data.json") | {"max_length": 64, "truncated_share": 0.0})
    run.write("sources.json", {"model": {"commit": None, "path": str(tmp_path)}, "data": {"commit": None}})
    numbers.result["onnx"]["fp32"]["file"] = "model.onnx"
    assert "`onnx/model_quantized.onnx` is the file that overflows" in render_card(run, numbers.result)
    for numbers_of_target in numbers.result["int8"].values():
        numbers_of_target["accepted"] = False
    pairs = run.recipe.data.model_copy(update={"columns": {"text": "a", "text_pair": "b", "label": "c"}})
    run = replace(run, recipe=run.recipe.model_copy(update={"data": pairs}))
    card = render_card(run, numbers.result)
    assert "model_quantized.onnx" not in card and "another one" not in card
    assert r"`job predict …/models/reviews --pairs $'TEXT\tANOTHER'` answers" in card
