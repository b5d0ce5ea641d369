"""What a row is to be answered with, where that is not one label: tags of words, answers in a context, sets, numbers.

Each reader returns what `Examples.targets` holds, in JSON, or raises ValueError saying what is wrong with the row.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Sequence
from datetime import date, datetime
from itertools import pairwise
from typing import Any

_LIST = re.compile(r"\s*\[.*\]\s*", re.DOTALL)
_LOOSE = re.compile(r"""['"]\s+['"]""")
"""Two strings without a comma between them: numpy spells lists so, and Python would join them."""
_TOO_LARGE = 1e30
"""Squares of numbers in a model must be numbers still."""


def join_words(value: Any) -> tuple[str, list[tuple[int, int]]]:
    """Return words as one text with a blank between them, and of each word its first and last + 1 character.

    `value`: a list of words, also as JSON, or a text that is split at white space. White space inside a word is one
    blank.
    """
    words = list_values(value) if isinstance(value, str) else value
    if not isinstance(words, Sequence) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"is {type(value).__name__}, no list of words")
    spans, end = [], -1
    words = [" ".join(word.split()) for word in words]
    for word in words:
        spans.append((end + 1, end + 1 + len(word)))
        end = spans[-1][1]
    return " ".join(words), spans


def read_tags(words: Any, value: Any, find: Callable[[Any], int | None]) -> list[list[int]]:
    """Return [first, last + 1 character, label id] of every word in the joined text; `find` maps a tag to its id."""
    tags = list_values(value)
    _, spans = join_words(words)
    if len(tags) != len(spans):
        raise ValueError(f"has {len(spans)} tokens and {len(tags)} tags")
    ids = [find(tag) for tag in tags]
    if None in ids:
        raise ValueError(f"tag {str(tags[ids.index(None)])[:40]!r} is not among the labels")
    return [[first, end, label] for (first, end), label in zip(spans, ids, strict=True) if label is not None]


def list_values(value: Any) -> list[Any]:
    """Return the labels of one row: those of a list, of a JSON list, or the words of a string; one alone as a list."""
    if isinstance(value, str):
        found = parse_json(value) if _LIST.fullmatch(value) else value
        value = found.split() if isinstance(found, str) else found
    if value is None:
        raise ValueError("label is missing")
    return list(value) if isinstance(value, (list, tuple)) else [value]


def list_labels(value: Any) -> list[Any]:
    """Return the labels of one text: those of a list, of a JSON list, of words between , ; or |, else of the words.

    An empty string, as CSV has it, is a text without a label.
    """
    if isinstance(value, str):
        if _LIST.fullmatch(value):
            value = _parse_list(value)
        elif mark := next((mark for mark in ",;|" if mark in value), ""):
            return [part.strip() for part in value.split(mark) if part.strip()]
    labels = list_values(value)
    if any(isinstance(label, (list, tuple, dict)) for label in labels):
        raise ValueError(f"label {str(value)[:40]!r} holds a list in a list")
    return labels


def _parse_list(text: str) -> Any:
    found = parse_json(text)
    if isinstance(found, str):
        raise ValueError(f'label {text[:40]!r} begins like a list and is none; write ["one", "another"]')
    return found


def read_labels(value: Any, find: Callable[[Any], int | None]) -> list[int]:
    """Return the ids of a text's labels, ascending; `find` maps a label to its id."""
    values = list_labels(value)
    ids = [find(label) for label in values]
    if None in ids:
        raise ValueError(f"label {str(values[ids.index(None)])[:40]!r} is not among the labels")
    found = sorted(label for label in ids if label is not None)
    for label, following in pairwise(found):
        if label == following:
            raise ValueError(
                f"label {str(values[ids.index(label)])[:40]!r} stands in the list twice; a list names the labels that "
                "a text has, and no 0 or 1 for each"
            )
    return found


def read_number(value: Any) -> float:
    """Return a label that is a number, or text that says one."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise ValueError("label is missing")
    try:
        # Python would read 1_000 as a thousand
        number = float("nan" if isinstance(value, bool) or "_" in str(value) else value)
    except (TypeError, ValueError):
        number = math.nan
    if not abs(number) < _TOO_LARGE:
        raise ValueError(f"label {str(value)[:40]!r} is no number")
    return number


def read_answers(context: str, value: Any) -> list[list[Any]]:
    """Return [first character, text] of every answer in the context, none for a question without one.

    `value`: SQuAD's {text, answer_start} of lists or single ones, a list of such, a text or texts to be found in the
    context, or any of these as JSON. An answer whose place is not given, or given wrong, is the first of its text.
    """
    found = []
    for text, start in _list_answers(value):
        text, start = spell_date(text), int(start) if isinstance(start, float) and start.is_integer() else start
        if not isinstance(text, str) or not text.strip():
            raise ValueError("an answer is empty; a question without one has an empty list")
        if not isinstance(start, int) or context[start : start + len(text)] != text:
            start = context.find(text)
        if start < 0:
            raise ValueError(f"answer {text[:40]!r} does not stand in its context")
        found.append([start, text])
    return found


_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}


def read_messages(value: Any) -> list[dict[str, str]]:
    """Return a conversation as {role, content}; ShareGPT's {from, value} too, or any of these as JSON."""
    messages = parse_json(value) if isinstance(value, str) else value
    if not isinstance(messages, (list, tuple)) or not all(isinstance(message, dict) for message in messages):
        raise ValueError("is no list of messages")
    read = []
    for message in messages:
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError("has a message without role or content")
        read.append({"role": _ROLES.get(role, role), "content": content})
    if not any(message["role"] == "assistant" and message["content"].strip() for message in read):
        raise ValueError("has nothing that the assistant says")
    return read


def join_messages(messages: list[dict[str, str]]) -> str:
    """Return a conversation as one text, for people, and to tell conversations apart."""
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def has_answer(value: Any) -> bool:
    """Tell whether a question has an answer, however it is written; see `read_answers`."""
    try:
        return bool(_list_answers(value))
    except ValueError:  # said of the row when it is read
        return True


def _list_answers(value: Any) -> list[tuple[Any, Any]]:
    try:
        return _unfold_answers(value)
    except RecursionError:
        raise ValueError("answers are lists in lists, over and over") from None


def _unfold_answers(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        value = parse_json(value)
    if value is None or value == "":
        return []
    if isinstance(value, dict):
        texts, starts = value.get("text", []), value.get("answer_start")
        if isinstance(texts, (list, tuple)):
            starts = starts if isinstance(starts, (list, tuple)) and len(starts) == len(texts) else [None] * len(texts)
            return list(zip(texts, starts, strict=True))
        return [(texts, starts)] if texts else []
    if isinstance(value, (list, tuple)):
        return [answer for part in value for answer in _unfold_answers(part)]
    return [(value, None)]


def parse_json(text: Any) -> Any:
    """Return what a text says as JSON, or as Python spells lists and maps (pandas writes them so); else `text`."""
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return _parse_python(text)


def _parse_python(text: Any) -> Any:
    if not isinstance(text, str) or text.lstrip()[:1] not in ("[", "{") or _LOOSE.search(text):
        return text
    try:
        found = ast.literal_eval(text.strip())
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return text
    return found if isinstance(found, (list, dict)) else text


def spell_date(value: Any) -> Any:
    """Return a date as text, and anything else as it is: JSON lines whose strings all look like dates become such."""
    if not isinstance(value, datetime):
        return value.isoformat() if isinstance(value, date) else value
    is_day = value.time() == datetime.min.time() and value.tzinfo is None
    return value.date().isoformat() if is_day else value.isoformat(sep=" ")
