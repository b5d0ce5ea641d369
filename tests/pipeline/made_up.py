"""Made-up data for tasks that no package brings texts for: sentences with names in them, and questions about them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

FIRST = [
    "Ada", "Boris", "Carla", "Dmitri", "Elena", "Farid", "Grete", "Hugo", "Ines", "Jamal", "Karin", "Liam", "Mona",
    "Nils", "Olga", "Pavel", "Rosa", "Sven",
]  # fmt: skip
LAST = [
    "Meyer", "Okafor", "Tanaka", "Silva", "Novak", "Larsen", "Haddad", "Moreau", "Rossi", "Kim", "Patel", "Weber",
    "Costa", "Berg", "Ortiz", "Dubois",
]  # fmt: skip
PLACES = [
    "Paris", "Lisbon", "New Delhi", "Cape Town", "Oslo", "San Jose", "Cairo", "Lima", "Hong Kong", "Prague", "Boston",
    "Quebec", "Kyoto", "Accra",
]  # fmt: skip
THINGS = [
    "violin", "lamp", "ladder", "kettle", "camera", "carpet", "helmet", "mirror", "basket", "candle", "hammer",
    "wallet", "guitar", "teapot",
]  # fmt: skip
VERBS = ["hides", "keeps", "left", "found", "lost", "bought"]
FRAMES = ("{p} flew from {l} to {l} yesterday .", "In {l} , {p} met {p} again .", "The mayor of {l} thanked {p} .",
          "{p} bought a {t} .", "Nobody in {l} knows why the {t} broke .", "{p} and {p} live near {l} .")  # fmt: skip


def _fill(frame: str, rng: random.Random) -> tuple[list[str], list[str]]:
    words, tags = [], []
    for word in frame.split():
        kind = word[1] if word.startswith("{") else ""
        if kind == "p":
            parts, label = [rng.choice(FIRST), rng.choice(LAST)][: rng.choice((1, 2))], "PER"
        elif kind == "l":
            parts, label = rng.choice(PLACES).split(), "LOC"
        else:
            parts, label = [rng.choice(THINGS) if kind else word], ""
        words += parts
        tags += [f"{'BI'[place > 0]}-{label}" if label else "O" for place in range(len(parts))]
    return words, tags


def write_tagged(folder: Path, sizes: dict[str, int]) -> Path:
    """Write JSON lines of {tokens, tags} for each split; no sentence stands in two."""
    rng, seen = random.Random(7), set()
    for split, size in sizes.items():
        rows: list[dict[str, Any]] = []
        while len(rows) < size:
            words, tags = tag_sentence(rng)
            if tuple(words) not in seen:
                seen.add(tuple(words))
                rows.append({"tokens": words, "tags": tags})
        _write(folder / f"{split}.jsonl", rows)
    return folder


def write_questions(folder: Path, sizes: dict[str, int], unanswered: float = 0.0) -> Path:
    """Write JSON lines of {question, context, answers} for each split, a share of them without an answer."""
    rng = random.Random(8)
    for split, size in sizes.items():
        _write(folder / f"{split}.jsonl", [ask_question(rng, rng.random() < unanswered) for _ in range(size)])
    return folder


def tag_sentence(rng: random.Random) -> tuple[list[str], list[str]]:
    """Return the words of one to three sentences, and their tags."""
    return _fill(" ".join(rng.choices(FRAMES, k=rng.randint(1, 3))), rng)


def ask_question(rng: random.Random, unanswered: bool) -> dict[str, Any]:
    things, places = rng.sample(THINGS, rng.randint(2, 8)), rng.sample(PLACES, 9)
    facts = [
        f"{rng.choice(FIRST)} {rng.choice(LAST)} {rng.choice(VERBS)} the {thing} in {place}."
        for thing, place in zip(things, places, strict=False)
    ]
    context, asked = " ".join(facts), rng.randrange(len(things))
    if unanswered:
        thing = next(thing for thing in THINGS if thing not in things)
        return {"question": f"Where is the {thing}?", "context": context, "answers": {"text": [], "answer_start": []}}
    answer = places[asked]
    start = context.index(f" {answer}.", context.index(things[asked])) + 1
    question = f"Where is the {things[asked]}?"
    return {"question": question, "context": context, "answers": {"text": [answer], "answer_start": [start]}}


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
