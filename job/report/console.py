"""What a person sees in the terminal: the closing table of a run, the listing of a store."""

from __future__ import annotations

import io
import os
import shlex
import shutil
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from job.errors import redact
from job.recipe import Recipe
from job.report.result import list_other_scores
from job.report.versus import list_comparison
from job.streams import escape_controls

_EXAMPLE = "I am absolutely amazed with this new and revolutionary AI device"


def format_result(result: dict[str, Any], recipe: Recipe | None = None) -> str:
    """Return tables of quality, exports and places, as stderr can show them; without metrics, the reason alone."""
    shown = io.StringIO()
    terminal = Console(stderr=True, width=None if sys.stderr.isatty() else 120)
    colours: dict[str, Any] = {"force_terminal": terminal.is_terminal, "color_system": terminal.color_system}
    console = Console(file=shown, highlight=False, width=terminal.width, **colours)
    console.print()
    if "metrics" in result:
        console.print(_quality_table(result))
    if "int8" in result:
        console.print(_export_table(result, _find_metric(result)))
    for name, value in _list_places(result, recipe):
        console.print(f"[bold]{name:<9}[/]", end="")
        console.print(value, markup=False, soft_wrap=True)  # one line, so that it can be copied
    colour = "green" if result["exit_code"] == 0 else "red"
    console.print(f"[bold {colour}]{result['status']}[/] (exit code {result['exit_code']})", end=" ")
    console.print(_say_why(result), markup=False, soft_wrap=True)
    return shown.getvalue()


def format_comparison(result: dict[str, Any]) -> str:
    """Return the table of `job compare` as stderr can show it."""
    shown = io.StringIO()
    width = None if sys.stderr.isatty() else 160
    console = Console(file=shown, highlight=False, width=Console(stderr=True, width=width).width)
    if "methods" in result:
        headings, rows = list_comparison(result)
        table = Table(title="What each method bought, and what it cost", title_justify="left")
        for heading in headings:
            table.add_column(heading, justify="left" if heading == "method" else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        console.print(f"report   {result['report']}", markup=False, soft_wrap=True)
    console.print(f"{result['status']} (exit code {result['exit_code']}) {_say_why(result)}", markup=False)
    return shown.getvalue()


def _say_why(result: dict[str, Any]) -> str:
    """Return the reason of a result, which may quote what other machines have written."""
    return escape_controls(redact(result["reason"]))


def _find_metric(result: dict[str, Any]) -> str:
    """Return the name of the task's metric: the one that has an interval."""
    suffix = "_interval"
    return next(key.removesuffix(suffix) for key in result["metrics"]["test"] if key.endswith(suffix))


def _quality_table(result: dict[str, Any]) -> Table:
    metric = _find_metric(result)
    others = list_other_scores(result["metrics"]["test"], metric)
    table = Table(title=f"What the training bought ({result['metrics']['test']['n']} test rows)", title_justify="left")
    for heading in ("model", metric, "95 % interval", *others):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    rows = {**result["metrics"]["baselines"], "fine-tuned": result["metrics"]["test"]}
    for name, scores in rows.items():
        low, high = scores[f"{metric}_interval"]
        style = "bold" if name == "fine-tuned" else ""
        shown = {"untrained": "before training"}.get(name, name)
        values = (f"{scores[key]:.4f}" for key in others)
        table.add_row(shown, f"{scores[metric]:.4f}", f"{low:.3f} – {high:.3f}", *values, style=style)
    return table


def _export_table(result: dict[str, Any], metric: str) -> Table:
    table = Table(title="The ONNX exports, on the same rows", title_justify="left")
    for heading in ("file", metric, "agreement", "drop (95 % bound)", "size", "ms/row", "speed", "verdict"):
        table.add_column(heading, justify="left" if heading in ("file", "verdict") else "right")
    fp32 = result["onnx"]["fp32"]
    table.add_row(
        "fp32", f"{fp32[metric]:.4f}", f"{result['onnx']['agreement']:.4f}", "", _mib(fp32["size"]),
        f"{fp32['ms_per_row']:.2f}", "1.0×", "equals torch",
    )  # fmt: skip
    for target, numbers in result["int8"].items():
        if numbers["metric"] is None:
            why = "not judged on this processor" if numbers["accepted"] is None else "[red]left out: nothing runs[/]"
            table.add_row(f"int8 {target}", *[""] * 6, why)
            continue
        table.add_row(
            f"int8 {target}", f"{numbers['metric']:.4f}", f"{numbers['agreement']:.4f}",
            f"{numbers['drop']:+.4f} ({numbers['drop_bound']:+.4f})", _mib(numbers["size"]),
            *([f"{numbers['ms_per_row']:.2f}", f"{numbers['speedup']:.1f}×"] if numbers["speedup"] else ["", ""]),
            "[green]accepted[/]" if numbers["accepted"] else "[red]left out[/]",
        )  # fmt: skip
    return table


def spell_question(recipe: Recipe | None, text: str, other: str) -> str:
    """Return the words after `job predict MODEL` that ask a model of a recipe's kind about a text, or two."""
    columns: Collection[str] = recipe.data.columns if recipe else ()
    if "question" in columns or "text_pair" in columns:
        first, second = (other, text) if "question" in columns else (text, other)
        return rf"--pairs $'{first}\t{second}'"
    if recipe and recipe.task == "masked-lm":
        text += " [MASK]"
    return f'--chat "{text}"' if "messages" in columns else f'"{text}"'


def _list_places(result: dict[str, Any], recipe: Recipe | None) -> list[tuple[str, str]]:
    """Return where everything lies, and the command to ask the model something."""
    if not result["release"]:
        return []
    store, _, name = result["release"].rpartition("/")[0].rpartition("/models/")
    pointer = "points to it" if result["promoted"] else "was not moved"
    question = spell_question(recipe, _EXAMPLE, "What amazes me?")
    command = f"{_how_called()} predict {shlex.quote(result['release'])} {question}"
    return [
        ("release", result["release"]),
        ("current", f"{store}/models/{name}  ({pointer})"),
        ("run", f"{store}/runs/{result['run_id']}  (checkpoints, stage records, report.html)"),
        ("ask it", command),
    ]


def _how_called() -> str:
    """The words that call this program here: with the embedded server in front where it is what answers."""
    if Path(sys.argv[0]).name == "__main__.py":
        program = "python -m job"
    else:
        program = "job" if shutil.which("job") else shlex.quote(os.path.relpath(sys.argv[0]))
    return f"{program} s3 -- {program}" if os.environ.get("JOB_EMBEDDED_S3") else program


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB"


def print_listing(title: str, headings: list[str], rows: list[list[str]]) -> None:
    """Print one table to stdout; on a pipe, plain tab-separated lines."""
    rows = [[escape_controls(cell).replace("\n", r"\n") for cell in row] for row in rows]
    if not sys.stdout.isatty():
        for row in rows:
            print("\t".join(row))
        return
    table = Table(title=Text(escape_controls(title), style="table.title"), title_justify="left")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console(highlight=False).print(table)
