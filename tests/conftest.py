"""Fixtures that more than one room's tests need: stores of every kind, and the quickstart's model and texts."""

from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from job.launch.signals import STOP_SIGNALS
from job.recipe.schema import Recipe
from job.store import open_store
from job.store.server import DEFAULT_BUCKET, serve

# how long an example takes depends on who else uses the machine, and is no fact about this code
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # two files at a time share the processors

OWN_STORE = os.environ.get("S3_CONFORMANCE_URI")
"""Set by `make s3-conformance`: the suite of every store then runs against this one alone."""
STORES = ["own"] if OWN_STORE else ["folder", "seaweedfs", "moto"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a user's own store only the suite is asked."""
    if OWN_STORE:
        items[:] = [item for item in items if "store_uri" in getattr(item, "fixturenames", ())]


@pytest.fixture(autouse=True)
def forget_precision() -> Iterator[None]:
    """Transformers notes a training's precision in the environment, where this process' next training reads it."""
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    yield
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)


@pytest.fixture(autouse=True)
def give_signals_back() -> Iterator[None]:
    """A StopRequest takes them; whoever ends this test run must be heard."""
    taken = (*STOP_SIGNALS, signal.SIGALRM)
    handlers = [signal.getsignal(number) for number in taken]
    yield
    for number, handler in zip(taken, handlers, strict=True):
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A SeaweedFS of this test run's own, with AWS_* set to reach it; yields the URI of its bucket."""
    with serve(tmp_path_factory.mktemp("s3")) as variables, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in variables.items():
            patch.setenv(name, value)
        yield f"s3://{DEFAULT_BUCKET}"


@pytest.fixture(scope="session")
def moto() -> Iterator[dict[str, str]]:
    """A moto server, which simulates AWS in memory, with a bucket; yields the AWS_* that lead to it."""
    from moto.server import ThreadedMotoServer

    from job.store.s3 import create_bucket

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "simulated", "AWS_SECRET_ACCESS_KEY": "simulated", "AWS_REGION": "us-east-1"}
    variables = keys | {"AWS_ENDPOINT_URL_S3": f"http://{host}:{port}"}
    create_bucket(DEFAULT_BUCKET, variables)
    yield variables
    server.stop()


@pytest.fixture(params=STORES)
def store_uri(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An unused place in a store of each kind; what a test asks of it, every store must keep."""
    place = uuid.uuid4().hex
    if request.param == "folder":
        yield str(tmp_path / "store")
    elif request.param == "seaweedfs":
        yield f"{request.getfixturevalue('s3')}/{place}"
    elif request.param == "moto":
        with pytest.MonkeyPatch.context() as patch:
            for name, value in request.getfixturevalue("moto").items():
                patch.setenv(name, value)
            yield f"s3://{DEFAULT_BUCKET}/{place}"
    else:
        uri = f"{OWN_STORE}/{place}"
        yield uri
        store = open_store(uri)
        store.delete([item.key for item in store.list("")])


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder with minilm-l6 and movie-reviews, made once per user and then kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "finetune-job" / "assets"
    subprocess.run([sys.executable, "-m", "job.data.assets", str(folder)], check=True)
    return folder


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory, assets: Path) -> Path:
    """A folder with 640 train and 200 test rows of the movie reviews, no text twice."""
    folder = tmp_path_factory.mktemp("reviews")
    for split, count in (("train", 640), ("test", 200)):
        with (assets / "movie-reviews" / f"{split}.csv").open(encoding="utf-8", newline="") as file:
            rows = {row["text"]: row for row in csv.DictReader(file)}
        chosen = random.Random(1).sample(list(rows.values()), count)
        with (folder / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(chosen)
    return folder


@pytest.fixture
def smallest_recipe() -> Recipe:
    """A recipe with nothing but what every recipe must say; nothing of it exists."""
    about = {"name": "x", "task": "text-classification", "model": {"id": "x"}, "data": {"source": "x"}}
    return Recipe.model_validate(about | {"store": {"uri": "x"}})
