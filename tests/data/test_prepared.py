"""What an earlier fetch has prepared is taken where nothing differs, and then leaves what a fetch leaves."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from folders import read_all

import job.data.fetch
from job.data import fetch_sources
from job.data.prepared import RECORDS, name_inputs, take_prepared
from job.data.sources import DataSource
from job.recipe import Run
from job.recipe.schema import Recipe
from job.store.models import ModelSource

Change = Callable[["Place"], None]


class Place:
    """A model, rows with one text in train and test, and the runs that read them."""

    def __init__(self, folder: Path, assets: Path) -> None:
        self.work, self.model, self.data = folder / "work", folder / "model", folder / "data"
        self.model.mkdir()
        for file in (assets / "minilm-l6").iterdir():
            shutil.copyfile(file, self.model / file.name)
        self.data.mkdir()
        rows = [f"film number {number},{'good' if number % 2 else 'bad'}" for number in range(40)]
        (self.data / "train.csv").write_text("\n".join(["text,label", *rows, "the same film,good"]) + "\n")
        (self.data / "test.csv").write_text("text,label\nthe same film,good\nanother one,bad\n")
        self.sections = {
            "name": "x",
            "task": "text-classification",
            "model": {"id": str(self.model)},
            "data": {"source": str(self.data), "max_length": 64, "max_bad_fraction": 0.05},
            "store": {"uri": str(folder / "store")},
        }

    def run(self, name: str = "first") -> Run:
        run = Run(name, Recipe.model_validate(self.sections), self.work)
        run.save()
        return run

    def name_inputs(self) -> str | None:
        model, data = (
            ModelSource(str(self.model), self.model, None),
            DataSource(str(self.data), self.data, None, self.work),
        )
        return name_inputs(self.run(), model, data)

    def set(self, section: str, key: str, value: object) -> None:
        self.sections[section] = {**dict(self.sections.get(section) or {}), key: value}  # type: ignore[call-overload]


@pytest.fixture
def place(tmp_path: Path, assets: Path) -> Place:
    return Place(tmp_path, assets)


def test_a_second_fetch_leaves_what_the_first_has_left_and_warns_of_the_same(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    left = []
    for name in ("first", "second"):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "job.data"):
            identity = fetch_sources(place.run(name))
        files = read_all(place.work / "runs" / name)
        del files["recipe.json"]  # it has the run's name
        left.append((identity, files, caplog.messages))
    assert left[0] == left[1]
    assert {*RECORDS, "sources.json", "tokenizer/tokenizer.json"} <= set(left[0][1])
    assert any("are also in test" in message for message in left[1][2])
    assert len(list((place.work / "cache" / "prepared").iterdir())) == 1


CHANGES: dict[str, Change] = {
    "a row": lambda at: (at.data / "train.csv").write_text("text,label\na,x\nb,y\n") and None,
    "another file beside the rows": lambda at: (at.data / "train-1.csv").write_text("text,label\na,good\n") and None,
    "the tokenizer": lambda at: (at.model / "tokenizer_config.json").write_text("{}") and None,
    "a file that the tokenizer may read": lambda at: (at.model / "chat_template.jinja").write_text("x") and None,
    "max_length": lambda at: at.set("data", "max_length", 32),
    "the names of labels": lambda at: at.set("data", "labels", ["good", "bad"]),
    "the seed": lambda at: at.set("training", "seed", 7),
    "class weights": lambda at: at.set("training", "class_weights", {"good": 2.0}),
    "shots": lambda at: at.set("tuning", "shots", 4),
}


@pytest.mark.parametrize("what", CHANGES)
def test_whatever_a_fetch_reads_is_in_the_name_of_what_it_leaves(place: Place, what: str) -> None:
    before = place.name_inputs()
    assert before == place.name_inputs() is not None
    CHANGES[what](place)
    assert place.name_inputs() not in (before, None)


def test_other_weights_need_no_new_tokens_but_are_another_model(place: Place) -> None:
    first = fetch_sources(place.run("first"))
    weights = place.model / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    second = fetch_sources(place.run("second"))
    assert len(list((place.work / "cache" / "prepared").iterdir())) == 1
    assert first.pop("model") != second.pop("model")
    assert first == second


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda file: file.write_bytes(b""),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "a flipped bit": flip_a_bit,
    "gone": lambda file: file.unlink(),
}


@pytest.mark.parametrize("prepared", [True, False], ids=["known data", "new data"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_table_that_a_power_cut_has_damaged_is_made_anew(
    place: Place, damage: Callable[[Path], object], prepared: bool
) -> None:
    identity = fetch_sources(place.run())
    cache = place.work / "cache"
    whole = read_all(cache / "tokens")
    for table in (cache / "tokens").iterdir():
        damage(table / "tokens.npy")
        damage(table / "labels.npy")
    if not prepared:
        shutil.rmtree(cache / "prepared")
    assert fetch_sources(place.run("second")) == identity
    assert read_all(cache / "tokens") == whole


def link_folder(at: Place) -> None:
    (at.data / "more").symlink_to(at.model)


def point_elsewhere(at: Place) -> None:
    (at.data / "README.md").write_text("---\nconfigs:\n- data_files: ../rows.csv\n---\n")


@pytest.mark.parametrize("lead_outside", [link_folder, point_elsewhere])
def test_rows_that_may_lie_elsewhere_have_no_name(place: Place, lead_outside: Change) -> None:
    lead_outside(place)
    assert place.name_inputs() is None


def lose_tables(work: Path) -> None:
    shutil.rmtree(work / "cache" / "tokens")


def change_record(work: Path) -> None:
    (record,) = (work / "cache" / "prepared").glob("*/test.json")
    record.write_text(record.read_text().replace("another one", "another two"))


def cut_list_short(work: Path) -> None:
    (record,) = (work / "cache" / "prepared").glob("*/kept.json")
    record.write_text(record.read_text()[:50])


@pytest.mark.parametrize("damage", [lose_tables, change_record, cut_list_short])
def test_what_is_not_whole_any_more_is_prepared_anew(place: Place, damage: Callable[[Path], None]) -> None:
    identity = fetch_sources(place.run("first"))
    damage(place.work)
    assert take_prepared(place.run("second"), place.name_inputs()) is None
    assert fetch_sources(place.run("second")) == identity
    records = [read_all(place.work / "runs" / name)["test.json"] for name in ("first", "second")]
    assert records[0] == records[1]
    assert take_prepared(place.run("third"), place.name_inputs()) is not None


def test_rows_that_change_while_they_are_read_are_not_kept(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    read = job.data.fetch.read_splits

    def read_and_be_overtaken(*words: object) -> object:
        splits = read(*words)  # type: ignore[arg-type]
        with (place.data / "train.csv").open("a") as file:
            file.write("one film more,good\n")
        return splits

    monkeypatch.setattr(job.data.fetch, "read_splits", read_and_be_overtaken)
    fetch_sources(place.run())
    assert not (place.work / "cache" / "prepared").exists()


def test_the_tokenizer_that_is_released_does_not_depend_on_what_was_cached(place: Place) -> None:
    fetch_sources(place.run("first"))
    place.set("data", "num_workers", 1)  # so it is prepared anew, from the tables that are there
    fetch_sources(place.run("second"))
    first, second = ((place.run(name).tokenizer / "tokenizer.json").read_bytes() for name in ("first", "second"))
    assert first == second
