"""Other texts, formats, label spellings, encoders and stores work by changing the recipe alone."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Answer, MakeModel, call_job, write_recipe
from made_up import write_questions, write_tagged

from job.store import open_store


def run(recipe: dict[str, Any], folder: Path, work: str = "work") -> Answer:
    path = write_recipe(folder / "recipe.yaml", **recipe)
    answer = call_job("run", str(path), "--work-dir", str(folder / work))
    assert answer.code == 0, answer.stderr
    return answer


def ask(release: str, text: str, folder: Path) -> dict[str, Any]:
    return dict(json.loads(call_job("predict", release, text, "--work-dir", str(folder / "work")).stdout))


def read_config(release: str) -> dict[str, Any]:
    blob = open_store(release).read("config.json")
    assert blob is not None
    return dict(json.loads(blob.data))


@pytest.mark.slow
def test_tweets_in_json_lines_with_numbered_labels_train_a_roberta(
    recipe: dict[str, Any], make_model: MakeModel, assets: Path, tmp_path: Path
) -> None:
    recipe["model"]["id"] = str(make_model("roberta", max_position_embeddings=66))
    recipe["data"] = {"source": str(assets / "tweets" / "all.jsonl"), "labels": ["bad", "good"], "limit": 256}
    recipe["data"] |= {"test": 0.2, "validation": 0.1}
    result = run(recipe, tmp_path).result
    assert result["onnx"]["agreement"] == 1.0
    assert set(ask(result["release"], "lovely", tmp_path)["scores"]) == {"bad", "good"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "task", "write"),
    [("modernbert", "question-answering", write_questions), ("llama", "token-classification", write_tagged)],
)
def test_a_head_that_optimum_does_not_list_is_exported_by_what_it_knows_of_the_body(
    recipe: dict[str, Any], make_model: MakeModel, tmp_path: Path, kind: str, task: str, write: Callable[..., Path]
) -> None:
    recipe["task"], recipe["baselines"] = task, []
    recipe["model"]["id"] = str(make_model(kind, max_position_embeddings=128))
    (tmp_path / "rows").mkdir()
    recipe["data"] = {"source": str(write(tmp_path / "rows", {"train": 120, "validation": 40, "test": 60}))}
    recipe["data"] |= {"validation": "validation", "max_length": 64}
    result = run(recipe, tmp_path).result
    assert result["onnx"]["agreement"] == 1.0
    assert open_store(result["release"]).read("onnx/model.onnx")


def test_a_tsv_of_three_classes_keeps_texts_that_read_na_and_sets_bad_rows_aside(
    recipe: dict[str, Any], tmp_path: Path, reviews: Path
) -> None:
    with (reviews / "train.csv").open(encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)][:400]
    rows = [(text, random.Random(text).choice(["low", "mid", "high"])) for text in [*texts, "NA", "null", "1984"]]
    bad = [(" ", "low"), ("a\x00b", "mid"), ("x", "")]
    with (tmp_path / "rows.tsv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([("body", "stars"), *rows, *bad])
    columns = {"text": "body", "label": "stars"}
    recipe["data"] = {"source": str(tmp_path / "rows.tsv"), "columns": columns, "test": 0.3, "max_bad_fraction": 0.01}
    result = run(recipe, tmp_path).result
    about = json.loads((tmp_path / "work" / "runs" / result["run_id"] / "data.json").read_text())
    assert about["set_aside"] == {"train": 3}
    assert sum(about["rows"].values()) == len(rows)
    assert set(ask(result["release"], "fine", tmp_path)["scores"]) == {"low", "mid", "high"}


def test_pairs_train_a_model_without_segments_and_the_bundle_opens_as_it_is(
    recipe: dict[str, Any], make_model: MakeModel, tmp_path: Path, reviews: Path
) -> None:
    """DistilBERT takes no token_type_ids, but BERT's tokenizer files, which it often comes with, give them."""
    recipe["model"]["id"] = str(make_model("distilbert", max_position_embeddings=64))
    with (reviews / "train.csv").open(encoding="utf-8", newline="") as file:
        rows = [{**row, "other": row["text"][::-1]} for row in csv.DictReader(file)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe["data"] = {"source": str(tmp_path / "rows.jsonl"), "columns": {"text_pair": "other"}, "test": 0.3}
    recipe["data"]["max_length"] = 64
    answer = run(recipe, tmp_path)
    assert "the bundle answers 65 texts" in answer.stderr
    words = ["predict", answer.result["release"], "first\tsecond", "--pairs", "--work-dir", str(tmp_path / "work")]
    assert json.loads(call_job(*words).stdout)["text"] == ["first", "second"]


@pytest.mark.slow
def test_an_edited_export_needs_no_training_even_on_an_empty_disk(recipe: dict[str, Any], tmp_path: Path) -> None:
    first = run(recipe, tmp_path)
    again = run(recipe, tmp_path)
    assert "already released" in again.stderr
    recipe["export"]["int8"] |= {"targets": ["portable"], "max_metric_drop": 0.05}
    recipe["baselines"] = ["majority", "few-shot:2"]
    edited = run(recipe, tmp_path, "empty disk")
    assert "train: already committed, skipped" in edited.stderr
    assert "fetching the trained model from the store" in edited.stderr
    card = open_store(edited.result["release"]).read("README.md")
    assert card is not None
    assert b"few-shot:2" in card.data, "the released report tells of this export, not of the first"
    assert edited.result["metrics"]["test"] == first.result["metrics"]["test"]


@pytest.mark.slow
def test_a_release_is_a_model_to_start_from(recipe: dict[str, Any], tmp_path: Path, reviews: Path) -> None:
    recipe["data"]["labels"] = ["positive", "negative"]
    first = run(recipe, tmp_path)
    recipe |= {"name": "second", "model": {"id": first.result["release"].rpartition("/")[0]}}
    recipe["data"] = {"source": str(reviews), "max_length": 64}
    second = run(recipe, tmp_path).result
    assert read_config(second["release"])["id2label"] == {"0": "positive", "1": "negative"}, "the model's order is kept"


@pytest.mark.slow
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
