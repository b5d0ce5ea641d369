"""What a row is to be answered with, where that is not one label: tags of words, answers in a context, sets, numbers.

Each reader returns what `Examples.targets` holds, in JSON, or raises ValueError saying what is wrong with the row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

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
        value = parse_json(value) if value.lstrip().startswith("[") else value.split()
    if value is None:
        raise ValueError("label is missing")
    return list(value) if isinstance(value, (list, tuple)) else [value]


def list_labels(value: Any) -> list[Any]:
    """Return the labels of one text: those of a list, of a JSON list, of words between commas, else of the words.

    An empty string, as CSV has it, is a text without a label.
    """
    if isinstance(value, str) and "," in value and not value.lstrip().startswith("["):
        return [part.strip() for part in value.split(",") if part.strip()]
    return list_values(value)


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
        number = float("nan" if isinstance(value, bool) else value)
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
    return bool(_list_answers(value))


def _list_answers(value: Any) -> list[tuple[Any, Any]]:
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
        return [answer for part in value for answer in _list_answers(part)]
    return [(value, None)]


def parse_json(text: Any) -> Any:
    """Return what a text says as JSON, or what was given."""
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return text
