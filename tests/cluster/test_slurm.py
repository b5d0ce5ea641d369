"""`slurm/finetune.sbatch` under a real SLURM: two nodes, a real model, and whatever the scheduler does to a job."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import pytest
from cases import Case, Ended, check_finished, check_store, descendants, resumed_from, send, wait_for
from light_venv import make_light_venv
from quickstart_slice import slice_of_quickstart
from slurm_daemons import Slurm, run_slurm

from job.store import RunStore
from job.store.commit import read_pointer
from job.store.inventory import verify_uri

pytestmark = pytest.mark.cluster

SCRIPT = Path(__file__).parents[2] / "slurm" / "finetune.sbatch"
ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with run_slurm() as slurm:
        yield slurm


@dataclass(frozen=True)
class Job:
    """One job of the script: its id, the log of all its starts, and its run in the store."""

    slurm: Slurm
    id: str
    log: Path
    store: str

    @property
    def run(self) -> RunStore:
        return RunStore(self.store, f"test-{self.id}")

    def wait(self, timeout_s: float = 150) -> dict[str, str]:
        """Wait for its end; return what the controller says of it and, as `Code`, the script's exit code."""
        about = self.slurm.wait_for_state(self.id, *ENDED, timeout_s=timeout_s)
        return about | {"Code": about["ExitCode"].partition(":")[0]}

    def wait_for_start(self, number: int) -> None:
        wait_for(lambda: self.slurm.describe(self.id)["Restarts"] == str(number), 120)
        self.slurm.wait_for_state(self.id, "RUNNING")

    def wait_for_commit(self, epoch: int = 1) -> int:
        """Wait until an attempt of at least `epoch` has committed a checkpoint; return its step."""

        def committed() -> bool:
            pointer = self.run.objects.read("current.json") and read_pointer(self.run.objects)
            return bool(pointer and f"/e{epoch:04d}-" <= pointer["manifest"][len("checkpoints") :])

        wait_for(committed, 240)
        return int((read_pointer(self.run.objects) or {})["step"])

    def text(self) -> str:
        return self.log.read_text()

    def result(self) -> dict[str, object]:
        lines = [line for line in self.text().splitlines() if line.startswith('{"run_id"')]
        return dict(json.loads(lines[-1]))


Submit = Callable[..., Job]


@pytest.fixture
def submit(slurm: Slurm, tmp_path: Path) -> Submit:
    """Return a function: sbatch options, then what the script gets; keyword arguments are variables."""

    def submit(store: str, *words: str, **variables: str) -> Job:
        options = list(takewhile(lambda word: word.startswith("-"), words))
        recipes = words[len(options) :]
        place = {"JOB_WORK_DIR": str(tmp_path / "work"), "JOB_VENV": sys.prefix} | variables
        out = f"--output={tmp_path}/%j.log"
        job = slurm.call("sbatch", "--parsable", out, f"--chdir={tmp_path}", *options, str(SCRIPT), *recipes, **place)
        return Job(slurm, job, tmp_path / f"{job}.log", store)

    return submit


class Light:
    """Jobs of light runs: the script, the scheduler, the supervisors and the store are real, the stages are not."""

    def __init__(self, submit: Submit, place: Path) -> None:
        self._submit, self._place, self.store = submit, place, str(place / "store")
        self._jobs = 0

    def submit(self, *options: str, light: tuple[str, ...] = (), tasks: int = 1, **variables: str) -> Job:
        self._jobs += 1
        venv = make_light_venv(self._place / f"venv-{self._jobs}", self.store, *light)
        votes = str(self._place / f"votes-{self._jobs}")
        place = {"JOB_VENV": str(venv), "LIGHT_VOTES": votes}
        return self._submit(self.store, *options, *["recipe"] * tasks, **place, **variables)

    def wait_for_steps(self) -> None:
        """Wait until the first attempt of the newest job has done two steps."""
        votes = self._place / f"votes-{self._jobs}" / "votes-1" / "rank-00000"
        wait_for(lambda: votes.exists() and votes.stat().st_size >= 2)

    def case(self, job: Job, ranks: int) -> Case:
        return Case(self.store, self._place, ranks=ranks, run_id=job.run.run_id)

    def check_finished(self, job: Job, ranks: int) -> Case:
        case = self.case(job, ranks)
        check_finished(case, Ended(0, job.result(), job.text()))
        return case


