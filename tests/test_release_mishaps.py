"""What a damaged record before a release costs, and an outage after it: a number, and some space."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from job.errors import Unreachable
from job.node import Node
from job.recipe import Recipe, Run
from job.releasing import _prune, find_order
from job.store import Attempt, RunStore
from job.store.promotion import take_order


@pytest.fixture
def run(smallest_recipe: Recipe, tmp_path: Path) -> Run:
    store = smallest_recipe.store.model_copy(update={"uri": str(tmp_path / "store")})
    return Run("night", smallest_recipe.model_copy(update={"store": store}), tmp_path)


def stand_in(run: Run, verify: Callable[[], None] = lambda: None) -> Attempt:
    """An attempt of which only the store and the question for the owner are used."""
    return cast(Attempt, SimpleNamespace(store=RunStore.of(run), verify=verify))


DAMAGED = [b"", b"{", b"[]", b'{"model": "x"}', b'{"model": "x", "order": "3"}', b'{"model": "x", "order": null}']


@pytest.mark.parametrize("data", DAMAGED)
def test_a_run_whose_number_is_damaged_takes_a_new_one_and_keeps_it(
    run: Run, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    attempt = stand_in(run)
    first = find_order(run, attempt)
    others = [take_order(run.recipe.store, run.recipe.name) for _ in range(2)]
    attempt.store.objects.write("order.json", data)
    with caplog.at_level(logging.WARNING):
        taken = find_order(run, attempt)
    assert taken > max(first, *others)
    assert find_order(run, attempt) == taken
    assert "order.json" in caplog.text, "it is told: an older night counts as a newer one from now on"


def test_a_run_takes_its_number_without_a_warning(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert find_order(run, stand_in(run)) == find_order(run, stand_in(run))
    assert caplog.text == ""


def test_an_outage_after_a_release_was_committed_does_not_undo_it(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise Unreachable("the store is out")

    node: Any = SimpleNamespace(transfer=lambda work: work())
    with caplog.at_level(logging.WARNING):
        _prune(cast(Node, node), run, stand_in(run, fail), "tiny-1-00000001")
    assert "the store is out; old releases stay" in caplog.text
