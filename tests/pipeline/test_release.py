"""The quickstart on a slice of its rows, end to end: what is released opens everywhere and verifies byte for byte."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import Released, assert_refused, call_job, quickstart_options
from processes import find_processes

from job.store import open_store
from job.store.release import read_release_manifest
from job.store.transfer import download_files

SENTENCE = "I am absolutely amazed with this new and revolutionary AI device"


@pytest.fixture(scope="module")
def bundle(released: Released, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The release, downloaded as a consumer would."""
    folder = tmp_path_factory.mktemp("bundle")
    store, manifest = read_release_manifest(released.uri)
    download_files(store, manifest, folder)
    return folder


@pytest.fixture(scope="module")
def texts(assets: Path) -> list[str]:
    with (assets / "movie-reviews" / "test.csv").open(encoding="utf-8", newline="") as file:
        return [row["text"] for row in csv.DictReader(file)][:200]


def test_the_result_line_says_what_was_proven(released: Released) -> None:
    result = released.result
    assert (result["status"], result["exit_code"], result["promoted"]) == ("released", 0, True)
    assert result["metrics"]["test"]["n"] == 2182
    assert result["metrics"]["test"]["accuracy"] > 0.75
    low, high = result["metrics"]["test"]["accuracy_interval"]
    assert low < result["metrics"]["test"]["accuracy"] < high
    assert result["metrics"]["baselines"]["untrained"]["accuracy"] < 0.6
    assert result["onnx"]["max_abs_logit_diff"] < 1e-3
    portable = result["int8"]["portable"]
    assert portable["accepted"] is True
    assert portable["drop"] <= portable["drop_bound"] <= 0.02
    assert portable["agreement"] >= 0.95
    assert portable["size_ratio"] < 0.3
    assert portable["measured_on"]


def test_progress_and_tables_go_to_stderr_and_stdout_is_one_json_line(released: Released) -> None:
    assert len(released.answer.stdout.strip().splitlines()) == 1
    for word in (
        '"step": 50, "steps": 63',
        "before training",
        "fine-tuned",
        "int8 portable",
        "job predict",
        released.uri,
    ):
        assert word in released.answer.stderr


def test_result_json_lies_in_work_folder_and_store(released: Released) -> None:
    run_id = released.result["run_id"]
    local = json.loads((released.work / "runs" / run_id / "result.json").read_text())
    store = open_store(released.uri.partition("/models/")[0])
    blob = store.read(f"runs/{run_id}/result.json")
    assert blob is not None
    assert json.loads(blob.data) == local == released.result


def test_fp32_labels_are_equal_in_transformers_optimum_and_predict(
    released: Released, bundle: Path, texts: list[str], tmp_path: Path
) -> None:
    import torch
    from optimum.onnxruntime import ORTModelForSequenceClassification
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bundle)
    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    expected = AutoModelForSequenceClassification.from_pretrained(bundle)(**batch).logits.detach()
    exported = ORTModelForSequenceClassification.from_pretrained(bundle, subfolder="onnx", file_name="model.onnx")
    found = exported(**batch).logits
    assert torch.equal(expected.argmax(-1), found.argmax(-1))
    quantized = ORTModelForSequenceClassification.from_pretrained(
        bundle, subfolder="onnx", file_name="model_quantized.onnx"
    )
    agreement = (quantized(**batch).logits.argmax(-1) == expected.argmax(-1)).float().mean()
    assert agreement >= 0.95
    answer = subprocess.run(
        [sys.executable, "-m", "job", "predict", released.uri, "--precision", "fp32", "--work-dir", str(tmp_path)],
        input="\n".join(texts), capture_output=True, text=True, check=True,
    )  # fmt: skip
    labels = [json.loads(line)["label"] for line in answer.stdout.splitlines()]
    names = exported.config.id2label
    assert labels == [names[int(index)] for index in np.asarray(expected.argmax(-1))]


