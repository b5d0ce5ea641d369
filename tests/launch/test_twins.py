"""Kubernetes and SLURM say the same of a run: the same command, the same variables, the same codes tried again."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from job.errors import PERMANENT
from job.recipe.load import load_recipe

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "slurm" / "finetune.sbatch"
JOB: dict[str, Any] = yaml.safe_load((ROOT / "k8s/base/job.yaml").read_text())
CONTAINER = JOB["spec"]["template"]["spec"]["containers"][0]
CODES = [0, 1, 2, *range(10, 20), 75, 76, 77, 78, 79, 137, 143]

SRUN = """#!/bin/bash
[ "$2" = mkdir ] && exit # of Pyxis
printf '%s\\0' "$@" > "$RECORD/argv"
env | sort > "$RECORD/env"
mkdir -p "$JOB_WORK_DIR/runs/$JOB_RUN_ID"
echo '{
 "exit_code": '$CODE',
 "reason": ""
}' > "$JOB_WORK_DIR/runs/$JOB_RUN_ID/result.json"
[ -z "$ASKED" ] || kill -$ASKED $PPID
sleep 0.2
exit ${SRUN_CODE:-75}
"""
"""In place of srun: notes what it was called with; node 0 ends with CODE, while srun itself says something else."""
SQUEUE = '#!/bin/bash\necho "failed starts: $FAILED"\n'
SCONTROL = '#!/bin/bash\necho "$@" >> "$RECORD/scontrol"\n'


def run_script(place: Path, *words: str, **variables: str) -> tuple[int, list[str], dict[str, str], bool]:
    """Run the batch script beside recorders; return its code, srun's words, their environment, and whether requeued."""
    bin_ = place / "bin"
    bin_.mkdir(exist_ok=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("scancel", "#!/bin/bash\n"), ("squeue", SQUEUE)):
        (bin_ / name).write_text(text)
        (bin_ / name).chmod(0o755)
    (place / "scontrol").unlink(missing_ok=True)
    environment = os.environ | {
        "PATH": f"{bin_}:{os.environ['PATH']}", "RECORD": str(place), "CODE": "0", "ASKED": "", "FAILED": "0",
        "SLURM_JOB_ID": "17", "SLURM_CLUSTER_NAME": "ci", "JOB_WORK_DIR": str(place / "work"), "JOB_VENV": "/opt/venv",
    } | variables  # fmt: skip
    done = subprocess.run(["bash", str(SCRIPT), *words], env=environment, cwd=place, capture_output=True, text=True)
    argv = (place / "argv").read_text().removesuffix("\0").split("\0")
    seen = dict(line.split("=", 1) for line in (place / "env").read_text().splitlines() if "=" in line)
    requeued = (place / "scontrol").exists() and "requeue" in (place / "scontrol").read_text()
    return done.returncode, argv, seen, requeued


def policy_of_kubernetes(code: int) -> str:
    """Return done, never, free (again, not counted) or counted."""
    if code == 0:
        return "done"
    for rule in JOB["spec"]["podFailurePolicy"]["rules"]:
        if code in rule.get("onExitCodes", {}).get("values", []):
            return {"FailJob": "never", "Ignore": "free"}[rule["action"]]
    return "counted"


def policy_of_slurm(place: Path, code: int) -> str:
    returned, _, _, again = run_script(place, "recipe.yaml", CODE=str(code), ASKED="USR1" if code == 75 else "")
    assert returned == code
    *_, capped = run_script(place, "recipe.yaml", CODE=str(code), FAILED="20", ASKED="USR1" if code == 75 else "")
    if again:
        # recorded runs are short, and 75 within two minutes counts
        return "free" if capped or code == 75 else "counted"
    return "done" if code == 0 else "never"


@pytest.mark.parametrize("code", CODES)
def test_both_try_the_same_codes_again(code: int, tmp_path: Path) -> None:
    kubernetes = policy_of_kubernetes(code)
    if code == 76:  # a newer attempt owns the run; there a pod comes again to look after it, here nothing needs to
        assert (kubernetes, policy_of_slurm(tmp_path, code)) == ("counted", "never")
        return
    assert policy_of_slurm(tmp_path, code) == kubernetes
    assert (kubernetes == "never") == (code in PERMANENT)


