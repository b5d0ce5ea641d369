"""Baselines without training: each kind of model is asked in its own way, on the same rows, the same every time."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from job.data import TokenTable, draw_shots, fetch_sources
from job.evaluate.baselines import measure_baselines
from job.evaluate.prompting import Prompter
from job.recipe import Recipe, Run


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, reviews: Path) -> Path:
    """60 train and 24 test rows of the reviews."""
    folder = tmp_path_factory.mktemp("small")
    for split, count in (("train", 60), ("test", 24)):
        lines = (reviews / f"{split}.csv").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"{split}.csv").write_text("".join(lines[: count + 1]), encoding="utf-8")
    return folder


def fetch(model: Path, data: Path, folder: Path, *baselines: str) -> Run:
    recipe = {
        "name": "x",
        "task": "text-classification",
        "model": {"id": str(model)},
        "data": {"source": str(data), "max_length": 64},
        "baselines": list(baselines),
        "export": {"int8": {"gate": "report_only"}},
        "store": {"uri": str(folder / "store")},
    }
    run = Run("x", Recipe.model_validate(recipe), folder / "work")
    run.save()
    fetch_sources(run)
    return run


def test_a_real_encoder_knows_more_from_a_few_examples_than_the_majority_does(
    assets: Path, reviews: Path, tmp_path: Path
) -> None:
    names = ("majority", "zero-shot", "one-shot", "few-shot:16", "linear-probe")
    run = fetch(assets / "minilm-l6", reviews, tmp_path, *names)
    scores = measure_baselines(run)
    assert list(scores) == list(names)
    assert scores["linear-probe"]["accuracy"] > scores["majority"]["accuracy"] + 0.1
    assert scores["few-shot:16"]["accuracy"] > scores["majority"]["accuracy"]
    assert measure_baselines(run) == scores, "drawn by seed"
    assert {score["n"] for score in scores.values()} == {200}


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory, assets: Path) -> Path:
    """A tiny language model with the tokenizer of the encoder."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("writer")
    tokenizer = AutoTokenizer.from_pretrained(assets / "minilm-l6")
    tokenizer.eos_token = tokenizer.sep_token
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, **sizes)).save_pretrained(folder)
    return folder


def test_a_language_model_is_scored_by_how_likely_it_goes_on_with_a_label(
    writer: Path, small: Path, tmp_path: Path
) -> None:
    run = fetch(writer, small, tmp_path, "zero-shot", "few-shot:2")
    scores = measure_baselines(run)
    assert scores["zero-shot"]["n"] == scores["few-shot:2"]["n"] == 24
    prompter = Prompter(run, TokenTable.open(run.tokens("train")), TokenTable.open(run.tokens("test")))
    names = [[5, 6, 7], [8], [9, 10]]
    found = prompter._measure([1, 2, 3, 4], names)
    for score, name in zip(found, names, strict=True):
        ids = torch.tensor([[1, 2, 3, 4, *name]])
        with torch.inference_mode():
            logs = prompter._model(input_ids=ids).logits[0].log_softmax(-1)
        assert score == pytest.approx(sum(float(logs[3 + at, token]) for at, token in enumerate(name)), abs=1e-4)


def test_a_model_of_entailment_is_asked_whether_a_text_is_of_a_label(assets: Path, small: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, pipeline

    folder = tmp_path / "nli"
    tokenizer = AutoTokenizer.from_pretrained(assets / "minilm-l6")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    labels = {"contradiction": 0, "neutral": 1, "entailment": 2}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(tokenizer), **sizes, label2id=labels, id2label={v: k for k, v in labels.items()})
    BertForSequenceClassification(config).save_pretrained(folder)
    scores = measure_baselines(fetch(folder, small, tmp_path, "zero-shot"))
    with (small / "test.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    theirs = pipeline("zero-shot-classification", model=str(folder), device="cpu")
    told = theirs([row["text"].lower() for row in rows], ["negative", "positive"])
    right = np.mean([answer["labels"][0] == row["label"] for answer, row in zip(told, rows, strict=True)])
    assert scores["zero-shot"]["accuracy"] == pytest.approx(right, abs=2 / 24)


@pytest.mark.parametrize("shots", [1, 3, 100])
def test_shots_are_the_same_number_of_every_label_and_no_row_twice(shots: int) -> None:
    labels: Any = np.array([0, 1, 1, 0, 2, 1, 0, 1])
    drawn = draw_shots(labels, 4, shots, np.random.default_rng(7))
    for label, places in enumerate(drawn):
        assert (labels[places] == label).all() and len(set(places)) == len(places)
        assert len(places) == min(shots, int((labels == label).sum()))
    again = draw_shots(labels, 4, shots, np.random.default_rng(7))
    assert json.dumps([p.tolist() for p in drawn]) == json.dumps([p.tolist() for p in again])
