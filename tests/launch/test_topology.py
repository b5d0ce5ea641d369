"""Which node this is, as Kubeflow, SLURM and Kubernetes say it: environments of each, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.errors import RecipeError
from job.launch.topology import RENDEZVOUS_PORT, Place, first_host, read_place

SLURM_BATCH = {
    "SLURM_CLUSTER_NAME": "ci",
    "SLURM_JOB_ID": "17",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NNODES": "2",
    "SLURM_NODEID": "0",
    "SLURM_PROCID": "0",
    "SLURM_NTASKS": "2",
}
"""What a batch script has: it runs on the first node only and is no step."""
SLURM_STEP = SLURM_BATCH | {
    "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}
INDEXED_JOB = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "JOB_COMPLETION_INDEX": "1", "JOB_NODES": "4"}
POD = "finetune-29401380-1.finetune.training.svc.cluster.local"
TRAIN_JOB = {
    "JOB_COMPLETION_INDEX": "3",
    "PET_NNODES": "4",
    "PET_NPROC_PER_NODE": "8",
    "PET_NODE_RANK": "3",
    "PET_MASTER_ADDR": "llama-node-0-0.llama",
    "PET_MASTER_PORT": "29400",
}
PYTORCH_JOB = {
    "PET_NNODES": "2",
    "PET_NPROC_PER_NODE": "auto",
    "PET_NODE_RANK": "1",
    "PET_RDZV_ENDPOINT": "bert-master-0:23456",
    "PET_RDZV_BACKEND": "c10d",
}


@pytest.mark.parametrize(
    ("environment", "host_name", "place"),
    [
        ({}, "laptop", Place()),
        ({"HOSTNAME": "laptop", "JOB_NAME": "jenkins/7"}, "laptop", Place()),
        (SLURM_BATCH, "node1", Place(run_id="ci-17")),
        (SLURM_STEP, "node2", Place(2, 1, "node1", 31757, None, "ci-17")),
        (INDEXED_JOB, POD, Place(4, 1, POD.replace("-1.", "-0."), RENDEZVOUS_PORT, None, "finetune-29401380")),
        (
            INDEXED_JOB | {"JOB_RENDEZVOUS_PORT": "31000"},
            POD,
            Place(4, 1, POD.replace("-1.", "-0."), 31000, None, "finetune-29401380"),
        ),
        (  # podman's networks know pods by their bare names
            {"JOB_COMPLETION_INDEX": "1", "JOB_NODES": "2"},
            "finetune-1",
            Place(2, 1, "finetune-0", RENDEZVOUS_PORT, None, "finetune"),
        ),
        (TRAIN_JOB, "llama-node-0-3.llama.ns.svc.cluster.local", Place(4, 3, "llama-node-0-0.llama", 29400, 8)),
        (PYTORCH_JOB, "bert-worker-0", Place(2, 1, "bert-master-0", 23456)),
        (TRAIN_JOB | SLURM_STEP, "x", Place(4, 3, "llama-node-0-0.llama", 29400, 8)),
    ],
    ids=[
        "nothing",
        "jenkins",
        "batch",
        "step",
        "indexed job",
        "other port",
        "podman",
        "train job",
        "pytorch job",
        "first match",
    ],
)
def test_a_node_finds_its_place_in_what_the_scheduler_says(
    environment: dict[str, str], host_name: str, place: Place
) -> None:
    assert read_place(environment, host_name) == place


def test_a_pod_of_a_single_node_job_needs_no_subdomain() -> None:
    place = read_place({"JOB_COMPLETION_INDEX": "0"}, "finetune-29401380-0")
    assert (place.nodes, place.run_id) == (1, "finetune-29401380")


@pytest.mark.parametrize(
    ("endpoint", "host", "port"),
    [
        ("[fd00::1]:23477", "fd00::1", 23477),
        ("trainer-0.svc:23477", "trainer-0.svc", 23477),
        ("trainer-0.svc", "trainer-0.svc", RENDEZVOUS_PORT),
    ],
)
def test_nodes_may_meet_at_any_address_with_a_port_or_without(endpoint: str, host: str, port: int) -> None:
    place = read_place({"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_RDZV_ENDPOINT": endpoint}, "pod")
    assert (place.host, place.port) == (host, port)


def test_a_single_node_meets_nobody_at_whatever_port() -> None:
    assert read_place({"PET_NNODES": "1", "PET_RDZV_ENDPOINT": "localhost:0"}, "pod").nodes == 1


@pytest.mark.parametrize(
    ("environment", "host_name", "word"),
    [
        (SLURM_STEP | {"SLURM_STEP_NUM_TASKS": "16"}, "node2", "--ntasks-per-node=1"),
        (INDEXED_JOB, "finetune-29401380-1", "subdomain"),
        (INDEXED_JOB, "finetune-29401380-x7k2p.finetune.ns.svc", "Indexed"),
        (INDEXED_JOB | {"JOB_NODES": "many"}, POD, "JOB_NODES"),
        (INDEXED_JOB | {"JOB_NODES": "1"}, POD, "JOB_NODES"),
        (TRAIN_JOB | {"PET_NNODES": "1:4"}, POD, "PET_NNODES"),
        (TRAIN_JOB | {"PET_MASTER_ADDR": ""}, POD, "PET_MASTER_ADDR"),
        (PYTORCH_JOB | {"PET_RDZV_ENDPOINT": ":29400"}, POD, "PET_RDZV_ENDPOINT"),
        (SLURM_STEP | {"SLURM_STEP_NODELIST": ""}, "node2", "SLURM_STEP_NODELIST"),
        (TRAIN_JOB | {"PET_MASTER_PORT": "65536"}, POD, "PET_MASTER_PORT: 65536 is no port"),
        (INDEXED_JOB | {"JOB_RENDEZVOUS_PORT": "0"}, POD, "JOB_RENDEZVOUS_PORT: 0 is no port"),
    ],
)
def test_what_cannot_be_a_run_is_refused_with_what_to_change(
    environment: dict[str, str], host_name: str, word: str
) -> None:
    with pytest.raises(RecipeError, match=word):
        read_place(environment, host_name)


def test_every_node_of_a_step_meets_at_the_same_port_and_other_jobs_at_another() -> None:
    def port(**changed: str) -> int:
        return read_place(SLURM_STEP | changed, "node1").port

    assert port(SLURM_NODEID="0", SLURM_PROCID="0") == port()
    others = {port(SLURM_JOB_ID="18"), port(SLURM_STEP_ID="1"), port(SLURM_RESTART_COUNT="1")}
    assert len(others | {port()}) == 4
    assert all(20000 <= number < 32768 for number in others)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node[1-2]", "node1"),
        ("gpu[003-005,9],login1", "gpu003"),
        ("rack[0-1]node[4,7]", "rack0node4"),
        ("a-1.example.org,b", "a-1.example.org"),
    ],
)
def test_the_first_of_a_node_list_is_where_node_0_is(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@given(st.text(max_size=40))
def test_any_node_list_has_a_first_name(nodes: str) -> None:
    assert isinstance(first_host(nodes), str)


NUMBERS: Any = st.dictionaries(st.sampled_from(sorted(SLURM_STEP | INDEXED_JOB | TRAIN_JOB)), st.text(max_size=6))


@given(NUMBERS, st.text(max_size=30))
def test_whatever_stands_in_the_environment_a_place_or_a_refusal_comes_of_it(
    environment: dict[str, str], host_name: str
) -> None:
    try:
        place = read_place(environment, host_name)
    except RecipeError:
        return
    assert 0 <= place.node_rank < place.nodes
    assert place.nodes == 1 or place.host
