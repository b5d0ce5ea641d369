"""Texts and models of the bench: real sentences in documents as long as IMDB's, a real encoder with fewer layers."""

from __future__ import annotations

import csv
import json
import random
import shutil
from pathlib import Path

from safetensors.numpy import load_file, save_file

_MEDIAN_WORDS, _SPREAD = 175.0, 0.62
"""Of IMDB: about 263 tokens a document on average where the longest are cut at 512 (1.3 tokens a word)."""


def write_documents(assets: Path, folder: Path, rows: dict[str, int]) -> Path:
    """Write SPLIT.csv with so many documents: sentences of reviews or of a newspaper, as long together as IMDB's are.

    Which of the two is learned in few steps, so that a short bench can ask what has been learned.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sentences = {"review": _read_texts(assets / "movie-reviews/train.csv"), "news": _read_texts(assets / "nyt/all.csv")}
    draw = random.Random(0)
    for split, count in rows.items():
        with (folder / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for number in range(count):
                label = list(sentences)[number % 2]
                writer.writerow([_write_document(draw, sentences[label]), label])
    return folder


def _read_texts(path: Path) -> list[str]:
    with path.open(encoding="utf-8", newline="") as file:
        return [row["text"] for row in csv.DictReader(file)]


def _write_document(draw: random.Random, sentences: list[str]) -> str:
    words: list[str] = []
    wanted = draw.lognormvariate(0.0, _SPREAD) * _MEDIAN_WORDS
    while len(words) < wanted:
        words += draw.choice(sentences).split()
    return " ".join(words[: max(int(wanted), 8)])


def cut_model(model: Path, folder: Path, layers: int) -> Path:
    """Write a BERT with its first layers alone, so that a bench has time for many rounds."""
    if (folder / "model.safetensors").exists():
        return folder
    shutil.copytree(model, folder, dirs_exist_ok=True)
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    weights = load_file(model / "model.safetensors")
    kept = {name: array for name, array in weights.items() if not _is_beyond(name, layers)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _is_beyond(name: str, layers: int) -> bool:
    _, found, rest = name.partition("encoder.layer.")
    return bool(found) and int(rest.partition(".")[0]) >= layers
