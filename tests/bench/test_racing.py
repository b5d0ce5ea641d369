"""A figure of the bench is a median with an interval, and a goal is met by the worse end of it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from machine import Busyness, count_cores
from racing import Interval, Turn, compare, race, run_command, run_until
from results import Row, draw_ratios, format_table


def test_turns_go_forwards_and_backwards_and_the_first_round_is_dropped() -> None:
    order: list[str] = []

    def contender(name: str) -> Turn:
        order.append(name)
        return Turn(1.0, float(len(order)))

    turns = race({name: lambda name=name: contender(name) for name in "ab"}, 3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert [turn.wall_s for turn in turns["a"]] == [4.0, 5.0]


def test_the_ratio_of_rounds_that_drift_together_is_exact() -> None:
    drift = np.linspace(1.0, 5.0, 9)
    assert compare(3 * drift, drift) == pytest.approx((3.0, 3.0, 3.0))


def test_the_interval_of_noise_holds_its_median_most_of_the_time() -> None:
    draw = np.random.default_rng(1)
    found = [compare(2 * np.exp(draw.normal(0, 0.2, 15)), np.ones(15)) for _ in range(200)]
    assert 0.85 < np.mean([each.low <= 2 <= each.high for each in found]) <= 1.0


def test_a_goal_is_met_by_the_worse_end_and_by_none_that_does_less() -> None:
    figure = Interval(2.5, 1.9, 3.0)
    assert Row("x", "×", figure, 1.9).met and not Row("x", "×", figure, 2.0).met
    assert Row("x", "s", figure, 3.0).met and not Row("x", "s", figure, 2.9).met
    assert not Row("x", "×", figure, 1.9, equal=False).met
    assert Row("x", "×", figure, None).met is None


def test_what_is_kept_of_a_row_is_all_of_it() -> None:
    row = Row("x", "×", Interval(2.5, 1.9, 3.0), 2.0, "a note", equal=False)
    assert Row.from_json(row.to_json()) == row
    assert "| x | 2.50 (1.90 – 3.00) × | ≥ 2 × | no | a note |" in format_table([row])
    assert draw_ratios("bench", [row]).count("<circle") == 1


def test_processor_time_of_a_command_has_that_of_its_children(tmp_path: Path) -> None:
    burn = "import time\nwhile time.process_time() < 0.4: pass"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}]); print('{{\"a\": 1}}')"
    turn = run_command([sys.executable, "-c", parent], tmp_path)
    assert turn.cpu_s >= 0.4 and turn.numbers == {"a": 1}
    with pytest.raises(RuntimeError, match="ended with 3 instead of 0"):
        run_command([sys.executable, "-c", "raise SystemExit(3)"], tmp_path)


def test_a_command_is_stopped_at_its_marker(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    burn = "while time.process_time() < 0.2: pass"  # the kernel counts in ticks of 10 ms
    code = f"import pathlib, time\n{burn}\npathlib.Path({str(marker)!r}).touch(); time.sleep(600)"
    turn = run_until(marker, [sys.executable, "-c", code], tmp_path)
    assert turn.cpu_s > 0.1 and turn.wall_s < 60
    with pytest.raises(RuntimeError, match="no marker"):
        run_until(marker, [sys.executable, "-c", "pass"], tmp_path)


def test_a_machine_is_busy_by_its_load_unless_all_cores_can_be_had_and_by_what_is_stolen() -> None:
    high = 2.0 * count_cores() + 0.1
    assert not Busyness(1.0, 1.0, 0.0).is_busy
    assert Busyness(high, 0.8, 0.0).is_busy and not Busyness(high, 1.0, 0.0).is_busy
    assert Busyness(0.0, 0.5, 0.0).is_busy, "a neighbour that has only just begun"
    assert Busyness(0.0, 0.95, 0.2).is_busy
