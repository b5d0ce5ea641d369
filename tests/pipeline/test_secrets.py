"""Canaries in environment, files, recipes and addresses: none in streams, work folder or store, whatever goes wrong.

Row 69 of the failure catalogue. Every call gets all canaries of the environment; each case adds its own.
"""

from __future__ import annotations

import base64
import os
import random
import string
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from conftest import Answer, Released, call_job, write_recipe
from hub_stand_in import Hub, serve_hub

from job.store import open_store

NAMES = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN",
    "COMET_API_KEY", "NEPTUNE_API_TOKEN", "GITHUB_TOKEN", "GITLAB_TOKEN", "CI_JOB_TOKEN", "AZURE_CLIENT_SECRET",
    "AZURE_STORAGE_KEY", "GOOGLE_API_KEY", "OPENAI_API_KEY", "SLACK_BOT_TOKEN", "DATABASE_PASSWORD", "PGPASSWORD",
    "VAULT_TOKEN", "KUBE_TOKEN", "NPM_TOKEN", "DOCKER_PASSWORD", "SMTP_PASSWORD", "AWS_CONTAINER_AUTHORIZATION_TOKEN",
)  # fmt: skip
ADDRESSES = ("HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "ALL_PROXY", "PIP_INDEX_URL", "SENTRY_DSN", "REDIS_URL")


def make_canary(name: str) -> str:
    """Return 40 letters that stand nowhere else, different for each name."""
    return "cAn4" + "".join(random.Random(name).choices(string.ascii_letters + string.digits, k=36))


@dataclass
class Canaries:
    """Values that must not show; `environment` carries some of them."""

    folder: Path
    values: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    def add(self, name: str) -> str:
        """Return a new canary."""
        self.values[name] = make_canary(name)
        return self.values[name]

    def assert_silent(self, answer: Answer, *folders: Path) -> None:
        """Both streams and every file below `folders` hold no canary, as it is, quoted for a URL, or in base64."""
        self.assert_absent("stdout", answer.stdout.encode())
        self.assert_absent("stderr", answer.stderr.encode())
        for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
            self.assert_absent(str(path), path.read_bytes())

    def assert_absent(self, where: str, data: bytes) -> None:
        for name, value in self.values.items():
            for form in (value, quote(value, safe=""), base64.b64encode(value.encode()).decode()):
                assert form.encode() not in data, f"{name} in {where}"


@pytest.fixture
def canaries(tmp_path: Path) -> Canaries:
    """Canaries under every name of NAMES and ADDRESSES and in the AWS files, which nobody needs to read."""
    made = Canaries(tmp_path)
    for name in NAMES:
        made.environment[name] = made.add(name)
    for name in ADDRESSES:
        made.environment[name] = f"http://user:{made.add(name)}@127.0.0.1:9/"
    for name, variable in (("credentials", "AWS_SHARED_CREDENTIALS_FILE"), ("config", "AWS_CONFIG_FILE")):
        path = tmp_path / f"aws-{name}"
        section = "default" if name == "credentials" else "profile other"
        path.write_text(
            f"[{section}]\naws_access_key_id = AKIA{made.add(name + ' id')[:16].upper()}\n"
            f"aws_secret_access_key = {made.add(name)}\naws_session_token = {made.add(name + ' token')}\n"
        )
        made.environment[variable] = str(path)
    made.environment |= {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost", "AWS_MAX_ATTEMPTS": "1"}
    return made


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A Hub without repositories: every id is unknown."""
    with serve_hub() as hub:
        yield hub


def call(canaries: Canaries, *words: str, **env: str) -> Answer:
    return call_job(*words, env=canaries.environment | env)


def run(canaries: Canaries, recipe: dict[str, Any], *words: str, verb: str = "run", **env: str) -> Answer:
    path = write_recipe(canaries.folder / "recipe.yaml", **recipe)
    return call(canaries, verb, str(path), "--work-dir", str(canaries.folder / "work"), *words, **env)


def test_the_canaries_are_100_and_differ() -> None:
    names = [*NAMES, *ADDRESSES, *(f"x{number}" for number in range(100))]
    assert len({make_canary(name) for name in names}) == len(names)


def test_a_wrong_recipe_shows_no_canary(canaries: Canaries, recipe: dict[str, Any]) -> None:
    recipe["training"] |= {
        "seed": canaries.add("seed"),
        "lerning_rate": canaries.add("unknown"),
        canaries.add("key"): 1,
    }
    words = ["--set", f"training.save_steps={canaries.add('set')}", "--set", canaries.add("no value")]
    words += ["--set", f"{canaries.add('set key')}=1"]
    answer = run(canaries, recipe, *words, verb="check", JOB__EXPORT__INT8__MODE=canaries.add("variable"))
    assert answer.code == 10
    assert answer.stderr.count("error: ") >= 5
    shown = {name: value for name, value in canaries.values.items() if name not in ("key", "no value", "set key")}
    Canaries(canaries.folder, shown).assert_silent(answer, canaries.folder / "work")


@pytest.mark.parametrize("section", [("model", "id"), ("data", "source"), ("store", "uri")], ids=lambda s: s[0])
@pytest.mark.parametrize("form", ["https://user:{}@example.org/x", "s3://{}@bucket/x", "s3://bucket/x?token={}"])
def test_an_address_with_a_credential_is_19_and_shows_none(
    canaries: Canaries, recipe: dict[str, Any], section: tuple[str, str], form: str
) -> None:
    recipe[section[0]][section[1]] = form.format(canaries.add("address"))
    answer = run(canaries, recipe)
    assert answer.code == 19, answer.stderr
    assert "holds a credential" in answer.stderr
    canaries.assert_silent(answer, canaries.folder / "work")


def test_a_recipe_that_carries_credentials_is_19_and_shows_none(canaries: Canaries, recipe: dict[str, Any]) -> None:
    recipe["store"] |= {
        "aws_secret_access_key": canaries.add("inline"),
        "aws_session_token": canaries.add("inline token"),
    }
    answer = run(canaries, recipe)
    assert answer.code == 19
    canaries.assert_silent(answer, canaries.folder / "work")


def test_a_wrong_bucket_and_wrong_keys_show_no_canary(canaries: Canaries, recipe: dict[str, Any], s3: str) -> None:
    recipe["store"]["uri"] = "s3://no-such-bucket/prefix"
    answer = run(canaries, recipe)
    assert answer.code == 13, answer.stderr
    canaries.assert_silent(answer, canaries.folder / "work")
    recipe["store"]["uri"] = f"{s3}/prefix"
    secrets = {"AWS_SECRET_ACCESS_KEY": canaries.add("secret key"), "AWS_SESSION_TOKEN": canaries.add("session token")}
    denied = run(canaries, recipe, **secrets)
    assert denied.code == 12, denied.stderr
    canaries.assert_silent(denied, canaries.folder / "work")


def test_keys_of_a_credentials_file_that_are_refused_show_no_canary(
    canaries: Canaries, recipe: dict[str, Any], s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    recipe["store"]["uri"] = f"{s3}/prefix"
    denied = run(canaries, recipe)
    assert denied.code == 12, denied.stderr
    canaries.assert_silent(denied, canaries.folder / "work")
    Path(canaries.environment["AWS_SHARED_CREDENTIALS_FILE"]).write_text(f"[default\n{canaries.add('damaged')}\n")
    damaged = run(canaries, recipe)
    assert damaged.code in (10, 12), damaged.stderr
    canaries.assert_silent(damaged, canaries.folder / "work")


def test_an_unknown_hub_id_and_a_hub_behind_a_proxy_show_no_canary(
    canaries: Canaries, recipe: dict[str, Any], hub: Hub
) -> None:
    recipe["model"]["id"] = "somebody/no-such-model"
    online = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(canaries.folder / "hf")}
    unknown = run(canaries, recipe, HF_ENDPOINT=hub.endpoint, **online)
    assert unknown.code == 13, unknown.stderr
    canaries.assert_silent(unknown, canaries.folder / "work", canaries.folder / "hf")
    unreachable = run(canaries, recipe, HF_ENDPOINT="https://hub.invalid", **online)
    assert unreachable.code == 77, unreachable.stderr
    canaries.assert_silent(unreachable, canaries.folder / "work", canaries.folder / "hf")
    in_address = hub.endpoint.replace("://", f"://user:{canaries.add('endpoint')}@")
    answer = run(canaries, recipe, HF_ENDPOINT=in_address, **online)
    assert answer.code in (10, 12, 13, 19, 77), answer.stderr
    canaries.assert_silent(answer, canaries.folder / "work", canaries.folder / "hf")


@pytest.mark.parametrize("verb", ["show", "verify", "predict"])
@pytest.mark.parametrize(
    "form", ["https://user:{}@example.org/m", "s3://user:{}@bucket/models/m", "s3://bucket/m?token={}", "/tmp/{}"]
)
def test_a_verb_that_is_given_a_credential_in_an_address_shows_none(
    canaries: Canaries, s3: str, verb: str, form: str
) -> None:
    address = form.format(canaries.add("address"))
    if form.startswith("/tmp"):
        canaries.environment["ADDRESS_TOKEN"] = canaries.values["address"]  # known as a secret by its variable
    words = [verb, address, *(["a text"] if verb == "predict" else [])]
    work = [] if verb == "show" else ["--work-dir", str(canaries.folder / "work")]
    answer = call(canaries, *words, *work)
    assert answer.code in (0, 10, 12, 13, 17, 19), answer.stderr
    assert "Traceback" not in answer.stderr
    canaries.assert_silent(answer, canaries.folder / "work")


def test_a_store_address_with_userinfo_shows_none(canaries: Canaries, recipe: dict[str, Any]) -> None:
    recipe["store"]["uri"] = "s3://bucket/prefix"
    endpoint = f"http://user:{canaries.add('endpoint')}@store.example:9000"
    answer = run(
        canaries, recipe, AWS_ENDPOINT_URL_S3=endpoint, AWS_SECRET_ACCESS_KEY="x" * 8, AWS_ACCESS_KEY_ID="y" * 8
    )
    assert answer.code == 19, answer.stderr
    canaries.assert_silent(answer, canaries.folder / "work")


def assert_store_silent(canaries: Canaries, uri: str) -> int:
    """Fetch every object under `uri`, weights as well; return how many."""
    store, copy = open_store(uri), canaries.folder / "object"
    keys = [item.key for item in store.list("")]
    for key in keys:
        store.download(key, copy)
        canaries.assert_absent(key, key.encode() + copy.read_bytes())
    return len(keys)


def test_a_release_holds_no_key_of_its_store(released: Released, tmp_path: Path) -> None:
    """The key that really opened the store: in no file of the work folder, no object, no log."""
    own = Canaries(tmp_path, {name: os.environ[name] for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID")})
    own.assert_silent(released.answer, released.work)
    assert assert_store_silent(own, released.uri.partition("/models/")[0]) > 20


@pytest.mark.slow
def test_a_whole_run_among_canaries_shows_none(canaries: Canaries, recipe: dict[str, Any], s3: str) -> None:
    recipe["store"]["uri"] = f"{s3}/canaries"
    answer = run(canaries, recipe)
    assert answer.code == 0, answer.stderr
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):
        canaries.values[name] = os.environ[name]
    canaries.assert_silent(answer, canaries.folder / "work")
    assert assert_store_silent(canaries, f"{s3}/canaries") > 20
