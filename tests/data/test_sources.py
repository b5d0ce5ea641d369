"""Rows are read from shards, label folders and s3:// as they are now, whatever they spell."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from job.data.sources import DataSource, locate_data, read_split
from job.data.tokenize import hash_tokenizer
from job.recipe.schema import Data
from job.store import open_store


def read(folder: Path, split: str, cache: Path) -> list[dict[str, object]]:
    return list(read_split(DataSource("origin", folder, None, cache), Data(source="origin"), split))


def test_shards_of_a_split_keep_texts_that_read_na(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train-0.csv").write_text("text,label\nNA,a\nnull,b\n")
    (folder / "train-1.csv").write_text("text,label\nNaN,a\n")
    (folder / "test.csv").write_text("text,label\nelse,None\n")
    assert [row["text"] for row in read(folder, "train", tmp_path)] == ["NA", "null", "NaN"]
    assert read(folder, "test", tmp_path) == [{"text": "else", "label": "None"}]


def test_rows_that_were_read_leave_nothing_that_a_later_attempt_could_believe(tmp_path: Path) -> None:
    file, place = tmp_path / "rows.csv", tmp_path / "datasets"
    for name, age_s in (("abandoned", 2 * 86400), ("in-use", 60)):
        (place / name).mkdir(parents=True)
        os.utime(place / name, (time.time() - age_s,) * 2)
    file.write_text("text,label\na,x\n")
    assert read(file, "train", tmp_path) == [{"text": "a", "label": "x"}]
    assert [left.name for left in place.iterdir()] == ["in-use"]


READ_WITH_LITTLE = """
import resource, sys
from pathlib import Path
from job.data.sources import DataSource, read_split
from job.launch import judge_error
from job.recipe.schema import Data

import datasets
resource.setrlimit(resource.{limit}, ({value}, {value}))
try:
    read_split(DataSource("o", Path(sys.argv[1]), None, Path(sys.argv[2])), Data(source="o"), "train")
except Exception as error:
    print(judge_error(error))
"""


@pytest.mark.parametrize(("limit", "value"), [("RLIMIT_FSIZE", 1 << 16), ("RLIMIT_NOFILE", 4)])
def test_a_node_that_lacks_something_is_78_and_the_file_is_not_called_wrong(
    tmp_path: Path, limit: str, value: int
) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text,label\n" + "".join(f"{number:0200},x\n" for number in range(10_000)))
    code = READ_WITH_LITTLE.format(limit=limit, value=value)
    done = subprocess.run([sys.executable, "-c", code, str(file), str(tmp_path)], capture_output=True, text=True)
    assert "'exit_code': 78" in done.stdout, done.stdout + done.stderr
    assert "correct the file" not in done.stdout


def test_text_files_are_labelled_by_their_folder(tmp_path: Path) -> None:
    for split, label, text in (("train", "pos", "good"), ("train", "neg", "bad"), ("test", "pos", "fine")):
        file = tmp_path / "data" / split / label / "0.txt"
        file.parent.mkdir(parents=True)
        file.write_text(text)
    rows = {(row["text"], row["label"]) for row in read(tmp_path / "data", "train", tmp_path)}
    assert rows == {("good", "pos"), ("bad", "neg")}


def test_objects_that_changed_or_went_are_seen_and_sources_are_not_mixed(tmp_path: Path, s3: str) -> None:
    store = open_store(f"{s3}/sources")
    rows = tmp_path / "rows.csv"

    def put(key: str, text: str) -> None:
        rows.write_text(f"text,label\n{text},a\n")
        store.upload(rows, key)

    def texts(prefix: str) -> list[object]:
        source = locate_data(Data(source=f"{s3}/sources/{prefix}"), tmp_path / "cache")
        return [row["text"] for row in read_split(source, Data(source="x"), "train")]

    put("x/y/train-0.csv", "first")
    put("x/y/train-1.csv", "second")
    put("x_y/train.csv", "other")
    assert texts("x/y") == ["first", "second"]
    assert texts("x_y/") == ["other"]
    assert texts("x_y/train.csv") == ["other"]
    store.delete(["x/y/train-1.csv"])
    put("x/y/train-0.csv", "changed")
    assert texts("x/y") == ["changed"]


def test_the_hash_of_a_tokenizer_does_not_depend_on_its_use(assets: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets / "minilm-l6")
    before = hash_tokenizer(tokenizer)
    tokenizer(["a text that is longer than that"], truncation=True, max_length=4, padding="max_length")
    assert hash_tokenizer(tokenizer) == before
