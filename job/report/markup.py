"""Markup that is well-formed whatever the data says: everything is escaped unless it is `Html` already."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable, Sequence

_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
"""No HTML or XML file may hold them; a data set may."""


class Html(str):
    """Text that is markup already; what is added to it is escaped."""

    def __add__(self, other: object) -> Html:
        return Html(str(self) + str(escape(other)))


def escape(value: object) -> Html:
    """Return `value` as markup: as it is where it is `Html`, else with what has a meaning in markup taken from it."""
    if isinstance(value, Html):
        return value
    return Html(html.escape(_FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", str(value))))


def element(tag: str, *content: object, **attributes: object) -> Html:
    """Return <tag attributes>content</tag>; `class_` is the attribute class, and _ in names stands for -."""
    named = "".join(f' {_name(key)}="{escape(value)}"' for key, value in attributes.items())
    inner = "".join(escape(part) for part in content)
    return Html(f"<{tag}{named}>{inner}</{tag}>" if content else f"<{tag}{named}/>")


def _name(key: str) -> str:
    return key.rstrip("_").replace("_", "-")


def render_table(headings: Sequence[object], rows: Iterable[Sequence[object]]) -> Html:
    """Return a table whose first column names the row; it scrolls by itself where the page is too narrow."""
    head = element("tr", *(element("th", heading, scope="col") for heading in headings))
    body = [
        element("tr", element("th", first, scope="row"), *(element("td", cell) for cell in cells))
        for first, *cells in rows
    ]
    table = element("table", element("thead", head), element("tbody", *body, ""))
    return element("div", table, class_="scroll", tabindex="0", role="region", aria_label=str(headings[0]))


def isolate(text: str) -> Html:
    """Return a name from the data; its direction, left or right, is its own and that of nothing around it."""
    return element("bdi", text)


def join_isolated(*names: str) -> str:
    """Return names from the data with arrows between them, in this order whatever their directions are (UAX #9)."""
    return " → ".join(f"\u2068{name}\u2069" for name in names)


def shorten(text: str, columns: int) -> str:
    """Return `text` in at most so many columns; a letter of Chinese, Japanese or Korean takes two, marks take none."""
    text = " ".join(text.split())
    width = 0
    for place, letter in enumerate(text):
        if unicodedata.category(letter) not in ("Mn", "Me", "Cf"):
            width += 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        if width > columns:
            return f"{text[: max(place - 1, 1)]}…"
    return text
