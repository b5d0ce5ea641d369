"""One request to stop is one, however often it is heard at once; what an evaluation owes is known from the log."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState

from job.train import preemption
from job.train.preemption import EvaluationCut, EvaluationDebt, StopVote, ToldTwice


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in preemption.STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def tell(number: signal.Signals = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", preemption.STOP_SIGNALS)
def test_a_signal_stops_at_the_end_of_the_step_with_a_checkpoint_and_no_evaluation(number: signal.Signals) -> None:
    vote, control = StopVote(None), TrainerControl(should_evaluate=True)
    state = TrainerState(global_step=3, max_steps=10)
    vote.on_step_end(None, state, control)
    assert not control.should_training_stop
    tell(number)
    vote.on_step_end(None, state, control)
    assert (control.should_training_stop, control.should_save, control.should_evaluate) == (True, True, False)
    control.should_evaluate = True
    vote.on_epoch_end(None, state, control)
    assert not control.should_evaluate


def test_a_signal_in_the_last_step_changes_nothing_and_in_an_evaluation_it_ends_that() -> None:
    vote, control = StopVote(None), TrainerControl()
    tell()
    vote.on_step_end(None, TrainerState(global_step=10, max_steps=10), control)
    assert not vote.stopped
    with pytest.raises(EvaluationCut):
        vote.on_prediction_step(None, TrainerState(global_step=10, max_steps=10), control)
    assert vote.stopped


def test_signals_at_once_are_one_request_and_a_later_one_is_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(preemption.time, "monotonic", lambda: now[0])
    StopVote(None)
    tell()
    now[0] += 0.9
    tell(signal.SIGUSR1)
    now[0] += 0.2
    with pytest.raises(ToldTwice):
        tell()
    assert not issubclass(ToldTwice, Exception)


@pytest.mark.parametrize(
    ("strategy", "step", "epoch", "log", "owed"),
    [
        ("steps", 0, 0.0, [], False),
        ("steps", 6, 0.4, [], True),
        ("steps", 6, 0.4, [{"step": 3, "eval_loss": 1.0}, {"step": 6, "loss": 1.0}], True),
        ("steps", 6, 0.4, [{"step": 6, "eval_loss": 1.0}], False),
        ("steps", 7, 0.4, [], False),
        ("epoch", 7, 1.0, [], True),
        ("epoch", 8, 1.1, [], False),
        ("epoch", 20, 2.5, [], True),
    ],
)
def test_what_an_evaluation_owes(
    strategy: str, step: int, epoch: float, log: list[dict[str, float]], owed: bool
) -> None:
    args = SimpleNamespace(eval_strategy=strategy, eval_steps=3, logging_steps=1, save_steps=1, eval_on_start=False)
    state = TrainerState(global_step=step, max_steps=20, epoch=epoch, log_history=log, eval_steps=5)
    EvaluationDebt(to_the_last=False).on_train_begin(args, state, TrainerControl())
    assert args.eval_on_start == owed


@pytest.mark.parametrize(("to_the_last", "step"), [(True, 20), (False, 20), (True, 19)])
def test_the_last_step_is_owed_an_evaluation_where_its_model_may_be_taken(to_the_last: bool, step: int) -> None:
    args = SimpleNamespace(eval_strategy="steps", eval_steps=3, logging_steps=1, save_steps=1, eval_on_start=False)
    state = TrainerState(global_step=step, max_steps=20, epoch=1.5, eval_steps=3)
    EvaluationDebt(to_the_last).on_train_begin(args, state, TrainerControl())
    assert args.eval_on_start == (to_the_last and step == 20)
