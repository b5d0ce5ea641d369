"""Scale on paper: step time, stall, durable lag and the best checkpoint interval on 8 to 1,024 GPUs.

python tests/bench/scale.py FOLDER [--parameters 1e9] [--gpus 8,16,…] [--constant NAME=VALUE …]

writes scale.md, .png and .svg. A calculation from constants, each with its source below or in job/train/cost.py, and no
measurement of many GPUs: it says what the design costs if they hold. What a checkpoint costs and how often it is best
saved is what `job check` says, too; what a failure costs is half an interval, the lag until the newest checkpoint is
durable, and the restart.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from results import write_plot

from job.report.axes import BOTTOM, LEFT, RIGHT, TOP, Axis, draw_frame, format_tick
from job.report.markup import Html, element
from job.report.plots import Plot
from job.train.cost import Cluster, Saved, estimate_cost
from job.train.interval import SHARE_OF_PEAK, estimate_step

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Constants(Cluster):
    """What the calculation is made of. Every one can be given on the command line."""

    parameters: float = 1e9
    zero_stage: float = 2.0  # 0: DDP
    tokens_per_gpu: float = 16_384.0  # of one step
    gpu_flops: float = 703e12  # bf16 matrix product, measured on an H200 (tests/bench/gpu.py)
    mfu: float = SHARE_OF_PEAK
    hidden_share: float = 0.8  # assumed: of the gradients' all-reduce, behind the backward pass
    restart_s: float = 120.0  # assumed: a new pod, imports, the checkpoint fetched


@dataclass(frozen=True)
class Point:
    """Seconds on so many GPUs: a step, the stall of a save, the lag until it is durable, the best interval; the loss.

    `steps` lie between two saves; `lost` is the share of time that saves and failures cost at that interval.
    """

    gpus: int
    step_s: float
    stall_s: float
    lag_s: float
    interval_s: float
    steps: int
    lost: float


def compute_point(gpus: int, given: Constants) -> Point:
    """Return the times on so many GPUs."""
    cost = estimate_cost(Saved(given.parameters, gpus, int(given.zero_stage)), given)
    step_s, mtbf_s = estimate_whole_step(gpus, given), 3600 * given.mtbf_h / gpus
    lost = estimate_loss(cost.interval_s, cost.stall_s, cost.lag_s + given.restart_s, mtbf_s)
    return Point(gpus, step_s, cost.stall_s, cost.lag_s, cost.interval_s, cost.count_steps(step_s), lost)


def estimate_whole_step(gpus: int, given: Constants) -> float:
    """Return the seconds of a step: what is computed, and what of the bf16 gradients' all-reduce is not hidden."""
    gradient_s = 2 * 2 * given.parameters * (gpus - 1) / gpus / (given.collective_gb_s * 1e9)
    compute_s = estimate_step(given.parameters, given.tokens_per_gpu, given.gpu_flops * given.mfu)
    return compute_s + (1 - given.hidden_share) * gradient_s


def estimate_loss(interval_s: float, cost_s: float, after_s: float, mtbf_s: float) -> float:
    """Return the share of time that is lost, first order: saves, and per failure half an interval and `after_s`."""
    return cost_s / (interval_s + cost_s) + (interval_s / 2 + after_s) / mtbf_s


def format_points(points: Sequence[Point], given: Constants) -> str:
    """Return a Markdown table, and the constants below it."""
    lines = [
        "| GPUs | step | stall of a save | durable after | best interval | in steps | time lost |",
        "|---" * 7 + "|",
    ]
    for each in points:
        lines.append(
            f"| {each.gpus:,} | {each.step_s:.2f} s | {each.stall_s * 1000:.3g} ms | {each.lag_s:.2g} s "
            f"| {each.interval_s:.3g} s | {each.steps:,} | {each.lost:.2%} |"
        )
    said = ", ".join(f"{each.name} {getattr(given, each.name):g}" for each in fields(given))
    return "\n".join([*lines, "", f"Calculated, not measured: {said}.", ""])


_SERIES = (("best interval", "interval_s", "a"), ("durable after", "lag_s", "b"), ("stall", "stall_s", "c"))


def draw_points(name: str, points: Sequence[Point]) -> Html:
    """Return curves of seconds over GPUs, both axes logarithmic."""
    decades = [math.log10(getattr(each, key)) for _, key, _ in _SERIES for each in points]
    low, high = math.floor(min(decades)), math.ceil(max(decades))
    first, last = math.log2(points[0].gpus), math.log2(points[-1].gpus)
    x = Axis(first, max(last, first + 1), LEFT + 8, RIGHT - 8, tuple(math.log2(each.gpus) for each in points))
    y = Axis(low, high, BOTTOM, TOP, tuple(range(low, high + 1)))
    parts: list[object] = []
    for tick in y.ticks:
        parts.append(element("line", x1=LEFT, x2=RIGHT, y1=y.place(tick), y2=y.place(tick), class_="rule"))
        words = f"{format_tick(10.0**tick)} s" if tick >= 0 else f"{format_tick(1000 * 10.0**tick)} ms"
        parts.append(element("text", words, x=LEFT - 6, y=y.place(tick) + 4, text_anchor="end"))
    for tick in x.ticks:
        parts.append(element("text", f"{2**tick:.0f}", x=x.place(tick), y=BOTTOM + 16, text_anchor="middle"))
    parts.append(element("text", "GPUs", x=(LEFT + RIGHT) / 2, y=BOTTOM + 33, text_anchor="middle"))
    for number, (title, key, colour) in enumerate(_SERIES):
        places = [(x.place(math.log2(each.gpus)), y.place(math.log10(getattr(each, key)))) for each in points]
        parts.append(element("polyline", points=" ".join(f"{a},{b}" for a, b in places), class_=f"line-{colour}"))
        parts.append(element("rect", x=2 + 118 * number, y=5, width=12, height=4, class_=f"fill-{colour}"))
        parts.append(element("text", title, x=19 + 118 * number, y=12))
    return draw_frame(name, *parts)


def main() -> None:
    """Calculate, print the table, write it and the picture."""
    parser = argparse.ArgumentParser(prog="scale")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parameters", type=float, default=Constants.parameters)
    parser.add_argument("--gpus", default=",".join(map(str, GPUS)))
    parser.add_argument("--constant", action="append", default=[], metavar="NAME=VALUE")
    asked = parser.parse_args()
    others = {name: float(value) for name, _, value in (each.partition("=") for each in asked.constant)}
    given = replace(Constants(parameters=asked.parameters), **others)
    points = [compute_point(int(word), given) for word in asked.gpus.split(",")]
    asked.folder.mkdir(parents=True, exist_ok=True)
    text = format_points(points, given)
    (asked.folder / "scale.md").write_text(text)
    title = f"checkpoints of a model of {given.parameters / 1e9:g} B parameters"
    write_plot(Plot("scale", title, draw_points(title, points)), asked.folder)
    print(text)


if __name__ == "__main__":
    main()