@pytest.mark.parametrize("asked", ["TERM", "USR2"])
@pytest.mark.parametrize("code", [75, 79, 143])
def test_a_job_that_was_cancelled_or_stopped_by_hand_is_never_requeued(asked: str, code: int, tmp_path: Path) -> None:
    returned, *_, again = run_script(tmp_path, "recipe.yaml", CODE=str(code), ASKED=asked)
    assert (returned, again) == (code, False)


@pytest.mark.parametrize(
    ("of_srun", "code", "again"), [(77, 77, True), (137, 137, True), (10, 75, False), (75, 75, False)]
)
def test_a_first_node_that_was_stopped_for_anothers_trouble_is_requeued_for_that(
    of_srun: int, code: int, again: bool, tmp_path: Path
) -> None:
    returned, *_, requeued = run_script(tmp_path, "recipe.yaml", CODE="75", SRUN_CODE=str(of_srun))
    assert (returned, requeued) == (code, again)


def test_a_start_that_the_time_limit_ends_at_once_is_not_repeated_for_ever(tmp_path: Path) -> None:
    assert run_script(tmp_path, "recipe.yaml", CODE="75", ASKED="USR1", FAILED="3")[3] is True
    assert run_script(tmp_path, "recipe.yaml", CODE="75", ASKED="USR1", FAILED="20")[3] is False


def test_75_without_a_reason_to_stop_is_not_requeued(tmp_path: Path) -> None:
    """Somebody cancelled the step, or it stopped by launch.time_limit_min, which whoever set it meant."""
    assert run_script(tmp_path, "recipe.yaml", CODE="75")[3] is False


def test_both_run_the_same_command(tmp_path: Path) -> None:
    _, argv, seen, _ = run_script(tmp_path, "/etc/finetune/recipe.yaml")
    own = ["--wait=0", "--kill-on-bad-exit=1", "--ntasks-per-node=1"]
    assert argv == [*own, "/opt/venv/bin/job", *CONTAINER["args"]]
    assert seen["JOB_RUN_ID"] == "ci-17"


def test_what_one_sets_by_a_variable_the_other_can(tmp_path: Path) -> None:
    """A recipe's keys by JOB__…; the rest is known to both under one name or comes from the scheduler itself."""
    names = {each["name"] for each in CONTAINER["env"]}
    assert names == {"JOB_RUN_ID", "JOB_NODES", "JOB__LAUNCH__GRACE_S"}
    words = {"JOB__LAUNCH__GRACE_S": "120", "JOB__LAUNCH__TIME_LIMIT_MIN": "60", "JOB__STORE__URI": "s3://bucket/x"}
    _, _, seen, _ = run_script(tmp_path, "quickstart", **words)
    assert words.items() <= seen.items(), "sbatch exports them to the tasks"
    recipe = load_recipe("quickstart", [], environment=words)
    assert (recipe.launch.grace_s, recipe.launch.time_limit_min, recipe.store.uri) == (120, 60, "s3://bucket/x")


def test_slurm_warns_early_enough_for_the_grace_of_a_recipe() -> None:
    signal_s = int(re.findall(r"--signal=B:USR1@(\d+)", SCRIPT.read_text())[0])
    grace_s = load_recipe("quickstart", []).launch.grace_s
    assert signal_s >= grace_s + 60, "SLURM may be 60 s late"


