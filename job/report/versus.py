"""compare.html: methods side by side, one self-contained file like the report of a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from job.recipe import Recipe
from job.report.comparisons import Bar, draw_bars, draw_intervals
from job.report.markup import Html, element, render_table
from job.report.page import write_document, write_figure

Row = dict[str, Any]

_COSTS = (
    ("seconds", "training, seconds", 1.0, "{:,.0f} s"),
    ("trainable_parameters", "trained parameters, millions", 1e6, "{:,.2f} M"),
    ("peak_memory_bytes", "peak memory of a rank, GiB", float(1 << 30), "{:,.2f} GiB"),
    ("checkpoint_bytes", "a checkpoint, MiB", float(1 << 20), "{:,.1f} MiB"),
    ("ms_per_row", "latency in fp32, ms a row", 1.0, "{:,.2f} ms"),
    ("ms_per_row_int8", "latency in int8, ms a row", 1.0, "{:,.2f} ms"),
)


def render_comparison(recipe: Recipe, run_id: str, found: dict[str, Any]) -> Html:
    """Return the page of `job compare`: `found` is {metric, methods: {name: row}}."""
    title = f"{recipe.name}: methods compared"
    about = f"{recipe.task}, {recipe.model.id.rpartition('/')[2]}, comparison {run_id}"
    intro = [element("h1", title), element("small", about)]
    return write_document(title, *intro, *_list_sections(found["metric"], found["methods"]))


def list_comparison(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of the table, for a terminal as well."""
    metric = found["metric"].replace("_", " ")
    headings = ["method", metric, "95 % interval", *(words.rpartition(",")[0] or words for _, words, _, _ in _COSTS)]
    return headings, [_list_cells(name, row) for name, row in found["methods"].items()]


def _list_cells(name: str, row: Row) -> list[str]:
    value = f"{row['value']:.4f}" if row["value"] is not None else "–"
    interval = "{:.3f} – {:.3f}".format(*row["interval"]) if row["interval"] else ""
    costs = [form.format(row[key] / unit) if row.get(key) is not None else "" for key, _, unit, form in _COSTS]
    return [name, f"{value} (not released)" if row.get("failed") else value, interval, *costs]


def _list_sections(metric: str, methods: dict[str, Row]) -> Iterator[Html]:
    measured = {name: row for name, row in methods.items() if row["value"] is not None}
    best = max(measured, key=lambda name: measured[name]["value"])
    rivals = [name for name, row in measured.items() if row["interval"][1] >= measured[best]["interval"][0]]
    words = metric.replace("_", " ")
    yield element(
        "p",
        element("strong", f"{best} is best: {words} {measured[best]['value']:.4f}", class_="good"),
        f" on {measured[best]['n']:,} test rows; "
        + (f"within its interval: {', '.join(r for r in rivals if r != best)}." if len(rivals) > 1 else "by a margin."),
        class_="verdict",
    )
    bars = [
        Bar(name, row["value"], f"{row['value']:.4f}", "a" if row.get("seconds") else "c", *row["interval"])
        for name, row in measured.items()
    ]
    quality = draw_intervals(words, bars, words)
    figures = [write_figure("Quality on the test rows", quality, "95 % intervals; grey: no training")]
    for key, title, unit, form in _COSTS:
        costs = [
            Bar(name, row[key] / unit, form.format(row[key] / unit), "a")
            for name, row in methods.items()
            if row.get(key) is not None
        ]
        if costs:
            figures.append(write_figure(title[0].upper() + title[1:], draw_bars(title, [("", costs)])))
    yield element("h2", "What each method bought, and what it cost")
    yield element("div", *figures, class_="figures")
    yield element("h2", "All numbers")
    headings, rows = list_comparison({"metric": metric, "methods": methods})
    yield element("div", render_table(headings, rows), class_="wide")
    for name, row in methods.items():
        if row.get("failed"):
            yield element("p", f"{name} was not released: {row['failed']}.", class_="bad")
