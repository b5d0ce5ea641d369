"""Sets of labels and numbers end to end: trained, quantized, released, and answered in the data's own units."""

from __future__ import annotations

import io
import json
import random
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Answer, MakeModel, assert_refused, call_job, write_recipe

from job.data.assets import TEXTS, TEXTS_ARCHIVE, TEXTS_MEMBER, fetch_package, read_member

TOPICS = {
    "food": "soup", "music": "violin", "sport": "tennis", "war": "army", "love": "wedding", "space": "rocket",
    "crime": "police", "nature": "forest", "city": "subway", "family": "mother", "school": "teacher", "money": "bank",
}  # fmt: skip
"""Label: the word by which it is known."""
FILLING = ["the", "of", "and", "with", "some", "old", "new", "story", "about", "near", "a", "few", "people", "talk"]
SIZES = {"train": 480, "test": 200}
TINY = {"max_steps": 100, "global_batch_size": 32, "learning_rate": 5e-3, "save_steps": 100, "eval_steps": 100}
PLAIN = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 64}


def write_rows(folder: Path, split: str, rows: list[dict[str, Any]]) -> None:
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="session")
def topics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts with none to four of twelve words in them, labelled by all of these, in JSON lines."""
    folder, rng = tmp_path_factory.mktemp("topics"), random.Random(3)
    for split, size in SIZES.items():
        rows = []
        for _ in range(size):
            chosen = rng.sample(sorted(TOPICS), rng.choice((0, 1, 2, 2, 3, 4)))
            words = [*(TOPICS[name] for name in chosen), *rng.choices(FILLING, k=rng.randint(4, 9))]
            rng.shuffle(words)
            rows.append({"text": " ".join(words), "label": chosen})
        write_rows(folder, split, rows)
    return folder


@pytest.fixture(scope="session")
def years(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts with a number that counts their words by sign, far from 0 and close to each other: 1990 ± 3."""
    folder, rng = tmp_path_factory.mktemp("years"), random.Random(4)
    weights = dict(zip(TOPICS.values(), (-2, -1, 1, 2) * 3, strict=True))
    for split, size in SIZES.items():
        rows = []
        for _ in range(size):
            words = rng.sample(sorted(weights), rng.randint(1, 4))
            texts = [*words, *rng.choices(FILLING, k=rng.randint(4, 9))]
            rng.shuffle(texts)
            rows.append({"text": " ".join(texts), "year": 1990 + sum(weights[word] for word in words)})
        write_rows(folder, split, rows)
    return folder


@pytest.fixture(scope="session")
def ratings(tmp_path_factory: pytest.TempPathFactory, assets: Path) -> Path:
    """Real sentences of movie reviews with the mean of at least ten people's ratings, from −4 to 4."""
    folder = tmp_path_factory.mktemp("ratings")
    package = fetch_package(TEXTS, assets.parent / "downloads")
    with tarfile.open(package) as outer, tarfile.open(fileobj=io.BytesIO(read_member(outer, TEXTS_ARCHIVE))) as inner:
        table = read_member(inner, TEXTS_MEMBER.format("movieReviewSnippets")).decode("utf-8")
    lines = [line.split("\t") for line in table.split("\r\n") if line]
    rows = [{"text": text, "rating": float(rating)} for text, rating in {line[2]: line[1] for line in lines}.items()]
    random.Random(0).shuffle(rows)
    write_rows(folder, "train", rows[:2400])
    write_rows(folder, "test", rows[2400:3000])
    return folder


def run(recipe: dict[str, Any], folder: Path, *words: str) -> Answer:
    path = write_recipe(folder / "r.yaml", **recipe)
    return call_job("run", str(path), "--work-dir", str(folder / "work"), *words, timeout_s=2400)


def ask(release: str, texts: list[str], folder: Path, precision: str = "fp32") -> list[dict[str, Any]]:
    (folder / "texts.txt").write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    words = ["--precision", precision, "--file", str(folder / "texts.txt"), "--work-dir", str(folder / "work")]
    answer = call_job("predict", release, *words)
    assert answer.code == 0, answer.stderr
    return [json.loads(line) for line in answer.stdout.splitlines()]


