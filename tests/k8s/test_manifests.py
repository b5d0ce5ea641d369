"""Every overlay, with every component that suits it: valid for the API, restricted, and of one mind with itself."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from manifests import COMPONENTS, OVERLAYS, ROOT, Manifest, Rendered, render, variables

from job.errors import PERMANENT, Interrupted

pytestmark = pytest.mark.k8s

VERSIONS = ("1.31", "1.37")
OF_JOBS = [name for name in OVERLAYS if name != "trainjob"]
"""Kubeflow makes the pods of a TrainJob; of the components only these know of it."""
OF_TRAIN_JOB = ["kueue", "irsa"]
COMBINATIONS = [
    *((overlay, (component,)) for overlay in OF_JOBS for component in COMPONENTS),
    *((overlay, ()) for overlay in OVERLAYS),
    *((overlay, tuple(COMPONENTS)) for overlay in OF_JOBS),
    *(("trainjob", (component,)) for component in OF_TRAIN_JOB),
    ("trainjob", tuple(OF_TRAIN_JOB)),
]
CRDS = {"JobSet", "TrainJob"}
VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
"""What Pod Security «restricted» lets a pod mount."""


def names(combination: tuple[str, tuple[str, ...]]) -> str:
    return "+".join((combination[0], *combination[1]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kustomize")


def test_all_that_the_readme_promises_is_there() -> None:
    assert OVERLAYS == ["dev-cpu", "jobset", "multi-node", "nightly", "single-gpu", "trainjob"]
    assert COMPONENTS == ["cache-pvc", "irsa", "kueue", "network-policy", "rdma", "s3-secret", "spot"]
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert [name for name in (*OVERLAYS, *COMPONENTS) if f"`{name}`" not in readme] == []


@pytest.mark.parametrize("combination", COMBINATIONS, ids=names)
def test_a_combination_is_valid_restricted_and_whole(combination: tuple[str, tuple[str, ...]], folder: Path) -> None:
    rendered = render(folder, *combination)
    check_schema(rendered)
    for kind, template in rendered.pod_templates():
        check_restricted(kind, template)
    check_references(rendered)
    check_sharing(rendered)


def check_schema(rendered: Rendered) -> None:
    for each in rendered.objects:
        if each["kind"] not in CRDS:
            for version in VERSIONS:
                kubernetes_validate.validate(each, version, strict=True)
    for kind, spec in rendered.job_specs():  # inside a custom resource too
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": kind.lower()}, "spec": spec}
        kubernetes_validate.validate(job, VERSIONS[-1], strict=True)


def check_restricted(kind: str, template: Manifest) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/, profile «restricted»."""
    spec = template["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True, kind
    assert spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not any(spec.get(name) for name in ("hostNetwork", "hostPID", "hostIPC"))
    assert spec["automountServiceAccountToken"] is False
    for container in spec["containers"]:
        allowed = container["securityContext"]
        assert allowed["allowPrivilegeEscalation"] is False
        assert allowed["readOnlyRootFilesystem"] is True
        assert allowed["capabilities"] == {"drop": ["ALL"]}
        assert not allowed.get("privileged")
        assert not any("hostPort" in port for port in container.get("ports", []))
        assert set(container["resources"]["requests"]) >= {"cpu", "memory"}
    for volume in spec["volumes"]:
        assert set(volume) - {"name"} <= VOLUMES, volume


def check_references(rendered: Rendered) -> None:
    """Whatever is named is there, under that name."""
    there = {(each["kind"], each["metadata"]["name"]) for each in rendered.objects}
    for kind, template in rendered.pod_templates():
        spec = template["spec"]
        mounted = {mount["name"] for container in spec["containers"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in spec["volumes"]}
        for volume in spec["volumes"]:
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in there
            if "persistentVolumeClaim" in volume:
                assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in there
        if kind != "Deployment":
            assert ("ServiceAccount", spec["serviceAccountName"]) in there
            assert ("Service", spec["subdomain"]) in there
    for train_job in rendered.of_kind("TrainJob"):
        (overrides,) = train_job["spec"]["podTemplateOverrides"]
        assert ("ServiceAccount", overrides["spec"]["serviceAccountName"]) in there
        assert ("ConfigMap", overrides["spec"]["volumes"][0]["configMap"]["name"]) in there


def check_sharing(rendered: Rendered) -> None:
    """A Job, and the CronJob beside it, are the same; what says the number of nodes says the same number."""
    specs = list(rendered.job_specs())
    assert all(spec == specs[0][1] for _, spec in specs)
    for kind, spec in specs:
        assert spec["completions"] == spec["parallelism"] == int(variables(spec["template"])["JOB_NODES"])
        assert spec["completionMode"] == "Indexed"
        if kind != "JobSet":
            assert spec["backoffLimit"] == 20 * spec["completions"]
        grace_s = int(variables(spec["template"])["JOB__LAUNCH__GRACE_S"])
        assert 0 < grace_s < spec["template"]["spec"]["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("overlay", OF_JOBS)
def test_the_policy_on_failures_is_the_table_of_exit_codes(overlay: str, folder: Path) -> None:
    for kind, spec in render(folder, overlay).job_specs():
        actions = {
            code: rule["action"]
            for rule in reversed(spec["podFailurePolicy"]["rules"])
            for code in rule.get("onExitCodes", {}).get("values", [])
        }
        expected = dict.fromkeys(PERMANENT, "FailJob")
        if kind != "JobSet":  # there the first failure starts all pods again
            expected[Interrupted.exit_code] = "Ignore"
            first = spec["podFailurePolicy"]["rules"][0]
            disrupted = {"type": "DisruptionTarget", "status": "True"}
            assert first == {"action": "Ignore", "onPodConditions": [disrupted]}
        assert actions == expected
        named = {
            rule["onExitCodes"]["containerName"] for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule
        }
        assert named == {spec["template"]["spec"]["containers"][0]["name"]}


@pytest.mark.parametrize("overlay", OF_JOBS)
@pytest.mark.parametrize(
    "affixes", [{"namePrefix": "team-a-"}, {"nameSuffix": "-v2"}, {"namePrefix": "a-", "nameSuffix": "-b"}]
)
def test_pods_still_find_each_other_under_another_name(overlay: str, affixes: dict[str, str], folder: Path) -> None:
    rendered = render(folder, overlay, ["cache-pvc", "network-policy", "spot"], **affixes)
    check_references(rendered)
    subdomains = {spec["template"]["spec"]["subdomain"] for _, spec in rendered.job_specs()}
    subdomains |= {job_set["spec"]["network"]["subdomain"] for job_set in rendered.of_kind("JobSet")}
    assert subdomains == {f"{affixes.get('namePrefix', '')}finetune{affixes.get('nameSuffix', '')}"}


def test_the_names_of_a_cronjobs_pods_fit_into_a_host_name(folder: Path) -> None:
    """A CronJob's Job adds 11 characters, the name of the pod of node 999 four more; a label of DNS has 63."""
    rendered = render(folder, "nightly", namePrefix="p" * (45 - len("finetune")))
    name = rendered.name_of("CronJob")
    assert len(name) == 45
    assert len(f"{name}-29401380-999") <= 63
    for kind, template in rendered.pod_templates():
        assert len(template["spec"]["subdomain"]) <= 63, kind


def test_the_nightly_runs_at_night_alone_and_never_meets_itself(folder: Path) -> None:
    rendered = render(folder, "nightly")
    assert rendered.of_kind("Job") == []
    (cron_job,) = rendered.of_kind("CronJob")
    spec = cron_job["spec"]
    assert (spec["suspend"], spec["concurrencyPolicy"], spec["startingDeadlineSeconds"]) == (False, "Forbid", 3600)
    assert (spec["successfulJobsHistoryLimit"], spec["failedJobsHistoryLimit"]) == (3, 3)
    assert spec["timeZone"]
    assert spec["jobTemplate"]["spec"]["activeDeadlineSeconds"] < 24 * 3600


def test_elsewhere_the_cronjob_only_waits_to_be_copied(folder: Path) -> None:
    for overlay in ("dev-cpu", "single-gpu", "multi-node"):
        assert [each["spec"]["suspend"] for each in render(folder, overlay).of_kind("CronJob")] == [True]


def test_kueue_finds_its_queue_on_what_it_admits_and_nobody_suspends(folder: Path) -> None:
    queues: dict[str, Any] = {}
    for overlay in OVERLAYS:
        for each in render(folder, overlay, ["kueue"]).objects:
            about = each["spec"]["jobTemplate"] if each["kind"] == "CronJob" else each
            if each["kind"] in ("Job", "CronJob", *CRDS):
                queues[f"{overlay} {each['kind']}"] = about["metadata"]["labels"].get("kueue.x-k8s.io/queue-name")
                assert "suspend" not in about["spec"]
    assert set(queues.values()) == {"finetune"}, queues
    assert len(queues) == 3 * 2 + 3


def test_a_changed_recipe_has_another_name_so_that_a_running_pod_keeps_its_own(folder: Path) -> None:
    before = render(folder, "single-gpu").name_of("ConfigMap")
    recipe = folder / "k8s/base/recipe.yaml"
    text = recipe.read_text()
    recipe.write_text(text.replace("seed: 42", "seed: 43"))
    assert render(folder, "single-gpu").name_of("ConfigMap") != before
    recipe.write_text(text)


def test_the_recipes_that_ship_with_the_manifests_are_valid() -> None:
    from job.recipe import load_recipe

    found = sorted(ROOT.glob("**/recipe.yaml"))
    assert len(found) == 2
    for recipe in found:
        assert re.fullmatch(r"[a-z0-9-]+", load_recipe(str(recipe), []).name)


def test_a_component_that_patches_the_job_copies_it_again() -> None:
    """One that forgot would leave the nightly as it was."""
    for name in COMPONENTS:
        about = yaml.safe_load((ROOT / f"components/{name}/kustomization.yaml").read_text())
        patched = {patch["target"]["kind"] for patch in about.get("patches", [])}
        assert ("Job" in patched) == ("../../share" in about.get("transformers", [])), name
