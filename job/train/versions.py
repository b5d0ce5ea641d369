"""What transformers 4.57 and 5 call otherwise. Training is written for the former; see `make test-next`."""

from __future__ import annotations

import os
from typing import Any

import transformers

_MAJOR = int(transformers.__version__.partition(".")[0])


def fit_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Return keyword arguments of TrainingArguments as this version takes them.

    5 has one argument for warm-up, a share below 1, and a variable for TensorBoard's folder.
    """
    if _MAJOR < 5:
        return options
    kept = {name: value for name, value in options.items() if name not in ("warmup_ratio", "logging_dir")}
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", options["logging_dir"])
    return kept | {"warmup_steps": options["warmup_steps"] or min(options["warmup_ratio"], 1 - 1e-9)}
