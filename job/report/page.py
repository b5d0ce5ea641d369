"""report.html: one self-contained file, readable offline, on a phone and in print."""

from __future__ import annotations

import html
from typing import Any

import yaml

from job.recipe import Run
from job.report.result import hide_paths, list_other_scores
from job.tasks import get_task

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1c2330}
h1{margin-bottom:0}h2{margin-top:2rem}table{border-collapse:collapse;display:block;overflow-x:auto}
td,th{padding:.3rem .8rem;border-bottom:1px solid #d8dde6;text-align:right;white-space:nowrap}
td:first-child,th:first-child{text-align:left}pre{background:#f4f6f9;padding:1rem;overflow-x:auto}
.bar{display:inline-block;height:.4rem;background:#2f6fde;-webkit-print-color-adjust:exact;print-color-adjust:exact}
svg{width:100%;height:auto;max-width:46rem}.ok{color:#17803d}.no{color:#b3261e}small{color:#5b6675}
@media(prefers-color-scheme:dark){body{background:#14181f;color:#e4e8ee}td,th{border-color:#333b47}pre{background:#1d232c}}
"""

_WIDTH, _HEIGHT, _MARGIN = 640, 220, 44


def render_page(run: Run, records: dict[str, Any], result: dict[str, Any]) -> str:
    """Return the report of a run as HTML, with its curves as inline SVG."""
    history = records["train"].get("history", [])
    metric = get_task(run.recipe.kind).metric
    parts = [
        f"<h1>{html.escape(run.recipe.name)}</h1><small>run {html.escape(run.run_id)}</small>",
        "<h2>Quality on test</h2>", _quality(result, metric),
        "<h2>Exports</h2>", _exports(result, metric),
        "<h2>ONNX fp32 against torch</h2>", _parity(records["export"]),
        "<h2>Latency</h2>", _latency(records["quantize"].get("latency", [])),
        "<h2>Training loss</h2>", draw_curve([(e["step"], e["loss"]) for e in history if "loss" in e], "loss"),
        f"<h2>Validation {metric.replace('_', ' ')}</h2>",
        draw_curve([(e["step"], e[f"eval_{metric}"]) for e in history if f"eval_{metric}" in e], metric),
        "<h2>Data</h2>", _data(run),
        "<h2>Recipe</h2>", _recipe(run),
    ]  # fmt: skip
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    title = f"<title>{html.escape(run.recipe.name)}</title>"
    return f"<!doctype html><html lang=en>{head}{title}<style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n"


def draw_curve(points: list[tuple[float, float]], name: str) -> str:
    """Return an SVG line through (step, value) points, with its range written at the axes."""
    points = [(x, y) for x, y in points if y == y and abs(y) != float("inf")]
    if len(points) < 2:
        return "<p>too few points to draw</p>"
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high = min(ys), max(ys)
    width, height = _WIDTH - 2 * _MARGIN, _HEIGHT - 2 * _MARGIN
    path = " ".join(
        f"{_MARGIN + (x - xs[0]) / max(xs[-1] - xs[0], 1) * width:.1f},"
        f"{_MARGIN + (1 - (y - low) / max(high - low, 1e-9)) * height:.1f}"
        for x, y in points
    )
    texts = [
        (2, _MARGIN, f"{high:.3g}"),
        (2, _HEIGHT - _MARGIN, f"{low:.3g}"),
        (_MARGIN, _HEIGHT - 12, f"step {xs[0]:g}"),
        (_WIDTH - _MARGIN - 40, _HEIGHT - 12, f"{xs[-1]:g}"),
    ]
    labels = "".join(f'<text x="{x}" y="{y}" font-size="13" fill="currentColor">{text}</text>' for x, y, text in texts)
    line = f'<polyline points="{path}" fill="none" stroke="#2f6fde" stroke-width="2"/>'
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{name} over steps">{line}{labels}</svg>'


def _table(headings: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _quality(result: dict[str, Any], metric: str) -> str:
    scores = {**result["metrics"]["baselines"], "fine-tuned": result["metrics"]["test"]}
    others = list_other_scores(scores["fine-tuned"], metric)
    rows = [
        [
            html.escape(name),
            f"{s[metric]:.4f}",
            "{:.3f} – {:.3f}".format(*s[f"{metric}_interval"]),
            *(f"{s[key]:.4f}" for key in others),
        ]
        for name, s in scores.items()
    ]
    return _table(["model", metric, "95 % interval", *others], rows)


def _exports(result: dict[str, Any], metric: str) -> str:
    fp32 = result["onnx"]["fp32"]
    rows = [["fp32", f"{fp32[metric]:.4f}", "1.0000", "", f"{fp32['ms_per_row']:.2f}", f"{fp32['size'] >> 20}", "", ""]]
    verdicts = {True: "<span class=ok>accepted</span>", False: "<span class=no>left out</span>", None: "not judged"}
    for target, n in result["int8"].items():
        numbers = ["", "", "", "", ""]
        if n["metric"] is not None:
            numbers = [f"{n['metric']:.4f}", f"{n['agreement']:.4f}", f"{n['drop']:+.4f} ({n['drop_bound']:+.4f})",
                       f"{n['ms_per_row']:.2f}" if n["ms_per_row"] else "", f"{n['size'] >> 20}"]  # fmt: skip
        rows.append(
            [f"int8 {target}<br><small>{n['rung']}</small>", *numbers, verdicts[n["accepted"]], n["measured_on"]]
        )
    return _table(["file", metric, "agreement", "drop (95 % bound)", "ms/row", "MiB", "verdict", "measured on"], rows)


def _parity(record: dict[str, Any]) -> str:
    """Tables by length and of the rows that differ most."""
    by_length = [
        [f"≤ {cell['tokens']}", str(cell["n"]), f"{cell['max_abs_logit_diff']:.1e}", f"{cell['agreement']:.4f}"]
        for cell in record.get("by_length", [])
    ]
    worst = ", ".join(f"{entry['row']} ({entry['difference']:.1e})" for entry in record["worst"])
    headings = ["tokens of the row", "answers", "largest difference", "agreement"]
    return _table(headings, by_length) + f"<p>Test rows that differ most: {worst}.</p>"


def _latency(cells: list[dict[str, Any]]) -> str:
    """A table of milliseconds, each cell with a bar as long as its share of the row's slowest."""
    names = list(cells[0]["ms"]) if cells else []
    rows = []
    for cell in cells:
        what = f"a row of {cell['rows']} real ones" if "rows" in cell else f"{cell['batch']} × {cell['tokens']} tokens"
        threads = "1 thread" if cell["threads"] == 1 else "all threads"
        slowest = max(cell["ms"].values())
        rows.append([f"{what}<br><small>{threads}</small>", *(_bar(cell["ms"].get(n), slowest) for n in names)])
    note = "<p>Milliseconds for a batch; lengths of real rows, sorted, in batches of 16. Fastest of several turns.</p>"
    return _table(["batch × length", *names], rows) + note


def _bar(value: float | None, slowest: float) -> str:
    if value is None:
        return ""
    return f"{value:.4g}<br><span class=bar style='width:{4 * value / slowest:.2f}rem'></span>"


def _recipe(run: Run) -> str:
    text = yaml.safe_dump(hide_paths(run.recipe.model_dump(mode="json")), sort_keys=False, allow_unicode=True)
    return f"<pre>{html.escape(text)}</pre>"


def _data(run: Run) -> str:
    data = run.read("data.json")
    rows = [[name, str(count)] for name, count in data["rows"].items()]
    note = (
        f"<p>{data['mean_tokens']} tokens a row on average, {data['truncated_share']:.1%} cut at {data['max_length']} "
        f"tokens; bad rows set aside: {html.escape(str(data['set_aside'] or 'none'))}; "
        f"rows that stand in a later split too: {html.escape(str(data['leaked'] or 'none'))}.</p>"
    )
    return _table(["split", "rows"], rows) + note
