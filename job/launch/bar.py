"""The progress of a training in one line of a terminal; nothing is left in the terminal when its writer is killed."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.table import Table


def draw_bar(progress: dict[str, Any], width: int) -> str:
    """Return step, share, time left, tokens per second and loss beside a bar, at most `width` columns wide."""
    grid = Table.grid(padding=(0, 1), expand=True)
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1, min_width=4)
    grid.add_column(no_wrap=True)
    bar = ProgressBar(total=max(progress["steps"], 1), completed=progress["step"])
    grid.add_row("train", bar, describe_progress(progress))
    shown = io.StringIO()
    # one column less: a terminal may wrap where the last one is written
    console = Console(file=shown, force_terminal=True, width=max(width - 1, 20), highlight=False)
    console.print(grid, end="", soft_wrap=False)
    return shown.getvalue().rstrip("\n").split("\n")[0]


def describe_progress(progress: dict[str, Any]) -> str:
    """Say `progress` in words: step 20/57, 35 %, 0:12 left, 5,210 tokens/s, loss 0.4213."""
    minutes, seconds = divmod(int(progress["left_s"]), 60)
    words = [f"step {progress['step']}/{progress['steps']}", f"{progress['percent']} %", f"{minutes}:{seconds:02} left"]
    if "tokens_per_second" in progress:
        words.append(f"{progress['tokens_per_second']:,.0f} tokens/s")
    if "loss" in progress:
        words.append(f"loss {progress['loss']:.4f}")
    return ", ".join(words)
