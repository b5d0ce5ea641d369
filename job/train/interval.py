"""How often to save: what a save costs against what a failure loses (Young 1974, Daly 2006).

A save blocks the loop while it copies; a failure loses what was trained since the last one. How long a step takes is
estimated, by a matrix product on this device: for a suggestion that is near enough.
"""

from __future__ import annotations

import math
import time

import torch

SNAPSHOT_GB_S = 11.3
"""Into memory that is allocated already, measured (803 MB in 0.071 s on one core)."""
GPU_MTBF_H = 50_700.0
"""Of one GPU: 419 interruptions of 16,384 in 54 days (Llama 3, 2024, table 5)."""
SHARE_OF_PEAK = 0.4
"""What a training reaches of the rate of a matrix product (MFU); published for 1–8 B on H100: 33–39 %."""
_SIDE, _MEASURED_S = 1024, 0.05


def find_interval(cost_s: float, mtbf_s: float) -> float:
    """Return the seconds between saves that lose least (Daly 2006, equation 37; Young 1974 is its first term)."""
    if cost_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = math.sqrt(cost_s / (2 * mtbf_s))
    return math.sqrt(2 * cost_s * mtbf_s) * (1 + ratio / 3 + ratio**2 / 9) - cost_s


def estimate_step(parameters: int, tokens: int) -> float:
    """Return the seconds in which this device trains on so many tokens: 6 FLOP for each parameter and token."""
    return 6 * parameters * tokens / (SHARE_OF_PEAK * measure_flops())


def measure_flops() -> float:
    """Return the rate of a matrix product in FLOP/s, in bf16 on a GPU and fp32 on a processor."""
    has_gpu = torch.cuda.is_available()
    matrix = torch.ones((_SIDE, _SIDE), device="cuda" if has_gpu else "cpu", dtype=torch.bfloat16 if has_gpu else None)
    matrix @ matrix  # the first loads kernels
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < _MEASURED_S:
        matrix @ matrix
        count += 1
        if has_gpu:
            torch.cuda.synchronize()
    return count * 2 * _SIDE**3 / (time.perf_counter() - began)
