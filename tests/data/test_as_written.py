"""Rows arrive as they are written, by whatever program: nothing is read as another value, or from another file."""

from __future__ import annotations

import os
import resource
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from job.data.columns import LabelMap, check_rows, pick_columns
from job.data.sources import DataSource, locate_data, read_split
from job.data.splits import check_splits, hold_out
from job.data.targets import join_words, list_labels, parse_json, read_answers, read_number
from job.errors import DataError, NotFound, ResourceExhausted
from job.recipe.load import load_recipe
from job.recipe.schema import Data
from job.store import open_store
from job.tasks import Examples, measure_question, measure_stride

COLUMNS: Any = {"text": "text", "label": "label"}


def read(path: Path, split: str = "train", **data: Any) -> list[dict[str, Any]]:
    """Return the rows of a file or folder."""
    about = Data(source=str(path), columns=COLUMNS, **data)
    return list(read_split(DataSource(str(path), path, None, path.parent / "cache"), about, split))


def label(path: Path, **data: Any) -> tuple[tuple[str, ...], list[str]]:
    """Return the names that a file's labels have, and of each row its own."""
    about = Data(source=str(path), columns=COLUMNS, **data)
    raw = pick_columns(read_split(DataSource("x", path, None, path.parent / "cache"), about, "train"), about, "train")
    examples = check_rows(raw, LabelMap.build(about, raw, None), about)
    return examples.names, [examples.names[label] for label in examples.labels]


# --- labels


@pytest.mark.parametrize("spelled", [("True", "False"), ("true", "false"), ("TRUE", "FALSE")])
@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["True", "False"], ("True", "False")),
        (["false", "true"], ("false", "true")),
        (["wrong", "right"], ("right", "wrong")),
        ({"True": "right", "False": "wrong"}, ("right", "wrong")),
        ({True: "right", False: "wrong"}, ("right", "wrong")),
    ],
)
def test_true_is_never_taken_for_false(
    tmp_path: Path, spelled: tuple[str, str], labels: Any, names: tuple[str, str]
) -> None:
    for name, rows in (
        ("rows.csv", f"text,label\na,{spelled[0]}\nb,{spelled[1]}\n"),
        ("rows.jsonl", '{"text": "a", "label": true}\n{"text": "b", "label": false}\n'),
    ):
        (tmp_path / name).write_text(rows)
        right, wrong = sorted(names, key=lambda name: name.casefold() in ("false", "wrong"))
        assert label(tmp_path / name, labels=labels)[1] == [right, wrong]


@pytest.mark.parametrize(
    ("cells", "labels", "found"),
    [
        (["01", "02", "01"], None, ["01", "02", "01"]),
        (["01", "02", "01"], ["01", "02"], ["01", "02", "01"]),
        (["1", "0", "1"], ["neg", "pos"], ["pos", "neg", "pos"]),
        (["1.0", "0.0", "1.0"], ["neg", "pos"], ["pos", "neg", "pos"]),
        (["1.0", "0.0", "1.0"], None, ["1", "0", "1"]),
        (["0.5", "1.0", "1.5"], [0.5, 1.0, 1.5], ["0.5", "1", "1.5"]),
        (["1e5", "2e5", "1e5"], None, ["1e5", "2e5", "1e5"]),
        (["1.000000", "0.000000"], None, ["1", "0"]),
        (["1.000000", "0.000000"], ["neg", "pos"], ["pos", "neg"]),
        (["1e+00", "0e+00"], ["neg", "pos"], ["pos", "neg"]),
        (["NA", "None", "null"], None, ["NA", "None", "null"]),
        (["True", "False", "Perhaps"], None, ["True", "False", "Perhaps"]),
    ],
)
def test_labels_of_a_csv_are_those_that_it_spells(tmp_path: Path, cells: list[str], labels: Any, found: Any) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"text {row},{cell}\n" for row, cell in enumerate(cells)))
    assert label(rows, labels=labels)[1] == found


def test_one_empty_label_is_the_only_row_set_aside(tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"text {row},{row % 2}\n" for row in range(30)) + "text,\n")
    assert len(label(rows, labels=["neg", "pos"], max_bad_fraction=0.05)[1]) == 30


@pytest.mark.parametrize(
    ("value", "labels"),
    [
        ("['joy', 'anger']", ["joy", "anger"]),
        ("['it\\'s', \"b\"]", ["it's", "b"]),
        ("joy; anger", ["joy", "anger"]),
        ("joy|anger", ["joy", "anger"]),
        ("[]", []),
    ],
)
def test_lists_of_labels_are_read_as_pandas_and_people_write_them(value: str, labels: list[str]) -> None:
    assert list_labels(value) == labels