def test_predict_answers_without_torch_or_transformers(released: Released, tmp_path: Path) -> None:
    program = (
        "import sys; from job.__main__ import app\n"
        f"sys.argv = ['job', 'predict', {released.uri!r}, {SENTENCE!r}, '--work-dir', {str(tmp_path)!r}]\n"
        "try: app()\nexcept SystemExit as done: code = done.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules); sys.exit(code)"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["label"] == "positive"


def test_the_model_address_follows_the_current_release(released: Released, tmp_path: Path) -> None:
    model = released.uri.rpartition("/")[0]
    answer = call_job("predict", model, "a waste of time", "--work-dir", str(tmp_path))
    assert json.loads(answer.stdout)["label"] == "negative"


def test_verify_accepts_release_model_checkpoint_and_run(released: Released, tmp_path: Path) -> None:
    store = released.uri.partition("/models/")[0]
    pointer = open_store(f"{store}/runs/{released.result['run_id']}").read("current.json")
    assert pointer is not None
    checkpoint = json.loads(pointer.data)["manifest"].rpartition("/")[0]
    for uri in (
        released.uri,
        released.uri.rpartition("/")[0],
        f"{store}/runs/{released.result['run_id']}/{checkpoint}",
        f"{store}/runs/{released.result['run_id']}",
    ):
        answer = call_job("verify", uri, "--work-dir", str(tmp_path))
        assert answer.code == 0, answer.stderr
        assert "match" in answer.stdout


def test_verify_names_the_object_with_a_flipped_byte(released: Released, bundle: Path, tmp_path: Path) -> None:
    store = open_store(released.uri)
    for name in ("config.json", "onnx/model.onnx", "report.html", "manifest.json"):
        original = (bundle / name).read_bytes() if name != "manifest.json" else store.read(name).data  # type: ignore[union-attr]
        position = len(original) // 2
        damaged = original[:position] + bytes([original[position] ^ 1]) + original[position + 1 :]
        store.write(name, damaged)
        try:
            assert_refused(call_job("verify", released.uri, "--work-dir", str(tmp_path)), 17, name)
        finally:
            store.write(name, original)
    assert call_job("verify", released.uri, "--work-dir", str(tmp_path)).code == 0


def test_a_missing_object_is_named(released: Released, bundle: Path, tmp_path: Path) -> None:
    store = open_store(released.uri)
    store.delete(["tokenizer.json"])
    try:
        assert_refused(call_job("verify", released.uri, "--work-dir", str(tmp_path)), 17, "tokenizer.json", "missing")
    finally:
        store.upload(bundle / "tokenizer.json", "tokenizer.json")


def _command(released: Released, assets: Path, work: Path) -> list[str]:
    """The words that `released` was made with, in a work folder of one's own."""
    store = released.uri.partition("/models/")[0]
    return ["run", "quickstart", "--work-dir", str(work), *quickstart_options(assets, store)]


def test_a_finished_run_is_not_done_again_and_leaves_no_process_that_was_to_do_it(
    released: Released, assets: Path
) -> None:
    folder = released.work / "runs" / released.result["run_id"]
    log = (folder / "logs" / "run_rank-0.log").read_bytes()
    again = call_job(*_command(released, assets, released.work))
    assert again.code == 0, again.stderr
    assert "already released" in again.stderr
    assert (folder / "logs" / "run_rank-0.log").read_bytes().startswith(log), "what the training has said stays"
    assert not find_processes(str(folder))
    assert again.result["release"] == released.uri
    assert again.result["metrics"] == released.result["metrics"]


def test_a_finished_run_is_not_done_again_on_an_empty_disk(released: Released, assets: Path, tmp_path: Path) -> None:
    again = call_job(*_command(released, assets, tmp_path))
    assert again.code == 0, again.stderr
    assert "already released" in again.stderr
    assert not (tmp_path / "runs" / released.result["run_id"] / "final").exists()


def test_show_lists_run_and_release(released: Released) -> None:
    store = released.uri.partition("/models/")[0]
    listing = call_job("show", store).stdout
    assert released.result["run_id"] in listing
    assert released.uri.rpartition("/")[2] in listing
    assert "train" in call_job("show", f"{store}/runs/{released.result['run_id']}").stdout


def test_the_manifest_says_what_the_release_was_made_of(released: Released) -> None:
    about = read_release_manifest(released.uri)[1].about
    assert (about["name"], about["run_id"]) == ("quickstart", released.result["run_id"])
    assert about["model"]["sha256"] and about["data"]["fingerprint"] and about["recipe_sha256"]
    assert about["versions"]["onnxruntime"]
    assert about["parent"] is None
    assert not str(about).count("/")


def test_the_card_tells_licence_limits_and_how_each_consumer_opens_it(bundle: Path) -> None:
    card = (bundle / "README.md").read_text()
    for words in (
        "ORTModelForSequence",
        "AutoModelForSequence",
        "@huggingface/transformers",
        "onnxruntime",
        "job predict",
    ):
        assert words in card
    assert "Licence of the base model: apache-2.0" in card
    assert "overflows on none" in card


def test_the_bundle_has_the_files_of_the_contract(bundle: Path) -> None:
    names = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    wanted = {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md", "metrics.json",
        "report.html", "onnx/model.onnx", "onnx/model_quantized.onnx", "plots/quality.png", "plots/confusion.png",
        "plots/loss.png",
    }  # fmt: skip
    assert wanted <= names
    card = (bundle / "README.md").read_text()
    assert "/tmp" not in card
    assert str(Path.home()) not in card + (bundle / "metrics.json").read_text()


def test_int8_files_are_not_fused_into_what_is_slower(bundle: Path, tmp_path: Path) -> None:
    int8 = [path for path in (bundle / "onnx").glob("*.onnx") if path.name != "model.onnx"]
    assert "model_quantized.onnx" in {path.name for path in int8}
    for path in int8:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath, options.log_severity_level = str(tmp_path / path.name), 3
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        kinds = {node.op_type for node in onnx.load(tmp_path / path.name).graph.node}
        assert "LayerNormalization" in kinds
        assert "SkipLayerNormalization" not in kinds
