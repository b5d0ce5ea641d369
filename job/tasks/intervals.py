"""Confidence intervals and bounds."""

from __future__ import annotations

import math

import numpy as np

_Z95 = 1.959964
"""Two-sided 95 % quantile of the normal distribution."""
_Z95_ONE_SIDED = 1.644854
_FEW = 10
"""Rows that differ by ±1 give a wider normal margin than the rule of three from the fourth on; so few make no mean that
is normal.
"""


def wilson_interval(share: float, n: int) -> list[float]:
    """Return the two-sided 95 % interval [low, high] of a share observed on n rows (Wilson 1927)."""
    z2 = _Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return [round(max(centre - half, 0.0), 6), round(min(centre + half, 1.0), 6)]


def normal_interval(values: np.ndarray, within: tuple[float, float] = (-math.inf, math.inf)) -> list[float]:
    """Return the two-sided 95 % interval [low, high] of the mean of float [rows], if it is normal, cut to `within`."""
    half = _Z95 * float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    low, high = float(values.mean()) - half, float(values.mean()) + half
    return [round(max(low, within[0]), 6), round(min(high, within[1]), 6)]


def spread_ratio(parts: np.ndarray, wholes: np.ndarray) -> np.ndarray:
    """Return for each row what it adds to Σ parts / Σ wholes, float64 [rows], so that their mean is that ratio.

    It is the ratio of all, and by how much this row moves it: the ratio estimator's residual (Cochran 1977, 6.8), whose
    spread is not that of the rows' sizes. 0 where all wholes are 0.
    """
    total = float(wholes.sum()) or 1.0
    ratio = float(parts.sum()) / total
    return np.asarray(ratio + (parts - ratio * wholes) * len(parts) / total)


def estimate_margin(paired: np.ndarray) -> float:
    """Return the margin of the one-sided 95 % bound of the mean of paired differences float [rows], if it is normal."""
    n = len(paired)
    return _Z95_ONE_SIDED * float(paired.std(ddof=1)) / math.sqrt(n) if n > 1 else 1.0


def count_rows(max_drop: float) -> int:
    """Return ln(20) / max_drop: the fewest rows on which a drop of at most `max_drop` can be proved.

    With no changed label in n rows the 95 % bound on the share of changed labels is ln(20)/n
    (Hanley & Lippman-Hand 1983), and that share bounds the drop.
    """
    return math.ceil(math.log(20) / max_drop)


def bound_mean(paired: np.ndarray, changed: np.ndarray) -> tuple[float, float]:
    """Return the mean of paired differences float [rows] and the margin of its one-sided 95 % bound from above.

    Where a few rows are much worse and none much better, a normal bound is passed two or three times as often as it
    says; the quantile is moved by the skewness (Johnson 1978). Where fewer than ten rows have `changed` at all (bool
    [rows, k]), the margin is at least ln(20)/n, which is what none would prove (rule of three, Hanley & Lippman-Hand
    1983), for differences within ±1.
    """
    margin = estimate_margin(paired) * (1.0 + _measure_skew(paired) / _Z95_ONE_SIDED)
    few = np.count_nonzero(changed.any(axis=1)) < _FEW
    return float(paired.mean()), max(margin, math.log(20) / len(paired) if few else 0.0)


def _measure_skew(paired: np.ndarray) -> float:
    """Return by how much skewness to the right moves the normal quantile of a mean of float [rows]."""
    spread = float(paired.std())
    if spread == 0.0:
        return 0.0
    skewness = float(np.mean(((paired - paired.mean()) / spread) ** 3))
    return max(skewness, 0.0) * (1.0 + 2.0 * _Z95_ONE_SIDED**2) / (6.0 * math.sqrt(len(paired)))