def read_texts(folder: Path, split: str = "test") -> list[str]:
    return [json.loads(line)["text"] for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def assert_sets_are_released(answer: Answer, texts: list[str], folder: Path) -> None:
    """Every consumer of the release gives the same probabilities, and labels above a half are those that are said."""
    from optimum.onnxruntime import ORTModelForSequenceClassification
    from transformers import AutoTokenizer, pipeline

    release = answer.result["release"]
    told = ask(release, texts, folder)
    onnx = ORTModelForSequenceClassification.from_pretrained(release, subfolder="onnx", file_name="model.onnx")
    for model in (release, onnx):
        opened = pipeline("text-classification", model, tokenizer=AutoTokenizer.from_pretrained(release), top_k=None)
        for mine, theirs in zip(told, opened(texts), strict=True):
            assert mine["scores"] == pytest.approx({one["label"]: one["score"] for one in theirs}, abs=1e-4)
            assert mine["labels"] == [name for name, score in mine["scores"].items() if score > 0.5]


def assert_numbers_are_released(answer: Answer, texts: list[str], folder: Path, name: str) -> None:
    """Every consumer of the release gives the same numbers."""
    from optimum.onnxruntime import ORTModelForSequenceClassification
    from transformers import AutoTokenizer, pipeline

    release = answer.result["release"]
    told = [one["score"] for one in ask(release, texts, folder)]
    onnx = ORTModelForSequenceClassification.from_pretrained(release, subfolder="onnx", file_name="model.onnx")
    for model in (release, onnx):
        opened = pipeline("text-classification", model, tokenizer=AutoTokenizer.from_pretrained(release))
        answers = opened(texts)
        assert {one["label"] for one in answers} == {name}
        assert told == pytest.approx([one["score"] for one in answers], abs=1e-3)


# --- a tiny model


@pytest.fixture
def sets(recipe: dict[str, Any], topics: Path, make_model: MakeModel) -> dict[str, Any]:
    recipe["model"] = {"id": str(make_model("bert", initializer_range=0.1, **PLAIN))}
    recipe["data"] = {"source": str(topics), "problem_type": "multi_label_classification", "max_length": 32}
    recipe.pop("baselines", None)
    return recipe | {"training": TINY | {"max_steps": 200, "learning_rate": 1e-2}}


@pytest.fixture
def numbers(recipe: dict[str, Any], years: Path, make_model: MakeModel) -> dict[str, Any]:
    recipe["model"] = {"id": str(make_model("bert", initializer_range=0.05, **PLAIN))}
    columns = {"label": "year"}
    recipe["data"] = {"source": str(years), "columns": columns, "problem_type": "regression", "max_length": 32}
    recipe.pop("baselines", None)
    return recipe | {"training": dict(TINY)}


def test_sets_of_labels_are_learned_and_released(sets: dict[str, Any], topics: Path, tmp_path: Path) -> None:
    answer = run(sets, tmp_path)
    assert answer.code == 0, answer.stderr
    scores = answer.result["metrics"]
    assert set(scores["baselines"]) == {"majority", "untrained"}
    assert scores["test"]["micro_f1"] > max(each["micro_f1"] for each in scores["baselines"].values()) + 0.2
    assert answer.result["int8"]["portable"]["agreement"] > 0.5
    assert "any number of them" in (Path(answer.result["release"]) / "README.md").read_text()
    assert_sets_are_released(answer, read_texts(topics)[:50], tmp_path)


def test_numbers_are_learned_and_released_in_their_own_units(
    numbers: dict[str, Any], years: Path, tmp_path: Path
) -> None:
    answer = run(numbers, tmp_path)
    assert answer.code == 0, answer.stderr
    scores, texts = answer.result["metrics"], read_texts(years)
    assert abs(scores["baselines"]["mean"]["r2"]) < 0.05
    assert scores["test"]["r2"] > 0.5 and scores["test"]["rmse"] < 2
    assert answer.result["onnx"]["max_abs_logit_diff"] < 1e-3
    assert_numbers_are_released(answer, texts[:50], tmp_path, "year")
    told = np.array([one["score"] for one in ask(answer.result["release"], texts, tmp_path)])
    labels = np.array([json.loads(line)["year"] for line in (years / "test.jsonl").read_text().splitlines()])
    assert 1 - np.square(told - labels).mean() / labels.var() == pytest.approx(scores["test"]["r2"], abs=1e-3)
    history = json.loads((tmp_path / "work" / "runs" / answer.result["run_id"] / "records.json").read_text())["train"]
    assert [entry["eval_r2"] for entry in history["history"] if "eval_r2" in entry][-1] == pytest.approx(
        scores["validation"]["r2"], abs=1e-3
    ), "what training counts in standard deviations is judged as what is released"


def test_a_kind_of_labels_that_a_task_has_not_is_refused(sets: dict[str, Any], numbers: Any, tmp_path: Path) -> None:
    other = sets | {"task": "token-classification", "data": {"source": "x", "problem_type": "regression"}}
    assert_refused(run(other, tmp_path), 10, "problem_type", "text-classification")
    assert_refused(run(numbers | {"baselines": ["majority"]}, tmp_path), 10, "'majority'", "mean, untrained")
    smoothed = numbers | {"training": TINY | {"label_smoothing_factor": 0.1}}
    assert_refused(run(smoothed, tmp_path), 10, "label_smoothing_factor")
    named = numbers | {"data": numbers["data"] | {"labels": ["a", "b"]}}
    assert_refused(run(named, tmp_path), 10, "labels", "leave it out")


def test_labels_of_another_kind_are_refused_before_training(sets: dict[str, Any], tmp_path: Path) -> None:
    del sets["data"]["problem_type"]
    assert_refused(run(sets, tmp_path), 11, "row 1", "data.problem_type: multi_label_classification")


# --- more of it


@pytest.mark.slow
def test_real_ratings_are_foretold_far_better_than_by_their_mean(
    numbers: dict[str, Any], ratings: Path, assets: Path, tmp_path: Path
) -> None:
    data = numbers["data"] | {"source": str(ratings), "columns": {"label": "rating"}, "max_length": 64}
    training = TINY | {"max_steps": 150, "global_batch_size": 16, "learning_rate": 1e-4, "warmup_ratio": 0.1}
    model = {"id": str(assets / "minilm-l6")}
    answer = run(numbers | {"data": data, "training": training, "model": model, "export": {"latency": False}}, tmp_path)
    assert answer.code == 0, answer.stderr
    scores = answer.result["metrics"]
    assert scores["test"]["r2"] > 0.2 > 0.1 > scores["baselines"]["mean"]["r2"]
    assert scores["test"]["r2_interval"][0] > 0.15
    assert answer.result["int8"]["portable"]["accepted"]
    assert_numbers_are_released(answer, read_texts(ratings)[:30], tmp_path, "rating")
    fp32, int8 = (ask(answer.result["release"], read_texts(ratings), tmp_path, name) for name in ("fp32", "int8"))
    differences = np.array([one["score"] - other["score"] for one, other in zip(fp32, int8, strict=True)])
    assert np.abs(differences).max() > 0 and np.std(differences) < 0.3


@pytest.mark.slow
def test_sets_of_reviews_topics_are_learned_by_a_real_model(
    sets: dict[str, Any], topics: Path, assets: Path, tmp_path: Path
) -> None:
    training = TINY | {"max_steps": 200, "global_batch_size": 16, "learning_rate": 5e-4}
    answer = run(
        sets | {"training": training, "model": {"id": str(assets / "minilm-l6")}, "export": {"latency": False}},
        tmp_path,
    )
    assert answer.code == 0, answer.stderr
    assert answer.result["metrics"]["test"]["micro_f1"] > 0.8
    assert answer.result["int8"]["portable"]["accepted"]
    assert_sets_are_released(answer, read_texts(topics)[:30], tmp_path)
    said = ask(answer.result["release"], ["the soup and the violin", "nothing of it"], tmp_path, "int8")
    assert set(said[0]["labels"]) == {"food", "music"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sets", "numbers"])
def test_better_compares_what_is_released_row_by_row(kind: str, request: Any, tmp_path: Path) -> None:
    recipe = request.getfixturevalue(kind) | {"release": {"promote_if": "better"}}
    worse = recipe | {"training": TINY | {"max_steps": 15, "save_steps": 15}}
    first = run(worse, tmp_path, "--run-id", "1")
    assert first.code == 0 and first.result["promoted"], first.stderr
    second = run(recipe, tmp_path, "--run-id", "2")
    assert second.code == 0 and second.result["promoted"], second.stderr
    third = run(worse | {"training": worse["training"] | {"seed": 7}}, tmp_path, "--run-id", "3")
    assert third.code == 0 and not third.result["promoted"], third.stderr
    assert "not better than" in third.result["reason"]


@pytest.mark.slow
def test_a_release_goes_on_as_another_kind_or_from_its_own_head(
    sets: dict[str, Any], numbers: dict[str, Any], tmp_path: Path
) -> None:
    """A head of another size is made anew; one that answers in years is taken into the units of the training."""
    first = run(numbers, tmp_path, "--run-id", "1")
    assert first.code == 0, first.stderr
    start = {"model": {"id": first.result["release"]}, "baselines": ["untrained"]}
    short = {"training": TINY | {"max_steps": 2, "save_steps": 2, "learning_rate": 1e-6}}
    again = run(numbers | start | short | {"name": "again"}, tmp_path, "--run-id", "2")
    assert again.code == 0, again.stderr
    for scores in (again.result["metrics"]["test"], again.result["metrics"]["baselines"]["untrained"]):
        assert scores["r2"] == pytest.approx(first.result["metrics"]["test"]["r2"], abs=0.01)
    other = run(sets | start | short | {"name": "other"}, tmp_path, "--run-id", "3")
    assert other.code == 0, other.stderr
    assert set(ask(other.result["release"], ["soup"], tmp_path)[0]["scores"]) == set(TOPICS)


@pytest.mark.slow
def test_an_adapter_for_numbers_answers_in_their_units_too(
    numbers: dict[str, Any], years: Path, tmp_path: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    training = TINY | {"max_steps": 20, "save_steps": 20}
    answer = run(numbers | {"tuning": {"method": "lora", "r": 1}, "training": training}, tmp_path)
    assert answer.code == 0, answer.stderr
    release, texts = answer.result["release"], read_texts(years)[:20]
    base = AutoModelForSequenceClassification.from_pretrained(numbers["model"]["id"], num_labels=1)
    model = PeftModel.from_pretrained(base, f"{release}/adapter").eval()
    with torch.inference_mode():
        inputs = AutoTokenizer.from_pretrained(release)(texts, padding=True, return_tensors="pt")
        said = model(**inputs).logits[:, 0].tolist()
    assert min(said) > 1900
    assert [one["score"] for one in ask(release, texts, tmp_path)] == pytest.approx(said, abs=1e-2)