@pytest.mark.parametrize("value", ["['joy' 'anger']", "[joy, anger]", '[["joy"], ["anger"]]', [["joy"]]])
def test_what_only_looks_like_a_list_of_labels_is_no_class_of_its_own(value: Any) -> None:
    with pytest.raises(ValueError, match="list"):
        list_labels(value)


def test_a_list_in_a_cell_is_no_single_label(tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\na,['joy']\nb,['fear']\n")
    with pytest.raises(DataError, match="multi_label_classification"):
        label(rows)


def test_data_whose_every_label_is_its_own_are_refused_for_that(tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"text {row},id {row}\n" for row in range(40_000)))
    about = Data(source=str(rows), columns=COLUMNS)
    raw = pick_columns(read_split(DataSource("x", rows, None, tmp_path), about, "train"), about, "train")
    names = LabelMap.build(about, raw, None)
    rest, held = hold_out(check_rows(raw, names, about), 0.2, 1)
    with pytest.raises(DataError, match=r"each of the 40,000 labels has a single row.*data\.columns\.label"):
        check_splits({"test": held, "train": rest}, names.names)


# --- texts and numbers


def test_texts_that_look_like_numbers_stay_as_they_are(tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label,other\n007,a,1\n1e5,b,2\n1_000,a,3\nTrue,b,4\n")
    assert [row["text"] for row in read(rows)] == ["007", "1e5", "1_000", "True"]


def test_a_column_that_begins_with_numbers_may_hold_a_word_later(tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    many = "".join(f"text {row},{row % 2},{row}\n" for row in range(300_000))
    rows.write_text("text,label,id\n" + many + "last,none,no number\n")
    assert read(rows)[-1] == {"text": "last", "label": "none", "id": "no number"}


def test_texts_and_answers_that_are_dates_are_texts(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "2020-01-01", "label": "2020-01-02"}\n{"text": "2021-05-06", "label": "2021-01-02"}\n')
    assert isinstance(read(rows)[0]["text"], datetime), "else there is nothing to mend"
    assert label(rows)[0] == ("2020-01-02", "2021-01-02")
    assert read_answers("born 2020-01-01 there", datetime(2020, 1, 1)) == [[5, "2020-01-01"]]


def test_days_of_a_parquet_file_are_texts(tmp_path: Path) -> None:
    table = pyarrow.table({"text": [date(2020, 1, 2), date(2021, 3, 4)], "label": [date(2022, 1, 1), date(2023, 1, 1)]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert label(tmp_path / "rows.parquet")[0] == ("2022-01-01", "2023-01-01")


@pytest.mark.parametrize("text", ["{{0}}", "[{{1}}]", "{1: [}", "[" * 5000])
def test_a_text_that_only_begins_like_python_is_a_text(text: str) -> None:
    assert parse_json(text) == text


def test_an_answer_is_where_its_place_says_also_as_a_fraction() -> None:
    assert read_answers("one two one", {"text": ["one"], "answer_start": [8.0]}) == [[8, "one"]]


def test_answers_nested_without_end_are_a_bad_row() -> None:
    with pytest.raises(ValueError, match="over and over"):
        read_answers("context", "[" * 900 + "]" * 900)


def test_a_number_is_what_it_spells() -> None:
    with pytest.raises(ValueError, match="no number"):
        read_number("1_000")


def test_words_with_a_bracket_in_front_are_words() -> None:
    assert join_words("[ laughter ] yes")[0] == "[ laughter ] yes"
    assert join_words("['a', 'b']")[0] == "a b"
    assert parse_json("[" * 100_000) == "[" * 100_000


def test_a_source_with_several_targets_stands_on_one_side() -> None:
    import numpy as np

    texts, pairs = [f"source {row // 4}" for row in range(80)], [f"target {row}" for row in range(80)]
    whole = Examples(texts, pairs, np.zeros(80, dtype=np.int64), np.arange(1, 81))
    rest, held = hold_out(whole, 0.2, 1, by_source=True)
    assert (len(held), len(rest)) == (16, 64)
    assert not set(rest.texts) & set(held.texts)


@pytest.mark.parametrize("max_length", range(8, 40))
def test_windows_of_any_length_leave_room_for_the_context(max_length: int) -> None:
    room = max_length - measure_question(max_length) - 4
    assert 0 <= measure_stride(max_length) < room


# --- files


def test_a_file_is_read_anew_though_its_time_is_the_old_one(tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    for text in ("first", "other"):
        rows.write_text(f"text,label\n{text},a\n")
        os.utime(rows, (1e9, 1e9))
        assert [row["text"] for row in read(rows)] == [text]


@pytest.mark.parametrize("name", ["reviews[1].csv", "a*b.csv", "data [v2].csv", "ä ö?.csv"])
def test_a_name_is_a_name_and_no_pattern(tmp_path: Path, name: str) -> None:
    for other in ("reviews1.csv", "a_b.csv", "data v.csv", "ä öx.csv"):
        (tmp_path / other).write_text("text,label\nWRONG,a\n")
    (tmp_path / name).write_text("text,label\nright,a\n")
    assert read(tmp_path / name)[0]["text"] == "right"
    folder = tmp_path / "folder"
    folder.mkdir()
    assert read_split(DataSource("x", folder, None, tmp_path), Data(source="x"), str(tmp_path / name))[0] == {
        "text": "right",
        "label": "a",
    }


def test_a_folder_that_only_a_pattern_could_find_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "dir [1]").mkdir()
    (tmp_path / "dir [1]/reviews.csv").write_text("text,label\na,x\n")
    with pytest.raises(DataError, match="rename it"):
        read(tmp_path / "dir [1]")
    (tmp_path / "dir [1]/train.csv").write_text("text,label\nb,x\n")
    assert [row["text"] for row in read(tmp_path / "dir [1]")] == ["b"]


def test_hidden_folders_hold_no_rows(tmp_path: Path) -> None:
    for place in ("train.csv", ".ipynb_checkpoints/train-checkpoint.csv"):
        (tmp_path / "data" / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / place).write_text(f"text,label\n{place},a\n")
    assert [row["text"] for row in read(tmp_path / "data")] == ["train.csv"]
    for folder in ("pos", "neg", ".ipynb_checkpoints"):
        (tmp_path / "texts/train" / folder).mkdir(parents=True)
        (tmp_path / "texts/train" / folder / "1.txt").write_text(folder)
    assert {row["label"] for row in read(tmp_path / "texts")} == {"pos", "neg"}


def test_a_folder_of_one_csv_keeps_what_reads_na(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/reviews.csv").write_text("text,label\nnull,NA\nNaN,None\n")
    assert read(tmp_path / "data") == [{"text": "null", "label": "NA"}, {"text": "NaN", "label": "None"}]


@pytest.mark.parametrize("declared", ["", "dataset_info:\n  features:\n  - {name: text, dtype: string}\n"])
def test_a_hub_folder_keeps_rows_of_which_an_unused_cell_is_empty(tmp_path: Path, declared: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    readme = "---\nconfigs:\n- config_name: default\n  data_files: [{split: train, path: part.csv}]\n---\n"
    if declared:
        columns = "".join(
            f"  - {{name: {name}, dtype: {kind}}}\n" for name, kind in (("label", "int64"), ("stars", "float64"))
        )
        readme = readme.replace("---\n", f"---\n{declared}{columns}", 1)
    (folder / "README.md").write_text(readme)
    rows = "".join(f"text {row},{row % 2},{'' if row == 15_000 else row}\n" for row in range(20_000))
    (folder / "part.csv").write_text("text,label,stars\n" + rows)
    assert len(read(folder)) == 20_000


def test_a_column_that_pandas_has_left_is_a_column(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,label,__index_level_0__\nhi,1,5\n")
    assert read(tmp_path / "rows.csv")[0]["text"] == "hi"


def test_a_broken_header_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('text,"label\n' + "some text,1\n" * 30_000)
    with pytest.raises(DataError):
        read(tmp_path / "rows.csv")


def test_a_loose_quotation_mark_in_one_split_changes_no_label_of_another(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text('text\tlabel\n"a ""good"" one"\t"pos"\nbad\t"neg"\n')
    (tmp_path / "test.tsv").write_text('text\tlabel\n"d" he said\t"pos"\n"quoted"\t"neg"\n')
    assert read(tmp_path / "train.tsv")[0] == {"text": 'a "good" one', "label": "pos"}
    assert read(tmp_path / "test.tsv") == [{"text": '"d" he said', "label": "pos"}, {"text": "quoted", "label": "neg"}]


def test_a_quotation_mark_that_begins_a_text_of_a_tsv_swallows_no_row(tmp_path: Path) -> None:
    bare, quoted = tmp_path / "bare.tsv", tmp_path / "quoted.tsv"
    bare.write_text('text\tlabel\n"Hello there\t0\nfine thing\t1\nnice\t0\nbye" he said\t0\n')
    quoted.write_text('text\tlabel\n"two\nlines"\t0\n"a ""word"""\t1\n')
    assert [row["text"] for row in read(bare)] == ['"Hello there', "fine thing", "nice", 'bye" he said']
    assert [row["text"] for row in read(quoted)] == ["two\nlines", 'a "word"']


def test_a_csv_whose_texts_hold_bare_commas_is_refused_and_not_cut(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,label\nGood, but long,a\nFine, ok,b\n")
    with pytest.raises(DataError, match="one cell more"):
        read(tmp_path / "rows.csv")


def test_blank_lines_of_a_text_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("one\n\n  \ntwo\n\n")
    assert [row["text"] for row in read(tmp_path / "book.txt")] == ["one", "two"]


def test_a_text_that_is_not_utf_8_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "data/train/pos").mkdir(parents=True)
    (tmp_path / "data/train/pos/1.txt").write_bytes("schön".encode("latin-1"))
    with pytest.raises(DataError, match=r"1\.txt is not UTF-8"):
        read(tmp_path / "data")


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv"])
def test_a_table_that_is_not_utf_8_is_refused_by_file_and_line_and_nothing_else_is_said(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    mark = "\t" if name.endswith("tsv") else ","
    lines = [f"text{mark}label\n", f"fine{mark}a\n", f"schön{mark}b\n"]
    (tmp_path / name).write_bytes("".join(lines).encode("windows-1252"))
    with pytest.raises(DataError, match=rf"{name}:3: is not UTF-8.*convert it"):
        read(tmp_path / name)
    assert not caplog.records
    assert capfd.readouterr().err == ""


def test_json_lines_that_are_not_utf_8_are_refused_by_row(tmp_path: Path) -> None:
    lines = ['{"text": "fine", "label": "a"}\n', '{"text": "schön", "label": "b"}\n']
    (tmp_path / "rows.jsonl").write_bytes("".join(lines).encode("windows-1252"))
    with pytest.raises(DataError, match=r"row 2 of split 'train' is not UTF-8.*convert the file"):
        label(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(("name", "mark"), [("rows.csv", ";"), ("rows.csv", "\t"), ("rows.tsv", ",")])
def test_cells_between_other_marks_than_the_files_name_says_are_refused(tmp_path: Path, name: str, mark: str) -> None:
    (tmp_path / name).write_text(f"text{mark}label\nGood, but long{mark}a\nFine{mark}b\n")
    with pytest.raises(DataError, match=rf"{name}:1: its cells stand between {mark!r}".replace("\\", r"\\")):
        read(tmp_path / name)


def test_sets_of_labels_that_are_all_empty_are_said_to_be(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,label\nfine,\ngood,[]\n")
    with pytest.raises(DataError, match="split 'train' has no label in any row"):
        label(tmp_path / "rows.csv", problem_type="multi_label_classification")


def test_a_cache_that_may_not_be_written_is_no_fault_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,label\nfine,a\n")
    about = Data(source="x", columns=COLUMNS)
    with pytest.raises(ResourceExhausted, match=r"/proc/cache.*--work-dir"):
        read_split(DataSource("x", tmp_path / "rows.csv", None, Path("/proc/cache")), about, "train")


def test_a_disk_that_is_full_while_rows_are_read_is_no_fault_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,label\n" + "a fine film,a\n" * 50_000)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(ResourceExhausted, match="disk is full"):
            read(tmp_path / "rows.csv")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_a_header_without_rows_is_said_to_have_none(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,label\n")
    with pytest.raises(DataError, match=r"split 'train' of .* has no rows"):
        read(tmp_path / "rows.csv")


def test_a_name_that_no_file_system_takes_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        locate_data(Data(source="x" * 300 + ".csv"), tmp_path)
    source = DataSource("x", tmp_path, None, tmp_path)
    with pytest.raises(NotFound):
        read_split(source, Data(source="x"), "y" * 300 + ".csv")


def test_marks_of_folders_in_a_bucket_are_no_files(tmp_path: Path, s3: str) -> None:
    client = open_store(s3)._client  # type: ignore[attr-defined]
    bucket = s3.removeprefix("s3://").partition("/")[0]
    for key, body in (("marks/train.csv/", b""), ("marks/train.csv/part-0.csv", b"text,label\nfine,a\n")):
        client.put_object(Bucket=bucket, Key=key, Body=body)
    for place in ("marks", "marks/train.csv/"):
        source = locate_data(Data(source=f"{s3}/{place}"), tmp_path / "cache")
        rows = read_split(source, Data(source="x"), "train")
        assert [row["text"] for row in rows] == ["fine"]


# --- the recipe


@pytest.mark.parametrize(
    ("written", "labels"), [("[010, 020]", ["010", "020"]), ("[12:30, 1]", ["12:30", 1]), ("[0.5, 1.0]", ["0.5", "1"])]
)
def test_labels_of_a_recipe_are_those_that_it_spells(tmp_path: Path, written: str, labels: list[Any]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "name: x\ntask: text-classification\nmodel: {id: m}\nstore: {uri: /tmp/x}\n"
        f"data: {{source: d, labels: {written}}}\ntraining: {{max_steps: 10}}\n"
    )
    assert load_recipe(str(path), [], {}).data.labels == labels
