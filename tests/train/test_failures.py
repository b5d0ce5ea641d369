"""What torch raises becomes one line and the right code; anything else stays what it is."""

from __future__ import annotations

import pytest
import torch

from job.errors import JobError, PeerLost, ResourceExhausted
from job.train import failures


@pytest.mark.parametrize(
    ("error", "expected", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), ResourceExhausted, "8 rows"),
        (RuntimeError("DataLoader worker (pid(s) 12) exited unexpectedly"), ResourceExhausted, "data.num_workers"),
        (RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed. "), ResourceExhausted, "signal: Killed"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:1"), PeerLost, "gone"),
        (RuntimeError("[gloo/…/unbound_buffer.cc:78] Timed out waiting 5000ms for recv"), PeerLost, "Timed out"),
        (torch.distributed.DistBackendError("NCCL communicator was aborted on rank 1."), PeerLost, "aborted"),
    ],
)
def test_an_error_that_torch_is_known_for(
    monkeypatch: pytest.MonkeyPatch, error: Exception, expected: type[JobError], words: str
) -> None:
    monkeypatch.setattr(failures.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(failures.dist, "get_world_size", lambda: 2)
    with pytest.raises(expected, match=words) as caught, failures.explain_failures(8):
        raise error
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), OSError(28, "No space left on device"), KeyError("x")]
)
def test_any_other_error_stays(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, failures.explain_failures(8):
        raise error
    assert caught.value is error
