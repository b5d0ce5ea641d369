"""Conversations: the assistant's words alone are learnt, and templates are rendered as transformers renders them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from job.data.targets import join_messages, read_messages
from job.errors import DataError, NotFound
from job.predict.chat import ChatTemplate, check_messages
from job.tasks import IGNORED_LABEL, Examples, get_task, render_chat

CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "Be kind.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system prompts') }}{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + "
    "message['content'] | trim + ' [/INST]' }}{% else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
FORGETFUL = (  # thoughts of earlier turns are left out, as reasoning models do
    "{% for message in messages %}{{ message['role'] }}: {% if message['role'] == 'assistant' and not loop.last %}"
    "{{ message['content'].split('</think>')[-1] }}{% else %}{{ message['content'] }}{% endif %}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
TALK = [
    {"role": "user", "content": "Name a film."},
    {"role": "assistant", "content": "Metropolis."},
    {"role": "user", "content": 'And a {braced} "quoted" é 中文 one?'},
    {"role": "assistant", "content": "M, by Fritz Lang."},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet)
    made.train_from_iterator([join_messages(TALK)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="<|im_end|>")


def encode(tokenizer: Any, messages: list[dict[str, str]], max_length: int = 400) -> Any:
    nothing = np.zeros(1, dtype=np.int64)
    examples = Examples([join_messages(messages)], None, nothing, nothing + 1, 0, [messages])
    return next(iter(get_task("causal-lm").encode(tokenizer, examples, max_length)))


def read_learnt(tokenizer: Any, row: Any) -> str:
    return str(tokenizer.decode([label for label in row.labels if label != IGNORED_LABEL]))


@pytest.mark.parametrize(
    ("template", "learnt"),
    [
        (CHATML, "Metropolis.<|im_end|>\nM, by Fritz Lang.<|im_end|>\n"),
        (LLAMA2, " Metropolis. <|im_end|> M, by Fritz Lang. <|im_end|>"),
        (FORGETFUL, " Metropolis.<|im_end|> M, by Fritz Lang.<|im_end|>"),
    ],
)
def test_only_what_the_assistant_says_is_learnt_its_end_included(tokenizer: Any, template: str, learnt: str) -> None:
    tokenizer.chat_template = template
    row = encode(tokenizer, TALK)
    assert read_learnt(tokenizer, row) == learnt
    whole = render_chat(tokenizer, TALK)
    assert tokenizer.decode([*row.ids, row.labels[-1] if row.labels[-1] >= 0 else 0]).startswith(whole[:-1])
    following = [*row.ids[1:], row.labels[-1]]
    asked = [place for place, label in enumerate(row.labels) if label != IGNORED_LABEL]
    assert [following[place] for place in asked] == [row.labels[place] for place in asked]


def test_a_turn_that_is_written_otherwise_once_others_follow_is_found_by_its_words(tokenizer: Any) -> None:
    tokenizer.chat_template = FORGETFUL
    talk = [*TALK[:3], {"role": "assistant", "content": "<think>hm</think>M."}, TALK[0], TALK[1]]
    with pytest.raises(DataError, match=r"row 1: .*does not write what the assistant says"):
        encode(tokenizer, talk)
    assert read_learnt(tokenizer, encode(tokenizer, talk[:4])).endswith("<think>hm</think>M.<|im_end|>")


def test_words_that_both_say_are_learnt_where_the_assistant_says_them(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {% if loop.last %}<think></think>{% endif %}"
        "{{ m['content'] }}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    says = [("user", "is it red?"), ("assistant", "yes"), ("user", "yes sure? or blue"), ("assistant", "yes")]
    row = encode(tokenizer, [{"role": role, "content": content} for role, content in says])
    assert read_learnt(tokenizer, row).replace(" ", "") == "yes<|im_end|>yes<|im_end|>"
    learnt = [place for place, label in enumerate(row.labels) if label != IGNORED_LABEL]
    before = tokenizer.decode(row.ids[: learnt[0] + 1])
    assert before.rstrip().endswith("assistant:")


def test_a_template_with_the_tags_of_transformers_is_rendered(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if loop.index > 3 %}{% break %}{% endif %}{% generation %}{{ m['content'] }}"
        "{% endgeneration %}{% endfor %}{% if tools is not none %}tools{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path)
    assert ChatTemplate(tmp_path, {}).render(TALK[:3], 0) == render_chat(tokenizer, TALK[:3], ask=True)


def test_a_conversation_that_is_too_long_keeps_its_end(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML
    row = encode(tokenizer, TALK * 5, 40)
    assert len(row.ids) == len(row.labels) == 40 and row.cut
    assert read_learnt(tokenizer, row).endswith("M, by Fritz Lang.<|im_end|>\n")


def test_a_tokenizer_without_a_template_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="has no chat template"):
        encode(tokenizer, TALK)


@pytest.mark.parametrize(
    "value",
    [
        TALK,
        json.dumps(TALK),
        [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in TALK],
    ],
)
def test_conversations_are_read_as_people_write_them(value: Any) -> None:
    assert read_messages(value) == TALK


@pytest.mark.parametrize("value", [None, "hello", [], [{"role": "user"}], TALK[:1], [{"role": "user", "content": 7}]])
def test_a_conversation_without_an_assistant_is_a_bad_row(value: Any) -> None:
    with pytest.raises(ValueError, match=r"message|assistant"):
        read_messages(value)


@pytest.mark.parametrize("template", [CHATML, LLAMA2, FORGETFUL])
@pytest.mark.parametrize("in_config", [True, False])
def test_predict_renders_a_template_as_transformers_does(
    tokenizer: Any, template: str, in_config: bool, tmp_path: Path
) -> None:
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path, save_jinja_files=not in_config)
    options = json.loads((tmp_path / "tokenizer_config.json").read_text())
    ours = ChatTemplate(tmp_path, options).render(TALK[:3], 0)
    assert ours == render_chat(tokenizer, TALK[:3], ask=True)


def test_a_template_can_refuse_and_reaches_nothing(tmp_path: Path) -> None:
    for template, reason in (
        ("{{ raise_exception('no system prompts') }}", "no system prompts"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% for", "refuses"),
        ("{% macro call() %}{{ call() }}{% endmacro %}{{ call() }}", "refuses"),
        ("{{ 'x' | xmlattr }}", "refuses"),
    ):
        (tmp_path / "chat_template.jinja").write_text(template)
        with pytest.raises(DataError, match=reason):
            ChatTemplate(tmp_path, {}).render(TALK[:1], 0)
    with pytest.raises(NotFound, match="no chat template"):
        ChatTemplate(tmp_path / "elsewhere", {}).render(TALK[:1], 0)
    for wrong in ([], [{"role": "user"}], ["hello"]):
        with pytest.raises(DataError, match="no conversation"):
            check_messages(wrong, 3)
