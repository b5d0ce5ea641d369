"""How many examples a fuzz test draws: few in every run, many where the variable FUZZ says how many times as many."""

from __future__ import annotations

import os

from hypothesis import settings

TIMES = int(os.environ.get("FUZZ", "1"))


def fuzz(examples: int) -> settings:
    """Return the decorator for a test that draws `examples`, times FUZZ."""
    return settings(max_examples=examples * TIMES)
