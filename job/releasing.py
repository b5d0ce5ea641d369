"""The release of a run, on node 0: the bundle becomes a version of its model, and the version perhaps the current one.

Order of calls; the numbers are those of `store/commit.py`:

    a  publish the bundle (15)
    b  read the model's pointer. It stays where this version is current already (a crash after d), where that of a run
       that began later is, or where the recipe says `never`; what was decided for this run before is not decided again
    c  promote_if: better: a process runs the current release on this run's test rows and compares row by row
    d  swap the pointer that b has read (16); where another run moved it meanwhile, again from b
    e  commit the stage's record (17)
    f  delete the model's oldest releases beyond `store.keep_releases`, but never this one, and the runs that made them

A crash before d leaves a version that nobody follows; the next attempt publishes the same one again, and decides anew.
A crash after e leaves more releases than were asked for, until the next one.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from job import __version__, stages
from job.errors import PERMANENT, JobError, NotFound, NoValidCheckpoint
from job.failpoints import failpoint
from job.identity import material_sections
from job.node import Node
from job.recipe import Recipe, Run, hash_json
from job.recipe.schema import DEFINES_TRAINING
from job.report import tell_promotion
from job.report.result import hide_paths
from job.store import Attempt, ModelPointer, Pruner, publish_release
from job.store.objects import open_room
from job.store.promotion import Standing, take_order
from job.store.records import Contention, parse_leniently
from job.store.release import read_release_manifest

log = logging.getLogger("job.pipeline")

Promotion = dict[str, Any]
"""{promoted, reason}, and where two releases were compared {against, gain, gain_bound, n}."""


def find_order(run: Run, attempt: Attempt) -> int:
    """Return this run's number among those of its model, which it takes when it begins (call 5a).

    A damaged one is replaced by the next that nobody has, as if the run had begun now.
    """
    found = attempt.store.objects.read("order.json")
    saved = parse_leniently(found)
    model, order = saved.get("model"), saved.get("order")
    if model == run.recipe.name and type(order) is int:
        return order
    if found and not (isinstance(model, str) and type(order) is int):
        log.warning("%s/order.json is damaged; this run counts as begun now", attempt.store.uri)
    order = take_order(run.recipe.store, run.recipe.name)
    attempt.verify()
    attempt.store.write_json("order.json", {"model": run.recipe.name, "order": order})
    return order


def release_bundle(node: Node, run: Run, attempt: Attempt, proven: dict[str, str] | None, key: str) -> dict[str, Any]:
    """Publish, promote, commit the stage's record under `key`; return it: {release, promoted, promotion}.

    `proven` is what the rehearsal has seen of the bundle: path → sha256.
    """
    recipe, lineage = run.recipe, describe_lineage(run, node.transfer(lambda: find_order(run, attempt)))
    version = node.transfer(lambda: publish_release(recipe.store, run.bundle, lineage, attempt.verify, proven))
    promoted = _promote(node, run, attempt, version, (proven or {}).get("model.safetensors"))
    log.info("%s: %s", "promoted" if promoted["promoted"] else "not promoted", promoted["reason"])
    release = f"{recipe.store.uri}/models/{recipe.name}/{version}"
    record = {"release": release, "promoted": promoted["promoted"], "promotion": promoted}
    _tell_promotion(run, promoted)
    node.transfer(lambda: _commit(run, attempt, {"key": key, "outputs": version, "record": record}))
    _prune(node, run, attempt, version)
    return record


def has_release(run: Run, uri: str) -> bool:
    """Tell whether what a run has released at `uri` is there still: a later run may have pruned it."""
    version = uri.rpartition("/")[2]
    return open_room(run.recipe.store, f"models/{run.recipe.name}/{version}").read("manifest.json") is not None


def find_unchanged(run: Run) -> str | None:
    """Return the URI of the current release where it was made of what this run would be made of, else None."""
    store, name = run.recipe.store, run.recipe.name
    standing = ModelPointer.of(store, name).read()
    if not standing.version:
        return None
    uri = f"{store.uri}/models/{name}/{standing.version}"
    try:
        about = read_release_manifest(uri, allow_http=store.allow_http)[1].about
    except (NoValidCheckpoint, NotFound) as error:
        log.warning("%s; this run makes a new one", error)
        return None
    return uri if about.get("made_of_sha256") == hash_origin(run.recipe, run.read("about.json")["identity"]) else None


def hash_origin(recipe: Recipe, identity: dict[str, Any]) -> str:
    """Return the sha256 (hex) of all that a release is made of: sources, recipe, and this package's version."""
    sections = material_sections(recipe, (*DEFINES_TRAINING, "name", "baselines", "export"))
    return hash_json([identity, sections, __version__])


