"""Confidence intervals."""

from __future__ import annotations

import math

_Z95 = 1.959964
"""Two-sided 95 % quantile of the normal distribution."""


def wilson_interval(share: float, n: int) -> list[float]:
    """Return the two-sided 95 % interval [low, high] of a share observed on n rows (Wilson 1927)."""
    z2 = _Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return [round(max(centre - half, 0.0), 6), round(min(centre + half, 1.0), 6)]
