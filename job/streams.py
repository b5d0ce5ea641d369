"""stdin, stdout and stderr as every verb may count on: there, and able to say any letter."""

from __future__ import annotations

import io
import os
import re
import sys

_CONTROLS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""Of terminals, of lines but for \\n, and of the direction of writing."""


def prepare_streams() -> None:
    """Put the null device where this process was started without a stream; let stdout escape what its encoding lacks.

    In this order a null device also takes the number of its stream, before a file or a socket does.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115  # as long as the process lives
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def speak_utf8() -> None:
    """Read stdin and write stdout as UTF-8, as JSON lines are, whatever the locale says.

    What is no UTF-8 raises UnicodeDecodeError; a lone surrogate is written as JSON escapes it.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")


def escape_controls(text: str) -> str:
    r"""Return text with its control characters escaped, which would steer a terminal; lines stay lines (\n)."""
    return _CONTROLS.sub(lambda found: repr(found.group())[1:-1], text)
