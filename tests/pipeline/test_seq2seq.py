"""Sequence to sequence end to end: encoder and decoder are trained, exported as two files, made small, and asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Answer, assert_refused, call_job, write_recipe
from translators import END, ONE_THREAD, PAD, make_model, write_down, write_translations


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder of sentences with their translations, and all words of both languages."""
    folder = tmp_path_factory.mktemp("language")
    return folder, write_translations(folder, {"train": 2000, "validation": 60, "test": 180})


def run(kind: str, language: tuple[Path, list[str]], folder: Path, *words: str, **changes: Any) -> Answer:
    source, vocabulary = language
    model = folder.parent / kind
    if not model.exists():
        make_model(kind, model, vocabulary)
    recipe = write_down(model, source, folder / "store") | changes
    path = write_recipe(folder / "recipe.yaml", **recipe)
    return call_job("run", str(path), "--work-dir", str(folder / "work"), *words, env=ONE_THREAD)


@pytest.fixture(scope="module")
def translated(language: tuple[Path, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Answer:
    """One release of a T5."""
    answer = run("t5", language, tmp_path_factory.mktemp("t5-run"))
    assert answer.code == 0, answer.stderr
    return answer


def read_test(language: tuple[Path, list[str]], count: int) -> list[dict[str, str]]:
    return [json.loads(line) for line in (language[0] / "test.jsonl").read_text().splitlines()[:count]]


def check_numbers(result: dict[str, Any]) -> None:
    """What a release promises: it has learned, fp32 is the trained model, int8 is as good, and writes the same."""
    test, before = result["metrics"]["test"], result["metrics"]["baselines"]["untrained"]
    assert test["token_accuracy"] > 0.9 > 0.2 > before["token_accuracy"]
    assert test["log_likelihood"] > before["log_likelihood"] + 2
    assert test["chrf"] > 0.9 > 0.4 > before["chrf"]
    assert test["rouge_l"] > 0.9 > 0.4 > before["rouge_l"]
    assert result["onnx"]["max_abs_logit_diff"] < 1e-3
    for target, numbers in result["int8"].items():
        assert numbers["accepted"], (target, numbers)
        assert numbers["drop_bound"] <= 0.02 and numbers["agreement"] >= 0.9 <= numbers["decoding"]["agreement"]
        assert numbers["size_ratio"] < 0.6, "of so small a model the graph is a large part"
    told = result["onnx"]["written"]
    assert told["written"]["decoder_model_merged.onnx"] >= told["n"] - 1 == 15


def test_a_translator_is_trained_exported_as_encoder_and_decoder_proven_and_released(translated: Answer) -> None:
    check_numbers(translated.result)
    names = {path.name for path in (Path(translated.result["release"]) / "onnx").iterdir()}
    assert names == {
        "encoder_model.onnx",
        "decoder_model_merged.onnx",
        "encoder_model_quantized.onnx",
        "decoder_model_merged_quantized.onnx",
        "generation_config.json",
    }
    assert "chrf" in translated.stderr and "rouge_l" in translated.stderr


def test_the_release_translates_in_every_consumer_as_in_transformers(
    translated: Answer, language: tuple[Path, list[str]], tmp_path: Path
) -> None:
    from optimum.onnxruntime import ORTModelForSeq2SeqLM
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    release, rows = translated.result["release"], read_test(language, 8)
    tokenizer = AutoTokenizer.from_pretrained(release)
    sources = tokenizer([row["source"] for row in rows], padding=True, return_tensors="pt")
    limits = {"do_sample": False, "max_new_tokens": 12}
    expected = AutoModelForSeq2SeqLM.from_pretrained(release).generate(**sources, **limits).tolist()
    fp32 = ORTModelForSeq2SeqLM.from_pretrained(release, subfolder="onnx")
    assert fp32.generate(**sources, **limits).tolist() == expected
    beams = limits | {"num_beams": 3}
    torch_beams = AutoModelForSeq2SeqLM.from_pretrained(release).generate(**sources, **beams).tolist()
    assert fp32.generate(**sources, **beams).tolist() == torch_beams, "the cache is reordered"
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for precision in ("fp32", "auto"):
        words = ["--precision", precision, "--max-new-tokens", "12", "--file", str(texts), "--work-dir", str(tmp_path)]
        asked = call_job("predict", release, *words)
        assert asked.code == 0, asked.stderr
        answers = [json.loads(line) for line in asked.stdout.splitlines()]
        right = sum(answer["written"] == row["target"] for answer, row in zip(answers, rows, strict=True))
        assert right >= 7
        assert {answer["ended"] for answer in answers} == {"end"}
        if precision == "fp32":
            assert [[PAD, *answer["ids"]] for answer in answers] == [ids[: ids.index(END) + 1] for ids in expected]


def test_the_card_says_how_the_two_files_are_opened_and_that_is_how_they_open(
    translated: Answer, language: tuple[Path, list[str]]
) -> None:
    from transformers import AutoTokenizer

    release = translated.result["release"]
    card = (Path(release) / "README.md").read_text()
    for words in ("pipeline_tag: text2text-generation", "AutoModelForSeq2SeqLM", "decoder_model_merged_quantized.onnx"):
        assert words in card
    lines = [line for line in card.splitlines() if "ORTModelForSeq2SeqLM" in line or "InferenceSession" in line]
    there = {"folder": release}
    exec("\n".join(["import onnxruntime", *lines]), there)  # as a reader of the card would
    row, tokenizer = read_test(language, 1)[0], AutoTokenizer.from_pretrained(release)
    ids = there["model"].generate(**tokenizer(row["source"], return_tensors="pt"), max_new_tokens=12)
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == row["target"]
    assert {entry.name for entry in there["encoder"].get_inputs()} == {"input_ids", "attention_mask"}


def test_what_has_no_source_is_refused(translated: Answer, tmp_path: Path) -> None:
    words = ["predict", translated.result["release"], "--work-dir", str(tmp_path)]
    assert_refused(call_job(*words, "--pairs", "one\ttwo"), 11, "text 0", "pair")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bart", "marian", "pegasus", "mt5"])
def test_other_architectures_go_the_same_way(kind: str, language: tuple[Path, list[str]], tmp_path: Path) -> None:
    export = {"latency": False, "int8": {"targets": ["portable", "int4"]}}
    answer = run(kind, language, tmp_path, "--set", "training.max_steps=240", export=export)
    assert answer.code == 0, answer.stderr
    check_numbers(answer.result)
    assert all("error" not in rung for rung in list_tried(answer)), "every rung writes files that run"
    row = read_test(language, 1)[0]
    asked = call_job("predict", answer.result["release"], row["source"], "--work-dir", str(tmp_path))
    assert asked.result["written"] == row["target"]


def list_tried(answer: Answer) -> list[dict[str, Any]]:
    """Return what is recorded of every rung that a released run has tried."""
    return [rung for target in read_quantized(answer)["targets"].values() for rung in target.get("tried", [])]


def read_quantized(answer: Answer) -> dict[str, Any]:
    """Return what the quantize stage of a released run has recorded."""
    return dict(json.loads((Path(answer.result["release"]) / "metrics.json").read_text())["stages"]["quantize"])


@pytest.mark.slow
def test_dynamic_int8_is_a_way_for_encoder_and_decoder_too(language: tuple[Path, list[str]], tmp_path: Path) -> None:
    int8 = {"mode": "dynamic", "targets": ["portable", "avx512_vnni"], "gate": "report_only"}
    answer = run("t5", language, tmp_path, export={"latency": True, "int8": int8})
    assert answer.code == 0, answer.stderr
    tried = list_tried(answer)
    assert tried and all("dynamic" in rung["rung"] and "error" not in rung for rung in tried), tried
    assert {name for cell in read_quantized(answer)["latency"] for name in cell["ms"]} >= {"torch", "fp32"}


@pytest.mark.slow
def test_better_compares_translators_token_by_token(language: tuple[Path, list[str]], tmp_path: Path) -> None:
    better = {"release": {"promote_if": "better"}}
    first = run("t5", language, tmp_path, "--run-id", "1", **better)
    assert first.code == 0 and first.result["promoted"], first.stderr
    steps = ["--set", "training.max_steps=10", "--set", "export.int8.gate=report_only"]
    second = run("t5", language, tmp_path, "--run-id", "2", *steps, **better)
    assert second.code == 0 and not second.result["promoted"], second.stderr
    assert "not better than" in second.result["reason"] and "gain -" in second.result["reason"]


@pytest.mark.slow
def test_models_without_an_encoder_or_a_decoder_are_refused(
    language: tuple[Path, list[str]], tmp_path: Path, tiny_model: Path
) -> None:
    encoder = run("t5", language, tmp_path, model={"id": str(tiny_model)})
    assert_refused(encoder, 11, "model.id", "no seq2seq-lm model")
    nameless = make_model("t5", tmp_path / "nameless", language[1])
    config = json.loads((nameless / "config.json").read_text())
    (nameless / "config.json").write_text(json.dumps(config | {"decoder_start_token_id": None}))
    (nameless / "generation_config.json").unlink()
    assert_refused(run("t5", language, tmp_path, model={"id": str(nameless)}), 11, "decoder_start_token_id")
