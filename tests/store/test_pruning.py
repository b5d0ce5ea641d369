"""Old releases go, and the runs that made them; nothing goes that anybody follows, goes back to, or builds on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from job.errors import Interrupted, NotFound, NoValidCheckpoint, Unreachable
from job.store import ModelPointer, Pruner, Store, open_store
from job.store.lease import Lease, acquire_lease
from job.store.manifest import Manifest, ManifestEntry
from job.store.records import dump
from job.store.restore import read_manifest

ENTRY = {"config.json": ManifestEntry(2, "0" * 64, "config.json")}


class Shop:
    """A store with releases of models, each made by a run of its own."""

    def __init__(self, uri: str) -> None:
        self.uri, self.objects = uri, open_store(uri)

    def add(self, model: str, night: int, parent: str | None = None, digits: str = "") -> str:
        version, run = f"{model}-{night}-{digits or f'0000000{night}'}", f"{model}-{night}"
        about = {"name": model, "run_id": run, "order": night, "parent": parent}
        self.objects.write(f"models/{model}/{version}/config.json", b"{}")
        self.objects.write(f"models/{model}/{version}/manifest.json", Manifest("release", ENTRY, about).to_bytes())
        record = {"record": {"release": f"{self.uri}/models/{model}/{version}"}}
        for key, value in (("run.json", {"recipe": {}}), ("stages/release.json", record), ("checkpoints/x/y", {})):
            self.objects.write(f"runs/{run}/{key}", dump(value))
        return version

    def pointer(self, model: str) -> ModelPointer:
        return ModelPointer(open_store(f"{self.uri}/models/{model}"))

    def pruner(self, model: str) -> Pruner:
        return Pruner(f"{self.uri}/models/{model}")

    def list(self, prefix: str) -> set[str]:
        return {item.key.removeprefix(prefix).split("/")[0] for item in self.objects.list(prefix)}


@pytest.fixture
def shop(store_uri: str) -> Shop:
    return Shop(store_uri)


def test_the_newest_releases_stay_and_the_runs_of_the_others_go(shop: Shop) -> None:
    versions = [shop.add("tiny", night) for night in range(1, 6)]
    for version in versions:
        shop.pointer("tiny").promote(version)
    deleted, runs = shop.pruner("tiny").prune(3)
    assert (sorted(deleted), sorted(runs)) == (versions[:2], ["tiny-1", "tiny-2"])
    assert shop.list("models/tiny/") == {*versions[2:], "current.json"}
    assert shop.list("runs/") == {"tiny-3", "tiny-4", "tiny-5"}
    assert shop.pruner("tiny").prune(3) == ([], [])


def test_what_is_followed_gone_back_to_or_built_on_stays_however_old_it_is(shop: Shop) -> None:
    versions = [shop.add("tiny", night) for night in range(1, 8)]
    shop.pointer("tiny").promote(versions[0])
    shop.pointer("tiny").promote(versions[1])
    shop.add("child", 1, parent=f"{shop.uri}/models/tiny/{versions[2]}")
    shop.add("nephew", 1, parent=versions[3])  # of a local store: paths are not told
    shop.objects.write(
        "runs/going/run.json", dump({"recipe": {"model": {"id": f"{shop.uri}/models/tiny/{versions[4]}"}}})
    )
    plan = {version.name: version.why for version in shop.pruner("tiny").plan(1)}
    assert plan == dict(
        zip(versions, ["rollback", "current", "chained", "chained", "chained", "", "newest"], strict=True)
    )
    assert shop.pruner("tiny").prune(1) == ([versions[5]], ["tiny-6"])
    assert shop.list("models/tiny/") >= set(versions[:5])
    assert shop.list("models/child/") and shop.list("runs/") >= {"going", "child-1"}


def test_what_a_run_that_goes_on_has_published_or_began_with_stays(shop: Shop) -> None:
    versions = [shop.add("tiny", night) for night in range(1, 5)]
    shop.objects.delete(["runs/tiny-1/stages/release.json"])  # it still compares its release with the current one
    shop.objects.write("runs/chain/run.json", dump({"parent": f"{shop.uri}/models/tiny/{versions[1]}"}))
    plan = {version.name: version.why for version in shop.pruner("tiny").plan(1)}
    assert plan == dict(zip(versions, ["going", "chained", "", "newest"], strict=True))
    assert shop.pruner("tiny").prune(1) == ([versions[2]], ["tiny-3"])


def test_a_run_that_began_before_the_newest_keeps_the_release_that_it_has_just_made(shop: Shop) -> None:
    versions = [shop.add("tiny", night) for night in (1, 2, 3)]
    assert shop.pruner("tiny").prune(1, "tiny-1", versions[0]) == ([versions[1]], ["tiny-2"])
    assert (shop.list("models/tiny/"), shop.list("runs/")) == ({versions[0], versions[2]}, {"tiny-1", "tiny-3"})


def test_a_run_does_not_wait_for_its_own_lease_where_another_has_pruned_its_release(shop: Shop) -> None:
    versions = [shop.add("tiny", night) for night in (1, 2)]
    shop.objects.delete([item.key for item in shop.objects.list(f"models/tiny/{versions[0]}/")])
    lease = acquire_lease(open_store(f"{shop.uri}/runs/tiny-1"), 30.0, lambda: None)
    try:
        assert shop.pruner("tiny").prune(1, "tiny-1", versions[0]) == ([], [])
    finally:
        lease.release()


@pytest.mark.parametrize(("first", "second"), ["0f", "f0"])
def test_of_two_releases_of_one_run_its_last_one_is_the_newer(shop: Shop, first: str, second: str) -> None:
    for digit in (first, second):
        shop.add("tiny", 1, digits=8 * digit)
    assert shop.pruner("tiny").prune(1) == ([f"tiny-1-{8 * first}"], [])
    assert (shop.list("models/tiny/"), shop.list("runs/")) == ({f"tiny-1-{8 * second}"}, {"tiny-1"})


def damage(shop: Shop, version: str) -> None:
    """Change a byte of a release's manifest."""
    key = f"models/tiny/{version}/manifest.json"
    manifest = shop.objects.read(key)
    assert manifest is not None
    shop.objects.write(key, manifest.data.replace(b"release", b"releasf"))


