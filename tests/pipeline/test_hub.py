"""The shipped Hub recipe against a stand-in of the Hub: revisions are resolved before loading, and recorded."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import Answer, MakeModel, assert_refused, call_job
from hub_stand_in import GATED_TOKEN, Hub, Repository, serve_hub

MODEL, DATA = "distilbert-base-uncased", "imdb"


@pytest.fixture(scope="module")
def imdb_folder(tmp_path_factory: pytest.TempPathFactory, reviews: Path) -> Path:
    """An IMDB-shaped data set: parquet per split, labels as a ClassLabel of neg and pos, splits named in the README."""
    folder = tmp_path_factory.mktemp("imdb")
    features = {
        "features": {
            "text": {"dtype": "string", "_type": "Value"},
            "label": {"names": ["neg", "pos"], "_type": "ClassLabel"},
        }
    }
    schema = pa.schema([("text", pa.string()), ("label", pa.int64())], {"huggingface": json.dumps({"info": features})})
    (folder / "plain_text").mkdir()
    for split in ("train", "test"):
        with (reviews / f"{split}.csv").open(encoding="utf-8", newline="") as file:
            rows = sorted(csv.DictReader(file), key=lambda row: row["label"])  # sorted by label, as IMDB is
        columns = [[row["text"] for row in rows], [int(row["label"] == "positive") for row in rows]]
        table = pa.Table.from_arrays([pa.array(columns[0]), pa.array(columns[1], pa.int64())], schema=schema)
        pyarrow.parquet.write_table(table, folder / "plain_text" / f"{split}-00000-of-00001.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: plain_text\n  data_files:\n"
        "  - {split: train, path: plain_text/train-*}\n  - {split: test, path: plain_text/test-*}\n"
        "  default: true\n---\n"
    )
    (folder / "imdb.py").write_text("raise SystemExit('data set scripts must never run')\n")
    return folder


@pytest.fixture
def hub(make_model: MakeModel, imdb_folder: Path) -> Iterator[Hub]:
    with serve_hub() as hub:
        hub.add(MODEL, "model", make_model("distilbert", max_position_embeddings=512))
        hub.add(DATA, "dataset", imdb_folder)
        yield hub


@pytest.fixture
def run_imdb(hub: Hub, tmp_path: Path) -> Any:
    """Return a function that runs the shipped recipe, cut short, against the stand-in and a local-folder store."""

    def run(*options: str, verb: str = "run", **env: str) -> Answer:
        shortened = ["training.max_steps=4", "training.save_steps=2", "data.limit=64", "export.int8.gate=report_only",
                     f"store.uri={tmp_path / 'store'}", *options]  # fmt: skip
        words = [word for option in shortened for word in ("--set", option)]
        variables = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf"), **env}
        named = ["--run-id", "classic"] if verb == "run" else []
        return call_job(verb, "imdb-distilbert", *named, "--work-dir", str(tmp_path / "work"), *words, env=variables)

    return run


def repository(hub: Hub, kind: str, name: str) -> Repository:
    return hub.repositories[f"{kind}s/{name}"]


@pytest.mark.slow
def test_the_classic_recipe_records_the_commits_it_was_trained_from(run_imdb: Any, hub: Hub, tmp_path: Path) -> None:
    answer = run_imdb()
    assert answer.code == 0, answer.stderr
    about = json.loads((tmp_path / "store" / "runs" / "classic" / "run.json").read_text())
    assert about["identity"]["model"]["commit"] == repository(hub, "model", MODEL).main
    assert about["identity"]["data"]["commit"] == repository(hub, "dataset", DATA).main
    downloads = [path for path in hub.requests if "/resolve/" in path]
    assert downloads
    assert all("/resolve/main/" not in path for path in downloads), "nothing is downloaded by a name that can move"
    assert not [path for path in downloads if path.endswith(".py")]
    config = json.loads(next((tmp_path / "store" / "models").rglob("config.json")).read_text())
    assert config["id2label"] == {"0": "neg", "1": "pos"}

    # the same run again, after somebody pushed to the model's main
    repository(hub, "model", MODEL).commits.append("f" * 40)
    moved = run_imdb()
    assert_refused(moved, 16, "model.revision", "moved", "f" * 40, "--run-id")


def test_a_revision_that_was_removed_is_not_found(run_imdb: Any) -> None:
    assert_refused(run_imdb(f"model.revision={'a' * 40}"), 13, "model.id", "a" * 40)


def test_an_unknown_model_is_not_found(run_imdb: Any) -> None:
    assert_refused(run_imdb("model.id=no-such-model"), 13, "no-such-model")


def test_a_gated_model_needs_a_token_and_works_with_one(run_imdb: Any, hub: Hub, tmp_path: Path) -> None:
    repository(hub, "model", MODEL).gated = True
    assert_refused(run_imdb(HF_TOKEN=""), 12, "gated", "HF_TOKEN")
    answer = run_imdb(verb="check", HF_TOKEN=GATED_TOKEN)
    assert answer.code == 0, answer.stderr
    assert f"{MODEL} at {repository(hub, 'model', MODEL).main}" in answer.stdout
    assert GATED_TOKEN not in answer.stdout + answer.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if GATED_TOKEN.encode() in path.read_bytes()]


def test_a_fast_download_that_somebody_elses_image_has_on_is_not_asked_for(run_imdb: Any) -> None:
    answer = run_imdb(verb="check", HF_HUB_ENABLE_HF_TRANSFER="1")
    assert answer.code == 0, answer.stderr


def test_a_token_does_not_go_to_another_machine_in_clear_text(run_imdb: Any) -> None:
    answer = run_imdb(HF_ENDPOINT="http://192.0.2.1", HF_TOKEN=GATED_TOKEN)
    assert_refused(answer, 19, "HF_ENDPOINT", "http://192.0.2.1", "https")


def test_a_cache_that_cannot_be_written_to_is_no_fault_of_the_hub(run_imdb: Any, tmp_path: Path) -> None:
    (tmp_path / "work" / "cache").mkdir(parents=True)
    (tmp_path / "work" / "cache" / "hub").touch()
    assert_refused(run_imdb(), 78, "Not a directory", "cache/hub")


def test_pickle_only_weights_on_the_hub_are_refused_before_any_download(run_imdb: Any, hub: Hub) -> None:
    folder = repository(hub, "model", MODEL).folder
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    try:
        assert_refused(run_imdb(), 19, "pickle")
        assert not [path for path in hub.requests if path.endswith(".bin")]
    finally:
        (folder / "pytorch_model.bin").rename(folder / "model.safetensors")


def test_an_unreachable_hub_is_worth_a_retry(run_imdb: Any) -> None:
    assert_refused(run_imdb(HF_ENDPOINT="http://127.0.0.1:9"), 77, "unreachable")


def test_a_hub_that_goes_away_while_files_come_is_worth_a_retry(run_imdb: Any, hub: Hub) -> None:
    hub.lost_files = True
    assert_refused(run_imdb(), 77, "unreachable")
