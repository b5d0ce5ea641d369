"""Prediction from a released bundle gives the labels of the model that was released, and trusts no damaged byte."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from job.errors import DataError, NotFound, NoValidCheckpoint, SecurityRefused
from job.predict import open_predictor
from job.predict.bundle import fetch_bundle
from job.predict.reader import _group_by_length
from job.processor import count_processors
from job.recipe.schema import Store as Address
from job.store import ModelPointer, open_store, publish_release

WORDS = ["good", "bad", "film", "plot", "actor", "never", "always", "the", "a", "of", "not", "very", "dull", "bright"]
LABELS = ["awful", "dull", "fair", "great"]
MAX_LENGTH = 48
NEEDED = {"config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}


def mixed_texts() -> list[str]:
    """60 texts from none to hundreds of words, in no order of length."""
    source = random.Random(7)
    texts = [" ".join(source.choices(WORDS, k=source.randint(1, 60))) for _ in range(50)]
    texts += ["", " ", "?!", "x" * 3000, "good " * 900, "[SEP] [PAD]"]
    texts += ["😀 👩‍👩‍👧 good", "ünïcödé 電影", "\x00\x01", "a\tb\nc\r\n"]
    source.shuffle(texts)
    return texts


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer BERT with four labels and a tokenizer of its own, in the Hugging Face layout."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *letters, *(f"##{mark}" for mark in letters)]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(vocabulary)), encoding="utf-8")
    tokenizer = BertTokenizerFast(vocab_file=str(folder / "vocab.txt"), model_max_length=MAX_LENGTH)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=MAX_LENGTH, initializer_range=0.4, id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
    )  # fmt: skip
    BertForSequenceClassification(config).eval().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bundle(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model exported as the released folder holds it: fp32 and portable int8."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from optimum.exporters.onnx import main_export

    exported, folder = tmp_path_factory.mktemp("exported"), tmp_path_factory.mktemp("made") / "bundle"
    main_export(str(tiny_model), exported, task="text-classification", do_validation=False)
    shutil.copytree(tiny_model, folder)
    (folder / "onnx").mkdir()
    shutil.move(exported / "model.onnx", folder / "onnx/model.onnx")
    quantize_dynamic(folder / "onnx/model.onnx", folder / "onnx/model_quantized.onnx", weight_type=QuantType.QInt8)
    return folder


@pytest.fixture(scope="session")
def torch_labels(tiny_model: Path) -> list[str]:
    """What transformers says of `mixed_texts`, one text at a time."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(tiny_model).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    with torch.no_grad():
        rows = [model(**tokenizer(text, truncation=True, return_tensors="pt")).logits[0] for text in mixed_texts()]
    return [model.config.id2label[int(row.argmax())] for row in rows]


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    """A bundle that the test may damage."""
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


@pytest.fixture
def store(tmp_path: Path) -> str:
    return str(tmp_path / "store")


def publish(base: str, folder: Path, run_id: str = "run-1") -> str:
    return publish_release(Address(uri=base), folder, {"name": "tiny", "run_id": run_id}, lambda: None)


def promote(base: str, version: str) -> None:
    ModelPointer.of(Address(uri=base), "tiny").promote(version)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def labels(answers: list[dict[str, Any]]) -> list[str]:
    return [answer["label"] for answer in answers]


def test_labels_are_those_of_transformers_in_the_order_of_the_texts(
    bundle: Path, torch_labels: list[str], tmp_path: Path
) -> None:
    texts = mixed_texts()
    answers = open_predictor(str(bundle), tmp_path, precision="fp32").predict(texts)
    assert len(texts) >= 50
    assert [answer["text"] for answer in answers] == texts
    assert labels(answers) == torch_labels
    assert len(set(torch_labels)) > 1, "a model that always says the same proves nothing"


def test_scores_are_probabilities_of_every_label(bundle: Path, tmp_path: Path) -> None:
    for answer in open_predictor(str(bundle), tmp_path).predict(mixed_texts()):
        assert list(answer["scores"]) == LABELS
        assert sum(answer["scores"].values()) == pytest.approx(1, abs=1e-5)
        assert answer["score"] == max(answer["scores"].values()) == answer["scores"][answer["label"]]