def _prune(node: Node, run: Run, attempt: Attempt, version: str) -> None:
    """Delete old releases; what cannot be deleted costs space, not the run."""
    store, keep = run.recipe.store, run.recipe.store.keep_releases
    if keep is None:
        return
    model = f"{store.uri}/models/{run.recipe.name}"
    pruner = Pruner(model, allow_http=store.allow_http, single_writer=store.single_writer)
    try:
        attempt.verify()
        releases, runs = node.transfer(lambda: pruner.prune(keep, run.run_id, version))
    except JobError as error:
        log.warning("%s; old releases stay, `job release prune` deletes them", error)
        return
    if releases or runs:
        log.info("deleted beyond store.keep_releases: %s", ", ".join([*releases, *(f"run {run}" for run in runs)]))


def describe_lineage(run: Run, order: int) -> dict[str, Any]:
    """Return what a release's manifest says beside its files: what it was made of, and by what."""
    sources, about = run.read("sources.json"), run.read("about.json")
    return {
        "name": run.recipe.name,
        "run_id": run.run_id,
        "parent": hide_paths(sources["model"]["release"]),
        "model": hide_paths(about["identity"]["model"]),
        "data": hide_paths(about["identity"]["data"]),
        "order": order,
        "made_of_sha256": hash_origin(run.recipe, about["identity"]),
        "tokenizer_sha256": about["identity"]["tokenizer_sha256"],
        "recipe_sha256": hash_json(run.recipe.model_dump(mode="json")),
        "versions": about["versions"],
    }


def _promote(node: Node, run: Run, attempt: Attempt, version: str, weights: str | None) -> Promotion:
    """Decide, and move the pointer where it is to be moved (calls b–d); `weights` is the sha256 of the trained ones."""
    order, pointer = node.transfer(lambda: find_order(run, attempt)), ModelPointer.of(run.recipe.store, run.recipe.name)
    contention = Contention(f"{run.recipe.store.uri}/models/{run.recipe.name}", "current.json")
    while True:
        standing = node.transfer(pointer.read)
        if standing.version == version:
            return {"reason": "it is current already", **standing.why, "promoted": True}
        promotion = _decide(node, run, standing, order, weights) | {"weights_sha256": weights}
        if not promotion["promoted"]:
            return promotion
        attempt.verify()
        failpoint("release-pointer")
        moved = node.transfer(lambda: pointer.move(standing, version, order, promotion))  # noqa: B023  # called at once
        if moved:
            failpoint("release-pointer-moved")
            return promotion
        node.transfer(contention.wait)


def _decide(node: Node, run: Run, standing: Standing, order: int, weights: str | None) -> Promotion:
    wanted = run.recipe.release.promote_if
    if wanted == "never":
        return {"promoted": False, "reason": "release.promote_if: never"}
    if standing.damaged:  # whose order and model these were is lost: it may be a later night's, or a better one
        reason = "the model's current.json is damaged, so what is current is not known; `job release promote` names it"
        return {"promoted": False, "reason": reason}
    own = re.fullmatch(re.escape(run.run_id) + "-[0-9a-f]{8}", standing.version or "")
    if standing.order > order:
        return {"promoted": False, "reason": f"{standing.version} is current, and its run began later"}
    if standing.order == order and not own:  # by a rollback: only this run has this number
        return {"promoted": False, "reason": f"{standing.version} was made current by hand, after this run's"}
    if own and weights and standing.why.get("weights_sha256") == weights:
        return {**standing.why, "promoted": True}  # the same model in another wrapping, decided by an attempt before
    if wanted == "better" and standing.version:
        return _compare(node, run, standing.version)
    return {"promoted": True, "reason": "all gates passed" if standing.version else "it is the first"}


def _compare(node: Node, run: Run, current: str) -> Promotion:
    """Run the current release on this run's test rows: better is a gain that is no loss beyond the gate's limit."""
    store = run.recipe.store
    run.write("current.json", {"release": f"{store.uri}/models/{run.recipe.name}/{current}"})
    try:
        compared = node.run_process(stages.COMPARE, run, {"TOKENIZERS_PARALLELISM": "true", "HF_HUB_OFFLINE": "1"})
    except JobError as error:
        if error.exit_code not in PERMANENT:
            raise
        reason = (
            f"the current release, {current}, cannot be compared with ({error}); `job release promote` names another"
        )
        return {"promoted": False, "reason": reason, "against": current}
    limit = run.recipe.export.int8.max_metric_drop
    better = compared["gain"] > 0 and compared["gain_bound"] > -limit
    reason = (
        f"{'' if better else 'not '}better than {current}: gain {compared['gain']:+.4f}, at least "
        f"{compared['gain_bound']:+.4f} (95 %), on {compared['n']} test rows; better is a gain above 0 and a bound "
        f"above {-limit:g}"
    )
    return {"promoted": better, "reason": reason, "against": current, **compared}


def _tell_promotion(run: Run, promotion: Promotion) -> None:
    """Write the run's own report: that of the release, and what became of it."""
    page = (run.bundle / "report.html").read_text(encoding="utf-8")
    (run.folder / "report.html").write_text(tell_promotion(page, promotion), encoding="utf-8")


def _commit(run: Run, attempt: Attempt, committed: dict[str, Any]) -> None:
    attempt.store.upload_report(run.folder / "report.html", "report.html")
    attempt.commit_record(stages.RELEASE.name, committed)
