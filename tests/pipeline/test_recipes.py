"""Every shipped recipe is run as it is, on small models and small data with the columns that it names."""

from __future__ import annotations

import csv
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeModel, call_job
from made_up import ask_question, tag_sentence
from translators import make_model as make_translator
from translators import write_translations

from job.recipe import Recipe, load_recipe, shipped_recipes

EMOTIONS = [f"emotion-{number}" for number in range(28)]
CHAT = (
    "{% for m in messages %}{{ m['role'] }}\n{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)


def list_texts(assets: Path) -> list[str]:
    with (assets / "movie-reviews" / "train.csv").open(encoding="utf-8", newline="") as file:
        return list(dict.fromkeys(row["text"] for row in csv.DictReader(file)))


def make_rows(recipe: Recipe, texts: Iterator[str], rng: random.Random) -> dict[str, Any]:
    """Return one row with the columns of a recipe, in the form that its data set on the Hub has."""
    columns = recipe.data.columns
    if recipe.task == "token-classification":
        words, tags = tag_sentence(rng)
        return {"tokens": words, "ner_tags": tags}
    if recipe.task == "question-answering":
        return ask_question(rng, unanswered=rng.random() < 0.2)
    if "messages" in columns:
        talk = [{"role": "user", "content": next(texts)}, {"role": "assistant", "content": next(texts)}]
        return {columns["messages"]: talk}
    row: dict[str, Any] = {theirs: next(texts) for ours, theirs in columns.items() if ours != "label"}
    if "label" in columns:
        row[columns["label"]] = {
            "multi_label_classification": lambda: rng.sample(EMOTIONS, rng.randint(1, 2)),
            "regression": lambda: round(rng.uniform(0, 5), 1),
        }.get(recipe.data.problem_type, lambda: rng.choice(["negative", "positive"]))()
    return row


def write_data(name: str, recipe: Recipe, folder: Path, texts: list[str]) -> Path:
    rng, source = random.Random(name), iter(texts)
    splits = {recipe.data.train: 400, recipe.data.validation: 60, recipe.data.test: 160}
    for split, count in splits.items():
        if isinstance(split, str):
            rows = [make_rows(recipe, source, rng) for _ in range(count)]
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def make_writer(tmp_path_factory: pytest.TempPathFactory, assets: Path) -> Callable[[], Path]:
    """Return a function that makes a tiny Llama with a chat template."""

    def make() -> Path:
        import torch
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

        folder = tmp_path_factory.mktemp("writer")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=600, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
        tokenizer.train_from_iterator(list_texts(assets)[:2000], trainer)
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
        fast.chat_template = CHAT
        fast.save_pretrained(folder)
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        LlamaForCausalLM(LlamaConfig(vocab_size=600, max_position_embeddings=512, **sizes)).save_pretrained(folder)
        return folder

    return make


def choose_model(recipe: Recipe, folder: Path, make_model: MakeModel, make_writer: Callable[[], Path]) -> Path:
    if recipe.task == "causal-lm":
        return make_writer()
    if recipe.task == "seq2seq-lm":
        model, data = folder / "t5", folder / "words"
        data.mkdir()
        make_translator("t5", model, write_translations(data, {"train": 10}))
        return model
    return make_model("bert", max_position_embeddings=512)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_a_shipped_recipe_runs_to_its_release(
    name: str, tmp_path: Path, assets: Path, make_model: MakeModel, make_writer: Callable[[], Path]
) -> None:
    recipe = load_recipe(name)
    data = tmp_path / "data"
    data.mkdir()
    if recipe.task == "seq2seq-lm":
        write_translations(data, {"train": 400, "validation": 60, "test": 160})
        for path in data.glob("*.jsonl"):
            theirs = recipe.data.columns
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            renamed = [{theirs["source"]: row["source"], theirs["target"]: row["target"]} for row in rows]
            path.write_text("".join(json.dumps(row) + "\n" for row in renamed))
    else:
        write_data(name, recipe, data, list_texts(assets))
    model = choose_model(recipe, tmp_path, make_model, make_writer)
    options = [
        f"model.id={model}", f"data.source={data}", "data.config=null", "data.max_length=64",
        f"store.uri={tmp_path / 'store'}",
        "training.max_steps=4", "training.save_steps=2", "training.eval_steps=2", "training.global_batch_size=8",
        "export.int8.gate=report_only", "export.latency=false",
    ]  # fmt: skip
    words = [word for option in options for word in ("--set", option)]
    answer = call_job("run", name, "--work-dir", str(tmp_path / "work"), *words)
    assert answer.code == 0, answer.stderr
    assert Path(answer.result["release"], "onnx").is_dir()
    shutil.rmtree(tmp_path, ignore_errors=True)