def test_the_company_of_a_text_does_not_change_its_label(bundle: Path, tmp_path: Path) -> None:
    predictor, texts = open_predictor(str(bundle), tmp_path, precision="fp32", threads=1), mixed_texts()
    together = predictor.predict(texts)
    alone = [predictor.predict([text])[0] for text in texts]
    assert labels(alone) == labels(together)
    assert labels(predictor.predict(texts[::-1])) == labels(together)[::-1]
    for one, other in zip(alone, together, strict=True):
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-5)


def test_a_pair_is_read_as_transformers_reads_it(bundle: Path, tiny_model: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    pairs = [("good film", "bad plot"), ("", "never " * 80), ("slow " * 30, "quick " * 30)]
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    with torch.no_grad():
        shares = [
            model(**tokenizer(*pair, truncation=True, return_tensors="pt")).logits[0].softmax(-1).tolist()
            for pair in pairs
        ]
    answers = open_predictor(str(bundle), tmp_path, precision="fp32").predict(pairs)
    for answer, expected in zip(answers, shares, strict=True):
        assert list(answer["scores"].values()) == pytest.approx(expected, abs=1e-4)


def test_texts_of_like_length_are_computed_together() -> None:
    assert list(_group_by_length([5, 400, 6, 1, 401], 2)) == [[3, 0], [2, 1], [4]]
    assert list(_group_by_length([5, 400, 6, 1, 401], 3)) == [[3, 0, 2], [1, 4]]
    assert [len(group) for group in _group_by_length([512] * 40, 32)] == [16, 16, 8], "memory is bounded too"
    assert list(_group_by_length([100_000], 32)) == [[0]]


def test_no_texts_give_no_answers(bundle: Path, tmp_path: Path) -> None:
    assert open_predictor(str(bundle), tmp_path).predict([]) == []


@pytest.mark.parametrize("text", [None, 7, ["a", "b"], ("a", "b", "c"), "\ud800"])
def test_what_is_no_text_is_refused_naming_its_row(bundle: Path, tmp_path: Path, text: Any) -> None:
    with pytest.raises(DataError, match="text 1: "):
        open_predictor(str(bundle), tmp_path).predict(["good", text])


def test_a_bad_text_is_named_by_its_place_among_all(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.predict.reader._WINDOW_ROWS", 2)
    predictor, texts = open_predictor(str(bundle), tmp_path), ["good", "bad", "good", "bad", None]
    with pytest.raises(DataError, match="text 4: "):
        predictor.predict(texts)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="text 4: "):
        list(predictor.stream(texts))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("architecture", "fine", "wrong"),
    [
        ("BertForTokenClassification", "good", ("a", "b")),
        ("BertForQuestionAnswering", ("who", "good"), "no context"),
        ("BertForMaskedLM", "a [MASK] film", "no mask"),
    ],
)
def test_a_text_that_a_task_cannot_read_is_named_by_its_place_among_all(
    copy: Path, tmp_path: Path, architecture: str, fine: Any, wrong: Any
) -> None:
    edit_json(copy / "config.json", architectures=[architecture])
    with pytest.raises(DataError, match="text 4097: "):
        open_predictor(str(copy), tmp_path).encode([fine, wrong], 4096)  # type: ignore[attr-defined]


def write_decoder(path: Path) -> None:
    """Write an ONNX file with the inputs and outputs of a decoder, which says the same token for ever."""
    import onnx

    ids = onnx.helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, [1, "tokens"])
    past, present, logits = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 1, 1])
        for name in ("past_key_values.0.key", "present.0.key", "logits")
    )
    nodes = [
        onnx.helper.make_node("Cast", ["input_ids"], ["floats"], to=onnx.TensorProto.FLOAT),
        onnx.helper.make_node("Unsqueeze", ["floats", "last"], ["logits"]),
        onnx.helper.make_node("Identity", ["past_key_values.0.key"], ["present.0.key"]),
    ]
    last = onnx.helper.make_tensor("last", onnx.TensorProto.INT64, [1], [2])
    graph = onnx.helper.make_graph(nodes, "decoder", [ids, past], [logits, present], [last])
    onnx.save(onnx.helper.make_model(graph, ir_version=9, opset_imports=[onnx.helper.make_opsetid("", 17)]), path)


