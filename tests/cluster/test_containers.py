"""The image, built from docker/Dockerfile and run as clusters run it: another user, a read-only root, little memory."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cases import is_training, wait_for
from containers import IMAGE, ROOT, Container, build_image, configure, podman
from quickstart_slice import slice_of_quickstart

from job.store import RunStore
from job.store.commit import read_pointer
from job.store.inventory import verify_uri
from job.store.server import DEFAULT_BUCKET, serve

pytestmark = pytest.mark.cluster

LIMITS = ["--read-only", "--user", "12345:0", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
NETWORK = f"finetune-{os.getpid()}"
RECIPE: dict[str, Any] = {
    "name": "pods",
    "task": "text-classification",
    "model": {"id": "/assets/minilm-l6"},
    "data": {"source": "/reviews", "max_length": 64},
    "training": {"max_steps": 8, "global_batch_size": 16, "save_steps": 4},
    "baselines": ["majority"],
    "export": {"int8": {"targets": ["portable"], "gate": "report_only"}},
}
Start = Callable[..., Container]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What `make image` printed."""
    configure(tmp_path_factory.mktemp("podman"))
    return build_image()


@pytest.fixture
def start(image: str, s3: str, assets: Path, reviews: Path) -> Iterator[Start]:
    """Return a function that starts the image as an unknown user, with the store's variables; words are `job`'s."""
    started = []
    keys = [word for name in os.environ if name.startswith("AWS_") for word in ("--env", name)]
    reviews.chmod(0o755)  # pytest's folders are for their owner alone, and another user is the point here
    mounts = ["-v", f"{assets}:/assets:ro", "-v", f"{reviews}:/reviews:ro"]

    def start(*words: str, options: tuple[str, ...] = ()) -> Container:
        container = Container.run("--network", "host", *LIMITS, *keys, *mounts, *options, IMAGE, *words)
        started.append(container)
        return container

    yield start
    for container in started:
        container.remove()


@pytest.fixture
def s3_for_pods(image: str, tmp_path: Path) -> Iterator[str]:
    """A SeaweedFS that pods on a network of their own reach at the network's gateway; yields the bucket's URI."""
    podman("network", "create", NETWORK)
    gateway = json.loads(podman("network", "inspect", NETWORK).stdout)[0]["subnets"][0]["gateway"]
    # the bridge, and with it the gateway's address, is there as long as a container is
    keeper = Container.run("--network", NETWORK, "--entrypoint", "sleep", IMAGE, "3600")
    with serve(tmp_path / "s3", bind="0.0.0.0") as variables, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in variables.items():
            patch.setenv(name, value.replace("127.0.0.1", gateway) if name.startswith("AWS_ENDPOINT") else value)
        yield f"s3://{DEFAULT_BUCKET}"
    keeper.remove()
    podman("network", "rm", "--force", NETWORK)


def run_slice(store: str) -> list[str]:
    return ["run", *slice_of_quickstart("/assets/minilm-l6", "/reviews", store)]


def test_make_image_says_how_large_the_layers_are_and_lists_what_is_inside(image: str) -> None:
    assert "COPY" in image
    assert "MB" in image or "GB" in image
    listed = json.loads((ROOT / "work/image/sbom-cpu.json").read_text())
    names = {each["purl"].split("@")[0] for each in listed["components"]}
    assert {"pkg:pypi/torch", "pkg:pypi/onnxruntime", "pkg:deb/debian/tini"} <= names


