"""SmolLM2-135M, a real language model, fine-tuned a few steps: exported with its cache, in int8 and in int4.

And taught by the shipped recipe for conversations to answer a question about a review in words of ours, with a quote.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from conftest import Answer, call_job, write_recipe
from smollm2 import prepare_smollm2


@pytest.fixture(scope="module")
def sentences(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of sentences from newspapers: 400 to train on, 60 to choose a rung, 120 to judge it."""
    folder = tmp_path_factory.mktemp("sentences")
    with (assets / "nyt" / "all.csv").open(encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file) if len(row["text"].split()) >= 12]
    for name, rows in (("train", texts[:400]), ("validation", texts[400:460]), ("test", texts[460:580])):
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["text"], *([text] for text in rows)])
    return folder


@pytest.fixture(scope="module")
def answer(sentences: Path, tmp_path_factory: pytest.TempPathFactory) -> Answer:
    """The whole way; the gate is told that a model of this size may lose some per cent of perplexity in 4 bits."""
    folder = tmp_path_factory.mktemp("smollm2")
    recipe = write_recipe(
        folder / "recipe.yaml",
        name="smollm2",
        task="causal-lm",
        model={"id": str(prepare_smollm2())},
        data={"source": str(sentences), "train": "train.csv", "validation": "validation.csv", "test": "test.csv",
              "max_length": 128},
        training={"max_steps": 30, "global_batch_size": 8, "learning_rate": 1e-4},
        export={"latency": False, "int8": {"max_metric_drop": 0.1, "min_agreement": 0.8}},
        store={"uri": str(folder / "store")},
    )  # fmt: skip
    done = call_job("run", str(recipe), "--work-dir", str(folder / "work"), timeout_s=3600)
    assert done.code == 0, done.stderr
    return done


@pytest.mark.slow
def test_a_few_steps_make_the_sentences_more_likely(answer: Answer) -> None:
    scores = answer.result["metrics"]
    assert scores["test"]["perplexity"] < 0.9 * scores["baselines"]["untrained"]["perplexity"]


@pytest.mark.slow
def test_int8_and_int4_stay_within_the_gate(answer: Answer) -> None:
    for target, numbers in answer.result["int8"].items():
        assert numbers["accepted"], (target, numbers)
        assert numbers["drop_bound"] <= 0.1
    assert answer.result["int8"]["portable"]["drop_bound"] <= 0.02
    assert answer.result["int8"]["int4"]["size"] < answer.result["int8"]["portable"]["size"]


@pytest.mark.slow
def test_32_tokens_are_written_as_torch_writes_them(answer: Answer) -> None:
    told = answer.result["onnx"]["written"]
    assert told["tokens"] == 32
    assert told["written"]["model.onnx"] >= told["n"] - 1
    assert told["written"]["model_quantized.onnx"] > told["n"] / 2, told
    assert set(told["written"]) == {"model.onnx", "model_quantized.onnx", "model_q4.onnx"}, "of 4 bits it is counted"


ANSWERS = {"positive": "Yes, warmly.", "negative": "No, avoid it."}
ASKED, QUOTED = "Would you recommend this film? ", ' In their own words: "'


@pytest.fixture(scope="module")
def reviews(assets: Path) -> list[dict[str, str]]:
    """Real ones, of whose words an answer has more than 32 tokens."""
    with (assets / "movie-reviews" / "train.csv").open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if 18 < len(row["text"].split()) < 30]


@pytest.fixture(scope="module")
def instructions(reviews: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small instruction file: a question about each of 600 reviews, and how we would answer it."""
    path = tmp_path_factory.mktemp("instructions") / "train.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for row in reviews[:600]:
            asked = {"role": "user", "content": ASKED + row["text"]}
            answered = {"role": "assistant", "content": f'{ANSWERS[row["label"]]}{QUOTED}{row["text"]}"'}
            file.write(json.dumps({"messages": [asked, answered]}) + "\n")
    return path


@pytest.mark.slow
def test_the_shipped_recipe_teaches_it_to_answer_as_an_instruction_file_does_and_4_bits_hardly_change_that(
    instructions: Path, reviews: list[dict[str, str]], tmp_path: Path
) -> None:
    """Of a newspaper's next word it is often unsure, and 4 bits decide otherwise; here it knows what comes next."""
    sets = [
        f"model.id={prepare_smollm2()}", f"data.source={instructions.parent}",
        "data.config=null", "data.test=0.25", "data.max_length=160", "training.max_steps=60",
        "training.global_batch_size=8", "training.learning_rate=1e-3", "training.save_steps=30",
        "export.latency=false", "export.int8.targets=[portable,int4]", f"store.uri={tmp_path / 'store'}",
    ]  # fmt: skip
    words = [word for each in sets for word in ("--set", each)]
    done = call_job("run", "chat-lora", "--work-dir", str(tmp_path / "work"), *words, timeout_s=3600)
    assert done.code == 0, done.stderr
    scores = done.result["metrics"]
    assert scores["test"]["perplexity"] < 1.1 < 2 < scores["baselines"]["untrained"]["perplexity"]
    texts = [row["text"] for row in reviews[600:602]]
    told = call_job("predict", done.result["release"], *(ASKED + text for text in texts), "--chat",
                    "--work-dir", str(tmp_path))  # fmt: skip
    for line, text in zip(told.stdout.splitlines(), texts, strict=True):
        verdict, _, quote = json.loads(line)["written"].partition(QUOTED)
        assert verdict in ANSWERS.values(), "in our words; which of them takes more rows"
        assert quote == f'{text}"'
    assert all(numbers["accepted"] for numbers in done.result["int8"].values()), done.result["int8"]
    assert done.result["int8"]["int4"]["size_ratio"] < 0.25
    alike = done.result["onnx"]["written"]
    assert alike["tokens"] == 32
    assert all(count > alike["n"] / 2 for count in alike["written"].values()), alike
