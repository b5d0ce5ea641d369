"""What torch raises becomes one line and the right code; anything else stays what it is."""

from __future__ import annotations

import pytest
import torch
from safetensors import SafetensorError

from job.errors import Diverged, JobError, PeerLost, ResourceExhausted
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
