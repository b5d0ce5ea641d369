"""Which charts a run has, drawn from its records; what a task does not have is left out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from job.report.charts import Series, draw_curves, draw_lengths, draw_reliability
from job.report.comparisons import Bar, draw_bars, draw_confusion, draw_intervals, draw_long_names
from job.report.markup import Html, join_isolated

MATRIX_LABELS = 20
"""A matrix of more labels cannot be read; its most confused pairs can."""
_SHOWN_PAIRS = 15


@dataclass(frozen=True)
class Plot:
    """A chart: the name of its picture, its title, the SVG, and what to know about it."""

    name: str
    title: str
    svg: Html
    caption: str = ""


@dataclass(frozen=True)
class Numbers:
    """What plots and tables are made of: `analysis` as `evaluate/analysis.json` has it, the others as in DESIGN §6."""

    metric: str
    records: dict[str, Any]
    result: dict[str, Any]
    analysis: dict[str, Any]

    @property
    def words(self) -> str:
        """The metric as people say it."""
        return self.metric.replace("_", " ")


def draw_plots(numbers: Numbers) -> dict[str, Plot]:
    """Return the charts of a run by name, in the order of the page."""
    makers = (_draw_quality, _draw_training, _draw_exports, _draw_answers)
    return {plot.name: plot for make in makers for plot in make(numbers)}


def _draw_quality(numbers: Numbers) -> Iterator[Plot]:
    rows = list(_list_intervals(numbers))
    caption = (
        "Whiskers: 95 % intervals on the test rows; those of int8 files are of the drop against fp32 on the same rows "
        "(one-sided 95 % bound)."
    )
    name = f"{numbers.words} of baselines, the fine-tuned model and its exports"
    yield Plot("quality", f"Test {numbers.words}", draw_intervals(name, rows, numbers.words), caption)


def _list_intervals(numbers: Numbers) -> Iterator[Bar]:
    metrics, metric = numbers.result["metrics"], numbers.metric
    scores = {**metrics["baselines"], "fine-tuned": metrics["test"], "ONNX fp32": numbers.result["onnx"]["fp32"]}
    for name, each in scores.items():
        low, high = each[f"{metric}_interval"]
        colour = "a" if name == "fine-tuned" else "b" if name == "ONNX fp32" else "c"
        yield Bar(name, each[metric], f"{each[metric]:.4f} ({low:.3f} – {high:.3f})", colour, low, high)
    for target, each in numbers.result["int8"].items():
        if each["metric"] is not None:
            value, margin = each["metric"], each["drop_bound"] - each["drop"]
            most = max(value, 1.0)  # no metric here is better
            yield Bar(name_export(target), value, f"{value:.4f}", "b", value - margin, min(value + margin, most))


def name_export(target: str) -> str:
    """Return a target as people say it."""
    return target if target == "int4" else f"int8 {target}"


def _draw_training(numbers: Numbers) -> Iterator[Plot]:
    record, metric = numbers.records["train"], numbers.metric
    history, marks = record.get("history", []), find_resumed_steps(record)
    curves = {
        "loss": ("Loss", [("loss", "training", "a"), ("eval_loss", "validation", "b")]),
        "validation": (f"Validation {numbers.words}", [(f"eval_{metric}", numbers.words, "b")]),
        "learning_rate": ("Learning rate", [("learning_rate", "learning rate", "a")]),
        "gradient_norm": ("Gradient norm", [("grad_norm", "norm before clipping", "a")]),
        "throughput": ("Throughput", [("tokens_per_second", "tokens per second, all ranks", "a")]),
    }
    for name, (title, keys) in curves.items():
        series = [
            Series(words, [(entry["step"], entry[key]) for entry in history if key in entry], colour)
            for key, words, colour in keys
        ]
        svg = draw_curves(f"{title} over steps", series, record["steps"], marks)
        if svg:
            yield Plot(name, title, svg, "Dashed: where an attempt went on from a checkpoint." if marks else "")


def find_resumed_steps(record: dict[str, Any]) -> list[int]:
    """Return the steps at which attempts went on from a checkpoint, by the train record."""
    steps = {attempt.get("resumed_from") for attempt in record.get("attempts", [])}
    return sorted(step for step in steps if step)


def _draw_exports(numbers: Numbers) -> Iterator[Plot]:
    metric, fp32 = numbers.metric, numbers.result["onnx"]["fp32"]
    files = {"ONNX fp32": fp32 | {"metric": fp32[metric], "speedup": 1.0}}
    files |= {
        name_export(target): each for target, each in numbers.result["int8"].items() if each["metric"] is not None
    }
    colours = {name: "a" if name == "ONNX fp32" else "b" for name in files}
    wanted = (
        (numbers.words, "metric", lambda each: f"{each['metric']:.4f}"),
        ("milliseconds per test row", "ms_per_row", lambda each: f"{each['ms_per_row']:.3g} ({each['speedup']:.1f}×)"),
        ("size in MiB", "size", lambda each: f"{each['size'] / 2**20:.1f}"),
    )
    groups = []
    for heading, key, describe in wanted:
        bars = [Bar(name, each[key], describe(each), colours[name]) for name, each in files.items() if each.get(key)]
        if bars and all(bar.value >= 0 for bar in bars):  # a log-likelihood has no bar from zero on
            groups.append((heading, bars))
    yield Plot("exports", "fp32 and int8", draw_bars("quality, time and size of the exports", groups))


def _draw_answers(numbers: Numbers) -> Iterator[Plot]:
    found = numbers.analysis
    if "confusion" in found:
        yield _draw_confusions(**found["confusion"])
    if "calibration" in found:
        error = found["calibration"]["expected_calibration_error"]
        caption = f"Expected calibration error {error:.4f} (15 bins). Larger dots hold more rows; whiskers: 95 %."
        yield Plot("calibration", "Calibration", draw_reliability("reliability", found["calibration"]), caption)
    lengths = found["lengths"]
    caption = (
        f"Mean {lengths['mean']:g} tokens, median {lengths['median']:g}, 95 % within {lengths['p95']:g}; "
        f"{lengths['cut']:.1%} of the rows were cut at {lengths['max_length']}."
    )
    yield Plot("lengths", "Lengths", draw_lengths("tokens of train rows", lengths), caption)


def _draw_confusions(labels: list[str], cells: list[list[int]]) -> Plot:
    counts = [[0] * len(labels) for _ in labels]
    for true, said, count in cells:
        counts[true][said] = count
    if len(labels) <= MATRIX_LABELS:
        svg = draw_confusion("confusion matrix", labels, counts)
        return Plot("confusion", "Confusion", svg, "Test rows; shades and percentages are shares of the true label.")
    bars = [
        Bar(join_isolated(labels[true], labels[said]), count, f"{count} ({count / sum(counts[true]):.0%})", "a")
        for true, said, count in list_confused(cells)
    ]
    words = f"The {len(bars)} most confused pairs of {len(labels)} labels, true → said: rows (share of the true label)."
    return Plot("confusion", "Most confused labels", draw_long_names("most confused labels", bars), words)


def list_confused(cells: list[list[int]]) -> list[list[int]]:
    """Return [true, said, rows] of the pairs that are confused most often."""
    wrong = [cell for cell in cells if cell[0] != cell[1]]
    return sorted(wrong, key=lambda cell: -cell[2])[:_SHOWN_PAIRS]
