"""Every overlay, with every component that suits it: valid for the API, restricted, and of one mind with itself."""

from __future__ import annotations

import re
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from manifests import COMPONENTS, OVERLAYS, ROOT, Manifest, Rendered, render, render_folder, variables

from job.errors import PERMANENT, Interrupted

pytestmark = pytest.mark.k8s

VERSIONS = ("1.31", "1.37")
PATCHING = [name for name in COMPONENTS if name not in ("irsa", "kueue", "network-policy")]
"""Those that change the pods."""
COMBINATIONS = [
    *((overlay, (component,)) for overlay in OVERLAYS for component in COMPONENTS),
    *((overlay, ()) for overlay in OVERLAYS),
    *((overlay, tuple(COMPONENTS)) for overlay in OVERLAYS),
]
CRDS = {"JobSet", "TrainJob", "TrainingRuntime"}
GANGS = {"JobSet", "TrainingRuntime"}
"""What starts all pods of a run again together."""
NAMED_BY = {
    "Job": "batch.kubernetes.io/job-name",
    "CronJob": "batch.kubernetes.io/job-name",
    "JobSet": "jobset.sigs.k8s.io/jobset-name",
    "TrainingRuntime": "jobset.sigs.k8s.io/jobset-name",  # Trainer calls the JobSet as the TrainJob
}
"""The label by which a controller tells its pods whose they are."""
VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
"""What Pod Security «restricted» lets a pod mount."""


