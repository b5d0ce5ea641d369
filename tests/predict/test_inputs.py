"""Texts come from lines, JSON lines and tables; what is no text is named by its row."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.errors import DataError, NotFound
from job.predict import open_texts

TEXTS = st.lists(
    st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\x00"), min_size=1), max_size=5
)


def read(path: Path | None, **options: object) -> list[object]:
    with open_texts(path, **options) as texts:  # type: ignore[arg-type]
        return list(texts)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "one\ntwo\r\n\n", ["one", "two", ""]),
        ("a.jsonl", '"one"\n{"text": "two"}\n\n["a", "b"]\n{"text": "c", "text_pair": "d", "id": 7}\n',
         ["one", "two", ("a", "b"), ("c", "d")]),
        ("a.csv", 'id,text\n1,"one, and\nmore"\n2,two\n', ["one, and\nmore", "two"]),
        ("a.tsv", 'text\ttext_pair\na\tb\n"c\td\n', [("a", "b"), ('"c', "d")]),
        ("quoted.tsv", '"id"\t"text"\n1\t"a ""fine"" film"\n2\t"so" so\n', ['a "fine" film', '"so" so']),
        ("bom.csv", "\ufefftext\nx\n", ["x"]),
        ("bom.txt", "\ufeffx\n", ["x"]),
        ("bom.jsonl", '\ufeff"x"\n', ["x"]),
    ],
)  # fmt: skip
def test_the_name_says_the_format(tmp_path: Path, name: str, content: str, expected: list[object]) -> None:
    path = tmp_path / name
    path.write_text(content)
    assert read(path) == expected


def test_stdin_is_lines_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("a\tb\n"))
    assert read(None, pairs=True) == [("a", "b")]
    monkeypatch.setattr("sys.stdin", io.StringIO('{"text": "x"}\n'))
    assert read(None, format_="jsonl") == ["x"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '"fine"\n{"label": 1}\n', "row 2"),
        ("a.jsonl", "{", "row 1"),
        ("a.jsonl", "[1, 2]", "row 1"),
        ("a.jsonl", "3", "row 1"),
        ("a.csv", "body\nx\n", "one must be called `text`"),
        ("a.csv", "id,text\n1\n", "row 1"),
        ("a.csv", "text,text_pair\na,b\nc\n", "row 2"),
        ("a.jsonl", '{"text_pair": "x"}', "row 1"),
        ("a.csv", "", "one must be called `text`"),
        ("a.csv", "text\nfine\nGood, but far too long\n", "row 2: has more columns"),
        ("a.tsv", "text\nfine\nGood\tbut cut\n", "row 2: has more columns"),
        ("a.csv", 'text\nfine\n"never closed\nthree\nfour\n', "row 2: "),
        ("a.csv", 'text\nfine\n"closed" too soon\n', "row 2: "),
        ("a.csv", '"text\nfine\n', "the first row: "),
    ],
)
def test_what_is_no_text_is_named(tmp_path: Path, name: str, content: str, words: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=words):
        read(path)


def test_a_file_that_is_not_there_or_not_utf8_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no such file"):
        read(tmp_path / "absent.csv")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(DataError, match="UTF-8"):
        read(tmp_path / "a.txt")
    with pytest.raises(NotFound, match="no such file"):
        read(tmp_path)


def test_a_text_of_a_table_may_be_as_long_as_a_book(tmp_path: Path) -> None:
    path, text = tmp_path / "a.csv", 'one, "two"\n' * 100_000
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["id", "text"], ["1", text]])
    assert read(path) == [text]


@given(TEXTS)
def test_json_lines_bring_every_text_as_it_was(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = tmp_path_factory.mktemp("json") / "a.jsonl"
    path.write_text("".join(json.dumps(text) + "\n" for text in texts))
    assert read(path) == texts
