"""100 canaries: a credential of any shape, given in any place of a recipe, never shows in what is said about it."""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from pathlib import Path

import pytest

from job.errors import RecipeError, SecurityRefused
from job.recipe import load_recipe

MINIMAL = {
    "name": "reviews", "task": "text-classification", "model": "{id: some/model}", "data": "{source: some/data}",
    "store": "{uri: s3://bucket/prefix}",
}  # fmt: skip
ALPHANUMERIC = string.ascii_letters + string.digits


def draw(number: int, alphabet: str = ALPHANUMERIC, length: int = 34) -> str:
    """Return letters that no other canary has, with a lower, an upper and a digit among them."""
    return "aB3" + "".join(random.Random(number).choices(alphabet, k=length))


SHAPES: dict[str, Callable[[int], tuple[str, str]]] = {
    "access key id": lambda n: (key := "AKIA" + draw(n, string.ascii_uppercase)[-16:], key),
    "temporary key id": lambda n: (key := "ASIA" + draw(n, string.ascii_uppercase)[-16:], key),
    "secret access key": lambda n: (key := draw(n, ALPHANUMERIC + "/+", 37), key),
    "session token": lambda n: (key := draw(n, ALPHANUMERIC + "/+=", 300), key),
    "hub token": lambda n: (key := "hf_" + draw(n), key),
    "userinfo": lambda n: (f"https://somebody:{draw(n)}@example.org/x", draw(n)),
    "token as userinfo": lambda n: (f"https://{draw(n)}@example.org/x", draw(n)),
    "presigned url": lambda n: (f"https://b.example.org/k?X-Amz-Date=1&X-Amz-Signature={draw(n)}", draw(n)),
    "query token": lambda n: (f"https://example.org/rows.csv?token={draw(n)}", draw(n)),
    "shared access signature": lambda n: (f"https://a.example.org/c/b?sv=2024&sig={draw(n)}", draw(n)),
}
Place = Callable[[str], tuple[dict[str, str], list[str], dict[str, str]]]
PLACES: dict[str, Place] = {
    "wrong value": lambda text: ({"training": f"{{seed: '{text}'}}"}, [], {}),
    "unknown key": lambda text: ({"training": f"{{zzz: '{text}'}}"}, [], {}),
    "the key itself": lambda text: ({f"'{text}'": "1"}, [], {}),
    "a key inside": lambda text: ({"model": f"{{id: x, '{text}': 1}}"}, [], {}),
    "a list": lambda text: ({"baselines": f"[majority, '{text}']"}, [], {}),
    "a section": lambda text: ({"data": f"'{text}'"}, [], {}),
    "broken yaml": lambda text: ({"model": f"{{id: '{text}' {{ }}"}, [], {}),
    "an alias": lambda text: ({"model": f"*{text}"}, [], {}),
    "--set": lambda text: ({}, [f"training.seed={text}"], {}),
    "a variable": lambda text: ({}, [], {"JOB__EXPORT__INT8__MODE": text}),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_credential_never_shows_whatever_its_shape_and_place(shape: str, place: str, tmp_path: Path) -> None:
    text, canary = SHAPES[shape](list(SHAPES).index(shape) * 100 + list(PLACES).index(place))
    keys, overrides, environment = PLACES[place](text)
    path = tmp_path / "recipe.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in (MINIMAL | keys).items()))
    with pytest.raises((RecipeError, SecurityRefused)) as caught:
        load_recipe(str(path), overrides, environment)
    assert canary not in str(caught.value)
    assert canary[:20] not in str(caught.value), "nor the half of it that a cut leaves"


@pytest.mark.parametrize("shape", sorted(SHAPES.keys() - {"secret access key", "session token"}))
def test_a_recipe_that_would_be_valid_is_refused_for_a_credential_with_its_place(shape: str, tmp_path: Path) -> None:
    text, _ = SHAPES[shape](7)
    path = tmp_path / "recipe.yaml"
    lines = MINIMAL | {"model": f"{{id: some/model, revision: '{text}'}}"}
    path.write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
    with pytest.raises(SecurityRefused, match=r"recipe\.yaml:3: model\.revision: holds a credential"):
        load_recipe(str(path), environment={})


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "WANDB_API_KEY", "MY_PASSWORD"])
def test_what_the_environment_holds_as_a_secret_is_masked_everywhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "plain words as a password")
    path = tmp_path / "recipe.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in MINIMAL.items()))
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path), ["training.seed=plain words as a password"])
    assert "--set: training.seed: " in str(caught.value)
    assert "plain words" not in str(caught.value)
