"""Every task the whole way on a real model: trained above its baseline, exported, quantized, released, and asked."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from conftest import Answer, assert_refused, call_job, write_recipe
from made_up import write_questions, write_tagged

SIZES = {"train": 1200, "validation": 160, "test": 200}


def run_task(task: str, folder: Path, assets: Path, data: dict[str, Any], steps: int, *words: str) -> Answer:
    recipe = {
        "name": "model",
        "task": task,
        "model": {"id": str(assets / "minilm-l6")},
        "data": data,
        "training": {"max_steps": steps, "global_batch_size": 16, "learning_rate": 4e-4, "eval_steps": steps},
        "export": {"int8": {"targets": ["portable"]}, "latency": False},
        "store": {"uri": str(folder / "store")},
    }
    path = write_recipe(folder / "recipe.yaml", **recipe)
    return call_job("run", str(path), "--work-dir", str(folder / "work"), *words)


def ask(release: str, text: str, folder: Path, *words: str) -> dict[str, Any]:
    answer = call_job("predict", release, text, "--work-dir", str(folder), *words)
    assert answer.code == 0, answer.stderr
    return answer.result


def check_numbers(result: dict[str, Any]) -> None:
    """What a release of any task promises."""
    assert result["status"] == "released" and result["promoted"]
    assert result["onnx"]["max_abs_logit_diff"] < 1e-2 and result["onnx"]["agreement"] > 0.999
    assert result["int8"]["portable"]["accepted"], result["int8"]
    assert result["int8"]["portable"]["drop_bound"] <= 0.02
    assert result["int8"]["portable"]["size_ratio"] < 0.4


# --- token classification


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory, assets: Path) -> Answer:
    folder = tmp_path_factory.mktemp("tagger")
    source = write_tagged(folder / "data", SIZES)
    data = {"source": str(source), "validation": "validation", "max_length": 32}
    answer = run_task("token-classification", folder, assets, data, 40)
    assert answer.code == 0, answer.stderr
    return answer


def test_a_token_classifier_finds_entities_far_better_than_before_it_was_trained(tagger: Answer) -> None:
    result = tagger.result
    check_numbers(result)
    scores = result["metrics"]
    assert scores["test"]["f1"] > 0.95 > 0.3 > scores["baselines"]["untrained"]["f1"]
    assert scores["baselines"]["majority"]["f1"] == 0
    assert scores["test"]["n"] == SIZES["test"] and scores["test"]["entities"] > SIZES["test"]


def test_predict_finds_the_entities_that_transformers_finds(tagger: Answer, tmp_path: Path) -> None:
    from transformers import pipeline

    text = "Nils Okafor flew from New Delhi to Oslo yesterday. " * 9
    answer = ask(tagger.result["release"], text, tmp_path, "--precision", "fp32")
    found = [(entity["entity"], entity["start"], entity["end"]) for entity in answer["entities"]]
    assert len(found) == 27, "a text longer than a row loses none"
    assert {text[start:end] for _, start, end in found} == {"Nils Okafor", "New Delhi", "Oslo"}
    short = text[:50]
    bundle = tagger.result["release"]
    theirs = pipeline("token-classification", model=bundle, device="cpu", aggregation_strategy="first")(short)
    ours = ask(bundle, short, tmp_path, "--precision", "fp32")["entities"]
    assert [(e["entity_group"], e["start"], e["end"]) for e in theirs] == [
        (e["entity"], e["start"], e["end"]) for e in ours
    ]
    assert [e["score"] for e in ours] == pytest.approx([float(e["score"]) for e in theirs], abs=1e-4)


# --- question answering


@pytest.fixture(scope="module")
def answerer(tmp_path_factory: pytest.TempPathFactory, assets: Path) -> Answer:
    folder = tmp_path_factory.mktemp("answerer")
    source = write_questions(folder / "data", SIZES | {"train": 3000}, unanswered=0.2)
    data = {"source": str(source), "validation": "validation", "max_length": 64}
    answer = run_task("question-answering", folder, assets, data, 60, "--set", "training.global_batch_size=32")
    assert answer.code == 0, answer.stderr
    return answer


@pytest.mark.slow
def test_questions_are_answered_and_those_without_an_answer_are_not(answerer: Answer, tmp_path: Path) -> None:
    result = answerer.result
    check_numbers(result)
    scores = result["metrics"]
    assert scores["test"]["f1"] > 0.8 > 0.3 > scores["baselines"]["untrained"]["f1"]
    context = "Rosa Weber lost the lamp in Cairo. Liam Kim keeps the violin in New Delhi. " + "It rains. " * 60
    question = {"question": "Where is the violin?", "context": context}
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(question) + "\n" + json.dumps(question | {"question": "Where is the kettle?"}) + "\n")
    done = call_job("predict", result["release"], "--file", str(path), "--work-dir", str(tmp_path))
    told, none = map(json.loads, done.stdout.splitlines())
    assert told["answer"] == "New Delhi" == context[told["start"] : told["end"]]
    assert none["answer"] == "" and 0 < none["score"] <= 1


@pytest.mark.slow
def test_the_answerer_opens_in_transformers_and_optimum(answerer: Answer) -> None:
    from optimum.onnxruntime import ORTModelForQuestionAnswering
    from transformers import AutoTokenizer, pipeline

    release = answerer.result["release"]
    asked = {"question": "Where is the lamp?", "context": "Rosa Weber lost the lamp in Cairo. It rains in Oslo."}
    assert pipeline("question-answering", model=release, device="cpu")(**asked)["answer"] == "Cairo"
    model = ORTModelForQuestionAnswering.from_pretrained(release, subfolder="onnx", file_name="model_quantized.onnx")
    theirs = pipeline("question-answering", model=model, tokenizer=AutoTokenizer.from_pretrained(release))
    assert theirs(**asked)["answer"] == "Cairo"


# --- masked language models, and what is trained on top of them


@pytest.fixture(scope="module")
def filler(tmp_path_factory: pytest.TempPathFactory, assets: Path) -> Answer:
    folder = tmp_path_factory.mktemp("filler")
    data = {"source": str(assets / "nyt"), "test": 0.1, "max_length": 48, "limit": 1600}
    answer = run_task("masked-lm", folder, assets, data, 60)
    assert answer.code == 0, answer.stderr
    return answer


@pytest.mark.slow
def test_a_masked_language_model_learns_a_domain_and_fills_masks(filler: Answer, tmp_path: Path) -> None:
    result = filler.result
    check_numbers(result)
    scores = result["metrics"]
    assert scores["test"]["perplexity"] < 0.2 * scores["baselines"]["untrained"]["perplexity"]
    text = "The president of the United [MASK] spoke on [MASK]."
    filled = ask(result["release"], text, tmp_path, "--precision", "fp32")["filled"]
    assert [text[token["start"] : token["end"]] for token in filled] == ["[MASK]"] * 2
    from transformers import pipeline

    theirs = pipeline("fill-mask", model=result["release"], device="cpu")(text, top_k=1)
    assert [token["id"] for token in filled] == [mask[0]["token"] for mask in theirs]
    refused = call_job("predict", result["release"], "no mask here", "--work-dir", str(tmp_path))
    assert_refused(refused, 11, "has no [MASK]")


@pytest.mark.slow
def test_a_classifier_is_trained_on_a_released_masked_language_model(
    filler: Answer, assets: Path, tmp_path: Path
) -> None:
    parent = filler.result["release"]
    model = str(Path(parent).parent)
    data = {"source": str(assets / "nyt"), "test": 0.1, "max_length": 48, "limit": 800}
    answer = run_task("text-classification", tmp_path, assets, data, 30, "--set", f"model.id={model}")
    assert answer.code == 0, answer.stderr
    manifest = json.loads((Path(answer.result["release"]) / "manifest.json").read_text())
    assert manifest["about"]["parent"].endswith(Path(parent).name)
    store = Path(answer.result["release"]).parents[2]
    assert Path(parent).name in call_job("show", str(store)).stdout
    (run,) = (store / "runs").iterdir()
    assert model in call_job("show", str(run)).stdout
    assert math.isfinite(answer.result["metrics"]["test"]["accuracy"])
