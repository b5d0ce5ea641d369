"""What translators are trained on and from: sentences of two made-up languages, tiny models of each kind, a recipe."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

PAD, END, UNKNOWN, BEGIN = range(4)
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""Matrices of this size are computed faster by one."""


def write_translations(folder: Path, sizes: dict[str, int]) -> list[str]:
    """Write JSON lines of {source, target} for each split; return all words of both languages. No sentence comes twice.

    A sentence is an article, a noun, a verb and an adverb; the other language has a word for each, the adverb first.
    """
    rng, kinds, seen = random.Random(9), (4, 20, 20, 12), set()
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    words = rng.sample([first + second for first in syllables for second in syllables], 2 * sum(kinds))
    fresh = iter(words)
    lexicon = [[(next(fresh), next(fresh)) for _ in range(count)] for count in kinds]
    for split, size in sizes.items():
        rows: list[dict[str, Any]] = []
        while len(rows) < size:
            article, noun, verb, adverb = sentence = tuple(map(rng.choice, lexicon))
            if sentence not in seen:
                seen.add(sentence)
                target = " ".join(word for _, word in (adverb, article, verb, noun))
                rows.append({"source": " ".join(word for word, _ in sentence), "target": target})
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return words


def make_model(kind: str, folder: Path, words: list[str]) -> Path:
    """Write a random model of two layers each, and a tokenizer of whole words."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["<pad>", "</s>", "<unk>", "<s>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(special + words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    begins = kind == "bart"
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if begins else "$A </s>", special_tokens=[("<s>", BEGIN), ("</s>", END)]
    )
    tokens = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"} | (
        {"bos_token": "<s>"} if begins else {}
    )
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens).save_pretrained(folder)
    torch.manual_seed(0)
    ids = {"vocab_size": len(special + words), "pad_token_id": PAD, "eos_token_id": END, "decoder_start_token_id": PAD}
    sizes: dict[str, Any] = {"d_model": 64, "max_position_embeddings": 64, "dropout": 0.0}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 2, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 128}
    if kind in ("t5", "mt5"):
        sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    if kind in ("marian", "pegasus"):  # as the published ones have it: else positions drown words
        sizes |= {"scale_embedding": True}
    if begins:  # as BART is: a target begins with a token of its own, after the one that the decoder begins with
        ids |= {"bos_token_id": BEGIN, "forced_bos_token_id": BEGIN, "decoder_start_token_id": END}
    config = transformers.AutoConfig.for_model(kind, **ids, **sizes)
    transformers.AutoModelForSeq2SeqLM.from_config(config).save_pretrained(folder)
    return folder


def write_down(model: Path, source: Path, store: Path) -> dict[str, Any]:
    """Return a complete recipe, by which these models learn their language in 120 steps."""
    steps = {"max_steps": 120, "save_steps": 60, "eval_steps": 60}
    return {
        "name": "translator",
        "task": "seq2seq-lm",
        "model": {"id": str(model)},
        "data": {"source": str(source), "max_length": 16, "validation": "validation"},
        "training": {"global_batch_size": 32, "learning_rate": 5e-3, "precision": "fp32", **steps},
        "export": {"latency": False, "int8": {"targets": ["portable"]}},
        "store": {"uri": str(store)},
    }
