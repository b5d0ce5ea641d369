"""Other texts, formats, label spellings, encoders and stores work by changing the recipe alone."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest
from conftest import Answer, MakeModel, call_job, write_recipe

from job.store import open_store


def run(recipe: dict[str, Any], folder: Path) -> Answer:
    path = write_recipe(folder / "recipe.yaml", **recipe)
    answer = call_job("run", str(path), "--work-dir", str(folder / "work"))
    assert answer.code == 0, answer.stderr
    return answer


def test_tweets_in_json_lines_with_numbered_labels_and_names(
    recipe: dict[str, Any], assets: Path, tmp_path: Path
) -> None:
    recipe["data"] = {
        "source": str(assets / "tweets" / "all.jsonl"),
        "labels": ["bad", "good"],
        "test": 0.2,
        "validation": 0.1,
    }
    recipe["data"]["limit"] = 256
    result = run(recipe, tmp_path).result
    answer = call_job("predict", result["release"], "lovely", "--work-dir", str(tmp_path / "work"))
    assert set(json.loads(answer.stdout)["scores"]) == {"bad", "good"}


def test_three_classes_from_a_tsv_with_other_column_names(
    recipe: dict[str, Any], tmp_path: Path, reviews: Path
) -> None:
    with (reviews / "train.csv").open(encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)][:300]
    with (tmp_path / "rows.tsv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["body", "stars"])
        writer.writerows([text, random.Random(text).choice(["low", "mid", "high"])] for text in texts)
    recipe["data"] = {"source": str(tmp_path / "rows.tsv"), "columns": {"text": "body", "label": "stars"}, "test": 0.3}
    result = run(recipe, tmp_path).result
    answer = call_job("predict", result["release"], "fine", "--work-dir", str(tmp_path / "work"))
    assert set(json.loads(answer.stdout)["scores"]) == {"low", "mid", "high"}


@pytest.mark.parametrize("kind", ["distilbert", "roberta"])
def test_other_encoders_export_and_agree(
    recipe: dict[str, Any], make_model: MakeModel, tmp_path: Path, kind: str
) -> None:
    recipe["model"]["id"] = str(make_model(kind, max_position_embeddings=66))
    result = run(recipe, tmp_path).result
    assert result["onnx"]["agreement"] == 1.0


def test_a_release_is_a_model_to_start_from_and_its_label_order_is_kept(
    recipe: dict[str, Any], tmp_path: Path, reviews: Path
) -> None:
    recipe["data"] |= {"labels": ["positive", "negative"]}
    first = run(recipe, tmp_path).result
    model = first["release"].rpartition("/")[0]
    second = {**recipe, "name": "second", "model": {"id": first["release"]}}
    second["data"] = {"source": str(reviews), "max_length": 64}
    again = run(second, tmp_path).result
    config = json.loads(open_store(again["release"]).read("config.json").data)  # type: ignore[union-attr]
    assert config["id2label"] == {"0": "positive", "1": "negative"}
    assert again["metrics"]["test"]["n"] == 200
    assert open_store(model).read("current.json")


def test_data_and_model_may_lie_in_the_store(
    recipe: dict[str, Any], s3: str, tmp_path: Path, reviews: Path, tiny_model: Path
) -> None:
    store = open_store(f"{s3}/inputs")
    for split in ("train", "test"):
        store.upload(reviews / f"{split}.csv", f"reviews/{split}.csv")
    for path in tiny_model.iterdir():
        store.upload(path, f"tiny/{path.name}")
    recipe["model"]["id"], recipe["data"]["source"] = f"{s3}/inputs/tiny", f"{s3}/inputs/reviews"
    recipe["store"]["uri"] = f"{s3}/elsewhere"
    assert run(recipe, tmp_path).result["release"].startswith(f"{s3}/elsewhere/models/tiny/")


def test_bad_rows_within_the_limit_are_set_aside_and_counted(
    recipe: dict[str, Any], tmp_path: Path, reviews: Path
) -> None:
    with (reviews / "train.csv").open(encoding="utf-8", newline="") as file:
        rows = [(row["text"], row["label"]) for row in csv.DictReader(file)]
    source = tmp_path / "rows.csv"
    with source.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows, (" ", "positive"), ("a\x00b", "negative"), ("x", "")])
    recipe["data"] = {"source": str(source), "test": 0.3, "max_bad_fraction": 0.01}
    recipe["data"]["max_length"] = 64
    result = run(recipe, tmp_path).result
    about = json.loads((tmp_path / "work" / "runs" / result["run_id"] / "data.json").read_text())
    assert about["set_aside"] == {"train": 3}
    assert sum(about["rows"].values()) == len(rows)


def test_a_text_that_reads_na_is_a_text(recipe: dict[str, Any], tmp_path: Path, reviews: Path) -> None:
    with (reviews / "train.csv").open(encoding="utf-8", newline="") as file:
        rows = [(row["text"], row["label"]) for row in csv.DictReader(file)]
    source = tmp_path / "rows.csv"
    with source.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(
            [("text", "label"), *rows, ("NA", "negative"), ("null", "negative"), ("1984", "positive")]
        )
    recipe["data"] = {"source": str(source), "test": 0.3, "max_length": 64}
    run(recipe, tmp_path)
