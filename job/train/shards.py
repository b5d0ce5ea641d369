"""Optimizer state as named fragments of parameters, in files that any number of ranks can read.

shard-NNNNN.safetensors   one per rank that holds state; key `<parameter>|<field>|<start>`: a run of the
                          flattened parameter's <field> (exp_avg, exp_avg_sq) from element <start> on
steps.json                the fields, and how often each parameter was updated; one without state is not in it

No engine is known here: `fragments.py` says which part of which parameter lies where.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open

from job.errors import CheckpointMismatch
from job.store.held import HeldFile
from job.train.snapshot import Keep

STEPS_FILE = "steps.json"

_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16"}
_ALIGNED_BYTES = 8


@dataclass(frozen=True)
class Fragment:
    """A run of one flattened parameter that this rank updates.

    It begins at element `start` of the parameter and is `length` long; its master copy lies in `flat`
    (fp32, what torch's optimizer calls its parameter) from element `offset` on. `numel` is the whole parameter's.
    """

    name: str
    numel: int
    start: int
    length: int
    flat: torch.Tensor
    offset: int

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this fragment's part of a tensor that is shaped like `flat`."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.length)


def gather_shard(
    optimizer: torch.optim.Optimizer, fragments: Iterable[Fragment], keep: Keep
) -> dict[str, torch.Tensor]:
    """Return copies, made by `keep`, of this rank's fragments of every field of the optimizer's state."""
    tensors = {}
    for fragment in fragments:
        for field, value in optimizer.state.get(fragment.flat, {}).items():
            if torch.is_tensor(value) and value.shape == fragment.flat.shape:
                key = f"{fragment.name}|{field}|{fragment.start}"
                tensors[key] = keep(fragment.view(value))
    return tensors


def hold_shard(tensors: dict[str, torch.Tensor], folder: Path, rank: int) -> HeldFile:
    """Return the file of `folder` that has what `gather_shard` returned; nothing is written yet, nothing copied."""
    return HeldFile(_lay_out(tensors), folder / f"shard-{rank:05d}.safetensors")


def _lay_out(tensors: dict[str, torch.Tensor]) -> list[memoryview]:
    """Return a safetensors file's header, and after it the numbers as they lie; its library gives whole files only.

    Source: https://huggingface.co/docs/safetensors, «Format»: 8 bytes of the header's length, JSON, the buffer.
    """
    header: dict[str, Any] = {}
    numbers, place = [], 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):  # then all are aligned
        numbers.append(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))
        end = place + len(numbers[-1])
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNED_BYTES)
    return [memoryview(len(text).to_bytes(8, "little") + text), *numbers]


def write_steps(optimizer: torch.optim.Optimizer, named: dict[str, torch.Tensor], folder: Path) -> None:
    """Write how often each parameter was updated; `named` maps its name to the flat tensor that holds it."""
    states = {name: optimizer.state[flat] for name, flat in named.items() if "step" in optimizer.state.get(flat, {})}
    steps = {name: float(state["step"]) for name, state in states.items()}
    fields = sorted({field for state in states.values() for field in state} - {"step"})
    (folder / STEPS_FILE).write_text(json.dumps({"fields": fields, "steps": steps}))


def read_shards(optimizer: torch.optim.Optimizer, fragments: Iterable[Fragment], folder: Path) -> None:
    """Put the saved state into this rank's fragments, whatever the ranks and the engine were that wrote it.

    Raises CheckpointMismatch (16) naming a parameter whose fragments are missing or overlap.
    """
    updates = json.loads((folder / STEPS_FILE).read_text())
    steps, fields = updates["steps"], updates["fields"]
    with SavedFragments(folder) as saved:
        for fragment in fragments:
            if fragment.name not in steps:  # never updated: no gradient ever reached it
                continue
            state = optimizer.state[fragment.flat]
            state["step"] = _count_on(optimizer, fragment.flat, steps[fragment.name])
            for field in fields:
                saved.check_complete(fragment, field)
                if field not in state:
                    state[field] = torch.zeros_like(fragment.flat, requires_grad=False)
                saved.copy(fragment, field, fragment.view(state[field]))


def _count_on(optimizer: torch.optim.Optimizer, flat: torch.Tensor, steps: float) -> torch.Tensor:
    """Return a step count where torch keeps it: beside the parameter for fused kernels, else on the CPU."""
    beside = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
    return torch.tensor(steps, dtype=torch.float32, device=flat.device if beside else "cpu")


class SavedFragments:
    """All shards of a checkpoint, opened but not read."""

    def __init__(self, folder: Path) -> None:
        self._files = ExitStack()
        self._found: dict[str, dict[str, list[tuple[int, int, Any]]]] = {}
        for path in sorted(folder.glob("shard-*.safetensors")):
            file = self._files.enter_context(safe_open(path, framework="pt"))
            for key in file.keys():  # noqa: SIM118  # not a mapping
                self._note(path, key, file.get_slice(key))

    def _note(self, path: Path, key: str, part: Any) -> None:
        name, field, start = [*key.rsplit("|", 2), "", ""][:3]
        if not start.isdigit():
            raise CheckpointMismatch(f"{path.name}: {key!r} is no fragment of a parameter; begin anew with --fresh")
        runs = self._found.setdefault(name, {}).setdefault(field, [])
        runs.append((int(start), part.get_shape()[0], part))

    def __enter__(self) -> SavedFragments:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()

    def check_complete(self, fragment: Fragment, field: str) -> None:
        """Raise CheckpointMismatch (16) unless a field's fragments cover the parameter once."""
        end = 0
        runs = self._found.get(fragment.name, {}).get(field, [])
        for start, length, _ in sorted(runs, key=lambda run: run[0]):
            if start != end:
                problem = "overlap" if start < end else "are missing"
                raise self._mismatch(fragment.name, f"fragments of {field} {problem} at element {min(start, end)}")
            end += length
        if end != fragment.numel:
            raise self._mismatch(fragment.name, f"{field} has {end} elements instead of {fragment.numel}")

    def _mismatch(self, name: str, problem: str) -> CheckpointMismatch:
        return CheckpointMismatch(
            f"shard-*.safetensors: parameter {name}: {problem}; the checkpoint is of another model or incomplete: "
            "use the model that it was trained from, or begin anew with --fresh"
        )

    def copy(self, fragment: Fragment, field: str, target: torch.Tensor) -> None:
        """Copy the saved elements of a fragment's field into `target` [fragment.length]."""
        first, last = fragment.start, fragment.start + fragment.length
        for start, length, part in self._found[fragment.name][field]:
            begin, end = max(start, first), min(start + length, last)
            if begin < end:
                target[begin - first : end - first] = part[begin - start : end - start]
