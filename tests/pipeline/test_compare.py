"""`job compare`: several methods on the same rows, one report; it goes on where it was killed."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from conftest import Answer, assert_refused, call_job, write_recipe


def compare(recipe: dict[str, Any], folder: Path, methods: str, **env: str) -> Answer:
    path = write_recipe(folder / "recipe.yaml", **recipe)
    return call_job("compare", str(path), "--methods", methods, "--work-dir", str(folder / "work"), env=env)


@pytest.mark.slow
def test_methods_are_compared_on_the_same_rows_and_a_killed_comparison_goes_on(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    methods = "majority,few-shot:4,partial,lora:4,full"
    killed = compare(recipe, tmp_path, methods, JOB_FAILPOINT="release-files=kill@2")
    assert killed.code == -9, killed.stderr
    store = tmp_path / "store"
    runs = {path.name: path for path in (store / "runs").iterdir()}
    partial = next(path for name, path in runs.items() if name.endswith("-partial"))
    before = (partial / "stages" / "release.json").read_bytes()

    answer = compare(recipe, tmp_path, methods)
    assert answer.code == 0, answer.stderr
    assert (partial / "stages" / "release.json").read_bytes() == before, "what is committed is not done again"
    result = answer.result
    assert (result["status"], list(result["methods"])) == ("compared", methods.split(","))
    rows = result["methods"]
    assert {row["n"] for row in rows.values()} == {200}
    assert all(row["interval"][0] <= row["value"] <= row["interval"][1] for row in rows.values())
    weights = [rows[name]["trainable_parameters"] for name in ("partial", "lora:4", "full")]
    assert weights == sorted(weights) and weights[0] * 50 < weights[2]
    sizes = [rows[name]["checkpoint_bytes"] for name in ("partial", "lora:4", "full")]
    assert sizes == sorted(sizes)
    assert all(rows[name]["seconds"] > 0 and rows[name]["peak_memory_bytes"] > 1 << 26 for name in ("partial", "full"))
    assert not (store / "models" / "tiny" / "current.json").exists(), "nobody follows what was only compared"

    page = Path(result["report"]).read_text()
    assert "http://" not in page and "https://" not in page
    words = "".join(ET.fromstring(page.partition("\n")[2]).itertext())
    for name, row in rows.items():
        assert name in words and f"{row['value']:.4f}" in words
    told = json.loads(Path(result["report"]).with_name("compare.json").read_text())
    assert told["methods"].keys() == rows.keys()
    best = Path(rows["full"]["release"])
    promoted = call_job("release", "promote", str(best.parent), best.name)
    assert promoted.code == 0 and best.name in promoted.stdout


def test_a_comparison_that_cannot_be_is_refused_before_anything_runs(recipe: dict[str, Any], tmp_path: Path) -> None:
    for methods, word in (
        ("majority", "no method that trains"),
        ("full,full", "twice"),
        ("full,linear", "has 'linear'"),
        ("partial:head-2,full", "has 'partial:head-2'"),
    ):
        assert_refused(compare(recipe, tmp_path, methods), 10, word)
    assert not (tmp_path / "store").exists()