def test_releases_whose_manifest_is_damaged_stay_with_their_objects_and_their_runs(shop: Shop) -> None:
    versions = [shop.add("tiny", night) for night in (1, 2, 3)]
    for version in (versions[0], versions[2]):
        shop.pointer("tiny").promote(version)
    for version in versions[1:]:
        damage(shop, version)
    before = {item.key for item in shop.objects.list("")}
    assert shop.pruner("tiny").prune(10) == ([], [])
    assert {item.key for item in shop.objects.list("")} == before


@pytest.mark.parametrize("moment", range(1, 25))
def test_what_another_night_releases_during_a_pruning_stays(tmp_path: Path, moment: int, monkeypatch: Any) -> None:
    shop = Shop(str(tmp_path / "store"))
    for night in (1, 2, 3):
        shop.pointer("tiny").promote(shop.add("tiny", night))
    pruner, kind, left, added = shop.pruner("tiny"), type(shop.objects), iter(range(moment)), []

    def come_between(name: str) -> None:
        call = getattr(kind, name)

        def wrapped(self: Any, *words: Any, **options: Any) -> Any:
            found = call(self, *words, **options)
            found = iter(list(found)) if name == "list" else found
            if not added and next(left, None) is None:
                added.append("")
                added[0] = shop.add("tiny", 4)
                shop.pointer("tiny").promote(added[0])
            return found

        monkeypatch.setattr(kind, name, wrapped)

    # it reads within its writes, where a folder's lock is held: nobody else can come between there
    monkeypatch.setattr("job.store.pruning.probe_conditional_writes", lambda objects: None)
    for name in ("read", "list", "delete"):
        come_between(name)
    pruner.prune(2)
    assert added, "some moments later, the pruning is over"
    assert shop.pointer("tiny").read().version == added[0]
    assert {item.key for item in shop.objects.list(f"models/tiny/{added[0]}/")} == {
        f"models/tiny/{added[0]}/{name}" for name in ("config.json", "manifest.json")
    }
    assert len(list(shop.objects.list("runs/tiny-4/"))) == 3


def test_a_list_that_wrongly_comes_back_empty_deletes_no_release_that_was_to_stay(tmp_path: Path) -> None:
    shop = Shop(str(tmp_path / "store"))
    for night in (1, 2, 3):
        shop.pointer("tiny").promote(shop.add("tiny", night))
    before, pruner = {item.key for item in shop.objects.list("")}, shop.pruner("tiny")
    answers = iter([list(pruner._objects.list(""))])
    pruner._objects.list = lambda prefix: iter(next(answers, []))  # type: ignore[method-assign]
    assert pruner.prune(10) == ([], [])
    assert {item.key for item in shop.objects.list("")} == before


def test_a_release_that_a_person_promotes_while_it_is_being_deleted_is_put_back(shop: Shop, monkeypatch: Any) -> None:
    versions = [shop.add("tiny", night) for night in (1, 2, 3)]
    shop.pointer("tiny").promote(versions[2])
    kind, delete = type(shop.objects), type(shop.objects).delete

    def promote_first(self: Any, keys: Any) -> None:
        if list(keys) == [f"{versions[0]}/manifest.json"]:
            shop.pointer("tiny").promote(versions[0])
        delete(self, keys)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "delete", promote_first)
        assert shop.pruner("tiny").prune(1) == ([versions[1]], ["tiny-2"])
    assert shop.pointer("tiny").read().version == versions[0]
    assert read_manifest(shop.objects, f"models/tiny/{versions[0]}/manifest.json").kind == "release"
    assert shop.objects.read(f"models/tiny/{versions[0]}/config.json") and shop.list("runs/") == {"tiny-1", "tiny-3"}


