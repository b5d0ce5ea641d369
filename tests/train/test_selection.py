"""The best evaluation and the waiting for a better one follow from the log, as transformers' own callback counts."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

from job.train.selection import Standing, judge


def write_log(values: list[float]) -> list[dict[str, Any]]:
    """Return a log with an evaluation every 10 steps, and losses between them."""
    entries: list[dict[str, Any]] = []
    for number, value in enumerate(values, 1):
        entries += [{"loss": 1.0, "step": 10 * number}, {"eval_loss": 1.0, "eval_accuracy": value, "step": 10 * number}]
    return entries


@given(st.lists(st.integers(0, 20).map(lambda count: count / 20), max_size=12), st.sampled_from([0.0, 0.04, 0.11]))
def test_waiting_and_stopping_are_those_of_transformers(values: list[float], threshold: float) -> None:
    args = TrainingArguments(
        output_dir="unused", use_cpu=True, metric_for_best_model="accuracy", greater_is_better=True
    )
    state, callback = TrainerState(), EarlyStoppingCallback(3, threshold)
    for number, value in enumerate(values, 1):
        control = TrainerControl()
        callback.on_evaluate(args, state, control, metrics={"eval_accuracy": value})
        if state.best_metric is None or value > state.best_metric:  # Trainer._determine_best_metric
            state.best_metric, state.best_global_step = value, 10 * number
        found = judge(write_log(values[:number]), "accuracy", threshold)
        assert found.waited == callback.early_stopping_patience_counter
        assert (found.waited >= 3) == control.should_training_stop
        assert (found.step, found.value) == (state.best_global_step, state.best_metric)


def test_of_equal_evaluations_the_earlier_is_the_best() -> None:
    assert judge(write_log([0.5, 0.8, 0.8, 0.7]), "accuracy", 0.0) == Standing(20, 0.8, 2)


def test_a_small_gain_is_the_best_model_but_no_reason_to_wait() -> None:
    assert judge(write_log([0.5, 0.505, 0.51]), "accuracy", 0.02) == Standing(30, 0.51, 2)


def test_what_is_no_number_is_never_the_best() -> None:
    assert judge(write_log([math.nan, 0.5, math.nan]), "accuracy", 0.0) == Standing(20, 0.5, 1)
    assert judge(write_log([math.nan]), "accuracy", 0.0) == Standing(None, None, 1)
    assert judge([], "accuracy", 0.0) == Standing(None, None, 0)
