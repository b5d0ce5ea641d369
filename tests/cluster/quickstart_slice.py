"""The shipped quickstart, cut to 18 steps: a real model and real texts that a test can afford."""

from __future__ import annotations


def slice_of_quickstart(model: str, data: str, store: str) -> list[str]:
    """Return the words for `job run`: the recipe and its options."""
    options = (
        f"model.id={model}", f"data.source={data}", f"store.uri={store}", "training.save_steps=3",
        "training.eval_steps=18", "baselines=[majority]", "export.int8.gate=report_only", "launch.grace_s=20",
    )  # fmt: skip
    return ["quickstart", *(word for option in options for word in ("--set", option))]
