"""Conversations as a bundle's chat template writes them, with jinja2 alone.

The template is a program of the bundle's: it runs in the sandbox that transformers runs it in, and sees the
conversation and the special tokens, nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from job.errors import DataError, NotFound

Message = dict[str, str]
"""{role, content}."""


class ChatTemplate:
    """The chat template of one bundle folder; `options`: its tokenizer_config.json."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        path = folder / "chat_template.jinja"
        source = path.read_text(encoding="utf-8") if path.is_file() else options.get("chat_template")
        self._source, self._folder = source if isinstance(source, str) else None, folder
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        texts = {name: options.get(name) for name in names}
        self._tokens = {name: t.get("content") if isinstance(t, dict) else t or "" for name, t in texts.items()}

    def render(self, messages: Sequence[Message], row: int) -> str:
        """Return a conversation as text up to where the assistant is to speak; raise DataError (11) naming the row."""
        from jinja2 import nodes
        from jinja2.ext import Extension
        from jinja2.parser import Parser
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class Generation(Extension):
            """{% generation %} marks what is learnt; here it is what stands in it (transformers has the same tag)."""

            tags = {"generation"}  # as jinja2 declares it

            def parse(self, parser: Parser) -> list[nodes.Node]:
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        if self._source is None:
            raise NotFound(f"{self._folder}: has no chat template; give prompts as plain texts (without --chat)")
        extensions = ["jinja2.ext.loopcontrols", Generation]
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        try:
            template = environment.from_string(self._source)
            unused = {"tools": None, "documents": None}
            return template.render(messages=list(messages), add_generation_prompt=True, **unused, **self._tokens)
        except Exception as error:  # templates are programs and raise what they like
            raise DataError(f"text {row}: the chat template refuses it: {str(error)[:200]}") from None


def _refuse(reason: str) -> NoReturn:
    raise ValueError(reason)


def check_messages(value: object, row: int) -> list[Message]:
    """Return a conversation; raise DataError (11) naming the row that is none."""
    if isinstance(value, list) and value and all(_is_message(message) for message in value):
        return [{"role": message["role"], "content": message["content"]} for message in value]
    raise DataError(f"text {row}: is no conversation; give a list of {{role, content}}")


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), str) for name in ("role", "content"))
