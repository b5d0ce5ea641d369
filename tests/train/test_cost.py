"""What a checkpoint is calculated to cost: rank 0 has all weights, however many ranks there are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from job.train.cost import ON_GPUS, ON_PROCESSORS, Cluster, Cost, Saved, estimate_cost
from job.train.interval import find_interval

BILLION, MANY = 1e9, (8, 64, 1024, 16_384)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("cluster", [ON_GPUS, ON_PROCESSORS])
def test_rank_0_carries_all_weights_however_many_ranks_there_are(stage: int, cluster: Cluster) -> None:
    for ranks in MANY:
        saved = Saved(BILLION, ranks, stage)
        cost = estimate_cost(saved, cluster)
        assert saved.count_sent(1) >= 4 * BILLION
        assert cost.stall_s >= 4 / cluster.copy_gb_s
        assert cost.lag_s - cost.stall_s >= 4 / cluster.hash_gb_s + 4 / cluster.send_gb_s


def test_under_ddp_rank_0_saves_all_moments_as_well_and_under_zero_its_part() -> None:
    for ranks in MANY:
        assert Saved(BILLION, ranks, 0).count_sent(1) == Saved(BILLION, ranks, 0).count_sent(ranks) == 12 * BILLION
        assert Saved(BILLION, ranks, 1).count_sent(1) == (4 + 8 / ranks) * BILLION
        assert Saved(BILLION, ranks, 1).count_sent(ranks) == 12 * BILLION
    assert len({estimate_cost(Saved(BILLION, ranks, 0), ON_GPUS).stall_s for ranks in MANY}) == 1


def test_a_billion_parameters_on_1024_ranks_take_what_their_copy_and_their_upload_take() -> None:
    cost = estimate_cost(Saved(BILLION, 1024, 2), replace(ON_PROCESSORS, collective_gb_s=1e9))
    assert cost.stall_s == pytest.approx(0.354, abs=0.002)
    assert cost.lag_s > 7.2


def test_weights_are_gathered_once_in_stage_3_and_reduced_in_stages_1_and_2() -> None:
    slow = replace(ON_GPUS, copy_gb_s=1e9)
    stalls = [estimate_cost(Saved(BILLION, 1024, stage), slow).stall_s for stage in (0, 1, 2, 3)]
    assert stalls == pytest.approx([0, 0.2, 0.2, 0.1], rel=0.01, abs=1e-6)
    assert estimate_cost(Saved(BILLION, 1, 3), slow).stall_s == pytest.approx(0, abs=1e-6)


def test_the_best_weights_are_sent_too_and_hold_up_nothing() -> None:
    plain, best = (estimate_cost(Saved(BILLION, 8, 2, with_best), ON_GPUS) for with_best in (False, True))
    assert best.stall_s == plain.stall_s
    assert best.lag_s - plain.lag_s == pytest.approx(4 / ON_GPUS.hash_gb_s + 4 / ON_GPUS.send_gb_s)


@pytest.mark.parametrize("slow", [{"store_gb_s": 0.01}, {"node_gb_s": 0.01}, {"send_gb_s": 0.01}, {"request_s": 80.0}])
def test_no_interval_is_shorter_than_the_lag(slow: dict[str, float]) -> None:
    saved, cluster = Saved(70 * BILLION, 1024, 3), replace(ON_GPUS, **slow)
    cost = estimate_cost(saved, cluster)
    assert cost.interval_s == cost.lag_s > find_interval(cost.stall_s, 3600 * cluster.mtbf_h / 1024)
    for step_s in (0.7, 3.0, 1e6):
        assert cost.count_steps(step_s) * step_s >= cost.lag_s


def test_where_uploads_are_quick_the_interval_is_dalys() -> None:
    cost = estimate_cost(Saved(BILLION, 64, 2), ON_GPUS)
    assert cost.interval_s == find_interval(cost.stall_s, 3600 * ON_GPUS.mtbf_h / 64) > cost.lag_s
    assert Cost(1.0, 2.0, 100.0).count_steps(7.0) == 14
