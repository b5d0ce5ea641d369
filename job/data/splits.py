"""Holding rows out, and finding train rows that reappear in test.

Rows with the same text always go to the same side, so a fraction can never leak. All choices
depend on the seed and the rows alone.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np

from job.data.columns import refuse_beyond
from job.errors import DataError
from job.recipe.schema import Data
from job.tasks import Examples

log = logging.getLogger("job.data")

Splits = dict[str, Examples]

_MIN_SPREAD = 5e-4
"""Standard deviation by the largest label: of the seven digits of fp32 three are to be left for the differences."""


def hold_out(examples: Examples, fraction: float, seed: int, *, by_source: bool = False) -> tuple[Examples, Examples]:
    """Return (rest, held-out), stratified by label, rows with equal texts on one side; order is kept.

    Of pairs both texts must be equal, or the first alone (`by_source`) where the second is what is to be written.
    Shares of labels are rounded so that their sum is right (largest remainder), and no label loses all of its rows.
    """
    groups = _group_texts(replace(examples, pairs=None) if by_source else examples)
    rng = np.random.default_rng(seed)
    first_of_group = np.unique(groups, return_index=True)[1]
    chosen = np.zeros(len(first_of_group), dtype=bool)
    labels = examples.labels[first_of_group]
    counts = np.unique(labels, return_counts=True)[1]
    of_each_label = np.split(np.argsort(labels, kind="stable"), counts.cumsum()[:-1])
    for count, members in zip(_share_out(counts, fraction, rng), of_each_label, strict=True):
        rng.shuffle(members)
        chosen[members[:count]] = True
    held = chosen[groups]
    return examples.take(np.flatnonzero(~held)), examples.take(np.flatnonzero(held))


def _share_out(counts: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Return how many rows of each label, which has `counts` of them, are held out: one at least of all, and none of a
    label's last.
    """
    wanted = fraction * counts
    shares = np.minimum(np.floor(wanted), counts - 1).astype(int)
    open_ = np.flatnonzero(shares < counts - 1)
    order = rng.permutation(open_)
    order = order[np.argsort(-(wanted - shares)[order], kind="stable")]
    missing = max(round(float(wanted.sum())), 1) - int(shares.sum())
    shares[order[: max(missing, 0)]] += 1
    return shares


def cut_train(train: Examples, limit: int | None, seed: int) -> Examples:
    """Return at most `limit` train rows, drawn at random (files are often sorted by label), in order."""
    if limit is None or limit >= len(train):
        return train
    drawn = np.random.default_rng([seed, 1]).permutation(len(train))[:limit]
    return train.take(np.sort(drawn))


def take_shots(train: Examples, shots: int | None, names: list[str], seed: int) -> Examples:
    """Return `shots` train rows of each label, drawn at random, in order; all of a label that has fewer."""
    if shots is None:
        return train
    drawn = draw_shots(train.labels, len(names), shots, np.random.default_rng([seed, 2]))
    for name, members in zip(names, drawn, strict=True):
        if 0 < len(members) < shots:
            log.warning("label %r has %d train rows, fewer than tuning.shots: %d", name, len(members), shots)
    return train.take(np.sort(np.concatenate(drawn)))


def draw_shots(labels: np.ndarray, classes: int, shots: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Return for each label the positions of at most `shots` rows, int64, drawn without replacement."""
    return [rng.permutation(np.flatnonzero(labels == label))[:shots] for label in range(classes)]


def separate_splits(splits: Splits, data: Data) -> Splits:
    """Take rows that stand in a later split out of the earlier ones, or raise DataError when there are too many.

    Test keeps its rows; validation loses those of test; train loses those of both.
    """
    train = _drop_known(splits, "train", "test", data)
    validation = _drop_known(splits, "validation", "test", data)
    train = _drop_known({"train": train, "validation": validation}, "train", "validation", data)
    return {"train": train, "validation": validation, "test": splits["test"]}


def check_splits(splits: Splits, names: list[str]) -> None:
    """Raise DataError for a split without rows, or a train split with one label only (`names`, if any)."""
    for name, examples in splits.items():
        if len(examples) == 0:
            rows = splits["train"].labels
            if len(names) == len(rows) == len(np.unique(rows)):
                raise DataError(
                    f"data.{name}: each of the {len(names):,} labels has a single row, so none can be held out; "
                    "correct data.columns.label, or give more rows of each"
                )
            raise DataError(f"data.{name}: no rows are left in this split; give it more rows or a larger fraction")
    train = splits["train"]
    several = [label for target in train.targets or () for label in target] if names else []
    present = np.unique(train.labels if train.targets is None else several)
    if names and len(present) < 2:
        said = f"every row has the label {names[int(present[0])]!r}" if len(present) else "no row has a label"
        raise DataError(f"data.train: {said}; classification needs at least two labels")
    absent = [name for index, name in enumerate(names) if index not in present]
    if absent:
        log.warning("labels without a train row: %s; the model cannot learn them", ", ".join(absent))


def check_spread(splits: Splits) -> None:
    """Raise DataError where the numbers of train or test are all (nearly) the same: nothing is learned or measured."""
    for name, examples in ((name, each) for name, each in splits.items() if name != "validation"):
        numbers = np.array(examples.targets, dtype=np.float64)
        if numbers.std() <= _MIN_SPREAD * np.abs(numbers).max():
            raise DataError(
                f"data.{name}: the labels lie between {numbers.min():g} and {numbers.max():g}, too close together for "
                "fp32 to tell their differences; give rows whose labels differ, or subtract a constant from all"
            )


def _drop_known(splits: Splits, split: str, later: str, data: Data) -> Examples:
    """Return `split` without the rows whose text stands in `later` too."""
    examples = splits[split]
    known = set(_normalize(splits[later]))
    repeated = np.array([text in known for text in _normalize(examples)], dtype=bool)
    count = int(repeated.sum())
    if count == 0:
        return examples
    rows = ", ".join(str(row) for row in examples.rows[repeated][:3])
    refuse_beyond(
        count,
        len(examples),
        data,
        f"{count} {split} row{'s' * (count > 1)} stand{'s' * (count == 1)} in {later} too (row {rows})",
        f"data.{split} or data.{later}",
    )
    log.warning("%d rows of %s are also in %s and were set aside", count, split, later)
    return examples.take(np.flatnonzero(~repeated))


def _group_texts(examples: Examples) -> np.ndarray:
    """Return int64 [rows]: the number of each row's text, in order of first appearance."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(text, len(numbers)) for text in _normalize(examples)], dtype=np.int64)


def _normalize(examples: Examples) -> list[str]:
    """Two rows are the same when their texts (and pairs) differ in white space only."""
    pairs = examples.pairs or [""] * len(examples)
    return [" ".join([*text.split(), "\x00", *pair.split()]) for text, pair in zip(examples.texts, pairs, strict=True)]
