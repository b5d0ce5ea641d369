"""The calculation of scale agrees with what it is derived from."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scale import GPUS, Constants, compute_point, draw_points, estimate_loss

from job.train.interval import find_interval


@pytest.mark.parametrize(("cost_s", "mtbf_s"), [(0.05, 180_000.0), (1.0, 20_000.0), (30.0, 3_600.0)])
def test_no_other_interval_loses_noticeably_less_than_dalys(cost_s: float, mtbf_s: float) -> None:
    found = find_interval(cost_s, mtbf_s)
    others = np.geomspace(found / 30, found * 30, 2001)
    least = min(estimate_loss(float(each), cost_s, 0.0, mtbf_s) for each in others)
    assert estimate_loss(found, cost_s, 0.0, mtbf_s) <= 1.01 * least


def test_a_save_that_costs_more_than_failures_leave_time_for_is_made_once_between_two() -> None:
    assert find_interval(50.0, 20.0) == 20.0


def test_more_gpus_fail_more_often_and_save_faster_so_they_save_more_often() -> None:
    points = [compute_point(gpus, Constants()) for gpus in GPUS]
    for fewer, more in itertools.pairwise(points):
        assert more.interval_s < fewer.interval_s and more.stall_s < fewer.stall_s and more.lag_s <= fewer.lag_s
        assert more.lost > fewer.lost


def test_no_interval_is_shorter_than_an_upload_takes() -> None:
    slow = Constants(parameters=70e9, store_gb_s=0.1)
    assert all(compute_point(gpus, slow).interval_s >= compute_point(gpus, slow).lag_s for gpus in GPUS)


def test_the_plot_has_a_curve_of_every_series_with_a_point_for_every_number_of_gpus() -> None:
    svg = draw_points("scale", [compute_point(gpus, Constants()) for gpus in GPUS])
    curves = [part.split('"')[0].split() for part in svg.split('points="')[1:]]
    assert [len(curve) for curve in curves] == [len(GPUS)] * 3
