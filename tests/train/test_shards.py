"""Optimizer state cut into fragments by any number of ranks is put together for any other, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from job.errors import CheckpointMismatch
from job.train.shards import Fragment, gather_shard, hold_shard, read_shards, write_steps

SHAPES = {"weight": (7, 5), "bias": (3,), "scale": (1,)}


def make_model() -> dict[str, torch.nn.Parameter]:
    torch.manual_seed(1)
    return {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}


def whole(parameters: dict[str, torch.nn.Parameter]) -> list[Fragment]:
    return [Fragment(name, p.numel(), 0, p.numel(), p, 0) for name, p in parameters.items()]


def partition(ranks: int, padding: int) -> list[list[Fragment]]:
    """All parameters end to end in one flat tensor per rank, as ZeRO-1 and 2 lay them; padding at the end."""
    total = sum(torch.Size(shape).numel() for shape in SHAPES.values())
    size = -(-(total + padding) // ranks)
    flats, fragments = [torch.nn.Parameter(torch.zeros(size)) for _ in range(ranks)], [[] for _ in range(ranks)]
    begin = 0
    for name, shape in SHAPES.items():
        numel = torch.Size(shape).numel()
        for rank, flat in enumerate(flats):
            first, last = max(begin, rank * size), min(begin + numel, (rank + 1) * size)
            if first < last:
                fragment = Fragment(name, numel, first - begin, last - first, flat, first - rank * size)
                fragments[rank].append(fragment)
        begin += numel
    return fragments


def train(parameters: list[torch.nn.Parameter]) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    for seed in range(3):
        torch.manual_seed(seed)
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return optimizer


@settings(max_examples=25)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 5))
def test_any_ranks_read_what_any_ranks_wrote(
    tmp_path_factory: pytest.TempPathFactory, writers: int, readers: int, padding: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    parameters = make_model()
    optimizer = train(list(parameters.values()))
    hold_shard(gather_shard(optimizer, whole(parameters), torch.clone), folder, 0).move_to_disk()
    write_steps(optimizer, dict(parameters), folder)

    for count in (writers, readers):
        written = tmp_path_factory.mktemp("again")
        for rank, fragments in enumerate(partition(count, padding)):
            flats = list({id(fragment.flat): fragment.flat for fragment in fragments}.values())
            partial = torch.optim.AdamW(flats or [torch.nn.Parameter(torch.zeros(1))], lr=0.1)
            read_shards(partial, fragments, folder)
            hold_shard(gather_shard(partial, fragments, torch.clone), written, rank).move_to_disk()
        (written / "steps.json").write_text((folder / "steps.json").read_text())
        folder = written

    fresh = make_model()
    final = torch.optim.AdamW(fresh.values(), lr=0.1)
    read_shards(final, whole(fresh), folder)
    for name, parameter in fresh.items():
        for field, value in optimizer.state[parameters[name]].items():
            assert torch.equal(final.state[parameter][field], value), (name, field)


def test_any_library_reads_it_whatever_kinds_of_numbers_it_has(tmp_path: Path) -> None:
    kinds = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    tensors = {f'é " {n}|exp_avg|0': torch.randn(n, 2)[::2].to(kinds[n % 4]) for n in range(9)}
    for held in ({}, tensors):
        file = hold_shard(held, tmp_path, 3)
        file.move_to_disk()
        found = load_file(tmp_path / "shard-00003.safetensors")
        assert found.keys() == held.keys()
        assert all(torch.equal(found[name], held[name]) and found[name].dtype == held[name].dtype for name in held)


def written_shard(folder: Path) -> dict[str, torch.Tensor]:
    parameters = make_model()
    optimizer = train(list(parameters.values()))
    hold_shard(gather_shard(optimizer, whole(parameters), torch.clone), folder, 0).move_to_disk()
    write_steps(optimizer, dict(parameters), folder)
    return load_file(folder / "shard-00000.safetensors")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t.pop("weight|exp_avg|0"), "exp_avg has 0 elements"),
        (lambda t: [t.pop(f"weight|{field}|0") for field in ("exp_avg", "exp_avg_sq")], "exp_avg has 0 elements"),
        (lambda t: t.update({"weight|exp_avg|0": t["weight|exp_avg|0"][:30].clone()}), "30 elements instead of 35"),
        (lambda t: t.update({"weight|exp_avg|4": torch.zeros(31)}), "overlap"),
        (lambda t: t.update({"weight|exp_avg|36": torch.zeros(1)}), "missing at element 35"),
        (lambda t: t.update({"weight|exp_avg|x": torch.zeros(1)}), "no fragment of a parameter"),
    ],
)
def test_fragments_that_are_missing_or_overlap_are_named(tmp_path: Path, change: object, problem: str) -> None:
    tensors = written_shard(tmp_path)
    change(tensors)  # type: ignore[operator]
    save_file(tensors, tmp_path / "shard-00000.safetensors")
    fresh = make_model()
    optimizer = torch.optim.AdamW(fresh.values(), lr=0.1)
    with pytest.raises(CheckpointMismatch, match=f"weight.*({problem})"):
        read_shards(optimizer, whole(fresh), tmp_path)


def test_a_parameter_that_no_gradient_reached_has_no_state_and_needs_none(tmp_path: Path) -> None:
    parameters = make_model()
    optimizer = train([parameters["weight"], parameters["bias"]])
    hold_shard(gather_shard(optimizer, whole(parameters), torch.clone), tmp_path, 0).move_to_disk()
    write_steps(optimizer, dict(parameters), tmp_path)
    assert sorted(json.loads((tmp_path / "steps.json").read_text())["steps"]) == ["bias", "weight"]
    fresh = make_model()
    final = torch.optim.AdamW(fresh.values(), lr=0.1)
    read_shards(final, whole(fresh), tmp_path)
    assert len(final.state) == 2
