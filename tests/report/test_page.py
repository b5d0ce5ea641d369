"""report.html: one well-formed file without scripts or outside resources, whatever labels and texts hold."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from page_numbers import NASTY, make_numbers, make_run

from job.evaluate.analysis import count_confusions, count_lengths, measure_calibration
from job.report.axes import Axis, format_tick
from job.report.charts import Series, draw_curves
from job.report.images import write_pictures
from job.report.markup import shorten
from job.report.page import render_page, tell_promotion
from job.report.plots import draw_plots
from job.tasks import Truth, share_out

MANY = [f"{word} {number}" for number in range(25) for word in ("intent", "الفئة", "类别", "card")]
LABELS = {"two": ["negative", "positive"], "nasty": NASTY, "a hundred": MANY}


@pytest.fixture(params=LABELS, ids=str)
def page(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    labels = LABELS[request.param]
    numbers = make_numbers(labels)
    text = str(render_page(make_run(tmp_path, labels), numbers, draw_plots(numbers)))
    (tmp_path / "report.html").write_text(text, encoding="utf-8")
    return text


def read(page: str) -> ElementTree.Element:
    return ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n"))


def list_texts(root: ElementTree.Element, tag: str) -> list[str]:
    return ["".join(found.itertext()) for found in root.iter(tag)]


def test_the_page_is_well_formed_and_asks_nothing_of_anybody(page: str) -> None:
    root = read(page)
    tags = {found.tag for found in root.iter()}
    assert not tags & {"script", "link", "img", "iframe", "object", "image", "use", "foreignObject", "b onclick"}
    for found in root.iter():
        assert not {"src", "href", "srcset", "data"} & set(found.attrib), found.attrib
        assert not [name for name in found.attrib if name.startswith("on")]
    style = next(root.iter("style")).text or ""
    assert "url(" not in style and "@import" not in style and "var(--" in style


def test_every_chart_has_a_name_for_who_cannot_see_it(page: str) -> None:
    charts = list(read(page).iter("svg"))
    assert len(charts) == 10
    for chart in charts:
        assert chart.get("role") == "img" and len(chart.findtext("title") or "") > 5


def test_no_number_of_a_chart_is_missing_or_infinite(page: str) -> None:
    for chart in read(page).iter("svg"):
        for found in chart.iter():
            assert not re.search("nan|inf|None", " ".join(found.attrib.values())), found.attrib


def test_hostile_labels_and_texts_are_shown_as_text(tmp_path: Path) -> None:
    numbers = make_numbers(NASTY)
    root = read(str(render_page(make_run(tmp_path, NASTY), numbers, draw_plots(numbers))))
    names = list_texts(root, "bdi")
    assert NASTY[0] in names and NASTY[2] in names and NASTY[3] in names
    quotes = list_texts(root, "blockquote")
    assert len(quotes) == 20 and NASTY[0] * 2 in quotes
    assert all(quote.get("dir") == "auto" for quote in root.iter("blockquote"))


def test_two_labels_have_a_matrix_and_a_hundred_their_most_confused_pairs() -> None:
    for labels, title in ((LABELS["two"], "Confusion"), (MANY, "Most confused labels")):
        numbers = make_numbers(labels)
        plot = draw_plots(numbers)["confusion"]
        assert plot.title == title
        texts = list_texts(ElementTree.fromstring(plot.svg), "text")
        for true, said, count in numbers.analysis["confusion"]["cells"] if len(labels) == 2 else []:
            assert str(count) in texts, (true, said)
        assert len(texts) == (2 * 2 + 1 + 4 * 2 if len(labels) == 2 else 15 * 2)


def test_a_task_without_classes_has_no_confusion_and_no_mistakes(tmp_path: Path) -> None:
    numbers = make_numbers(["a", "b"])
    for name in ("confusion", "calibration", "mistakes"):
        del numbers.analysis[name]
    plots = draw_plots(numbers)
    assert set(plots) == {
        "quality", "loss", "validation", "learning_rate", "gradient_norm", "throughput", "exports", "lengths",
    }  # fmt: skip
    assert "Wrong with the most confidence" not in render_page(make_run(tmp_path, []), numbers, plots)


def test_the_headline_says_what_the_training_bought_and_which_files_passed(page: str) -> None:
    said = " ".join(list_texts(read(page), "p"))
    assert "released as fp32 and int8 portable" in said
    assert re.search(
        r"Fine-tuning bought \+0\.\d{4} accuracy over the best baseline, majority: 0\.2000 → 0\.\d{4}", said
    )
    assert "intervals are apart" in said


def test_the_run_has_a_report_that_knows_what_became_of_the_release(page: str) -> None:
    assert "It became the current release" not in page
    told = tell_promotion(page, {"promoted": False, "reason": "not better than <the other>"})
    assert "It did not become the current release: not better than &lt;the other&gt;." in told
    assert len(list(read(told).iter("p"))) == len(list(read(page).iter("p")))


def test_the_page_says_what_was_resumed_from_where(page: str) -> None:
    rows = [["".join(cell.itertext()) for cell in row] for row in read(page).iter("tr")]
    assert ["1", "2026-11-26 06:52:19", "the beginning", "killed without a word"] in rows
    assert ["2", "2026-11-26 06:52:19", "step 30", "finished the training"] in rows


def test_a_long_curve_keeps_its_spikes_in_few_points() -> None:
    values = [1.0] * 50_000
    values[31_234], values[40_000] = 9.0, float("inf")
    svg = draw_curves("loss", [Series("loss", list(enumerate(values)))], 50_000)
    line = next(ElementTree.fromstring(str(svg)).iter("polyline")).get("points", "").split()
    heights = {float(point.split(",")[1]) for point in line}
    assert len(line) <= 240 and len(heights) == 2


def test_a_chart_without_a_point_is_left_out() -> None:
    assert draw_curves("norm", [Series("norm", [(1, float("inf"))])], 3) is None
    assert draw_curves("norm", [Series("norm", [(1, 5.0)])], 3) is not None


@pytest.mark.parametrize("values", [[0.2, 0.8], [5, 5], [0, 0], [-3.1, -2.9], [1e-7, 3e-7], [0, 1.2e6]])
def test_axes_hold_their_values_between_few_round_ticks(values: list[float]) -> None:
    axis = Axis.across(values, 0, 100)
    assert axis.low <= min(values) and max(values) <= axis.high
    assert 2 <= len(axis.ticks) <= 8
    assert all(len(format_tick(tick)) <= 7 for tick in axis.ticks)


def test_pictures_show_text_also_where_the_machine_has_no_font(tmp_path: Path) -> None:
    plots = draw_plots(make_numbers(["negative", "positive"]))
    write_pictures(plots.values(), tmp_path)
    names = {path.stem for path in tmp_path.glob("*.png")}
    assert names == set(plots)
    blank = draw_plots(make_numbers(["", ""]))
    write_pictures([blank["confusion"]], tmp_path / "blank")
    sizes = []
    for picture in (tmp_path / "confusion.png", tmp_path / "blank" / "confusion.png"):
        data = picture.read_bytes()
        assert data.startswith(b"\x89PNG") and struct.unpack(">I", data[16:20])[0] == 900
        sizes.append(len(data))
    assert sizes[0] > sizes[1]


def test_a_name_is_cut_by_the_room_that_its_letters_take() -> None:
    assert shorten("a  name", 10) == "a name"
    assert shorten("abcdefghijk", 6) == "abcde…"
    assert shorten("很长的标签名称", 6) == "很长…"


def test_calibration_counts_how_far_confidence_is_from_being_right() -> None:
    logits = np.log(np.array([[0.9, 0.1]] * 10 + [[0.4, 0.6]] * 10, dtype=np.float32))
    truth = Truth(np.array([0] * 5 + [1] * 5 + [1] * 6 + [0] * 4), np.arange(20))
    found = measure_calibration(share_out(logits), truth)
    assert found["expected_calibration_error"] == pytest.approx((0.4 + 0.0) / 2, abs=1e-5)
    assert [(each["n"], each["accuracy"]) for each in found["bins"]] == [(10, 0.6), (10, 0.5)]


def test_confusions_are_counted_for_pairs_that_occur() -> None:
    truth = Truth(np.array([0, 0, 2, 2]), np.arange(4))
    assert count_confusions(np.array([0, 1, 2, 2]), truth) == [[0, 0, 1], [0, 1, 1], [2, 2, 2]]


def test_every_row_is_in_the_histogram_of_lengths() -> None:
    for lengths in ([1], [1, 2, 3], [8, 8, 512], list(range(1, 129))):
        found = count_lengths(np.array(lengths))
        assert sum(found["counts"]) == len(lengths)
        assert len(found["counts"]) <= 24
        assert found["width"] * len(found["counts"]) >= max(lengths)