def test_the_cpu_image_has_no_compiler_no_pip_cache_and_no_secret(image: str) -> None:
    look = "command -v gcc cc g++ pip; find / -xdev -path '*/.cache/pip/*'; cat /etc/pip.conf"
    inside = podman("run", "--rm", "--user", "0", "--entrypoint", "sh", IMAGE, "-c", look)
    assert inside.stdout.strip() == "", inside.stdout
    about = json.loads(podman("inspect", IMAGE).stdout)[0]
    assert about["Config"]["User"] == "1000:0"
    assert about["Config"]["Entrypoint"] == ["/usr/bin/tini", "--", "job"]
    assert about["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    text = json.dumps(about) + podman("history", "--no-trunc", IMAGE).stdout
    secret_names = [name for name in os.environ if name.endswith(("_KEY", "_TOKEN", "_PASSWORD")) and os.environ[name]]
    assert [name for name in secret_names if os.environ[name] in text] == []


def test_an_unknown_user_on_a_read_only_root_trains_and_releases(start: Start, s3: str, tmp_path: Path) -> None:
    container = start(*run_slice(f"{s3}/container"))
    assert container.wait(500) == 0, container.logs()[-3000:]
    assert verify_uri(container.result()["release"], tmp_path / "verify")[1] == []


def test_podman_stop_leaves_a_committed_checkpoint_and_75(start: Start, s3: str) -> None:
    store = f"{s3}/stopped"
    more = ("training.num_train_epochs=20", "training.save_steps=1000", "training.logging_steps=1")
    words = [*run_slice(store), "--run-id", "stopped", *(word for key in more for word in ("--set", key))]
    container = start(*words)
    wait_for(lambda: is_training(container.logs()), 240)
    time.sleep(15)  # a few steps; nothing is committed before the stop
    assert container.stop(60) == 75, container.logs()[-3000:]
    pointer = read_pointer(RunStore(store, "stopped").objects)
    assert pointer is not None
    assert pointer["step"] >= 1


def test_too_little_memory_is_78_and_says_so_or_the_next_attempt_does(start: Start, s3: str) -> None:
    words = [*run_slice(f"{s3}/starved"), "--run-id", "starved"]
    little = ("--memory", "700m", "--memory-swap", "700m")
    container = start(*words, options=little)
    code = container.wait(300)
    text = container.logs()
    if code == 137:
        container = start(*words, options=little)
        container.wait(300)
        text = container.logs()
    else:
        assert code == 78, text[-3000:]
    assert "memory" in text


class Pods:
    """The pods that an overlay's Job would start, played by podman, with a recipe that this machine can run.

    podman knows no Job, so its template becomes pods with the index that a Job would give them, of this machine's size.
    """

    def __init__(self, overlay: str, place: Path, store: str) -> None:
        words = ["kubectl", "kustomize", str(ROOT / "k8s/overlays" / overlay)]
        objects = list(yaml.safe_load_all(subprocess.run(words, capture_output=True, text=True, check=True).stdout))
        job, recipe = (next(each for each in objects if each["kind"] == kind) for kind in ("Job", "ConfigMap"))
        recipe["data"]["recipe.yaml"] = yaml.safe_dump(RECIPE | {"store": {"uri": store}})
        (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        self.nodes, self._template, self._place = job["spec"]["completions"], job["spec"]["template"], place
        self._played: list[Path] = []

    def play(self, index: int, mounts: dict[str, Path], names: list[dict[str, Any]]) -> Container:
        """Start the pod of a node; `names` are what a cluster's DNS would answer (podman's needs a plug-in)."""
        path = self._place / f"pod-{index}.yaml"
        path.write_text(yaml.safe_dump(self._make(index, mounts, names)))
        self._played.append(path)
        words = ["--network", NETWORK, "--configmap", str(self._place / "recipe.yaml"), str(path)]
        played = podman("kube", "play", *words)
        assert played.returncode == 0, played.stderr
        return Container(f"finetune-{index}-node")

    def remove(self) -> None:
        for path in self._played:
            podman("kube", "down", str(path))

    def _make(self, index: int, mounts: dict[str, Path], names: list[dict[str, Any]]) -> dict[str, Any]:
        spec = json.loads(json.dumps(self._template["spec"]))
        (container,) = spec["containers"]
        container |= {"image": IMAGE, "imagePullPolicy": "Never", "resources": {}}
        given = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        given |= {"JOB_COMPLETION_INDEX": str(index), "JOB__STORE__ALLOW_HTTP": "true"}
        kept = [each for each in container["env"] if each["name"] not in given]
        container["env"] = [*kept, *({"name": name, "value": value} for name, value in given.items())]
        for name, source in mounts.items():
            container["volumeMounts"].append({"name": name, "mountPath": f"/{name}", "readOnly": True})
            spec["volumes"].append({"name": name, "hostPath": {"path": str(source), "type": "Directory"}})
        labels = self._template["metadata"]["labels"] | {"batch.kubernetes.io/job-name": "finetune"}
        about = {"name": f"finetune-{index}", "labels": labels}
        spec |= {"hostname": f"finetune-{index}", "hostAliases": names}
        return {"apiVersion": "v1", "kind": "Pod", "metadata": about, "spec": spec}


def find_address(pod: str) -> str:
    infra = podman("pod", "inspect", "--format", "{{.InfraContainerID}}", pod).stdout.strip()
    networks = json.loads(podman("inspect", infra).stdout)[0]["NetworkSettings"]["Networks"]
    return str(networks[NETWORK]["IPAddress"])


@pytest.mark.parametrize("overlay", ["dev-cpu", "multi-node"])
def test_the_pods_of_an_overlay_release(
    overlay: str, image: str, s3_for_pods: str, assets: Path, reviews: Path, tmp_path: Path
) -> None:
    reviews.chmod(0o755)
    mounts = {"assets": assets, "reviews": reviews}
    pods = Pods(overlay, tmp_path, f"{s3_for_pods}/{overlay}")
    try:
        started, names = [], []
        for index in range(pods.nodes):
            started.append(pods.play(index, mounts, names))
            names = names or [{"ip": find_address("finetune-0"), "hostnames": ["finetune-0"]}]
        codes = [container.wait(600) for container in started]
        assert codes == [0] * pods.nodes, "\n".join(container.logs()[-2500:] for container in started)
        assert verify_uri(started[0].result()["release"], tmp_path / "verify", allow_http=True)[1] == []
    finally:
        pods.remove()
