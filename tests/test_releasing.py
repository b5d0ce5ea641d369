"""Whether a release becomes the current one: by its gates, by its order, and never against a person's hand."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, cast

import pytest

from job.errors import Interrupted
from job.node import Node
from job.recipe import Recipe, Run
from job.releasing import _decide
from job.store.promotion import Standing


class Compares:
    """In a node's place: says that two releases would be compared."""

    def run_process(self, *words: object) -> dict[str, Any]:
        raise Interrupted("compared")


WHY = {"promoted": True, "reason": "all gates passed", "weights_sha256": "w"}


def decide(recipe: Recipe, standing: Standing, promote_if: str = "proven") -> dict[str, Any]:
    """Decide for the run `nightly` of order 3 with the weights w."""
    release = recipe.release.model_copy(update={"promote_if": promote_if})
    with tempfile.TemporaryDirectory() as folder:
        run = Run("nightly", recipe.model_copy(update={"release": release}), Path(folder))
        return _decide(cast(Node, Compares()), run, standing, 3, "w")


def test_the_first_release_and_one_after_an_older_run_are_promoted(smallest_recipe: Recipe) -> None:
    assert decide(smallest_recipe, Standing(None, 0, [], {}, None))["promoted"]
    assert decide(smallest_recipe, Standing("other-0123abcd", 2, [], {}, "e"))["promoted"]


@pytest.mark.parametrize("promote_if", ["proven", "better", "never"])
def test_where_the_pointer_is_damaged_a_run_does_not_count_as_the_first(
    smallest_recipe: Recipe, promote_if: str
) -> None:
    decided = decide(smallest_recipe, Standing(None, 0, [], {}, "e", damaged=True), promote_if=promote_if)
    assert not decided["promoted"]
    assert promote_if == "never" or "`job release promote`" in decided["reason"]


@pytest.mark.parametrize("promote_if", ["proven", "better", "never"])
@pytest.mark.parametrize("current", ["other-0123abcd", "nightly-2-0123abcd", "nightly-0123abcd-0123abcd"])
def test_a_run_that_began_earlier_stays_behind_whatever_the_names_are(
    smallest_recipe: Recipe, current: str, promote_if: str
) -> None:
    assert not decide(smallest_recipe, Standing(current, 4, [], WHY, "e"), promote_if=promote_if)["promoted"]


def test_a_pointer_that_a_person_moved_away_from_this_run_stays(smallest_recipe: Recipe) -> None:
    moved = decide(smallest_recipe, Standing("other-0123abcd", 3, [], {"reason": "rolled back"}, "e"))
    assert not moved["promoted"]
    assert "by hand" in moved["reason"]


def test_the_same_model_in_another_wrapping_keeps_what_was_decided(smallest_recipe: Recipe) -> None:
    own = Standing("nightly-0123abcd", 3, [], WHY, "e")
    assert decide(smallest_recipe, own, promote_if="better") == WHY
    assert not decide(smallest_recipe, own, promote_if="never")["promoted"]


def test_another_model_of_the_same_run_is_decided_anew(smallest_recipe: Recipe) -> None:
    own = Standing("nightly-0123abcd", 3, [], WHY | {"weights_sha256": "other"}, "e")
    with pytest.raises(Interrupted, match="compared"):
        decide(smallest_recipe, own, promote_if="better")
