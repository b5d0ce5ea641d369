"""Which release users get: a better one, never an older night's, and by hand whichever a person names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import Answer, call_job, write_recipe

from job.store import latest_release

GOOD = ("training.max_steps=150", "training.learning_rate=2e-3")
BAD = ("training.max_steps=1", "training.learning_rate=1e-6")


class Nights:
    """Runs of one recipe into one store; each night has its own run id."""

    def __init__(self, folder: Path, recipe: dict[str, Any]) -> None:
        self.folder, self.model = folder, f"{folder / 'store'}/models/tiny"
        release = {"promote_if": "better"}
        store = {"uri": str(folder / "store")}
        self.recipe = str(write_recipe(folder / "recipe.yaml", **recipe | {"release": release, "store": store}))

    def run(self, night: str, *options: str, env: dict[str, str] | None = None) -> Answer:
        words = [word for option in options for word in ([option] if option[0] == "-" else ["--set", option])]
        return call_job("run", self.recipe, "--run-id", night, "--work-dir", str(self.folder / "work"), *words, env=env)

    def current(self) -> str:
        return latest_release(self.model)

    def call(self, *words: str) -> str:
        answer = call_job(*words)
        assert answer.code == 0, answer.stderr
        return answer.stdout


@pytest.fixture
def nights(tmp_path: Path, recipe: dict[str, Any]) -> Nights:
    return Nights(tmp_path, recipe)


def test_the_pointer_moves_to_a_better_release_only_and_back_by_hand(nights: Nights) -> None:
    late = nights.run("monday", *GOOD, env={"JOB_FAILPOINT": "stage-recorded=kill@1"})
    assert late.code == -9, late.stderr

    bad = nights.run("tuesday", *BAD).result
    assert (bad["promoted"], bad["promotion"]["reason"]) == (True, "it is the first")

    good = nights.run("wednesday", *GOOD).result
    assert (good["promoted"], good["promotion"]["against"]) == (True, Path(bad["release"]).name)
    assert good["promotion"]["gain"] > 0.1
    assert good["promotion"]["gain"] == pytest.approx(
        good["metrics"]["test"]["accuracy"] - bad["metrics"]["test"]["accuracy"], abs=1e-6
    ), "the current release, run again on the same rows, answers as it did"

    worse = nights.run("thursday", *BAD, "training.seed=7")
    assert (worse.code, worse.result["status"], worse.result["promoted"]) == (0, "released", False)
    assert f"not better than {Path(good['release']).name}" in worse.result["reason"]
    assert nights.current() == good["release"]

    older = nights.run("monday", *GOOD, "release.promote_if=proven").result
    assert (older["promoted"], older["exit_code"]) == (False, 0)
    assert "began later" in older["reason"]
    assert nights.current() == good["release"], "an older night that ends late changes nothing"

    listed = nights.call("release", "list", nights.model)
    assert f"{Path(good['release']).name}\tcurrent" in listed
    assert all(Path(run["release"]).name in listed for run in (bad, worse.result, older))
    nights.call("release", "rollback", nights.model)
    assert nights.current() == bad["release"]
    scores = nights.call("predict", nights.model, "a waste of time", "--work-dir", str(nights.folder / "work"))
    pinned = nights.call("predict", bad["release"], "a waste of time", "--work-dir", str(nights.folder / "work"))
    assert json.loads(scores) == json.loads(pinned)
    nights.call("release", "promote", nights.model, Path(worse.result["release"]).name)
    assert nights.current() == worse.result["release"]


@pytest.mark.slow
def test_a_promotion_that_was_killed_before_its_record_is_not_decided_again(nights: Nights) -> None:
    nights.run("monday", *BAD)
    killed = nights.run("tuesday", *GOOD, env={"JOB_FAILPOINT": "release-pointer-moved=kill"})
    assert killed.code == -9, killed.stderr
    again = nights.run("tuesday", *GOOD).result
    assert again["promoted"] is True
    assert again["promotion"]["against"].startswith("monday-"), "not compared with itself"


def test_a_night_on_which_nothing_is_new_ends_at_once_and_old_nights_are_deleted(nights: Nights) -> None:
    skip = ("release.skip_if_unchanged=true", "release.promote_if=proven", "training.max_steps=2")
    skip = (*skip, "store.keep_releases=1")
    first = nights.run("monday", *skip).result
    again = nights.run("tuesday", *skip)
    assert (again.code, again.result["status"], again.result["release"]) == (0, "unchanged", first["release"])
    assert "nothing was done" in again.result["reason"]
    assert not (nights.folder / "store" / "runs" / "tuesday" / "checkpoints").exists()
    changed = nights.run("wednesday", *skip, "training.seed=7").result
    assert (changed["status"], changed["promoted"]) == ("released", True)
    third = nights.run("thursday", *skip, "training.seed=8").result
    model = nights.folder / "store" / "models" / "tiny"
    kept = {path.parent.name for path in model.glob("*/manifest.json")}
    assert kept == {Path(changed["release"]).name, Path(third["release"]).name}, "the current one, and the one before"
    runs = nights.folder / "store" / "runs"
    assert {path.relative_to(runs).parts[0] for path in runs.rglob("*.json")} >= {"wednesday", "thursday"}
    assert not [path for path in (runs / "monday").rglob("*") if path.is_file()]
    assert "monday" not in nights.call("release", "list", nights.model)
    shutil.rmtree(changed["release"])
    gone = nights.run("wednesday", *skip, "training.seed=7")
    assert (gone.code, gone.result["status"], gone.result["release"]) == (0, "pruned", None)
    assert not gone.result["promoted"]
    assert f"{changed['release']}, which was deleted since" in gone.result["reason"]


def test_a_night_that_ends_late_keeps_its_release_until_the_next_one(nights: Nights) -> None:
    few = ("training.max_steps=2", "release.promote_if=never", "store.keep_releases=1")
    late = nights.run("monday", *few, env={"JOB_FAILPOINT": "stage-recorded=kill@1"})
    assert late.code == -9, late.stderr
    assert nights.run("tuesday", *few, "training.seed=7").code == 0
    monday = nights.run("monday", *few).result
    assert nights.call("verify", monday["release"])
    again = nights.run("monday", *few).result
    assert (again["reason"], again["release"]) == ("already released; nothing was done", monday["release"])


def test_a_run_goes_on_from_the_release_it_began_with_though_another_is_current_by_now(nights: Nights) -> None:
    quick = ("training.max_steps=2", "release.promote_if=proven")
    first = nights.run("monday", *quick).result["release"]
    chain = (f"model.id={nights.model}", "name=chained", "training.save_steps=1", *quick, "training.max_steps=4")
    assert nights.run("chain", *chain, env={"JOB_FAILPOINT": "files-upload=kill@3"}).code == 79
    second = nights.run("tuesday", *quick, "training.seed=7").result["release"]
    assert nights.current() == second

    again = nights.run("chain", *chain)
    assert again.code == 0, again.stderr
    about = json.loads((Path(again.result["release"]) / "manifest.json").read_text())["about"]
    assert about["parent"] == Path(first).name

    afresh = nights.run("chain", *chain, "training.seed=3", "--fresh")
    about = json.loads((Path(afresh.result["release"]) / "manifest.json").read_text())["about"]
    assert about["parent"] == Path(second).name
