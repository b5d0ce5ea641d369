"""Trainings of real rank processes without the stages around them: begun, killed, and resumed from their store.

`Trial.attempt` does what the pipeline does between two attempts: read current.json, fetch the checkpoint's
files, write attempt.json, start the ranks. What the ranks run is `run_trial_rank`: the house's own, with noise
in its data, and with an accident at a chosen step.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from job.data import fetch_sources
from job.launch import Limits, Place, StopRequest, Supervisor, find_free_port, find_topology
from job.recipe import Run, load_recipe
from job.store import RunStore
from job.store.manifest import Manifest
from job.store.transfer import download_files
from job.training import list_environments

HERE = Path(__file__).parent
ONE, TWO = "distributed.processes_per_node=1", "distributed.processes_per_node=2"


def run_trial_rank(run: Run) -> dict[str, Any]:
    """Train as the house does, but for what TRIAL_NOISE, _MEMORY_ROWS, _MEMORY_MIB, _OVERFLOW and _ACCIDENT say."""
    from job.train import run_rank

    if os.environ.get("TRIAL_NOISE"):
        _add_noise()
    if rows := os.environ.get("TRIAL_MEMORY_ROWS"):
        _limit_memory(int(rows), run)
    if mib := os.environ.get("TRIAL_MEMORY_MIB"):
        _shrink_gpu(int(mib))
    if os.environ.get("TRIAL_OVERFLOW"):
        _overflow()
    if run.recipe.training.torch_compile:
        _fail_where_compiling_has_no_end()
    if accident := os.environ.get("TRIAL_ACCIDENT"):
        _arrange(accident, run)
    return run_rank(run)


def _fail_where_compiling_has_no_end() -> None:
    """Where each micro-batch would need kernels of its own, torch gives up after eight and goes on without any."""
    import torch._dynamo

    torch._dynamo.config.fail_on_recompile_limit_hit = True


def _add_noise() -> None:
    """Let the data set and the collator draw from Python's, numpy's and torch's generators."""
    import torch

    from job.train import stream, trainer

    class NoisyRows(stream.TableRows):
        def __getitem__(self, index: int) -> int:
            random.random()
            return super().__getitem__(index)

    class NoisyCollator(stream.Collator):
        def __call__(self, positions: list[int]) -> dict[str, torch.Tensor]:
            batch = super().__call__(positions)
            ids = batch["input_ids"]
            masked = (torch.rand(ids.shape) < 0.1) | torch.from_numpy(np.random.random(ids.shape) < 0.1)
            batch["input_ids"] = torch.where(masked, random.randrange(1000, 2000), ids)
            return batch

    trainer.TableRows, trainer.Collator = NoisyRows, NoisyCollator  # type: ignore[misc]


def _limit_memory(rows: int, run: Run) -> None:
    """Let a GPU's memory end where a micro-batch has more than `rows` rows, once step 3 is committed."""
    import torch

    from job.train.trainer import JobTrainer

    inner = JobTrainer.compute_loss

    def compute_loss(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if model.training and self.shape[0] > rows and self.state.global_step >= 3:
            _await_commit(run, 3)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return inner(self, model, inputs, *args, **kwargs)

    JobTrainer.compute_loss = compute_loss  # type: ignore[method-assign]


def _shrink_gpu(mib: int) -> None:
    """Let torch have so much of the GPU's memory and no more."""
    import torch

    torch.cuda.set_per_process_memory_fraction(mib * 2**20 / torch.cuda.get_device_properties(0).total_memory)


def _overflow() -> None:
    """Let every gradient overflow as in fp16, before torch's own scaler (on the CPU: fp16 itself needs a GPU)."""
    import torch

    from job.train.trainer import JobTrainer

    inner, train = JobTrainer.compute_loss, JobTrainer.train

    def train_scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.accelerator.scaler = torch.amp.GradScaler("cpu")
        return train(self, *args, **kwargs)

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = inner(self, *args, **kwargs)
        if isinstance(loss, torch.Tensor) and loss.requires_grad:
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    JobTrainer.train, JobTrainer.compute_loss = train_scaled, compute_loss  # type: ignore[method-assign]


def _arrange(accident: str, run: Run) -> None:
    """`PLACE:WHAT:STEP`: in training_step or prediction_step, at that global step, once the last save is committed.

    It happens once in this run's folder. Until then each save is committed before the next step: those that found the
    one before under way would wait for a later step's vote. In load_model, whatever the step, before it loads.
    """
    from job.train import rank
    from job.train.trainer import JobTrainer

    place, what, step = accident.split(":")
    if place == "load_model":
        rank.load_model = lambda *_: ACCIDENTS[what](run)  # type: ignore[assignment,misc,return-value]
        return
    training_step = JobTrainer.training_step
    happened = run.folder / f"accident-{place}-{what}-{step}"

    def training_step_waiting(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not happened.exists():
            _await_commit(run, self.state.global_step)
        return training_step(self, *args, **kwargs)

    JobTrainer.training_step = training_step_waiting  # type: ignore[method-assign]
    inner = getattr(JobTrainer, place)

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == int(step) and not happened.exists():
            happened.touch()
            _await_commit(run, int(step))
            ACCIDENTS[what](run)
        return inner(self, *args, **kwargs)

    setattr(JobTrainer, place, wrapped)


def _await_commit(run: Run, step: int) -> None:
    every = run.recipe.training.save_steps or 1
    pointer = Path(run.recipe.store.uri) / "runs" / run.run_id / "current.json"
    deadline = time.monotonic() + 60
    while step >= every and time.monotonic() < deadline:
        if pointer.exists() and json.loads(pointer.read_text()).get("step", -1) >= step // every * every:
            return
        time.sleep(0.05)


def _signal_self(number: signal.Signals) -> Callable[[Run], None]:
    return lambda run: os.kill(os.getpid(), number)


def _signal_loader(run: Run) -> None:
    """Signal a loading process, and wait until this one has heard of it: the steps that are left take milliseconds."""
    handler, heard = signal.getsignal(signal.SIGUSR1), []
    assert callable(handler)
    signal.signal(signal.SIGUSR1, lambda *told: (heard.append(told), handler(*told)))
    os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGUSR1)
    deadline = time.monotonic() + 20
    while not heard and time.monotonic() < deadline:
        time.sleep(0.05)


def _kill_loader(run: Run) -> None:
    os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)


