"""The tables show every outcome of a target: accepted, left out, not judged, and none that could be made at all."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import pytest

from job.recipe import Recipe
from job.report import format_comparison, format_result
from job.report.console import print_listing
from job.report.plots import Numbers
from job.report.tables import render_exports, render_training

NUMBERS: dict[str, Any] = dict.fromkeys(
    ("accepted", "metric", "drop", "drop_bound", "agreement", "n", "size", "ms_per_row", "speedup", "rung")
)
MEASURED = {"metric": 0.8, "drop": 0.01, "drop_bound": 0.02, "agreement": 0.97, "n": 200, "size": 1 << 20, "rung": "x"}
RESULT: dict[str, Any] = {
    "run_id": "r", "status": "released", "exit_code": 0, "reason": "", "release": None,
    "metrics": {"baselines": {}, "test": {"accuracy": 0.81, "accuracy_interval": [0.79, 0.83], "n": 200}},
    "onnx": {"agreement": 1.0, "fp32": {"accuracy": 0.81, "size": 4 << 20, "ms_per_row": 2.0}},
    "int8": {
        "portable": NUMBERS | MEASURED | {"accepted": True, "ms_per_row": 1.0, "speedup": 2.0, "measured_on": "cpu"},
        "avx2": NUMBERS | MEASURED | {"accepted": False, "measured_on": "cpu"},
        "arm64": NUMBERS | {"measured_on": "cpu"},
        "avx512_vnni": NUMBERS | {"accepted": False, "measured_on": "cpu"},
    },
}  # fmt: skip


def test_the_terminal_says_what_became_of_each_target() -> None:
    shown = format_result(RESULT)
    for words in ("accepted", "left out", "not judged", "nothing runs"):
        assert words in shown


@pytest.mark.parametrize(
    ("task", "columns", "words"),
    [
        ("text-classification", {}, 'predict s3://b/p/models/m/v "I am'),
        ("text-classification", {"text_pair": "b"}, r"predict s3://b/p/models/m/v --pairs $'I am"),
        ("question-answering", {}, r"predict s3://b/p/models/m/v --pairs $'What amazes me?\tI am"),
        ("causal-lm", {"messages": "m"}, 'predict s3://b/p/models/m/v --chat "I am'),
        ("masked-lm", {}, 'device [MASK]"'),
    ],
)
def test_the_last_lines_ask_a_model_what_one_of_its_kind_can_answer(
    task: str, columns: dict[str, str], words: str
) -> None:
    about = {"name": "m", "task": task, "model": {"id": "x"}, "store": {"uri": "s3://bucket/p"}}
    recipe = Recipe.model_validate(about | {"data": {"source": "d", "columns": columns}})
    shown = format_result(RESULT | {"release": "s3://b/p/models/m/v", "promoted": True}, recipe)
    assert words in next(line for line in shown.splitlines() if line.startswith("ask it"))


def test_the_command_that_asks_can_be_typed_where_folders_have_spaces() -> None:
    shown = format_result(RESULT | {"release": "/my store/models/m/v", "promoted": True})
    assert "predict '/my store/models/m/v' " in next(line for line in shown.splitlines() if line.startswith("ask it"))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("words", ["columns [text, label]", "[/work/data/train.csv] is empty", "[red]a[/] :smile: \\["])
def test_a_listing_on_a_terminal_shows_what_the_data_says_as_it_is(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("sys.stdout", terminal := Terminal())
    print_listing(f"releases; {words}", ["reason", ""], [[words, "wide " * 10]])
    assert terminal.getvalue().count(words) == 2


@pytest.mark.parametrize("show", [format_result, format_comparison])
def test_a_reason_that_quotes_another_machine_steers_no_terminal(show: Callable[[dict[str, Any]], str]) -> None:
    shown = show({"status": "failed", "exit_code": 76, "reason": "h\x1b[2J\x07 owns it", "release": None})
    assert r"h\x1b[2J\x07 owns it" in shown and "\x07" not in shown


@pytest.mark.parametrize("terminal", [io.StringIO, Terminal])
def test_what_a_store_says_steers_no_terminal(monkeypatch: pytest.MonkeyPatch, terminal: type[io.StringIO]) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("sys.stdout", shown := terminal())
    hostile = "\x1b]0;owned\x07\x1b[2J\r\x9b31m one\ntwo\tthree \u202etxt"
    print_listing(f"title {hostile}", ["reason", ""], [[hostile, "ü漢é"]])
    assert not set("\x1b\x07\r\x9b\u202e") & set(re.sub(r"\x1b\[[0-9;]*m", "", shown.getvalue()))
    assert r"\x1b]0;owned\x07" in shown.getvalue() and "ü漢é" in shown.getvalue()
    if terminal is io.StringIO:
        assert shown.getvalue().count("\n") == shown.getvalue().count("\t") == 1


def test_the_page_says_what_became_of_each_target() -> None:
    shown = render_exports(Numbers("accuracy", {}, RESULT, {}))
    assert shown.count("left out") == 2
    assert shown.count("not judged") == 1


def test_the_page_says_which_steps_model_it_is_and_what_labels_weighed() -> None:
    record: dict[str, Any] = {"steps": 1200, "model_step": 900, "stopped_by": "early stopping"}
    shown = str(render_training(record | {"class_weights": {"ham": 0.53, "<b>": 8.0}}))
    assert "Early stopping ended the training after step 1,200. The model is that of step 900" in shown
    assert shown.index("&lt;b&gt;") < shown.index("ham"), "the heaviest first"
    assert " 8, " in shown and " 0.53." in shown
    assert str(render_training({"steps": 60, "model_step": 60, "stopped_by": "the last step"})) == ""
    assert str(render_training({"steps": 60})) == "", "the record of an older version"