def test_whoever_copies_an_example_that_asks_for_gpus_gets_processors_for_them() -> None:
    """Of --ntasks-per-node=1 SLURM makes one processor a node, whatever the number of GPUs (sbatch(1), -c)."""
    text = (ROOT / "README.md").read_text() + SCRIPT.read_text()
    examples = [line for line in text.splitlines() if re.search(r"\bsbatch .*--gpus-per-node", line)]
    assert len(examples) == 4
    assert [line for line in examples if "--cpus-per-task=" not in line] == []


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
def test_in_a_container_it_is_the_same_command(runtime: str, tmp_path: Path) -> None:
    _, argv, seen, _ = run_script(
        tmp_path, "r.yaml", "--fresh", JOB_RUNTIME=runtime, JOB_IMAGE="registry/finetune.sqsh"
    )
    assert argv[-4:] == ["job", "run", "r.yaml", "--fresh"]
    assert json.dumps(argv).count("registry/finetune.sqsh") + (seen["JOB_IMAGE"] == "registry/finetune.sqsh") >= 1


@pytest.mark.parametrize(("allocated", "mounted"), [({}, None), ({"SLURM_GPUS_ON_NODE": "8"}, "all")])
def test_in_pyxis_the_work_folder_is_the_scripts_and_where_there_are_gpus_so_is_their_driver(
    allocated: dict[str, str], mounted: str | None, tmp_path: Path
) -> None:
    """Pyxis takes an image's variables before the host's; enroot's hook mounts a driver, or fails for lack of one."""
    where = {"JOB_RUNTIME": "pyxis", "JOB_IMAGE": "registry/finetune.sqsh"}
    _, argv, seen, _ = run_script(tmp_path, "r.yaml", **where, **allocated)
    assert argv[-5:] == ["env", f"JOB_WORK_DIR={tmp_path / 'work'}", "job", "run", "r.yaml"]
    assert seen.get("NVIDIA_VISIBLE_DEVICES") == mounted


def test_apptainer_gets_on_the_node_what_job_reads(tmp_path: Path) -> None:
    """The words that srun would run are run, with a recorder called apptainer."""
    _, argv, _, _ = run_script(tmp_path, "r.yaml", JOB_RUNTIME="apptainer", JOB_IMAGE="finetune.sif")
    recorder = tmp_path / "bin" / "apptainer"
    recorder.write_text('#!/bin/bash\nprintf "%s\\n" "$@" > "$RECORD/apptainer"\nenv > "$RECORD/inside"\n')
    recorder.chmod(0o755)
    task = {"SLURM_NODEID": "1", "AWS_REGION": "eu", "no_proxy": "10.0.0.0/8", "WANDB_API_KEY": "k"}
    (tmp_path / "ca.pem").touch()
    task |= {"REQUESTS_CA_BUNDLE": str(tmp_path / "ca.pem"), "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    others = {"SECRETS_OF_OTHERS": "x", "PYTHONPATH": "/home/x", "TORCH_HOME": "/home/x", "OMPI_MCA_btl": "tcp"}
    others |= {"JOB_IMAGE": "finetune.sif", "SSL_CERT_FILE": "/no/such/file"}
    place = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "RECORD": str(tmp_path), "JOB_WORK_DIR": "/w"}
    subprocess.run(argv[argv.index("bash") :], env=task | others | place, cwd=tmp_path, check=True)
    inside = (tmp_path / "inside").read_text().splitlines()
    assert {f"APPTAINERENV_{name}={value}" for name, value in task.items()} <= set(inside)
    told = {line.partition("=")[0] for line in inside}
    assert [name for name in others if f"APPTAINERENV_{name}" in told] == ["JOB_IMAGE"]
    words = (tmp_path / "apptainer").read_text().splitlines()
    assert words[:3] == ["exec", "--nv", "--cleanenv"]
    assert words[words.index("--bind") + 1] == f"{tmp_path},/w,{tmp_path / 'ca.pem'}"
    assert words[-4:] == ["finetune.sif", "job", "run", "r.yaml"]


def test_a_task_of_an_array_takes_its_own_recipe(tmp_path: Path) -> None:
    words = ("a.yaml", "b.yaml", "--set", "training.seed=7")
    _, argv, _, _ = run_script(tmp_path, *words, SLURM_ARRAY_TASK_ID="1")
    assert argv[-4:] == ["run", "b.yaml", "--set", "training.seed=7"]
    assert run_script(tmp_path, *words)[1][-3] == "a.yaml"