def names(combination: tuple[str, tuple[str, ...]]) -> str:
    return "+".join((combination[0], *combination[1]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kustomize")


def test_all_that_the_readme_promises_is_there() -> None:
    assert OVERLAYS == ["dev-cpu", "jobset", "multi-node", "nightly", "single-gpu", "trainjob"]
    assert COMPONENTS == ["cache-pvc", "irsa", "kueue", "network-policy", "openshift", "rdma", "s3-secret", "spot"]
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
    assert spec["securityContext"].get("runAsUser", 1000) > 0  # for OpenShift, whatever it gives
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
            for service in rendered.of_kind("Service"):
                if service["metadata"]["name"] == spec["subdomain"]:
                    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    for train_job in rendered.of_kind("TrainJob"):
        assert (train_job["spec"]["runtimeRef"]["kind"], train_job["spec"]["runtimeRef"]["name"]) in there
        assert ("Service", train_job["metadata"]["name"]) in there  # where PET_MASTER_ADDR is


def check_sharing(rendered: Rendered) -> None:
    """A Job, and the CronJob beside it, are the same; what says the number of nodes says the same number."""
    specs = list(rendered.job_specs())
    assert all(spec == specs[0][1] for _, spec in specs)
    for kind, spec in specs:
        assert spec["completions"] == spec["parallelism"] == int(variables(spec["template"])["JOB_NODES"])
        assert spec["completionMode"] == "Indexed"
        assert spec["backoffLimit"] == (0 if kind in GANGS else 20 * spec["completions"])
        grace_s = int(variables(spec["template"])["JOB__LAUNCH__GRACE_S"])
        assert 0 < grace_s < spec["template"]["spec"]["terminationGracePeriodSeconds"]
    for runtime in rendered.of_kind("TrainingRuntime"):
        assert runtime["spec"]["mlPolicy"]["numNodes"] == specs[0][1]["completions"]
    for train_job in rendered.of_kind("TrainJob"):
        assert train_job["spec"]["trainer"]["numNodes"] == specs[0][1]["completions"]


def check_run_id(rendered: Rendered) -> None:
    """A run is called as the object that starts it, so that two of them never share one."""
    for kind, spec in rendered.job_specs():
        (run_id,) = (each for each in spec["template"]["spec"]["containers"][0]["env"] if each["name"] == "JOB_RUN_ID")
        assert run_id["valueFrom"] == {"fieldRef": {"fieldPath": f"metadata.labels['{NAMED_BY[kind]}']"}}
    for train_job in rendered.of_kind("TrainJob"):  # what its trainer says comes before what the runtime says
        assert "env" not in train_job["spec"]["trainer"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_policy_on_failures_is_the_table_of_exit_codes(overlay: str, folder: Path) -> None:
    for kind, spec in render(folder, overlay).job_specs():
        actions = {
            code: rule["action"]
            for rule in reversed(spec["podFailurePolicy"]["rules"])
            for code in rule.get("onExitCodes", {}).get("values", [])
        }
        expected = dict.fromkeys(PERMANENT, "FailJob")
        if kind not in GANGS:  # there the first failure starts all pods again
            expected[Interrupted.exit_code] = "Ignore"
            first = spec["podFailurePolicy"]["rules"][0]
            disrupted = {"type": "DisruptionTarget", "status": "True"}
            assert first == {"action": "Ignore", "onPodConditions": [disrupted]}
        assert actions == expected
        named = {
            rule["onExitCodes"]["containerName"] for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule
        }
        assert named == {spec["template"]["spec"]["containers"][0]["name"]}


def test_a_permanent_code_ends_a_gang_and_all_else_starts_it_again(folder: Path) -> None:
    (job_set,) = render(folder, "jobset").of_kind("JobSet")
    (runtime,) = render(folder, "trainjob").of_kind("TrainingRuntime")
    policy = job_set["spec"]["failurePolicy"]
    assert policy == runtime["spec"]["template"]["spec"]["failurePolicy"]
    assert (policy["maxRestarts"], policy["restartStrategy"]) == (100, "BlockingRecreate")
    ends = [(rule["action"], rule["onJobFailureReasons"]) for rule in policy["rules"]]
    assert ends == [("FailJobSet", ["PodFailurePolicy"])]


def test_kubeflow_trainer_knows_the_container_and_tells_it_its_place(folder: Path) -> None:
    """It looks for the name `node` in the Job with this label, and sets PET_* for TrainJobs with a `trainer`."""
    rendered = render(folder, "trainjob")
    (runtime,) = rendered.of_kind("TrainingRuntime")
    assert "torch" in runtime["spec"]["mlPolicy"]
    assert "network" not in runtime["spec"]["template"]["spec"]  # PET_MASTER_ADDR does not look at it
    (made,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert made["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    assert (made["name"], made["replicas"]) == ("node", 1)
    assert [container["name"] for container in made["template"]["spec"]["template"]["spec"]["containers"]] == ["node"]
    (train_job,) = rendered.of_kind("TrainJob")
    assert train_job["spec"]["trainer"]


def test_a_runtime_is_applied_before_the_trainjob_that_needs_it(folder: Path) -> None:
    kinds = [each["kind"] for each in render(folder, "trainjob", sortOptions={"order": "fifo"}).objects]
    assert (kinds[0], kinds[-1]) == ("TrainingRuntime", "TrainJob")
    assert [each["kind"] for each in render_folder(ROOT / "overlays/trainjob").objects] == kinds


@pytest.mark.parametrize("overlay", ["nightly", "jobset", "trainjob"])  # elsewhere the Job itself is applied
@pytest.mark.parametrize("component", PATCHING)
def test_a_component_reaches_what_gets_a_copy_of_the_job(component: str, overlay: str, folder: Path) -> None:
    before, after = (list(render(folder, overlay, chosen).job_specs()) for chosen in ([], [component]))
    assert len(before) == len(after)
    assert not [kind for kind, spec in after if (kind, spec) in before]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_image_of_ones_own_and_a_number_of_nodes_reach_all_pods(overlay: str, folder: Path) -> None:
    env = [{"name": "JOB_NODES", "value": "4"}]
    template = {"spec": {"containers": [{"name": "node", "env": env}]}}
    backoff = 0 if overlay in ("jobset", "trainjob") else 80
    spec = {"completions": 4, "parallelism": 4, "backoffLimit": backoff, "template": template}
    patch = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "finetune"}, "spec": spec}
    rendered = render(
        folder,
        overlay,
        images=[{"name": "finetune-job", "newName": "registry.example.org/finetune-job", "newTag": "0.1"}],
        patches=[{"patch": yaml.safe_dump(patch), "target": {"kind": "Job", "name": "finetune"}}],
        transformers=["../share"],
    )
    check_sharing(rendered)
    for _, made in rendered.job_specs():
        assert made["completions"] == 4
        assert made["template"]["spec"]["containers"][0]["image"] == "registry.example.org/finetune-job:0.1"


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize(
    "affixes", [{"namePrefix": "team-a-"}, {"nameSuffix": "-v2"}, {"namePrefix": "a-", "nameSuffix": "-b"}]
)
def test_under_another_name_pods_still_find_each_other_and_are_another_run(
    overlay: str, affixes: dict[str, str], folder: Path
) -> None:
    rendered = render(folder, overlay, ["cache-pvc", "network-policy", "spot"], **affixes)
    check_references(rendered)
    check_run_id(rendered)
    subdomains = {spec["template"]["spec"]["subdomain"] for _, spec in rendered.job_specs()}
    subdomains |= {job_set["spec"]["network"]["subdomain"] for job_set in rendered.of_kind("JobSet")}
    assert subdomains == {f"{affixes.get('namePrefix', '')}finetune{affixes.get('nameSuffix', '')}"}


@pytest.mark.parametrize("affixes", [{}, {"namePrefix": "team-a-"}, {"nameSuffix": "-v2"}])
def test_the_server_inside_the_cluster_is_found_under_another_name(affixes: dict[str, str], folder: Path) -> None:
    rendered = render(folder, "dev-cpu", ["s3-secret"], **affixes)
    servers = {f"http://{each['metadata']['name']}:8333" for each in rendered.of_kind("Service")}
    for kind, spec in rendered.job_specs():
        told = variables(spec["template"])
        address = told["AWS_ENDPOINT_URL_S3"].replace("$(S3_SERVICE)", told.get("S3_SERVICE", ""))  # as the kubelet
        assert address in servers, kind


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
            if each["kind"] in ("Job", "CronJob", "JobSet", "TrainJob"):
                queues[f"{overlay} {each['kind']}"] = about["metadata"]["labels"].get("kueue.x-k8s.io/queue-name")
                assert "suspend" not in about["spec"]
                assert about["metadata"]["labels"]["app.kubernetes.io/name"] == "finetune-job"
    assert set(queues.values()) == {"finetune"}, queues
    assert len(queues) == 3 * 2 + 3


@pytest.mark.parametrize(
    ("address", "port", "protocol", "allowed"),
    [
        ("10.96.0.10", 53, "UDP", True),
        ("10.96.0.10", 53, "TCP", True),  # an answer that is too long for UDP
        ("10.128.0.4", 5353, "UDP", True),  # the name servers of OpenShift, whose Service says 53
        ("10.128.0.4", 5353, "TCP", True),
        ("52.216.1.1", 443, "TCP", True),  # S3, STS for IRSA, the Hub
        ("169.254.170.23", 80, "TCP", True),  # keys by EKS Pod Identity
        ("fd00:ec2::23", 80, "TCP", True),
        ("169.254.169.254", 80, "TCP", False),  # the keys of the node itself
        ("52.216.1.1", 80, "TCP", False),
        ("10.96.0.1", 6443, "TCP", False),
    ],
)
def test_pods_behind_the_network_policy_reach_what_they_need_and_no_more(
    address: str, port: int, protocol: str, allowed: bool, folder: Path
) -> None:
    """https://kubernetes.io/docs/concepts/services-networking/network-policies/; none of these is a pod of the run."""
    (policy,) = render(folder, "single-gpu", ["network-policy", "irsa"]).of_kind("NetworkPolicy")

    def allows(rule: Manifest) -> bool:
        blocks = [ip_network(peer["ipBlock"]["cidr"]) for peer in rule.get("to", []) if "ipBlock" in peer]
        ports = [(each["protocol"], each["port"]) for each in rule.get("ports", [])]
        reached = "to" not in rule or any(ip_address(address) in block for block in blocks)
        return reached and (not ports or (protocol, port) in ports)

    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert any(allows(rule) for rule in policy["spec"]["egress"]) == allowed


@pytest.mark.parametrize("overlay", ["single-gpu", "multi-node", "nightly", "jobset", "trainjob"])
def test_on_spot_machines_with_gpus_the_taints_of_both_are_tolerated(overlay: str, folder: Path) -> None:
    for kind, template in render(folder, overlay, ["spot"]).pod_templates():
        tolerated = {each["key"] for each in template["spec"]["tolerations"]}
        assert tolerated >= {"nvidia.com/gpu", "cloud.google.com/gke-spot", "karpenter.sh/capacity-type"}, kind


def test_openshift_chooses_the_user_and_nobody_else_leaves_it_open(folder: Path) -> None:
    for overlay in OVERLAYS:
        for components, expected in (([], {1000}), (["openshift"], {None})):
            rendered = render(folder, overlay, components)
            contexts = [template["spec"]["securityContext"] for _, template in rendered.pod_templates()]
            assert {each.get(name) for each in contexts for name in ("runAsUser", "runAsGroup", "fsGroup")} == expected


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
        assert ("Job" in patched) == ("../../share" in about.get("transformers", [])) == (name in PATCHING), name
