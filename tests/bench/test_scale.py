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


def test_more_gpus_fail_more_often_so_they_save_more_often() -> None:
    points = [compute_point(gpus, Constants()) for gpus in GPUS]
    for fewer, more in itertools.pairwise(points):
        assert more.interval_s < fewer.interval_s and more.lost > fewer.lost


def test_neither_stall_nor_lag_falls_below_what_rank_0_needs_for_the_weights() -> None:
    given = Constants()
    for gpus in GPUS:
        point = compute_point(gpus, given)
        assert point.stall_s > 4 / 64, "no GPU copies faster than PCIe 5 × 16 does, 64 GB/s"
        assert point.lag_s > 4 / given.hash_gb_s + 4 / given.send_gb_s


@pytest.mark.parametrize("stage", [0, 3])
def test_each_constant_of_a_checkpoint_counts(stage: int) -> None:
    plain = compute_point(64, Constants(zero_stage=stage))
    assert compute_point(64, Constants(zero_stage=stage, copy_gb_s=5.0)).stall_s > plain.stall_s
    for slower in ({"write_gb_s": 0.1}, {"hash_gb_s": 0.1}, {"send_gb_s": 0.1}, {"request_s": 1.0}):
        assert compute_point(64, Constants(zero_stage=stage, **slower)).lag_s > plain.lag_s


def test_no_interval_is_shorter_than_an_upload_takes() -> None:
    slow = Constants(parameters=70e9, store_gb_s=0.1)
    assert all(compute_point(gpus, slow).interval_s >= compute_point(gpus, slow).lag_s for gpus in GPUS)


def test_the_plot_has_a_curve_of_every_series_with_a_point_for_every_number_of_gpus() -> None:
    svg = draw_points("scale", [compute_point(gpus, Constants()) for gpus in GPUS])
    curves = [part.split('"')[0].split() for part in svg.split('points="')[1:]]
    assert [len(curve) for curve in curves] == [len(GPUS)] * 3