@pytest.fixture
def light(submit: Submit, tmp_path: Path) -> Light:
    return Light(submit, tmp_path)


def final_weights(job: Job) -> str:
    record = job.run.read_json("stages/train.json") or {}
    return str(record["files"]["final/model.safetensors"])


def long_run(store: str, assets: Path, reviews: Path) -> list[str]:
    """Return the script's words for a run that is still training after two starts that are cut short."""
    longer = ("--set", "training.max_steps=60", "--set", "training.save_steps=5")
    return [*slice_of_quickstart(str(assets / "minilm-l6"), str(reviews), store), *longer]


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, str]:
    """The final weights of a run on two nodes that nobody disturbed, by the test that made one."""
    return {}


def test_two_nodes_fine_tune_and_release_although_srun_would_not_wait_for_the_export(
    submit: Submit, s3: str, assets: Path, reviews: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    store = f"{s3}/two-nodes"
    job = submit(store, "--nodes=2", *long_run(store, assets, reviews))
    about = job.wait(400)
    assert (about["JobState"], about["Code"], about["Restarts"]) == ("COMPLETED", "0", "0"), job.text()
    result = job.result()
    assert result["status"] == "released"
    assert verify_uri(str(result["release"]), tmp_path / "verify")[1] == []
    assert "node 1 of 2 has joined" in job.text()
    undisturbed["weights"] = final_weights(job)


def test_a_requeued_job_and_one_whose_node_failed_resume_from_the_store_to_the_same_weights(
    slurm: Slurm, submit: Submit, s3: str, assets: Path, reviews: Path, undisturbed: dict[str, str]
) -> None:
    store = f"{s3}/disturbed"
    job = submit(store, "--nodes=2", *long_run(store, assets, reviews))
    job.wait_for_commit()
    slurm.call("scontrol", "requeue", job.id)
    job.wait_for_start(1)
    job.wait_for_commit(epoch=2)
    slurm.call("scontrol", "update", "nodename=node2", "state=down", "reason=test")
    wait_for(lambda: slurm.describe(job.id)["Restarts"] == "2", 60)
    slurm.call("scontrol", "update", "nodename=node2", "state=resume")
    about = job.wait(400)
    assert (about["JobState"], about["Restarts"]) == ("COMPLETED", "2"), job.text()
    assert job.text().count("resuming from the checkpoint of step") == 2
    assert final_weights(job) == undisturbed["weights"]


def test_an_array_of_two_recipes_gives_two_releases(
    slurm: Slurm, submit: Submit, s3: str, assets: Path, reviews: Path, tmp_path: Path
) -> None:
    store = f"{s3}/array"
    quickstart, *options = slice_of_quickstart(str(assets / "minilm-l6"), str(reviews), store)
    recipes = []
    for name in ("first", "second"):
        text = (Path(__file__).parents[2] / "job/recipes/quickstart.yaml").read_text()
        (tmp_path / f"{name}.yaml").write_text(text.replace(f"name: {quickstart}", f"name: {name}"))
        recipes.append(f"{name}.yaml")
    job = submit(store, "--array=0-1", *recipes, *options, "--set", "training.max_steps=4")
    for number in range(2):
        slurm.wait_for_state(f"{job.id}_{number}", *ENDED, timeout_s=400)
    for name in ("first", "second"):
        assert verify_uri(f"{store}/models/{name}", tmp_path / "verify")[1] == []


def test_5_the_time_limits_signal_commits_75_and_the_script_requeues_to_the_end(light: Light) -> None:
    job = light.submit("--nodes=2", "--time=2", "--signal=B:USR1@60", light=("--save-steps=100",), LIGHT_STEP_S="8")
    about = job.wait(400)
    assert about["JobState"] == "COMPLETED", job.text()
    assert "code 75 after start 0: requeued" in job.text()
    assert (resumed_from(light.check_finished(job, 2)) or 0) >= 2


def test_a_permanent_error_is_reported_and_not_requeued_although_the_first_node_is_slower(
    submit: Submit, tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text("name: x\ntask: text-classification\n")
    program = tmp_path / "venv" / "bin" / "job"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/bash\n((SLURM_NODEID)) || sleep 3\nexec {sys.prefix}/bin/job "$@"\n')
    program.chmod(0o755)
    job = submit(str(tmp_path / "store"), "--nodes=2", "recipe.yaml", JOB_VENV=str(tmp_path / "venv"))
    about = job.wait()
    assert (about["JobState"], about["Code"], about["Restarts"]) == ("FAILED", "10", "0"), job.text()


def test_a_permanent_error_of_the_first_node_alone_is_its_code_and_not_its_peers(light: Light) -> None:
    """The other node is told to stop by srun and leaves with 75; srun's own code is not ours."""
    job = light.submit("--nodes=2", LIGHT_BAD_ROW="7", LIGHT_BAD_NODE="0")
    about = job.wait()
    assert (about["JobState"], about["Code"], about["Restarts"]) == ("FAILED", "11", "0"), job.text()


def test_a_cancelled_job_stays_cancelled(slurm: Slurm, light: Light) -> None:
    job = light.submit("--nodes=2", LIGHT_STEP_S="0.5")
    job.wait_for_commit()
    slurm.call("scancel", job.id)
    assert job.wait()["JobState"] == "CANCELLED"
    time.sleep(10)
    about = slurm.describe(job.id)
    assert (about["JobState"], about["Restarts"]) == ("CANCELLED", "0"), job.text()
    assert "requeued\n" not in job.text().replace("not requeued\n", "")
    assert check_store(light.case(job, 2)) >= 2


@pytest.mark.parametrize(("name", "again"), [("USR1", True), ("USR2", False)])
def test_a_signal_by_hand_leaves_a_committed_checkpoint(slurm: Slurm, light: Light, name: str, again: bool) -> None:
    """USR1 goes to the queue again, USR2 stays stopped until somebody requeues it.

    Nothing was committed before, and node 0 uploads longer than the other: srun must not end it when that one leaves.
    """
    slow = {"JOB_FAILPOINT": "files-uploaded=sleep:8", "JOB_FAILPOINT_RANK": "0"}
    job = light.submit("--nodes=2", light=("--save-steps=100",), LIGHT_STEP_S="0.5", **slow)
    light.wait_for_steps()
    slurm.call("scancel", "--batch", f"--signal={name}", job.id)
    if not again:
        about = job.wait()
        assert (about["JobState"], about["Code"], about["Restarts"]) == ("FAILED", "75", "0"), job.text()
        assert check_store(light.case(job, 2)) >= 2
        slurm.call("scontrol", "requeue", job.id)
    job.wait_for_start(1)
    assert job.wait()["JobState"] == "COMPLETED", job.text()
    assert 2 <= (resumed_from(light.check_finished(job, 2)) or 0) < 12


def test_a_job_that_is_preempted_and_saves_within_the_grace_comes_back(slurm: Slurm, light: Light) -> None:
    """SLURM itself requeues none that ends before the grace does."""
    job = light.submit("--nodes=2", light=("--save-steps=100",), LIGHT_STEP_S="0.5")
    light.wait_for_steps()
    slurm.call("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 5")
    job.wait_for_start(1)
    assert job.wait()["JobState"] == "COMPLETED", job.text()
    assert "code 75 after start 0: requeued" in job.text()
    assert 2 <= (resumed_from(light.check_finished(job, 2)) or 0) < 12


def test_a_job_that_gets_no_variables_of_the_shell_is_the_same_run(light: Light) -> None:
    job = light.submit("--nodes=2", "--export=JOB_VENV,JOB_WORK_DIR,LIGHT_VOTES")
    assert job.wait()["JobState"] == "COMPLETED", job.text()
    light.check_finished(job, 2)


def test_passing_trouble_of_another_node_is_requeued(light: Light) -> None:
    """srun then tells node 0 to stop, which leaves with 75."""
    job = light.submit("--nodes=2", JOB_MAX_RESTARTS="1", LIGHT_FULL_NODE="1")
    about = job.wait(300)
    assert (about["JobState"], about["Code"], about["Restarts"]) == ("FAILED", "78", "1"), job.text()


def test_passing_trouble_is_requeued_up_to_the_cap(light: Light) -> None:
    job = light.submit(JOB_MAX_RESTARTS="1", JOB_FAILPOINT="checkpoint-write=kill@1")
    about = job.wait(300)
    assert (about["JobState"], about["Code"], about["Restarts"]) == ("FAILED", "79", "1"), job.text()


def test_a_task_of_an_array_that_is_requeued_leaves_the_others_alone(slurm: Slurm, light: Light) -> None:
    """The last has the array's own number, by which scontrol would name all."""
    job = light.submit("--array=0-1", tasks=2, LIGHT_STEP_S="1", JOB_MAX_RESTARTS="1", LIGHT_FULL_TASK="1")
    ends = [slurm.wait_for_state(f"{job.id}_{number}", *ENDED, timeout_s=300) for number in range(2)]
    assert [(each["JobState"], each["Restarts"]) for each in ends] == [("COMPLETED", "0"), ("FAILED", "1")], job.text()


def test_6_38_a_start_that_was_killed_with_its_node_is_followed_at_once_by_the_next(slurm: Slurm, light: Light) -> None:
    """Its lease names another host and lasts ten minutes: only SLURM's count of starts tells that it is gone."""
    job = light.submit(light=("--ttl=600",), JOB_MAX_RESTARTS="0", LIGHT_STEP_S="1")
    job.wait_for_commit()
    owner = job.run.read_json("owner.json") or {}
    send(descendants(int(owner["pid"])), signal.SIGKILL)
    job.run.write_json("owner.json", (job.run.read_json("owner.json") or {}) | {"host": "node-that-died"})
    assert job.wait()["JobState"] == "FAILED"
    committed = check_store(light.case(job, 1))
    slurm.call("scontrol", "requeue", job.id)
    job.wait_for_start(1)
    assert job.wait()["JobState"] == "COMPLETED", job.text()
    assert (resumed_from(light.case(job, 1)) or 0) >= committed >= 2


def test_gpus_of_the_allocation_are_the_ranks_and_a_job_beside_it_meets_elsewhere(slurm: Slurm, light: Light) -> None:
    alone = light.submit("--nodes=2", "--gpus-per-node=2", light=("--ranks=0",))
    assert alone.wait()["JobState"] == "COMPLETED", alone.text()
    light.check_finished(alone, 4)
    pair = [light.submit("--nodes=2", "--gpus-per-node=1", light=("--ranks=0",), LIGHT_STEP_S="0.5") for _ in range(2)]
    for job in pair:
        slurm.wait_for_state(job.id, "RUNNING")
    assert [job.wait()["JobState"] for job in pair] == ["COMPLETED", "COMPLETED"], pair[1].text()


def test_sbatch_would_take_the_script_as_it_is(slurm: Slurm) -> None:
    done = subprocess.run(
        ["sbatch", "--test-only", "--nodes=2", "--gpus-per-node=2", "--time=0:30:00", str(SCRIPT), "quickstart"],
        env=slurm.environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
