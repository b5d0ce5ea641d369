"""Tables of the report: quality, exports, parity, latency, training, attempts, data."""

from __future__ import annotations

from typing import Any

from job.report.markup import Html, element, escape, isolate, render_table
from job.report.plots import Numbers, list_confused, name_export
from job.report.result import list_other_scores

_SHOWN_WEIGHTS = 20


def render_quality(numbers: Numbers) -> Html:
    """Return the scores of baselines and model on the test rows."""
    metric, metrics = numbers.metric, numbers.result["metrics"]
    scores = {**metrics["baselines"], "fine-tuned": metrics["test"]}
    others = list_other_scores(metrics["test"], metric)
    rows = [
        [
            {"untrained": "before training"}.get(name, name),
            f"{each[metric]:.4f}",
            "{:.3f} – {:.3f}".format(*each[f"{metric}_interval"]),
            *(f"{each[key]:.4f}" for key in others),
        ]
        for name, each in scores.items()
    ]
    return render_table(["model", numbers.words, "95 % interval", *(key.replace("_", " ") for key in others)], rows)


def render_exports(numbers: Numbers) -> Html:
    """Return the ONNX files, what they lose and what became of each."""
    fp32 = numbers.result["onnx"]["fp32"]
    measured = [f"{fp32['ms_per_row']:.2f}", f"{fp32['size'] >> 20}"]
    rows: list[list[object]] = [["fp32", f"{fp32[numbers.metric]:.4f}", "1.0000", "", *measured, "equals torch"]]
    verdicts = {
        True: element("span", "accepted", class_="good"),
        False: element("span", "left out", class_="bad"),
        None: "not judged on this processor",
    }
    for target, each in numbers.result["int8"].items():
        values: list[object] = [""] * 5
        if each["metric"] is not None:
            drop = f"{each['drop']:+.4f} ({each['drop_bound']:+.4f})"
            speed = f"{each['ms_per_row']:.2f}" if each["ms_per_row"] else ""
            values = [f"{each['metric']:.4f}", f"{each['agreement']:.4f}", drop, speed, f"{each['size'] >> 20}"]
        rung = element("small", each["rung"]) if each["rung"] else Html()
        rows.append([escape(name_export(target)) + rung, *values, verdicts[each["accepted"]]])
    headings = ["file", numbers.words, "agreement", "drop (95 % bound)", "ms/row", "MiB", "verdict"]
    processors = sorted({each["measured_on"] for each in numbers.result["int8"].values() if each["measured_on"]})
    note = element("p", f"Measured on {', '.join(processors)}.", class_="soft") if processors else Html()
    return render_table(headings, rows) + note


def render_parity(record: dict[str, Any]) -> Html:
    """Return how far ONNX fp32 is from torch, by length, and the rows that differ most."""
    rows = [
        [f"≤ {cell['tokens']}", cell["n"], f"{cell['max_abs_logit_diff']:.1e}", f"{cell['agreement']:.4f}"]
        for cell in record.get("by_length", [])
    ]
    worst = ", ".join(f"{entry['row']} ({entry['difference']:.1e})" for entry in record["worst"])
    headings = ["tokens of the row", "answers", "largest difference", "agreement"]
    return render_table(headings, rows) + element("p", f"Test rows that differ most: {worst}.", class_="soft")


def render_latency(cells: list[dict[str, Any]]) -> Html:
    """Return milliseconds by batch, length and threads; nothing where the recipe wanted none."""
    if not cells:
        return Html()
    names, rows = list(cells[0]["ms"]), []
    for cell in cells:
        threads = "1 thread" if cell["threads"] == 1 else "all threads"
        numbers = (f"{cell['ms'][name]:.4g}" if name in cell["ms"] else "" for name in names)
        rows.append([f"{_name_work(cell)}, {threads}", *numbers])
    note = "Milliseconds for a batch, a real row (sorted, in batches of 16), or a token. Fastest of several turns."
    return render_table(["batch × length", *names], rows) + element("p", note, class_="soft")


