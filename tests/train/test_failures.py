"""What torch raises becomes one line and the right code; anything else stays what it is."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import SafetensorError

from job.data.fetch import load_tokenizer
from job.errors import DataError, Diverged, JobError, PeerLost, ResourceExhausted
from job.launch import judge_error
from job.tasks import get_task, load_model
from job.train import failures


@pytest.mark.parametrize(
    ("error", "expected", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), ResourceExhausted, "8 rows of 128 tokens"),
        (OSError(28, "No space left on device"), ResourceExhausted, "free space"),
        (OSError(122, "Disk quota exceeded"), ResourceExhausted, "Disk quota exceeded"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), ResourceExhausted, "free space"),
        (RuntimeError("DataLoader worker (pid(s) 12) exited unexpectedly"), ResourceExhausted, "data.num_workers"),
        (RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed. "), ResourceExhausted, "signal: Killed"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:1"), PeerLost, "gone"),
        (RuntimeError("[gloo/…/unbound_buffer.cc:78] Timed out waiting 5000ms for recv"), PeerLost, "Timed out"),
        (Exception("Current loss scale already at minimum - cannot decrease scale anymore."), Diverged, "use bf16"),
        (torch.distributed.DistBackendError("NCCL communicator was aborted on rank 1."), PeerLost, "aborted"),
    ],
)
def test_an_error_that_torch_is_known_for(
    monkeypatch: pytest.MonkeyPatch, error: Exception, expected: type[JobError], words: str
) -> None:
    monkeypatch.setattr(failures.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(failures.dist, "get_world_size", lambda: 2)
    with pytest.raises(expected, match=words) as caught, failures.explain_failures(lambda: (8, 128)):
        raise error
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), OSError(2, "No such file"), SafetensorError("header"), KeyError("x")]
)
def test_any_other_error_stays(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, failures.explain_failures():
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    ("rows", "tokens", "retry", "words"),
    [
        (9, 128, {"max_micro_batch_size": 4}, "9 rows of 128 tokens at once"),
        (2, 128, {"max_micro_batch_size": 1}, "2 rows"),
        (1, 512, None, "1 row of 512 tokens; lower data.max_length"),
        (0, 0, None, "the model and its optimizer"),
    ],
)
def test_12_memory_that_is_too_small_asks_for_half_the_rows_until_one_is_left(
    rows: int, tokens: int, retry: dict[str, int] | None, words: str
) -> None:
    with pytest.raises(ResourceExhausted, match=words) as caught, failures.explain_failures(lambda: (rows, tokens)):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert caught.value.retry == retry


@contextmanager
def few_files(more: int) -> Iterator[None]:
    """Let this process have so many more files open than it has."""
    lowest = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + more, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


def load(folder: Path) -> None:
    with failures.explain_failures():
        load_model(folder, get_task("text-classification"), ["a", "b"], seed=0)


def test_files_that_may_not_be_opened_while_a_model_loads_are_no_fault_of_the_model(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    transformers.BertModel(transformers.BertConfig(vocab_size=9, **sizes)).save_pretrained(tmp_path)
    load(tmp_path)  # what it imports is imported
    for more in range(2):
        with pytest.raises((OSError, RuntimeError)) as caught, few_files(more):
            load(tmp_path)
        assert judge_error(caught.value)["exit_code"] == 78


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json"])
def test_a_disk_that_gives_no_answer_is_no_fault_of_the_model(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "vocab.txt").write_text("[PAD]")
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to("/proc/self/mem")  # to read its first byte is an error of input
    with pytest.raises(Exception, match=r"(?i)input/output error") as caught:
        load_tokenizer(tmp_path, {}, get_task("text-classification"))
    verdict = judge_error(caught.value)
    assert (verdict["exit_code"], "see dmesg" in verdict["reason"]) == (78, True), verdict


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), ResourceExhausted),
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:1"), PeerLost),
        (RuntimeError("Error(s) in loading state_dict for Bert: size mismatch for classifier.weight"), DataError),
    ],
)
def test_what_fails_where_ranks_share_the_weights_as_they_load_is_told_from_wrong_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, expected: type[JobError]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(failures.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(failures.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr("transformers.integrations.is_deepspeed_zero3_enabled", lambda: True)
    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, "from_pretrained", fail)
    with pytest.raises(expected):
        load(tmp_path)