def test_a_run_that_released_anew_before_its_turn_came_is_left_alone(shop: Shop, monkeypatch: Any) -> None:
    for night in (1, 2):
        shop.add("tiny", night)

    def release_anew(objects: Store, *words: Any) -> Lease:
        if objects.uri.endswith("tiny-1"):
            record = {"record": {"release": f"{shop.uri}/models/tiny/tiny-1-99999999"}}
            objects.write("stages/release.json", dump(record))
        return acquire_lease(objects, *words)

    monkeypatch.setattr("job.store.pruning.acquire_lease", release_anew)
    assert shop.pruner("tiny").prune(1) == (["tiny-1-00000001"], [])
    assert {item.key for item in shop.objects.list("runs/tiny-1/")} >= {
        f"runs/tiny-1/{key}" for key in ("run.json", "stages/release.json", "checkpoints/x/y")
    }


@pytest.mark.parametrize("content", [b"{", b'{"version": 7}', b'{"version": "tiny-2-00000002", "before": 3}'])
def test_nothing_is_deleted_where_the_pointer_is_damaged(shop: Shop, content: bytes) -> None:
    versions = [shop.add("tiny", night) for night in (1, 2, 3)]
    shop.objects.write("models/tiny/current.json", content)
    for call in (shop.pruner("tiny").plan, shop.pruner("tiny").prune):
        with pytest.raises(NoValidCheckpoint, match=r"current\.json: is damaged.*`job release promote`"):
            call(1)
    assert shop.list("models/tiny/") == {*versions, "current.json"}
    shop.pointer("tiny").promote(versions[1])
    assert shop.pruner("tiny").prune(1) == ([versions[0]], ["tiny-1"])


def test_a_run_without_a_release_and_one_that_somebody_owns_are_left_alone(shop: Shop, monkeypatch: Any) -> None:
    monkeypatch.setattr("job.store.pruning._TTL_S", 0.5)
    for night in (1, 2, 3):
        shop.add("tiny", night)
    shop.objects.write("runs/interrupted/run.json", dump({"recipe": {}}))
    shop.objects.write("runs/interrupted/checkpoints/x/y", b"")
    lease = acquire_lease(open_store(f"{shop.uri}/runs/tiny-1"), 3.0, lambda: None)
    try:
        deleted, runs = shop.pruner("tiny").prune(1)
    finally:
        lease.release()
    assert len(deleted) == 2 and runs == ["tiny-2"]
    assert shop.list("runs/") == {"tiny-1", "tiny-3", "interrupted"}
    assert shop.pruner("tiny").prune(1) == ([], ["tiny-1"])


@pytest.mark.parametrize("allowed", range(1, 12))
def test_pruning_that_was_cut_short_goes_on_the_next_time(shop: Shop, allowed: int, monkeypatch: Any) -> None:
    versions = [shop.add("tiny", night) for night in (1, 2, 3)]
    kind, left = type(shop.objects), iter(range(allowed))
    delete = kind.delete

    def cut(self: Any, keys: Any) -> None:
        if next(left, None) is None:
            raise Interrupted("cut short")
        delete(self, keys)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "delete", cut)
        with pytest.raises(Interrupted):
            shop.pruner("tiny").prune(1)
    monkeypatch.setattr("job.store.pruning._TTL_S", 0.5)
    shop.pruner("tiny").prune(1)
    assert shop.list("models/tiny/") == {versions[2]}
    assert shop.list("runs/") == {"tiny-3"}


def test_a_run_of_which_one_object_could_not_be_deleted_is_found_the_next_time(shop: Shop, monkeypatch: Any) -> None:
    versions = [shop.add("tiny", night) for night in (1, 2)]
    kind, delete, refused = type(shop.objects), type(shop.objects).delete, ["checkpoints/x/y"]

    def refuse_one(self: Any, keys: Any) -> None:
        delete(self, [key for key in keys if key not in refused])
        if set(refused) & set(keys):
            raise Unreachable("DeleteObjects: InternalError for one key")

    with monkeypatch.context() as patch:
        patch.setattr(kind, "delete", refuse_one)
        with pytest.raises(Unreachable):
            shop.pruner("tiny").prune(1)
    monkeypatch.setattr("job.store.pruning._TTL_S", 0.5)
    assert shop.pruner("tiny").prune(1) == ([], ["tiny-1"])
    assert (shop.list("models/tiny/"), shop.list("runs/")) == ({versions[1]}, {"tiny-2"})


def test_only_a_model_is_pruned(shop: Shop) -> None:
    for uri in (f"{shop.uri}/runs/tiny", shop.uri, f"{shop.uri}/models/tiny/version"):
        with pytest.raises(NotFound, match=r"name …/models/<name>"):
            Pruner(uri).plan(1)
    with pytest.raises(NotFound, match="no release"):
        shop.pruner("nobody").plan(1)