def _name_work(cell: dict[str, Any]) -> str:
    if "written" in cell:
        return f"a token of {cell['written']} written one by one"
    return f"a row of {cell['rows']} real ones" if "rows" in cell else f"{cell['batch']} × {cell['tokens']} tokens"


def render_training(record: dict[str, Any]) -> Html:
    """Return which step's model it is, why training ended, and what the labels weighed; nothing where all is usual."""
    steps, chosen, early = record["steps"], record.get("model_step"), record.get("stopped_by") == "early stopping"
    end = f"Early stopping ended the training after step {steps:,}. " if early else ""
    if chosen not in (None, steps):
        end += f"The model is that of step {chosen:,}, the best of those that were evaluated on the validation rows."
    return (element("p", end) if end else Html()) + _list_weights(record)


def _list_weights(record: dict[str, Any]) -> Html:
    weights = record.get("class_weights") or {}
    shown = sorted(weights.items(), key=lambda item: -item[1])[:_SHOWN_WEIGHTS]
    words = [part for name, weight in shown for part in (", ", isolate(name), f" {weight:.3g}")][1:]
    more = f" and {len(weights) - len(shown)} more" if len(weights) > len(shown) else ""
    return element("p", "What a label counts in the loss: ", *words, f"{more}.") if weights else Html()


def render_attempts(record: dict[str, Any]) -> Html:
    """Return what was begun, ended and resumed when; nothing where one attempt did it all."""
    attempts = record.get("attempts", [])
    if len(attempts) < 2:
        return Html()
    rows = [
        [
            each["epoch"],
            each["began"][:19].replace("T", " "),
            f"step {each['resumed_from']}" if each["resumed_from"] else "the beginning",
            _describe_end(each, last=each is attempts[-1]),
        ]
        for each in attempts
    ]
    return element("h3", "Attempts") + render_table(["attempt", "began (UTC)", "from", "ended"], rows)


def _describe_end(attempt: dict[str, Any], last: bool) -> str:
    if last:
        return "finished the training"
    if attempt["exit_code"] is None:
        return "killed without a word"
    words = {75: "stopped with a checkpoint", 76: "gave way to a newer one", 0: "finished"}
    return f"{attempt['ended'][11:19]}: {words.get(attempt['exit_code'], 'exit code ' + str(attempt['exit_code']))}"


def render_data(data: dict[str, Any]) -> Html:
    """Return rows by split, and what was set aside."""
    note = (
        f"Bad rows set aside: {_list_counts(data['set_aside'])}; rows that stand in a later split too, left out: "
        f"{_list_counts(data['leaked'])}."
    )
    return render_table(["split", "rows"], data["rows"].items()) + element("p", note)


def _list_counts(counts: dict[str, Any]) -> str:
    return ", ".join(f"{split} {count}" for split, count in counts.items()) or "none"


def render_confused(confusion: dict[str, Any]) -> Html:
    """Return the most confused pairs of labels as a table."""
    labels = confusion["labels"]
    rows = [
        [isolate(labels[true]), isolate(labels[said]), count] for true, said, count in list_confused(confusion["cells"])
    ]
    return render_table(["true label", "said", "test rows"], rows)


def render_mistakes(mistakes: list[dict[str, Any]], labels: list[str]) -> Html:
    """Return the texts of rows that were answered wrongly with the most confidence."""
    items = []
    for each in mistakes:
        texts = [element("blockquote", each[part], dir="auto") for part in ("text", "pair") if part in each]
        true, said = isolate(labels[each["true"]]), isolate(labels[each["said"]])
        sure = f" with probability {each['probability']:.3f}"
        items.append(element("li", *texts, element("small", f"row {each['row']}: true ", true, ", said ", said, sure)))
    return element("ol", *items, class_="mistakes") if items else element("p", "None of the test rows.")
