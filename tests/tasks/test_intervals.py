"""Intervals are Wilson's."""

from __future__ import annotations

import pytest

from job.tasks.intervals import wilson_interval


@pytest.mark.parametrize(
    ("share", "n", "low", "high"), [(0.5, 100, 0.4038, 0.5962), (0.0, 10, 0.0, 0.2775), (1.0, 10, 0.7225, 1.0)]
)
def test_wilson_intervals_match_published_values(share: float, n: int, low: float, high: float) -> None:
    assert wilson_interval(share, n) == pytest.approx([low, high], abs=1e-4)
