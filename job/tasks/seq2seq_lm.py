"""Sequence to sequence: a text that is written from another one, as in translation and summarization."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from job.tasks.causal_lm import find_end
from job.tasks.likelihood import TokenLikelihood
from job.tasks.onnx_files import DECODER
from job.tasks.protocol import Encoded, Examples


class Seq2SeqLM(TokenLikelihood):
    """An encoder reads the source, a decoder foretells the target's tokens; each one has those before it."""

    name: ClassVar[str] = "seq2seq-lm"
    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    ort_class: ClassVar[str] = "ORTModelForSeq2SeqLM"
    architectures: ClassVar[tuple[str, ...]] = ("ForConditionalGeneration", "MTModel")
    export_task: ClassVar[str] = "text2text-generation-with-past"
    onnx_file: ClassVar[str] = DECODER
    pipeline_tag: ClassVar[str] = "text2text-generation"
    generates: ClassVar[bool] = True
    is_encoder_decoder: ClassVar[bool] = True
    trains_head: ClassVar[bool] = False

    def encode(self, tokenizer: Any, examples: Examples, max_length: int) -> Iterator[Encoded]:
        """Yield a row for each source, whose labels are the tokens of its target; each has at most `max_length`.

        A target ends with the token at which generation stops, unless it is cut: then its end is not learned.
        """
        end = find_end(tokenizer)
        for place, (source, target) in enumerate(zip(examples.texts, examples.pairs or (), strict=True)):
            ids = tokenizer(source, truncation=True, max_length=max_length)["input_ids"]
            labels = list(tokenizer(text_target=target)["input_ids"])
            labels += [end] if labels[-1:] != [end] else []
            cut = len(ids) >= max_length or len(labels) > max_length
            yield Encoded(place, ids, None, labels[:max_length], cut)