def test_a_conversation_with_a_lone_surrogate_is_refused_naming_its_row(copy: Path, tmp_path: Path) -> None:
    write_decoder(copy / "onnx/model.onnx")
    edit_json(copy / "config.json", architectures=["GPT2LMHeadModel"])
    (copy / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    writer = open_predictor(str(copy), tmp_path, precision="fp32", max_new_tokens=2)
    talk = [[{"role": "user", "content": said}] for said in ("good", "good \ud800")]
    assert writer.predict(talk[:1])[0]["ended"] == "length"
    with pytest.raises(DataError, match="text 1: holds a lone surrogate"):
        writer.predict(talk)


def test_more_threads_than_processors_are_not_started(bundle: Path, tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/task"))
    predictor = open_predictor(str(bundle), tmp_path, threads=500)
    assert predictor.threads == count_processors()
    assert len(os.listdir("/proc/self/task")) < before + 100
    assert open_predictor(str(bundle), tmp_path, threads=1).threads == 1


def test_auto_takes_int8_where_the_bundle_has_it_and_fp32_elsewhere(copy: Path, tmp_path: Path) -> None:
    assert open_predictor(str(copy), tmp_path).model_path.name == "model_quantized.onnx"
    assert open_predictor(str(copy), tmp_path, precision="fp32").model_path.name == "model.onnx"
    (copy / "onnx/model_quantized.onnx").rename(copy / "onnx/model_int8_avx2.onnx")
    assert open_predictor(str(copy), tmp_path).model_path.name == "model.onnx"
    assert open_predictor(str(copy), tmp_path, precision="avx2").model_path.name == "model_int8_avx2.onnx"
    with pytest.raises(NotFound, match=r"'int8' needs onnx/model_quantized\.onnx, but the bundle has onnx/model\.onnx"):
        open_predictor(str(copy), tmp_path, precision="int8")


def test_the_current_release_is_followed_and_a_pinned_one_stays(copy: Path, store: str, tmp_path: Path) -> None:
    first = publish(store, copy)
    promote(store, first)
    edit_json(copy / "config.json", id2label={str(index): label.upper() for index, label in enumerate(LABELS)})
    second = publish(store, copy, "run-2")
    model, cache = f"{store}/models/tiny", tmp_path / "cache"
    before = open_predictor(model, cache).predict(["good"])[0]
    promote(store, second)
    after = open_predictor(model, cache).predict(["good"])[0]
    pinned = open_predictor(f"{model}/{first}", cache).predict(["good"])[0]
    assert after["label"] == before["label"].upper() != before["label"]
    assert pinned == before
    assert open_predictor(f"file://{model}/", cache).predict(["good"])[0] == after


def test_a_release_in_s3_is_downloaded_once_and_only_what_prediction_needs(copy: Path, s3: str, tmp_path: Path) -> None:
    base, cache = f"{s3}/predict", tmp_path / "cache"
    version = publish(base, copy)
    promote(base, version)
    model = f"{base}/models/tiny"
    here = open_predictor(str(copy), tmp_path).predict(mixed_texts())
    assert open_predictor(model, cache).predict(mixed_texts()) == here
    (folder,) = cache.iterdir()
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == NEEDED | {"onnx/model_quantized.onnx"}
    open_store(f"{model}/{version}").delete(list(files))
    assert fetch_bundle(model, cache) == folder, "nothing is left to download from"
    assert fetch_bundle(f"{model}/{version}", cache, "fp32") == folder
    assert (folder / "onnx/model.onnx").is_file()


def test_a_damaged_cache_is_fetched_again(copy: Path, s3: str, tmp_path: Path) -> None:
    base = f"{s3}/predict-damaged"
    uri = f"{base}/models/tiny/{publish(base, copy)}"
    folder = fetch_bundle(uri, tmp_path / "cache")
    flip_byte(folder / "onnx/model_quantized.onnx")
    fetch_bundle(uri, tmp_path / "cache")
    assert (folder / "onnx/model_quantized.onnx").read_bytes() == (copy / "onnx/model_quantized.onnx").read_bytes()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "onnx/model_quantized.onnx"])
def test_a_flipped_byte_is_refused_naming_the_file(copy: Path, store: str, name: str, tmp_path: Path) -> None:
    version = publish(store, copy)
    released = Path(store, "models/tiny", version)
    for folder in (copy, released):
        flip_byte(folder / name)
        with pytest.raises(NoValidCheckpoint, match=name) as caught:
            open_predictor(str(folder), tmp_path)
        assert caught.value.exit_code == 17


