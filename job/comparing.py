"""`job compare`: one recipe tuned by several methods on the same rows and seeds, and one report of what each bought.

Every method that trains is a run of its own, `<id>-<method>`, with all that a run has: checkpoints, gates, a release
that nobody follows until somebody promotes it. What is committed is skipped, so a comparison that was killed goes on
where it stopped. Methods that do not train are baselines of the first run. A method that ends with a verdict on the
model itself (14, 15) is told in the report; any other end is the comparison's.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from job.errors import Diverged, GateFailed, JobError, RecipeError
from job.launch import Place
from job.opening import run_node
from job.recipe import Recipe, Run, write_json
from job.report import render_comparison
from job.report.result import hide_paths
from job.store import RunStore
from job.tasks import get_task

log = logging.getLogger("job.pipeline")

Row = dict[str, Any]
"""Of one method: {value, interval, n, trainable_parameters, seconds, …}; what does not apply is None."""

_TRAINED = re.compile(r"full|partial(:(?P<unfreeze>head|last-[1-9][0-9]*-layers))?|lora(:(?P<r>[1-9][0-9]*))?")
_TOLD = (Diverged.exit_code, GateFailed.exit_code)


class Comparison(NamedTuple):
    """What is compared: all `methods` in the order asked for, and the `recipes` of those that train."""

    methods: list[str]
    recipes: dict[str, Recipe]


def plan_comparison(recipe: Recipe, methods: Sequence[str]) -> Comparison:
    """Return what the words after `--methods` mean; raise RecipeError (10) naming one that is none.

    full, partial, partial:last-2-layers, lora, lora:16 are trained; anything else is a baseline of the recipe's task.
    """
    trained = [method for method in methods if _TRAINED.fullmatch(method)]
    baselines = [method for method in methods if method not in trained]
    if not trained or len(set(methods)) < len(methods):
        raise RecipeError(
            f"--methods: {','.join(methods)!r} names "
            + ("a method twice" if trained else "no method that trains; add full, partial or lora")
        )
    recipes: dict[str, Recipe] = {}
    for method in trained:
        first = not recipes
        recipes[method] = _change(recipe, _describe_tuning(recipe, method), baselines if first else [])
    return Comparison(list(methods), recipes)


def _describe_tuning(recipe: Recipe, method: str) -> dict[str, Any]:
    """Return the section `tuning` of a method: the recipe's own where it has the same, with what the word adds."""
    name, found = method.partition(":")[0], _TRAINED.fullmatch(method)
    own = recipe.tuning.model_dump(mode="json", exclude_unset=True)
    section = own if recipe.tuning.method == name else {key: own[key] for key in own if key == "shots"}
    added = {key: value for key, value in (found.groupdict() if found else {}).items() if value is not None}
    return section | {"method": name} | added


def _change(recipe: Recipe, tuning: dict[str, Any], baselines: list[str]) -> Recipe:
    about = recipe.model_dump(mode="json", exclude_unset=True)
    about |= {"tuning": tuning, "baselines": baselines}
    about["release"] = {"promote_if": "never"}
    about["export"] = about.get("export", {}) | {"latency": False}  # the page has what the gate measures
    about["store"] = about["store"] | {"keep_releases": None}
    try:
        return Recipe.model_validate(about)
    except ValidationError as error:
        first = error.errors()[0]
        raise RecipeError(f"--methods: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def compare_methods(comparison: Comparison, run_id: str, work: Path, place: Place) -> dict[str, Any]:
    """Run what is not committed yet, write the report, return the result: {status, exit_code, reason, methods, report}.

    The report goes to the prefix of the comparison's own id, and to the work folder.
    """
    if place.nodes > 1:
        raise RecipeError(f"job compare: runs on one node, this is one of {place.nodes}; compare there, run here")
    rows: dict[str, Row] = {}
    metric = get_task(next(iter(comparison.recipes.values())).kind).metric
    for method, recipe in comparison.recipes.items():
        name = f"{run_id}-{re.sub('[^a-z0-9]+', '-', method)}"
        log.info("method %s: run %s", method, name)
        result = run_node(recipe, name, work, False, place)
        if result["exit_code"] not in (0, *_TOLD):
            reason = f"method {method}: {result['reason']}"
            return {"run_id": run_id, "status": result["status"], "exit_code": result["exit_code"], "reason": reason}
        rows |= dict(_list_rows(method, result, metric))
    missing: Row = {"value": None, "interval": None, "failed": "the run that was to measure it did not get so far"}
    ordered = {method: rows.get(method, missing) for method in comparison.methods}
    if all(row["value"] is None for row in ordered.values()):
        reason = next(row["failed"] for row in rows.values() if row.get("failed"))
        return {"run_id": run_id, "status": "failed", "exit_code": Diverged.exit_code, "reason": reason}
    return _report(comparison, run_id, work, {"metric": metric, "methods": ordered})


def _list_rows(method: str, result: dict[str, Any], metric: str) -> Iterator[tuple[str, Row]]:
    """Yield the baselines that a run has measured, then the run itself."""
    metrics = result.get("metrics", {})
    for name, scores in metrics.get("baselines", {}).items():
        yield name, _describe_scores(scores, metric)
    train, int8 = result.get("train", {}), result.get("int8", {})
    row = _describe_scores(metrics["test"], metric) if "test" in metrics else {"value": None, "interval": None}
    keys = ("trainable_parameters", "seconds", "steps", "peak_memory_bytes", "checkpoint_bytes", "tokens_per_second")
    row |= {key: train.get(key) for key in keys}
    row["ms_per_row"] = result.get("onnx", {}).get("fp32", {}).get("ms_per_row")
    row["ms_per_row_int8"] = next((each["ms_per_row"] for each in int8.values() if each["accepted"]), None)
    row |= {"release": result["release"], "failed": result["reason"] if result["exit_code"] else None}
    yield method, row


def _describe_scores(scores: dict[str, Any], metric: str) -> Row:
    return {"value": scores[metric], "interval": scores[f"{metric}_interval"], "n": scores["n"]}


def _report(comparison: Comparison, run_id: str, work: Path, found: dict[str, Any]) -> dict[str, Any]:
    recipe = next(iter(comparison.recipes.values()))
    folder = work.absolute() / "compare" / run_id
    write_json(folder / "compare.json", hide_paths(found))
    (folder / "compare.html").write_text(render_comparison(recipe, run_id, found), encoding="utf-8")
    store = RunStore.of(Run(run_id, recipe, work))
    told = {"report": f"{store.uri}/compare.html"}
    try:
        for name in ("compare.json", "compare.html"):
            store.upload_report(folder / name, name)
    except JobError as error:
        log.warning("%s; the report lies in %s alone", error, folder)
        told = {"report": str(folder / "compare.html")}
    return {"run_id": run_id, "status": "compared", "exit_code": 0, "reason": "", **told, **found}
