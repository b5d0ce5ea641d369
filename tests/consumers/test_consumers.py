"""One released folder, every consumer: the same answers in Optimum, onnxruntime, transformers and transformers.js.

`make test-cluster` runs this, for it needs Node. The folder is opened as it is, without a network.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from translators import ONE_THREAD, make_model, write_down, write_translations

from job.store.release import read_release_manifest
from job.store.transfer import download_files

pytestmark = pytest.mark.cluster

HERE = Path(__file__).parent
ROWS = 200
INT8_DIFFERENCES = 1
"""Rows of 200 in which int8 may differ between consumers, who pad other rows together."""


@pytest.fixture(scope="module")
def bundle(s3: str, assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release of the quickstart on a slice of its rows, with Triton's layout, downloaded."""
    work = tmp_path_factory.mktemp("work")
    options = (
        f"model.id={assets / 'minilm-l6'}", f"data.source={assets / 'movie-reviews'}", "data.limit=2000",
        f"store.uri={s3}/consumed", "baselines=[]", "export.latency=false", "export.triton=true",
    )  # fmt: skip
    command = [sys.executable, "-m", "job", "run", "quickstart", "--work-dir", str(work)]
    command += [word for option in options for word in ("--set", option)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    store, manifest = read_release_manifest(json.loads(done.stdout.splitlines()[-1])["release"])
    folder = tmp_path_factory.mktemp("models") / "quickstart"
    download_files(store, manifest, folder)
    return folder


@pytest.fixture(scope="module")
def texts(assets: Path) -> list[str]:
    with (assets / "movie-reviews" / "test.csv").open(encoding="utf-8", newline="") as file:
        return [row["text"] for row in csv.DictReader(file)][:ROWS]


@pytest.fixture(scope="module")
def expected(bundle: Path, texts: list[str]) -> list[str]:
    """What transformers answers from model.safetensors."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(bundle)
    batch = AutoTokenizer.from_pretrained(bundle)(texts, padding=True, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        answers = model(**batch).logits.argmax(-1)
    return [model.config.id2label[int(answer)] for answer in answers]


@pytest.fixture(scope="module")
def node_modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ask.mjs and transformers.js, which npm checks by the hashes of package-lock.json."""
    folder = tmp_path_factory.mktemp("node")
    for name in ("package.json", "package-lock.json", "ask.mjs"):
        shutil.copy(HERE / name, folder)
    words = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def ask_optimum(bundle: Path, file: str, texts: list[str]) -> list[str]:
    from optimum.onnxruntime import ORTModelForSequenceClassification
    from transformers import AutoTokenizer

    model = ORTModelForSequenceClassification.from_pretrained(bundle, subfolder="onnx", file_name=file)
    tokenizer = AutoTokenizer.from_pretrained(bundle)
    answers = [model(**tokenizer(text, truncation=True, return_tensors="pt")).logits.argmax(-1) for text in texts]
    return [model.config.id2label[int(answer)] for answer in answers]


def ask_onnxruntime(bundle: Path, file: str, texts: list[str]) -> list[str]:
    """Nothing but onnxruntime, tokenizers and config.json."""
    import onnxruntime
    from tokenizers import Tokenizer

    session = onnxruntime.InferenceSession(bundle / "onnx" / file, providers=["CPUExecutionProvider"])
    tokenizer, names = Tokenizer.from_file(str(bundle / "tokenizer.json")), {i.name for i in session.get_inputs()}
    labels = json.loads((bundle / "config.json").read_text())["id2label"]
    found = []
    for text in texts:
        encoded = tokenizer.encode(text)
        feed = {"input_ids": encoded.ids, "attention_mask": encoded.attention_mask, "token_type_ids": encoded.type_ids}
        arrays = {name: np.array([values], dtype=np.int64) for name, values in feed.items() if name in names}
        found.append(labels[str(int(session.run(["logits"], arrays)[0].argmax()))])
    return found


def ask_javascript(
    bundle: Path, dtype: str, texts: list[str], folder: Path, task: str = "text-classification"
) -> list[str]:
    words = ["node", "ask.mjs", str(bundle.parent), bundle.name, task, dtype]
    done = subprocess.run(words, cwd=folder, input=json.dumps(texts), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout.splitlines()[-1]))


def ask_predict(bundle: Path, precision: str, texts: list[str]) -> list[str]:
    words = [sys.executable, "-m", "job", "predict", str(bundle), "--precision", precision, "--format", "jsonl"]
    lines = "\n".join(json.dumps(text) for text in texts)
    done = subprocess.run(words, input=lines, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line)["label"] for line in done.stdout.splitlines()]


def test_fp32_labels_are_equal_everywhere(
    bundle: Path, texts: list[str], expected: list[str], node_modules: Path
) -> None:
    assert ask_optimum(bundle, "model.onnx", texts) == expected
    assert ask_onnxruntime(bundle, "model.onnx", texts) == expected
    assert ask_javascript(bundle, "fp32", texts, node_modules) == expected
    assert ask_predict(bundle, "fp32", texts) == expected


def test_int8_labels_are_nearly_equal_everywhere(bundle: Path, texts: list[str], node_modules: Path) -> None:
    file = "model_quantized.onnx"
    optimum = ask_optimum(bundle, file, texts)
    others = {
        "onnxruntime": ask_onnxruntime(bundle, file, texts),
        "transformers.js": ask_javascript(bundle, "q8", texts, node_modules),
    }
    for name, labels in others.items():
        assert sum(a != b for a, b in zip(optimum, labels, strict=True)) <= INT8_DIFFERENCES, name


@pytest.fixture(scope="module", params=["t5", "bart"])
def translator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A release of a model of encoder and decoder, and sources to translate."""
    work = tmp_path_factory.mktemp("translator")
    model = make_model(request.param, work / "base", write_translations(work, {"train": 2000, "test": 180}))
    recipe = write_down(model, work, work / "store")
    recipe["data"]["validation"] = 0.05
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "job", "run", str(work / "recipe.yaml"), "--work-dir", str(work / "work")]
    environment = os.environ | ONE_THREAD | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    rows = (work / "test.jsonl").read_text().splitlines()[:20]
    return Path(json.loads(done.stdout.splitlines()[-1])["release"]), [json.loads(row)["source"] for row in rows]


@pytest.mark.parametrize("dtype", ["fp32", "q8"])
def test_transformers_js_translates_as_transformers_does(
    translator: tuple[Path, list[str]], dtype: str, node_modules: Path
) -> None:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    release, texts = translator
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(release), AutoTokenizer.from_pretrained(release)
    ids = [model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=12)[0] for text in texts]
    expected = [tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    found = ask_javascript(release, dtype, texts, node_modules, "text2text-generation")
    assert sum(a != b for a, b in zip(expected, found, strict=True)) <= (INT8_DIFFERENCES if dtype == "q8" else 0)


def test_triton_finds_the_model_where_it_looks(bundle: Path) -> None:
    import onnx

    folder = bundle / "triton" / "quickstart"
    model, config = onnx.load(folder / "1" / "model.onnx"), (folder / "config.pbtxt").read_text()
    assert 'name: "quickstart"' in config
    assert 'platform: "onnxruntime_onnx"' in config
    for kind, entries in (("input", model.graph.input), ("output", model.graph.output)):
        block = config.partition(f"\n{kind} [")[2].partition("\n]")[0]
        assert {f'name: "{entry.name}"' in block for entry in entries} == {True}, kind
        assert block.count("name:") == len(entries)
    assert "TYPE_INT64" in config.partition("\noutput [")[0]
    assert "TYPE_FP32" in config.partition("\noutput [")[2]
