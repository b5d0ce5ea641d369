"""What can be seen of the race on a GPU without one: who takes part, what a failure costs, which goals are printed."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu
import numpy as np
import pytest
from gpu import Results, Turn

from job.data.batching import FILLER

SHAPE = gpu.SHAPES["bert-base"]
DYNAMIC, GROUPED = "Trainer, dynamic padding, batch 64", "Trainer, group_by_length, batch 64"
COMPILED = "job, padded, batch 64, compiled"
SCALE = gpu.Scale(1000, 12, 1e9)


def turn(tokens: int, compiled: tuple[int, int] = (0, 0)) -> Turn:
    return Turn(1.0, 4, np.array([tokens]), compiled=compiled)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still unless its one number is changed; nothing is released."""
    now = [0.0]
    monkeypatch.setattr(gpu, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(gpu, "release", lambda: None)
    return now


def test_who_is_compiled_takes_part_with_as_many_rows_as_who_is_not() -> None:
    names = set(gpu.list_contenders(SHAPE))
    for each in ("Trainer, group_by_length", "job, padded", "job, varlen"):
        for rows in (64, 256):
            assert {f"{each}, batch {rows}", f"{each}, batch {rows}, compiled"} <= names
    chosen = gpu.choose_contenders(SHAPE, gpu.read_words(["bert-base", "--only", "dynamic", "--only", "job, padded"]))
    assert list(chosen) == [DYNAMIC, "job, padded, batch 64", "job, padded, batch 256"]
    with_compiled = gpu.read_words(["bert-base", "--only", COMPILED, "--compiled"])
    assert list(gpu.choose_contenders(SHAPE, with_compiled)) == [COMPILED]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "job", "--only", "jab"], "'jab' is in no name"),
        (["bert-base", "--only", "batch 16"], "is in no name"),
        (["--only", "compiled"], "take part with --compiled"),
        (["bert-base", "--saves"], "--saves measures llama-1b"),
        (["gpt-5"], "there is no model gpt-5"),
    ],
)
def test_words_that_name_nothing_are_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.read_words(words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_who_fails_loses_no_turn_but_its_own(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[int, ...]] = []

    def fail() -> Turn:
        raise RuntimeError("backend='inductor' raised:\nRuntimeError: no C compiler\n\nSet TORCHDYNAMO_VERBOSE=1")

    def note(found: Results) -> None:
        seen.append(tuple(len(taken) for taken in found.turns.values()))

    found = gpu.race({"a": lambda: turn(1), "b": fail, "c": lambda: turn(3)}, 2, 60.0, note)
    assert seen == [(1, 0, 0), (1, 0, 0), (1, 0, 1), (1, 0, 2), (2, 0, 2)]
    assert "RuntimeError: no C compiler" in found.failed["b"]["why"]
    assert 'raise RuntimeError("backend=' in found.failed["b"]["where"]
    assert "b failed: RuntimeError: backend='inductor' raised:" in capsys.readouterr().out


def test_no_turn_begins_that_would_end_too_late(clock: list[float]) -> None:
    def take(seconds: float) -> Turn:
        clock[0] += seconds
        return turn(1)

    long_and_short = {"long": partial(take, 10.0), "short": partial(take, 2.0)}
    found = gpu.race(long_and_short, 3, 23.0, lambda found: None)
    # 10 + 2, then 2, and the 9 that are left are too few for the long one, not for the short one
    assert {each: len(taken) for each, taken in found.turns.items()} == {"long": 1, "short": 3}
    found = gpu.race(long_and_short, 3, clock[0] + 5.0, lambda found: None)
    assert {each: len(taken) for each, taken in found.turns.items()} == {"long": 1, "short": 0}


def make_lines(turns: dict[str, list[Turn]]) -> list[dict[str, Any]]:
    return gpu.judge("bert-base", Results(turns), SCALE)


def test_the_first_turn_is_dropped_where_another_follows() -> None:
    one, two = make_lines({"job, padded, batch 64": [turn(5)], COMPILED: [turn(9), turn(2, (3, 1)), turn(4, (3, 0))]})
    assert (one["tokens_per_second"], one["rounds"], one["first_dropped"]) == (5, 1, False)
    assert (two["tokens_per_second"], two["rounds"], two["first_dropped"]) == (3, 2, True)
    assert (two["lowest"], two["highest"], two["recompiled"], two["speeds"]) == (2, 4, 1, [9, 2, 4])


def test_a_goal_is_printed_where_both_sides_took_part_and_says_who_is_compiled(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = make_lines(
        {
            DYNAMIC: [turn(1), turn(10)],
            GROUPED: [turn(1), turn(20)],
            "job, varlen, batch 64": [turn(1), turn(24)],
            COMPILED: [turn(1), turn(26)],
        }
    )
    gpu.print_table(lines)
    capsys.readouterr()
    gpu.print_goals(lines)
    said = capsys.readouterr().out
    assert f"2.40x of {DYNAMIC}, by job, varlen, batch 64: missed, wanted 2.5x (1 of 2 rounds count)" in said
    assert f"2.60x of {DYNAMIC}, by {COMPILED}: met" in said
    assert f"1.30x of {GROUPED}, by {COMPILED}: met" in said
    assert "fp32" not in said, "nobody trained in it"


def test_other_rows_are_no_rivals_but_the_tutorials() -> None:
    lines = make_lines(
        {
            "Trainer, pad to 512, fp32, batch 8": [turn(1)],
            GROUPED: [turn(20)],
            "Trainer, group_by_length, batch 256": [turn(90)],
            "job, padded, batch 64": [turn(30)],
        }
    )
    for kind, rival in (("fp32", lines[0]), ("Trainer", lines[1]), ("dynamic padding", None)):
        assert gpu.find_rivals(lines[-1:], lines, kind) == (rival and (lines[-1], rival)), kind
    assert gpu.find_rivals([], lines, "Trainer") is None


def test_a_ratio_is_of_the_rounds_in_which_both_took_turns() -> None:
    warm, cold = make_lines({COMPILED: [turn(4), turn(30), turn(40)], DYNAMIC: [turn(2)]})
    assert gpu.compare(warm, cold)[0] == 2.0
    assert "the first round alone" in gpu.compare(warm, cold)[1]
    assert gpu.compare(warm, {"speeds": [2.0, 10.0]}) == (3.0, "1 of 2 rounds count")


def test_rows_of_a_compiled_model_have_a_multiple_of_8_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("CC", "CXX"):  # nothing is compiled yet
        monkeypatch.setenv(variable, sys.executable)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # which transformers sets: as before, afterwards
    shape = replace(SHAPE, sizes=gpu.TINY["bert-base"], batch=2, steps=1)
    table = gpu.make_table(shape)
    longest, rows = int(table.lengths.argmax()), [int(np.flatnonzero(table.lengths % 8)[0]), FILLER]
    for compiled in (False, True):
        trainer = gpu.make_job(shape, table, tmp_path, "padded", compiled)
        length, batch = int(table.lengths[rows[0]]), trainer._collator(rows)
        assert batch["input_ids"].shape == (2, -(-length // 8) * 8 if compiled else length)
        assert batch["attention_mask"][0].sum() == length
        assert trainer._collator([longest])["input_ids"].shape[1] == table.lengths[longest] == 512
