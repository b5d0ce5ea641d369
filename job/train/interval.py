"""How often to save: what a save costs against what a failure loses (Young 1974, Daly 2006).

A save blocks the loop while it copies (`cost.py`); a failure loses what was trained since the last one. How long a step
takes is estimated, by a matrix product on this device: for a suggestion that is near enough.
"""

from __future__ import annotations

import math
import time

import torch

SHARE_OF_PEAK = 0.4
"""What a training reaches of the rate of a matrix product (MFU); published for 1–8 B on H100: 33–39 %."""
_SIDE, _MEASURED_S = 1024, 0.05


def find_interval(cost_s: float, mtbf_s: float) -> float:
    """Return the seconds between saves that lose least (Daly 2006, equation 37; Young 1974 is its first term)."""
    if cost_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = math.sqrt(cost_s / (2 * mtbf_s))
    return math.sqrt(2 * cost_s * mtbf_s) * (1 + ratio / 3 + ratio**2 / 9) - cost_s


def estimate_step(parameters: float, tokens: float, flops: float) -> float:
    """Return the seconds in which a device that computes `flops` FLOP/s in training trains on so many tokens.

    6 FLOP for each parameter and token (Kaplan et al. 2020, section 2.1).
    """
    return 6 * parameters * tokens / flops


def measure_flops() -> float:
    """Return what this device will compute in training, in FLOP/s: SHARE_OF_PEAK of what a matrix product reaches.

    That is measured in bf16 on a GPU and fp32 on a processor.
    """
    has_gpu = torch.cuda.is_available()
    matrix = torch.ones((_SIDE, _SIDE), device="cuda" if has_gpu else "cpu", dtype=torch.bfloat16 if has_gpu else None)
    matrix @ matrix  # the first loads kernels
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < _MEASURED_S:
        matrix @ matrix
        count += 1
        if has_gpu:
            torch.cuda.synchronize()
    return SHARE_OF_PEAK * count * 2 * _SIDE**3 / (time.perf_counter() - began)
