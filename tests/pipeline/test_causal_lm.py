"""Language models end to end: trained on raw text or completions, exported with a cache, small files, and asked."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import Answer, assert_refused, call_job, write_recipe

from job.export.genai import offer_genai

END = "<end>"


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, reviews: Path) -> Path:
    """A two-layer Llama with tied embeddings and a byte-level tokenizer of 600 tokens that was trained on reviews.

    It names two ids at which it stops, none for padding, and wants to be sampled.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("llama")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    with (reviews / "train.csv").open(encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=600, special_tokens=[END], initial_alphabet=alphabet)
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"vocab_size": len(tokenizer.get_vocab()), "eos_token_id": [0, 255], "bos_token_id": 0}
    config = LlamaConfig(num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True, **sizes, **ids)
    LlamaForCausalLM(config).save_pretrained(folder)
    # wishes of a base model: to be kept for its users, and to be left out where greedy text is compared
    wishes = {
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "eos_token_id": [0, 255],
        "transformers_version": "4.57.6",
    }
    (folder / "generation_config.json").write_text(json.dumps(wishes))
    return folder


@pytest.fixture(scope="module")
def words(tiny_llama: Path, reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A complete recipe on a local-folder store."""
    return {
        "name": "writer",
        "task": "causal-lm",
        "model": {"id": str(tiny_llama)},
        "data": {"source": str(reviews), "max_length": 64},
        "training": {
            "max_steps": 60,
            "global_batch_size": 16,
            "learning_rate": 5e-3,
            "save_steps": 20,
            "eval_steps": 30,
        },
        "export": {"latency": False},
        "store": {"uri": str(tmp_path_factory.mktemp("store"))},
    }


def run(recipe: dict[str, Any], folder: Path, *words: str) -> Answer:
    return call_job("run", str(write_recipe(folder / "r.yaml", **recipe)), "--work-dir", str(folder / "work"), *words)


@pytest.fixture(scope="module")
def written(words: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Answer:
    """One release of a language model."""
    answer = run(words, tmp_path_factory.mktemp("run"))
    assert answer.code == 0, answer.stderr
    return answer


def test_a_language_model_is_trained_exported_proven_and_released(written: Answer) -> None:
    result = written.result
    scores = result["metrics"]
    assert scores["test"]["perplexity"] < 0.5 * scores["baselines"]["untrained"]["perplexity"]
    assert scores["test"]["log_likelihood"] > scores["baselines"]["untrained"]["log_likelihood"] + 0.5
    assert result["onnx"]["max_abs_logit_diff"] < 1e-3
    assert set(result["int8"]) == {"portable", "int4"}, "what the task offers where the recipe says nothing"
    for target, numbers in result["int8"].items():
        assert numbers["accepted"], (target, numbers)
        assert numbers["drop"] <= numbers["drop_bound"] <= 0.02
        assert numbers["agreement"] >= 0.9
    told = result["onnx"]["written"]
    assert told["written"]["model.onnx"] >= told["n"] - 1 == 15, "fp32 writes what torch writes, but for a close call"
    assert "perplexity" in written.stderr


def test_the_release_writes_in_every_consumer_what_transformers_writes(written: Answer, tmp_path: Path) -> None:
    from optimum.onnxruntime import ORTModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    release = written.result["release"]
    tokenizer = AutoTokenizer.from_pretrained(release)
    assert tokenizer.eos_token == END and tokenizer.pad_token
    ids = tokenizer("the film", return_tensors="pt")
    limits = {"do_sample": False, "max_new_tokens": 24}
    torch_ids = AutoModelForCausalLM.from_pretrained(release).generate(**ids, **limits)
    onnx = ORTModelForCausalLM.from_pretrained(release, subfolder="onnx", file_name="model.onnx")
    assert onnx.generate(**ids, **limits).tolist() == torch_ids.tolist()
    words = ["--precision", "fp32", "--max-new-tokens", "24", "--work-dir", str(tmp_path)]
    answer = call_job("predict", release, "the film", *words).result
    assert answer["ids"] == torch_ids[0, ids["input_ids"].shape[1] :].tolist()
    assert answer["written"] == tokenizer.decode(answer["ids"], skip_special_tokens=True)
    assert answer["ended"] == ("end" if answer["ids"][-1] in (0, 255) else "length")
    wishes = json.loads((Path(release) / "generation_config.json").read_text())
    assert (wishes["eos_token_id"], wishes["temperature"]) == ([0, 255], 0.6)


def test_onnxruntime_genai_opens_the_release_as_it_is_and_writes_what_job_predict_writes(
    written: Answer, tmp_path: Path
) -> None:
    import onnxruntime_genai

    told = written.result["onnx"]["written"]
    assert told["genai"] == {"file": "model_q4.onnx", "same": told["n"]}, "the smallest file that has passed"
    model = onnxruntime_genai.Model(written.result["release"])
    ids = onnxruntime_genai.Tokenizer(model).encode("the film")
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(ids) + 12, do_sample=False)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    words = ["--precision", "int4", "--max-new-tokens", "12", "--work-dir", str(tmp_path)]
    answer = call_job("predict", written.result["release"], "the film", *words).result
    assert [int(token) for token in generator.get_sequence(0)][len(ids) :] == [
        token for token in answer["ids"] if token not in (0, 255)
    ]


def test_a_config_for_genai_stays_out_where_it_writes_something_else(written: Answer, tmp_path: Path) -> None:
    bundle = shutil.copytree(written.result["release"], tmp_path / "bundle")
    told = offer_genai(bundle, ["the film"], "model_q4.onnx", [[1, 2, 3]])
    assert told == {"left_out": "it writes something else than `job predict` after 1 prompts"}
    assert not (bundle / "genai_config.json").exists()
    told = offer_genai(bundle, ["the film"], "no.onnx", [[1, 2, 3]])
    assert told and "no.onnx" in told["left_out"]


def test_the_report_says_how_long_a_token_takes(written: Answer) -> None:
    cells = json.loads((Path(written.result["release"]) / "metrics.json").read_text())["stages"]["quantize"]["latency"]
    (cell,) = (cell for cell in cells if "written" in cell)
    assert set(cell["ms"]) == {"fp32", "portable", "int4"} and min(cell["ms"].values()) > 0
    assert "written one by one" in (Path(written.result["release"]) / "report.html").read_text()


def test_dynamic_int8_is_a_way_for_tied_embeddings_too(written: Answer, words: dict[str, Any], tmp_path: Path) -> None:
    """The export edited, so nothing is trained again; what the gate says of it is the gate's affair."""
    int8 = {"mode": "dynamic", "targets": ["portable", "avx512_vnni"], "gate": "report_only"}
    answer = run(words | {"export": {"latency": False, "int8": int8}}, tmp_path, "--run-id", written.result["run_id"])
    assert answer.code == 0, answer.stderr
    stages = json.loads((Path(answer.result["release"]) / "metrics.json").read_text())["stages"]
    tried = [rung for target in stages["quantize"]["targets"].values() for rung in target.get("tried", [])]
    assert tried and all("dynamic" in rung["rung"] and "error" not in rung for rung in tried), tried
    assert min(rung["size_ratio"] for rung in tried) < 0.7, "of so small a model the graph is a large part"


def test_a_prompt_longer_than_the_model_keeps_its_end(written: Answer, tmp_path: Path) -> None:
    words = ["--precision", "fp32", "--max-new-tokens", "8", "--work-dir", str(tmp_path)]
    long = call_job("predict", written.result["release"], "the plot " * 300 + "the film", *words)
    assert long.code == 0, long.stderr
    assert len(long.result["ids"]) == 8 or long.result["ended"] == "end"
    all_of_it = call_job(
        "predict", written.result["release"], "the film", "--max-new-tokens", "500", *words[:2], *words[4:]
    )
    assert all_of_it.code == 0, all_of_it.stderr
    assert len(all_of_it.result["ids"]) < 128, "the model's positions end before"


@pytest.mark.parametrize("precision", ["int8", "int4", "auto"])
def test_predict_writes_from_the_small_files_without_torch(written: Answer, precision: str, tmp_path: Path) -> None:
    words = ["--precision", precision, "--max-new-tokens", "8", "--work-dir", str(tmp_path)]
    answer = call_job("predict", written.result["release"], "the film", *words)
    assert answer.code == 0, answer.stderr
    assert answer.result["written"]
    assert len(answer.result["ids"]) <= 8


def test_predict_refuses_a_prompt_of_nothing_and_a_pair(written: Answer, tmp_path: Path) -> None:
    words = ["predict", written.result["release"], "--work-dir", str(tmp_path)]
    assert_refused(call_job(*words, ""), 11, "text 0", "empty")
    assert_refused(call_job(*words, "--pairs", "one\ttwo"), 11, "text 0", "pair")


def test_the_card_speaks_of_writing(written: Answer) -> None:
    card = (Path(written.result["release"]) / "README.md").read_text()
    for words in (
        "pipeline_tag: text-generation",
        "ORTModelForCausalLM",
        "AutoModelForCausalLM",
        "log_likelihood",
        "model_q4.onnx",
    ):
        assert words in card
    assert "labels" not in card


def test_completions_are_learned_and_their_prompts_are_not(words: dict[str, Any], tmp_path: Path) -> None:
    """Every answer is the same word, so it is foretold; the prompts are random letters, which nothing foretells."""
    import random

    letters = random.Random(0)
    for name, count in (("train", 200), ("validation", 40), ("test", 160)):
        with (tmp_path / f"{name}.jsonl").open("w") as file:
            for number in range(count):
                question = " ".join(letters.choice("abcdefgh") for _ in range(20)) + f" {name}{number}:"
                file.write(json.dumps({"question": question, "answer": " a fine film"}) + "\n")
    splits = {name: f"{name}.jsonl" for name in ("train", "validation", "test")}
    columns = {"prompt": "question", "completion": "answer"}
    data = {"source": str(tmp_path), "columns": columns, "max_length": 64, **splits}
    answer = run(words | {"data": data, "store": {"uri": str(tmp_path / "store")}}, tmp_path)
    assert answer.code == 0, answer.stderr
    assert answer.result["metrics"]["test"]["perplexity"] < 1.1
    asked = call_job("predict", answer.result["release"], "a b c d e f g h a b c d test3:", "--work-dir", str(tmp_path))
    assert asked.result["written"] == " a fine film"
    assert asked.result["ended"] == "end"


@pytest.mark.slow
def test_better_compares_language_models_token_by_token(words: dict[str, Any], tmp_path: Path) -> None:
    recipe = words | {"store": {"uri": str(tmp_path / "store")}, "release": {"promote_if": "better"}}
    first = run(recipe, tmp_path, "--run-id", "1")
    assert first.code == 0 and first.result["promoted"], first.stderr
    worse = recipe | {"training": words["training"] | {"max_steps": 4, "save_steps": 4}}
    second = run(worse, tmp_path, "--run-id", "2")
    assert second.code == 0, second.stderr
    assert not second.result["promoted"]
    assert "not better than" in second.result["reason"] and "gain -" in second.result["reason"]
    better = recipe | {"training": words["training"] | {"max_steps": 200, "save_steps": 100}}
    third = run(better, tmp_path, "--run-id", "3")
    assert third.code == 0 and third.result["promoted"], third.stderr


def test_what_a_language_model_cannot_use_is_refused(words: dict[str, Any], tmp_path: Path, tiny_model: Path) -> None:
    labelled = words | {"data": words["data"] | {"columns": {"text": "text", "label": "label"}}}
    assert_refused(run(labelled, tmp_path), 10, "data: columns names", "causal-lm takes")
    assert_refused(run(words | {"baselines": ["majority"]}, tmp_path), 10, "baselines", "majority")
    assert_refused(run(words | {"model": {"id": str(tiny_model)}}, tmp_path), 11, "is an encoder (bert)")


def test_a_model_without_a_head_is_refused_instead_of_trained_from_nothing(
    words: dict[str, Any], tiny_llama: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import LlamaConfig, LlamaModel

    folder = shutil.copytree(tiny_llama, tmp_path / "headless")
    (folder / "model.safetensors").unlink()
    torch.manual_seed(0)
    sizes = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    LlamaModel(LlamaConfig(**sizes)).save_pretrained(folder)
    assert_refused(run(words | {"model": {"id": str(folder)}}, tmp_path), 11, "lm_head.weight")


@pytest.mark.slow
def test_two_ranks_learn_what_one_learns(words: dict[str, Any], tmp_path: Path) -> None:
    """Completions of unlike length: the loss is the sum over all their tokens, however ranks share them."""
    from safetensors.numpy import load_file

    with (tmp_path / "train.jsonl").open("w") as file:
        for number in range(400):
            answer = " film" * (1 + number % 7)
            file.write(json.dumps({"prompt": f"{number}:", "completion": answer}) + "\n")
    data = {"source": str(tmp_path / "train.jsonl"), "columns": {"prompt": "prompt", "completion": "completion"}}
    data |= {"validation": 0.1, "test": 0.4, "max_length": 32}
    training = words["training"] | {
        "max_steps": 12,
        "learning_rate": 1e-3,
        "precision": "fp32",
        "max_micro_batch_size": 4,
    }
    weights = {}
    for ranks in (1, 2):
        recipe = words | {"data": data, "training": training, "store": {"uri": str(tmp_path / f"store-{ranks}")}}
        done = run(recipe | {"distributed": {"processes_per_node": ranks}}, tmp_path, "--run-id", str(ranks))
        assert done.code == 0, done.stderr
        weights[ranks] = load_file(Path(done.result["release"]) / "model.safetensors")
    for name, tensor in weights[1].items():
        assert abs(tensor - weights[2][name]).max() < 1e-4, name


@pytest.mark.slow
def test_a_lora_on_two_sharded_ranks_is_released_whole_with_its_adapter(words: dict[str, Any], tmp_path: Path) -> None:
    lora = {
        "tuning": {"method": "lora", "targets": ["q_proj", "v_proj"]},
        "distributed": {"engine": "deepspeed", "zero_stage": 2, "processes_per_node": 2},
        "training": words["training"] | {"max_steps": 10},
        "export": {"latency": False, "int8": {"gate": "report_only"}},
        "store": {"uri": str(tmp_path / "store")},
    }
    recipe = write_recipe(tmp_path / "recipe.yaml", **(words | lora))
    done = call_job("run", str(recipe), "--work-dir", str(tmp_path / "work"))
    assert done.code == 0, done.stderr
    release = Path(str(done.result["release"]))
    about = json.loads((release / "adapter" / "adapter_config.json").read_text())
    assert about["modules_to_save"] is None, "the head was pre-trained with the body, and stays"
    assert done.result["train"]["trainable_parameters"] == 2 * (64 * 8 + 8 * 64 + 64 * 8 + 8 * 32)
    assert done.result["onnx"]["agreement"] == 1


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}\n{{ message['content'] }}" + END + "{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)


def test_a_model_learns_to_answer_in_conversations_and_its_release_knows_how(
    words: dict[str, Any], tiny_llama: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    (model / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    for split, count in (("train", 320), ("test", 200)):
        rows = [
            [
                {"role": "user", "content": f"{number} goes {'up up up' if number % 2 else 'down down down'}"},
                {"role": "assistant", "content": "higher" if number % 2 else "lower"},
            ]
            for number in range(1000 * (split == "test"), 1000 * (split == "test") + count)
        ]
        lines = [json.dumps({"messages": messages}) + "\n" for messages in rows]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))
    data = {"source": str(tmp_path), "columns": {"messages": "messages"}, "max_length": 64}
    training = words["training"] | {"packing": True, "max_steps": 120}
    recipe = words | {"model": {"id": str(model)}, "data": data, "training": training, "name": "talker"}
    answer = run(recipe | {"export": {"latency": False, "int8": {"targets": ["portable"]}}}, tmp_path)
    assert answer.code == 0, answer.stderr
    scores = answer.result["metrics"]
    assert scores["test"]["perplexity"] < 1.2 < 50 < scores["baselines"]["untrained"]["perplexity"]
    asked = ["5001 goes up up up", "5002 goes down down down", "--chat", "--work-dir", str(tmp_path)]
    told = call_job("predict", answer.result["release"], *asked)
    assert [json.loads(line)["written"] for line in told.stdout.splitlines()] == ["higher", "lower"]
    whole = tmp_path / "talk.jsonl"
    whole.write_text(json.dumps({"messages": [{"role": "user", "content": "5001 goes up up up"}]}) + "\n")
    again = call_job("predict", answer.result["release"], "--file", str(whole), "--work-dir", str(tmp_path))
    assert json.loads(again.stdout)["written"] == "higher"
