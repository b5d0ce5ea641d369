"""The merge stage: the whole model out of the base and what the training has moved, proven before anything uses it.

What a merge loses is lost in silence: a head that is left out is drawn anew at the next load (peft #577). So what was
written is held against the trained model, weight by weight and by its answers to real rows once it is opened again.
Where every weight was trained there is no such stage.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from job.data.tokenize import TokenTable
from job.errors import GateFailed
from job.recipe import Run
from job.tasks import IGNORED_LABEL, Task, get_task, join_outputs, load_model, open_trained
from job.train.checkpoint import read_weights, write_weights
from job.train.fragments import WEIGHTS_FILE
from job.train.methods import ADAPTER, Anatomy, apply_method, name_moved
from job.train.units import restore_units

log = logging.getLogger("job.train")

_ROWS = 32
_SHARE = 0.1
"""Of what two runtimes may differ by. Here are one runtime and one processor: a merge moves a logit by about 1e-6."""
_KEPT = "nothing is released, the checkpoint is kept"


def merge_run(run: Run) -> dict[str, Any]:
    """Write `merged/config.json` and `merged/model.safetensors`, for lora `merged/adapter/` in peft's format as well.

    Returns max_abs_logit_diff between the trained and the merged model on n rows; raises GateFailed (15) where
    a weight that no factor belongs to is not the trained one, or an answer differs by more than rounding.
    """
    task, tuning = get_task(run.recipe.kind), run.recipe.tuning
    shutil.rmtree(run.final_model, ignore_errors=True)
    model, _ = load_model(run.base_model, task, run.read("data.json")["labels"], run.recipe.training.seed)
    tuner = apply_method(model, tuning, run.recipe.training.seed)
    moved = name_moved(model, tuning)
    read_weights(model, run.trained, moved)
    expected = _answer(model, run, task)
    if task.standardizes:
        expected = restore_units(model, run, expected)
    unmerged = {name: tensor for name, tensor in model.state_dict().items() if not _is_of_factors(name)}
    if tuner:
        write_adapter(model, moved or set(), run)
        model = tuner.merge_and_unload()
    write_weights(model, model.state_dict(), run.final_model, whole=True)
    (run.final_model / "generation_config.json").unlink(missing_ok=True)  # the bundle gets its own
    _check_weights(unmerged, run.final_model / WEIGHTS_FILE)
    del model, tuner, unmerged
    found = _answer(open_trained(run.final_model, task), run, task)
    difference = _compare(task, expected, found)
    log.info("merged: %d answers as before, max |Δlogit| %.2g", len(expected), difference)
    return {"max_abs_logit_diff": float(f"{difference:.3g}"), "n": len(expected)}


def _is_of_factors(name: str) -> bool:
    """Tell whether a weight is a factor, or what a merge adds factors to."""
    return ".lora_" in name or ".base_layer." in name


def write_adapter(model: Any, moved: set[str], run: Run) -> None:
    """Write the factors, and the trained head, as PeftModel.from_pretrained(base, folder) reads them."""
    import peft

    folder, source = run.final_model / "adapter", run.read("sources.json")["model"]
    factors = peft.get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    state = model.state_dict()
    tensors = factors | {name: state[name] for name in moved if not _is_of_factors(name)}
    config = model.peft_config[ADAPTER]
    config.inference_mode = True
    config.modules_to_save = Anatomy.of(model).new_head or None
    config.target_modules = sorted(config.target_modules)  # peft keeps a set, whose order is another in each process
    origin = source["origin"]
    config.base_model_name_or_path = origin if source["commit"] or "://" in origin else Path(origin).name
    config.revision = source["commit"]
    config.save_pretrained(str(folder))
    save_file(
        {f"base_model.model.{name}": tensors[name].contiguous() for name in sorted(tensors)},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )


def _check_weights(unmerged: dict[str, torch.Tensor], path: Path) -> None:
    """Hold every written weight that no factor was added to against the model's; one that is missing shows later."""
    with safe_open(path, framework="pt") as file:
        for name in unmerged.keys() & file.keys():
            if not torch.equal(unmerged[name], file.get_tensor(name)):
                raise GateFailed(f"merge: {name} in {path.name} is not the trained one; {_KEPT}")


@torch.inference_mode()
def _answer(model: Any, run: Run, task: Task) -> np.ndarray:
    """Return the task's answers float32 [units, k] to the first validation rows, one by one: without padding."""
    table, pad_id = TokenTable.open(run.tokens("validation")), run.read("data.json")["pad_id"]
    answers = []
    for position in range(min(len(table), _ROWS)):
        place = np.array([position])
        batch = {name: torch.from_numpy(array) for name, array in table.pad(place, pad_id).items()}
        labels = torch.from_numpy(table.pad_labels(place))
        answer = task.reduce(join_outputs(task, model.eval()(**batch)), labels)
        answers.append(answer[labels != IGNORED_LABEL] if table.per_token else answer)
    return np.asarray(torch.cat(answers).float().numpy())


def _compare(task: Task, expected: np.ndarray, found: np.ndarray) -> float:
    """Return max |Δlogit|; raise GateFailed (15) beyond the task's tolerance, or for NaN."""
    difference = float(np.abs(task.logits_of(expected) - task.logits_of(found)).max())
    # a number far from 0 is rounded more than a share
    tolerance = task.max_abs_diff if task.standardizes else _SHARE * task.max_abs_diff
    if not difference <= tolerance:
        raise GateFailed(
            f"merge: the merged model and the trained one differ by {difference:.3g} in a logit (at most "
            f"{tolerance:g}); {_KEPT}"
        )
    return difference
