"""Fixtures of the end-to-end tests: `job` as users call it, tiny models, small data sets, one real release."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ACCIDENTAL_JOB = (sys.executable, str(Path(__file__).with_name("accidental_job.py")))
"""`job` with the stages replaced that JOB_STAND_INS names."""

MakeModel = Callable[..., Path]
WriteTraining = Callable[..., Path]


@dataclass(frozen=True)
class Answer:
    """What one call of `job` left: exit code, both streams, and the result line where there is one."""

    code: int
    stdout: str
    stderr: str

    @property
    def result(self) -> dict[str, Any]:
        return dict(json.loads(self.stdout.strip().splitlines()[-1]))


def call_job(
    *words: str,
    env: dict[str, str] | None = None,
    timeout_s: int = 1800,
    program: Sequence[str] = (sys.executable, "-m", "job"),
) -> Answer:
    """Run `job` as a process of its own."""
    environment = {"HF_HUB_OFFLINE": "1"} | dict(os.environ) | (env or {})
    done = subprocess.run([*program, *words], capture_output=True, text=True, env=environment, timeout=timeout_s)
    return Answer(done.returncode, done.stdout, done.stderr)


def write_recipe(path: Path, **sections: Any) -> Path:
    """Write a recipe and return its path."""
    path.write_text(yaml.safe_dump(sections, sort_keys=False))
    return path


def assert_refused(answer: Answer, code: int, *words: str) -> None:
    """A refusal has its code, names what it must in one sentence per problem, and shows no traceback."""
    assert answer.code == code, answer.stderr
    assert "Traceback" not in answer.stderr
    for word in words:
        assert word in answer.stderr, answer.stderr


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory, assets: Path) -> MakeModel:
    """Return a function that makes a tiny, randomly initialised encoder of a kind, with a real tokenizer."""

    def make(kind: str = "bert", **changes: Any) -> Path:
        import torch
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        folder = tmp_path_factory.mktemp(kind)
        tokenizer = AutoTokenizer.from_pretrained(assets / "minilm-l6")
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        if kind == "distilbert":
            sizes = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}
        config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **{**sizes, "pad_token_id": 0, **changes})
        torch.manual_seed(0)
        AutoModel.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_model(make_model: MakeModel) -> Path:
    """A two-layer BERT of 1 M parameters."""
    return make_model("bert", max_position_embeddings=128)


@pytest.fixture(scope="session")
def still_model(make_model: MakeModel) -> Path:
    """The same without dropout: however many ranks share a training, its weights differ by rounding only."""
    return make_model("bert", max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


@pytest.fixture(scope="session")
def write_training(tmp_path_factory: pytest.TempPathFactory, reviews: Path, make_model: MakeModel) -> WriteTraining:
    """Return a function that writes a recipe of 2 epochs with 7 steps each, a save every 2 steps; what it is given
    changes data, model and training.
    """

    def write(data: dict[str, Any], model: Path | None = None, **training: Any) -> Path:
        folder = tmp_path_factory.mktemp("training")
        return write_recipe(
            folder / "recipe.yaml",
            name="training",
            task="text-classification",
            model={"id": str(model or make_model("bert", max_position_embeddings=64))},
            data={"source": str(reviews), "max_length": 48, "limit": 100} | data,
            training={
                "num_train_epochs": 2, "global_batch_size": 16, "max_micro_batch_size": 4, "learning_rate": 1e-3,
                "precision": "fp32", "seed": 3, "save_steps": 2, "logging_steps": 1,
            } | training,
            baselines=[],
            store={"uri": str(folder / "unused")},
        )  # fmt: skip

    return write


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path, reviews: Path) -> dict[str, Any]:
    """A small, complete recipe on a local-folder store; tests change what they are about."""
    return {
        "name": "tiny",
        "task": "text-classification",
        "model": {"id": str(tiny_model)},
        "data": {"source": str(reviews), "max_length": 64},
        "training": {"max_steps": 6, "global_batch_size": 16, "learning_rate": 1e-3, "save_steps": 3, "eval_steps": 6},
        "baselines": ["majority"],
        "export": {"int8": {"targets": ["portable"], "gate": "report_only"}, "latency": False},
        "store": {"uri": str(tmp_path / "store")},
    }


def quickstart_options(assets: Path, store: str) -> list[str]:
    """Options that point the shipped recipe at the cached assets and cut its train rows."""
    options = (
        f"model.id={assets / 'minilm-l6'}", f"data.source={assets / 'movie-reviews'}", "data.limit=2000",
        f"store.uri={store}", "training.save_steps=50", "baselines=[untrained]",
    )  # fmt: skip
    return [word for option in options for word in ("--set", option)]


@dataclass(frozen=True)
class Released:
    """One real release of the quickstart on a slice of its train rows."""

    result: dict[str, Any]
    work: Path
    answer: Answer

    @property
    def uri(self) -> str:
        return str(self.result["release"])


@pytest.fixture(scope="session")
def released(tmp_path_factory: pytest.TempPathFactory, s3: str, assets: Path) -> Released:
    """The shipped quickstart recipe on 2,000 train rows, into a real S3 server."""
    work = tmp_path_factory.mktemp("work")
    answer = call_job("run", "quickstart", "--work-dir", str(work), *quickstart_options(assets, f"{s3}/released"))
    assert answer.code == 0, answer.stderr
    return Released(answer.result, work, answer)
