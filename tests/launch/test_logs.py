"""How far a training is: a bar on a terminal, which leaves nothing behind, and JSON lines anywhere else."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import pty
import struct
import termios
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest

from job.launch import set_up_logging
from job.launch.logs import write_where_read

PROGRESS = {"step": 20, "steps": 57, "percent": 35, "left_s": 72, "loss": 0.42131, "tokens_per_second": 5210.4}
log = logging.getLogger("job.test")


@pytest.fixture(autouse=True)
def keep_handlers() -> Iterator[None]:
    root = logging.getLogger("job")
    handlers, propagate, level = root.handlers, root.propagate, root.level
    yield
    root.handlers, root.propagate = handlers, propagate
    root.setLevel(level)


def speak(stream: TextIO) -> None:
    set_up_logging(stream)
    log.info("it begins")
    log.info("", extra={"progress": PROGRESS, "passing": False})
    log.info("", extra={"progress": PROGRESS | {"step": 21}, "passing": True})
    log.info("it ends")


def test_a_log_that_is_no_terminal_gets_a_json_line_for_each_logging_step(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as stream:
        speak(stream)
    first, told, last = (tmp_path / "log").read_text().splitlines()
    assert first.endswith("it begins") and last.endswith("it ends")
    line = json.loads(told)
    assert line.pop("time")
    assert line == PROGRESS


def test_what_another_machine_has_written_steers_no_terminal(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as stream:
        set_up_logging(stream)
        log.warning("attempt 1 on %s owns this run\nand more", "\x1b]0;owned\x07\x1b[2Jhöst\r")
    first, last = (tmp_path / "log").read_text().splitlines()
    assert first.endswith(r"attempt 1 on \x1b]0;owned\x07\x1b[2Jhöst\r owns this run") and last == "and more"


@pytest.mark.parametrize("columns", [80, 200, 30])
def test_a_terminal_gets_a_bar_of_one_line_that_the_next_line_takes_the_place_of(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(slave, "w") as stream:
        speak(stream)
        shown = b""
        while b"it ends" not in shown:
            shown += os.read(master, 1 << 16)
    os.close(master)
    begins, bars = shown.decode().split("\n")[:2]
    assert "it begins" in begins
    assert bars.count("\x1b[2K") == 3 and "it ends" in bars  # two bars and the line that follows, all on one line
    if columns >= 80:
        for words in ("20/57", "21/57", "1:12 left", "5,210 tokens/s", "loss 0.4213"):
            assert words in bars
    assert b"\x1b[?25l" not in shown  # a cursor that was hidden would stay so after a kill


def test_a_result_is_told_where_no_thread_can_be_started_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with (tmp_path / "out").open("w") as stream:
        write_where_read(stream, "the result\n", 1.0)
    assert (tmp_path / "out").read_text() == "the result\n"
