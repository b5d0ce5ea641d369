"""What a person sees in the terminal: the closing table of a run, the listing of a store."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

_EXAMPLE = "I am absolutely amazed with this new and revolutionary AI device"


def print_result(result: dict[str, Any], metric: str = "accuracy") -> None:
    """Print tables of quality, exports and places to stderr; a result without metrics prints its reason."""
    console = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 110)
    console.print()
    if "metrics" in result:
        console.print(_quality_table(result, metric))
    if "int8" in result:
        console.print(_export_table(result, metric))
    if result["release"]:
        console.print(_places_table(result))
    colour = "green" if result["exit_code"] == 0 else "red"
    console.print(f"[bold {colour}]{result['status']}[/] (exit code {result['exit_code']})", end=" ")
    console.print(result["reason"], markup=False)


def _quality_table(result: dict[str, Any], metric: str) -> Table:
    table = Table(title=f"What the training bought ({result['metrics']['test']['n']} test rows)", title_justify="left")
    for heading in ("model", metric, "95 % interval", "macro F1"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    rows = {**result["metrics"]["baselines"], "fine-tuned": result["metrics"]["test"]}
    for name, scores in rows.items():
        low, high = scores[f"{metric}_interval"]
        style = "bold" if name == "fine-tuned" else ""
        shown = {"untrained": "before training"}.get(name, name)
        table.add_row(
            shown, f"{scores[metric]:.4f}", f"{low:.3f} – {high:.3f}", f"{scores['macro_f1']:.4f}", style=style
        )
    return table


def _export_table(result: dict[str, Any], metric: str) -> Table:
    table = Table(title="The ONNX exports, on the same rows", title_justify="left")
    for heading in ("file", metric, "agreement", "drop (95 % bound)", "size", "ms/row", "speed", "verdict"):
        table.add_column(heading, justify="left" if heading in ("file", "verdict") else "right")
    fp32 = result["onnx"]["fp32"]
    equal = f"= torch (Δ {result['onnx']['max_abs_logit_diff']:.0e})"
    table.add_row(
        "fp32", f"{fp32[metric]:.4f}", "1.0000", "", _mib(fp32["size"]), f"{fp32['ms_per_row']:.2f}", "1.0×", equal
    )
    for target, numbers in result["int8"].items():
        if numbers["accepted"] is None:
            table.add_row(f"int8 {target}", *[""] * 6, "not judged on this processor")
            continue
        table.add_row(
            f"int8 {target}", f"{numbers['metric']:.4f}", f"{numbers['agreement']:.4f}",
            f"{numbers['drop']:+.4f} ({numbers['drop_bound']:+.4f})", _mib(numbers["size"]),
            f"{numbers['ms_per_row']:.2f}", f"{numbers['speedup']:.1f}×",
            "[green]accepted[/]" if numbers["accepted"] else "[red]left out[/]",
        )  # fmt: skip
    return table


def _places_table(result: dict[str, Any]) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    model = result["release"].rpartition("/")[0]
    pointer = "" if result["promoted"] else "  (the pointer was not moved)"
    for name, value in (
        ("release", result["release"]),
        ("follows", model + pointer),
        ("run", f"{model.rpartition('/models/')[0]}/runs/{result['run_id']}"),
        ("ask it", f'job predict {result["release"]} "{_EXAMPLE}"'),
    ):
        table.add_row(f"[bold]{name}[/]", value)
    return table


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB"


def print_listing(title: str, headings: list[str], rows: list[list[str]]) -> None:
    """Print one table to stdout; on a pipe, plain tab-separated lines."""
    if not sys.stdout.isatty():
        for row in rows:
            print("\t".join(row))
        return
    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)