def _pause(run: Run) -> None:
    """Let the next save come late."""
    time.sleep(8)


def _signal_twice(run: Run) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1.3)
    os.kill(os.getpid(), signal.SIGTERM)


def _raise(run: Run) -> None:
    raise ValueError("an accident that no code expects")


def _fill_disk(run: Run) -> None:
    """Write into the staging of this attempt until the disk is full; only for a disk of the test's own."""
    assert os.path.ismount(run.work)
    with suppress(OSError), (run.folder / "train" / "ballast").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))


ACCIDENTS = {
    "raise": _raise,
    "disk-full": _fill_disk,
    "pause": _pause,
    "kill": _signal_self(signal.SIGKILL),
    "term": _signal_self(signal.SIGTERM),
    "usr1": _signal_self(signal.SIGUSR1),
    "usr2": _signal_self(signal.SIGUSR2),
    "twice": _signal_twice,
    "loader-usr1": _signal_loader,
    "loader-kill": _kill_loader,
}


class Trial:
    """One run of one recipe in a folder of its own; its attempts follow each other."""

    def __init__(self, recipe: Path, folder: Path, *options: str, noise: bool = False) -> None:
        self._recipe, self._folder, self._options, self._noise = recipe, folder, options, noise
        self._epoch = 0
        self.record: dict[str, Any] = {}
        self.reason = ""

    def run(self, *options: str) -> Run:
        """Return the run with these options; what it reads is fetched once."""
        store = f"store.uri={self._folder / 'store'}"
        run = Run("trial", load_recipe(str(self._recipe), [store, *self._options, *options]), self._folder / "work")
        run.save()
        if not (run.folder / "data.json").exists():
            fetch_sources(run)
        return run

    def attempt(self, *options: str, accident: str = "", rank: int = 0, failpoint: str = "") -> int:
        """Start the ranks from the newest checkpoint; return the code. The accident happens in one rank."""
        run = self.run(*options)
        self._epoch += 1
        shutil.rmtree(run.folder / "train", ignore_errors=True)
        order = {"epoch": self._epoch, "nonce": f"{self._epoch:032x}", "keep": 2, "peer_timeout_s": 60}
        RunStore(run.recipe.store.uri, run.run_id).write_json("owner.json", order)  # committing asks who owns the run
        run.write("attempt.json", order | self._fetch(run) | {"about": {"engine": run.recipe.distributed.engine}})
        path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
        common = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": path, "TRIAL_NOISE": "1" if self._noise else ""}
        topology = find_topology(run.recipe.distributed, Place())
        for _ in range(3):
            environments = [each | common for each in list_environments(run, topology, find_free_port())]
            environments[rank] |= {"TRIAL_ACCIDENT": accident, "JOB_FAILPOINT": failpoint}
            supervisor = Supervisor(StopRequest(), Limits.of(run.recipe.launch))
            verdict = supervisor.run("trainings:run_trial_rank", run.folder, environments)
            if "another process took the port" not in verdict.reason:  # which the pipeline would try again, too
                break
        self.record, self.reason = verdict.record, verdict.reason
        return verdict.code

    def _fetch(self, run: Run) -> dict[str, Any]:
        if not self.pointer:
            return {"resume": None, "resumed_from": None}
        folder, manifest = run.folder / "train" / "resume", self.committed
        download_files(RunStore(run.recipe.store.uri, run.run_id).objects, manifest, folder)
        assert manifest.about["engine"] == run.recipe.distributed.engine
        return {"resume": str(folder), "resumed_from": manifest.about["step"]}

    @property
    def pointer(self) -> dict[str, Any]:
        """What current.json says; empty before the first commit."""
        path = self._folder / "store" / "runs" / "trial" / "current.json"
        return json.loads(path.read_text()) if path.exists() else {}

    @property
    def committed(self) -> Manifest:
        """The manifest of the checkpoint that current.json names."""
        pointer = self.pointer
        file = self._folder / "store" / "runs" / "trial" / pointer["manifest"]
        return Manifest.parse(file.read_bytes(), pointer["manifest"], pointer["manifest_sha256"])

    @property
    def weights(self) -> Path:
        """The newest weights that an attempt committed and, where it was not killed right then, laid here."""
        return self._folder / "work" / "runs" / "trial" / "final" / "model.safetensors"

    @property
    def digest(self) -> str:
        """The sha256 of the newest weights."""
        return hashlib.sha256(self.weights.read_bytes()).hexdigest()