def test_a_flipped_byte_in_s3_is_refused_naming_the_object(copy: Path, s3: str, tmp_path: Path) -> None:
    base = f"{s3}/predict-flipped"
    uri = f"{base}/models/tiny/{publish(base, copy)}"
    flip_byte(copy / "onnx/model_quantized.onnx")
    open_store(uri).upload(copy / "onnx/model_quantized.onnx", "onnx/model_quantized.onnx")
    with pytest.raises(NoValidCheckpoint, match=r"onnx/model_quantized\.onnx: does not match"):
        open_predictor(uri, tmp_path)


def test_a_file_that_the_manifest_names_but_the_folder_lacks_is_named(copy: Path, store: str, tmp_path: Path) -> None:
    publish(store, copy)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(NoValidCheckpoint, match=r"tokenizer\.json: named by manifest\.json but missing"):
        open_predictor(str(copy), tmp_path)


def test_what_is_no_bundle_is_not_found(copy: Path, s3: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for uri in (str(tmp_path / "empty"), str(tmp_path / "nowhere"), f"{s3}/nowhere/models/x", "https://example.org/x"):
        with pytest.raises(NotFound) as caught:
            open_predictor(uri, tmp_path / "cache")
        assert caught.value.exit_code == 13
    (copy / "tokenizer.json").unlink()
    with pytest.raises(NotFound, match=r"has no tokenizer\.json"):
        open_predictor(str(copy), tmp_path)


def test_a_bundle_of_another_task_is_refused(copy: Path, tmp_path: Path) -> None:
    edit_json(copy / "config.json", architectures=["BertForMultipleChoice"])
    with pytest.raises(NotFound, match="BertForMultipleChoice"):
        open_predictor(str(copy), tmp_path)


DAMAGES = [
    pytest.param("onnx/model_quantized.onnx", b"no protobuf", id="model"),
    pytest.param("onnx/model_quantized.onnx", b"", id="empty-model"),
    pytest.param("tokenizer.json", b"{}", id="tokenizer"),
    pytest.param("tokenizer_config.json", b"[", id="tokenizer-config"),
    pytest.param("config.json", b"[" * 100_000, id="config-nested"),
    pytest.param("config.json", b'{"architectures": ["XForSequenceClassification"], "id2label": [1]}', id="labels"),
]


@pytest.mark.parametrize(("name", "data"), DAMAGES)
def test_a_broken_file_without_a_manifest_is_named(copy: Path, name: str, data: bytes, tmp_path: Path) -> None:
    (copy / name).write_bytes(data)
    with pytest.raises(NoValidCheckpoint, match=Path(name).name):
        open_predictor(str(copy), tmp_path)


def test_a_config_with_more_labels_than_the_model_gives_is_refused(copy: Path, tmp_path: Path) -> None:
    edit_json(copy / "config.json", id2label={str(index): f"label {index}" for index in range(7)})
    with pytest.raises(NoValidCheckpoint, match="7 labels"):
        open_predictor(str(copy), tmp_path).predict(["good"])


def test_a_tokenizer_without_a_limit_stops_at_what_the_model_has(copy: Path, tmp_path: Path) -> None:
    edit_json(copy / "tokenizer_config.json", model_max_length=int(1e30))
    long = "good " * 900
    limited = open_predictor(str(copy), tmp_path, precision="fp32").predict([long])
    assert limited[0]["label"] in LABELS


def test_external_data_that_is_hard_linked_is_refused(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"not of this bundle")
    (copy / "onnx/model.onnx_data").hardlink_to(tmp_path / "secret")
    with pytest.raises(SecurityRefused, match=r"model\.onnx_data: is hard-linked"):
        open_predictor(str(copy), tmp_path, precision="fp32")


def move_weights(model: Path, place: str) -> None:
    """Let an ONNX file keep its weights in a file of its own, at `place` beside it."""
    import onnx

    loaded = onnx.load(model)
    model.unlink()
    onnx.save_model(loaded, model, save_as_external_data=True, location="weights", size_threshold=0)
    (model.parent / place).parent.mkdir(exist_ok=True)
    (model.parent / "weights").rename(model.parent / place)
    loaded = onnx.load(model, load_external_data=False)
    for tensor in loaded.graph.initializer:
        for entry in tensor.external_data:
            entry.value = place if entry.key == "location" else entry.value
    model.write_bytes(loaded.SerializeToString())


@pytest.mark.parametrize("place", ["hard.bin", "below/hard.bin", "model.onnx_data", "model_quantized.onnx"])
def test_weights_that_are_hard_linked_are_refused_whatever_they_are_called(
    copy: Path, tmp_path: Path, place: str
) -> None:
    move_weights(copy / "onnx/model.onnx", place)
    assert open_predictor(str(copy), tmp_path, precision="fp32").predict(["good"])[0]["label"] in LABELS
    (tmp_path / "secret").hardlink_to(copy / "onnx" / place)
    with pytest.raises(SecurityRefused, match=rf"{place}: is hard-linked") as caught:
        open_predictor(str(copy), tmp_path, precision="fp32")
    assert caught.value.exit_code == 19


def test_weights_that_are_hard_linked_are_refused_behind_a_symlink_too(copy: Path, tmp_path: Path) -> None:
    (copy / "blobs").mkdir()
    move_weights(copy / "onnx/model.onnx", "../blobs/hard.bin")
    (copy / "onnx/model.onnx").rename(copy / "blobs/model")
    (copy / "onnx/model.onnx").symlink_to("../blobs/model")
    (tmp_path / "secret").hardlink_to(copy / "blobs/hard.bin")
    with pytest.raises(SecurityRefused, match=r"hard\.bin: is hard-linked"):
        open_predictor(str(copy), tmp_path, precision="fp32")


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_copy_made_of_hard_links_opens(copy: Path, store: str, tmp_path: Path, precision: str) -> None:
    publish(store, copy)
    linked = shutil.copytree(copy, tmp_path / "linked", copy_function=os.link)
    assert open_predictor(str(linked), tmp_path, precision).predict(["good"])[0]["label"] in LABELS


def test_weights_of_their_own_open_beside_files_that_are_hard_linked(copy: Path, tmp_path: Path) -> None:
    move_weights(copy / "onnx/model.onnx", "model.onnx_data")
    for path in copy.rglob("*"):
        if path.is_file() and path.name != "model.onnx_data":
            (tmp_path / path.name).hardlink_to(path)
    assert open_predictor(str(copy), tmp_path, precision="fp32").predict(["good"])[0]["label"] in LABELS


def test_a_snapshot_made_of_symlinks_opens(copy: Path, store: str, tmp_path: Path) -> None:
    publish(store, copy)
    snapshot = tmp_path / "snapshot"
    for path in copy.rglob("*"):
        if path.is_file():
            link = snapshot / path.relative_to(copy)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    assert open_predictor(str(snapshot), tmp_path).predict(["good"])[0]["label"] in LABELS


def test_predicting_imports_neither_torch_nor_transformers(bundle: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from job.predict import open_predictor\n"
        "print(open_predictor(sys.argv[1], Path(sys.argv[2])).predict(['good'])[0]['label'])\n"
        "print(sorted({'torch', 'transformers', 'boto3', 'optimum'} & set(sys.modules)))\n"
    )
    command = [sys.executable, "-c", program, str(bundle), str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert output[0] in LABELS
    assert output[1] == "[]"


def call_predict(*words: str, stdin: bytes | None = None, **environment: str) -> list[dict[str, Any]]:
    """Return the answers of `job predict`; without `stdin`, that is closed."""
    closed = ["sh", "-c", 'exec "$@" <&-', "sh"] if stdin is None else []
    command = [*closed, sys.executable, "-m", "job", "predict", *words]
    done = subprocess.run(command, input=stdin, capture_output=True, env=os.environ | environment, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    return [json.loads(line) for line in done.stdout.decode().splitlines()]


def test_a_closed_stdin_has_no_texts(bundle: Path) -> None:
    assert call_predict(str(bundle)) == []


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_texts_are_utf8_whatever_the_locale_says(bundle: Path, encoding: str) -> None:
    for words, stdin in ((["é😀"], None), ([], "é😀\n".encode())):
        (answer,) = call_predict(str(bundle), *words, stdin=stdin, PYTHONIOENCODING=encoding)
        assert answer["text"] == "é😀"


def test_stdin_that_is_not_utf8_is_said_so(bundle: Path) -> None:
    command = [sys.executable, "-m", "job", "predict", str(bundle)]
    for encoding in ("utf-8:surrogateescape", "latin-1"):
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        done = subprocess.run(command, input=b"caf\xe9\n", capture_output=True, env=environment, timeout=120)
        assert (done.returncode, done.stdout) == (11, b"")
        assert done.stderr.startswith(b"error: stdin: is not UTF-8")
