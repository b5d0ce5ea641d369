"""report.html in a real browser: it asks nobody for anything, has nothing to complain of, and fits a phone."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from page_numbers import NASTY, make_numbers, make_run

from job.report.page import render_page
from job.report.plots import draw_plots

pytestmark = pytest.mark.cluster

LABELS = {
    "nasty": NASTY,
    "a hundred": [f"{word} {number}" for number in range(25) for word in ("intent", "الفئة", "类别", "card")],
}

PROBE = """<script>
const boxes = [...document.querySelectorAll("main *")].filter(each => !each.parentElement.closest(".scroll"))
  .map(each => each.getBoundingClientRect()).filter(box => box.width);
document.title = JSON.stringify([Math.min(...boxes.map(b => b.left)), Math.max(...boxes.map(b => b.right))]);
</script>"""


@pytest.fixture(params=LABELS, ids=str)
def page(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    labels = LABELS[request.param]
    numbers = make_numbers(labels)
    path = tmp_path / "report.html"
    path.write_text(render_page(make_run(tmp_path, labels), numbers, draw_plots(numbers)), encoding="utf-8")
    return path


def browse(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    words = [
        "chromium",
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={page.parent / 'profile'}",
    ]
    quiet = ["--disable-background-networking", "--disable-component-update", "--no-first-run", "--hide-scrollbars"]
    return subprocess.run([*words, *quiet, *options, page.as_uri()], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_loads_without_a_complaint_or_a_request_to_anybody(page: Path, width: int, tmp_path: Path) -> None:
    log = tmp_path / "net.json"
    options = (f"--window-size={width},900", "--enable-logging=stderr", f"--log-net-log={log}", "--dump-dom")
    done = browse(page, *options)
    assert "Wrong with the most confidence" in done.stdout
    assert "CONSOLE" not in done.stderr
    hosts = set(re.findall(r'"url":"https?://([^/"]+)', log.read_text()))
    assert not [host for host in hosts if not re.search(r"\b(google|googleapis|gvt1)\.com$", host)]  # Chromium's own
    assert "alert(1)" in done.stdout and "<script" not in done.stdout


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_but_a_table_that_scrolls_is_wider_than_the_page(page: Path, width: int) -> None:
    text = re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
    # no window is narrower than 500 pixels, so the page is made so
    page.write_text(text.replace("</body>", f"<style>body{{width:{width}px;margin:0}}</style>{PROBE}</body>"), "utf-8")
    found = re.search(r"<title>(\[.*?\])</title>", browse(page, "--window-size=1280,900", "--dump-dom").stdout)
    assert found
    left, right = json.loads(found.group(1))
    assert left >= 0 and right <= width
