"""report.html: one self-contained file without scripts, readable offline, on a phone and in print."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from job.recipe import Run
from job.report import tables
from job.report.markup import Html, element
from job.report.plots import MATRIX_LABELS, Numbers, Plot, name_export
from job.report.result import hide_paths
from job.report.style import write_page_style

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""No browser runs a script of this page or asks anybody for anything, whatever got into it."""
_UNDECIDED = "Whether it became the current release was decided after this page was written: "
_PROMOTION = element("p", _UNDECIDED, element("code", "job release list"), " tells.", class_="soft")


def render_page(run: Run, numbers: Numbers, plots: dict[str, Plot]) -> Html:
    """Return the report of a run as HTML that an XML parser reads as well."""
    name = run.recipe.name
    intro = [element("h1", name), element("small", f"{run.recipe.task}, run {run.run_id}")]
    return write_document(f"{name}: report", *intro, *_list_sections(run, numbers, plots))


def write_document(title: str, *content: object) -> Html:
    """Return a whole page in the style of all pages, which no reader's browser has to fetch anything for."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width,initial-scale=1"),
        element("title", title),
        element("style", Html(write_page_style())),
    )
    body = element("body", element("main", *content))
    return Html(f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n")


def write_figure(title: str, svg: Html, caption: str = "") -> Html:
    """Return a chart below its title, and what to know about it."""
    return element("figure", element("h3", title), svg, element("figcaption", caption) if caption else "")


def tell_promotion(page: str, promotion: dict[str, Any]) -> str:
    """Return the page with what became of the release, in place of the sentence that it is not known yet."""
    words = "It became the current release" if promotion["promoted"] else "It did not become the current release"
    return page.replace(_PROMOTION, element("p", f"{words}: {promotion['reason']}.", class_="soft"))


def _list_sections(run: Run, numbers: Numbers, plots: dict[str, Plot]) -> Iterator[Html]:
    records, found = numbers.records, numbers.analysis
    yield _render_verdict(numbers)
    yield _render_tiles(numbers)
    yield element("h2", "Quality")
    yield _show(plots, "quality", beside=tables.render_quality(numbers))
    yield element("h2", "Exports")
    yield element("div", tables.render_exports(numbers), class_="wide")
    parity = element("h3", "ONNX fp32 against torch") + tables.render_parity(records["export"])
    yield _show(plots, "exports", beside=parity)
    if latency := tables.render_latency(records["quantize"].get("latency", [])):
        yield element("h3", "Latency") + latency
    if "confusion" in found:
        yield element("h2", "Answers on the test rows")
        yield _show(plots, "confusion", "calibration")
        if 2 < len(found["confusion"]["labels"]) <= MATRIX_LABELS:
            yield element("h3", "Most confused labels") + tables.render_confused(found["confusion"])
        yield element("h3", "Wrong with the most confidence")
        yield tables.render_mistakes(found["mistakes"], found["confusion"]["labels"])
    yield element("h2", "Training")
    yield _show(plots, "loss", "validation", "learning_rate", "gradient_norm", "throughput")
    yield tables.render_training(records["train"])
    yield tables.render_attempts(records["train"])
    yield element("h2", "Data")
    yield _show(plots, "lengths", beside=tables.render_data(run.read("data.json")))
    yield element("h2", "Recipe")
    text = yaml.safe_dump(hide_paths(run.recipe.model_dump(mode="json")), sort_keys=False, allow_unicode=True)
    yield element("pre", text)


def _show(plots: dict[str, Plot], *names: str, beside: Html | None = None) -> Html:
    """Return the plots that there are, two in a row where the page is wide, and what is to stand beside them."""
    shown = (plots[name] for name in names if name in plots)
    figures = [write_figure(plot.title, plot.svg, plot.caption) for plot in shown]
    others = [element("div", beside)] if beside else []
    return element("div", *figures, *others, "", class_="figures")


def _render_verdict(numbers: Numbers) -> Html:
    """Say what passed, and what the training bought against the best baseline."""
    onnx, int8 = numbers.result["onnx"], numbers.result["int8"]
    passed = [target for target, each in int8.items() if each["accepted"]]
    files = " and ".join(["fp32", *map(name_export, passed)])
    words = (
        f"Every gate passed: released as {files}" if passed else "Released as fp32 alone: no int8 file passed its gate"
    )
    verdict = element("strong", words, class_="good" if passed else "bad")
    proof = f"; ONNX fp32 gives torch's answers on all {onnx['n']:,} test rows. " if onnx["agreement"] == 1 else ". "
    sentences = element("p", verdict, proof, _describe_gain(numbers), class_="verdict")
    return sentences + _PROMOTION


def _describe_gain(numbers: Numbers) -> str:
    metric, metrics = numbers.metric, numbers.result["metrics"]
    test, baselines = metrics["test"], metrics["baselines"]
    if not baselines:
        return ""
    best = max(baselines, key=lambda name: baselines[name][metric])
    gain = test[metric] - baselines[best][metric]
    apart = test[f"{metric}_interval"][0] > baselines[best][f"{metric}_interval"][1]
    certainty = "the 95 % intervals are apart" if apart else "the 95 % intervals overlap"
    return (
        f"Fine-tuning bought {gain:+.4f} {numbers.words} over the best baseline, {best}: {baselines[best][metric]:.4f} "
        f"→ {test[metric]:.4f}; {certainty}."
    )


def _render_tiles(numbers: Numbers) -> Html:
    result, metric = numbers.result, numbers.metric
    low, high = result["metrics"]["test"][f"{metric}_interval"]
    tiles = [(f"{result['metrics']['test'][metric]:.4f}", f"{numbers.words} on test ({low:.3f} – {high:.3f})")]
    accepted = [each for each in result["int8"].values() if each["accepted"] and each["speedup"]]
    if accepted:
        fastest = max(accepted, key=lambda each: each["speedup"])
        tiles.append((f"{fastest['speedup']:.1f}×", "as fast as fp32, the fastest int8 file"))
        tiles.append((f"{fastest['size_ratio']:.0%}", "of the size of fp32"))
    train = result["train"]
    minutes, seconds = divmod(round(train["seconds"]), 60)
    ranks = f"{train['world_size']} rank{'s' if train['world_size'] > 1 else ''}"
    when = "in the last attempt" if train["resumed_from"] else "of training"
    tiles.append((f"{minutes}:{seconds:02}", f"minutes {when}, {train['steps']:,} steps"))
    tiles.append((f"{train['tokens_per_second']:,}", f"tokens per second on {ranks}, {train['precision']}"))
    return element(
        "div", *(element("div", element("b", n), element("small", w), class_="tile") for n, w in tiles), class_="tiles"
    )
