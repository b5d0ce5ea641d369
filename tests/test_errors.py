"""The exit codes are the contract with schedulers, and no message carries a secret."""

from __future__ import annotations

import resource
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job import errors
from job.errors import (
    PERMANENT,
    JobError,
    RecipeError,
    contains_secret,
    exceeds_limits,
    lacks_disk,
    lacks_memory,
    redact,
)
from job.launch import judge_error

# The table that the README, the Kubernetes manifests and the sbatch scripts are written from.
CODES = {
    "RecipeError": 10,
    "DataError": 11,
    "AccessDenied": 12,
    "NotFound": 13,
    "Diverged": 14,
    "GateFailed": 15,
    "CheckpointMismatch": 16,
    "NoValidCheckpoint": 17,
    "NoProgress": 18,
    "SecurityRefused": 19,
    "Interrupted": 75,
    "Fenced": 76,
    "Unreachable": 77,
    "ResourceExhausted": 78,
    "PeerLost": 79,
}


def error_classes() -> dict[str, type[JobError]]:
    return {
        name: value
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, JobError) and value is not JobError
    }


def test_every_error_has_the_exit_code_of_the_table_and_no_other_error_exists() -> None:
    assert {name: error.exit_code for name, error in error_classes().items()} == CODES
    assert len(set(CODES.values())) == len(CODES)
    assert JobError.exit_code == 1


def test_the_docstring_shows_the_same_table() -> None:
    documented = errors.__doc__ or ""
    for name, code in CODES.items():
        assert f"{name} " in documented
        assert any(name in line and f" {code} " in line for line in documented.splitlines())


def test_codes_that_no_retry_can_mend_are_those_below_twenty() -> None:
    assert frozenset({2, *(code for code in CODES.values() if code < 20)}) == PERMANENT


def test_a_recipe_error_carries_every_problem() -> None:
    error = RecipeError("one", "two")
    assert error.problems == ("one", "two")
    assert str(error) == "one\ntwo"


AWS_ID = st.builds(
    str.__add__, st.sampled_from(["AKIA", "ASIA"]), st.text("ABCDEFGHIJ234567", min_size=16, max_size=16)
)
HUB_TOKEN = st.text("abcdefXYZ0123456789", min_size=15, max_size=40).map("hf_{}7".format)
OPAQUE = st.text("abcdefXYZ0123456789+/-._~", min_size=12, max_size=60).filter(
    lambda text: text.strip("+/-._~") == text
)
LEADS = [
    "X-Amz-Signature={}",
    "X-Amz-Security-Token={}",
    "https://bucket.example.org/key?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Signature={}&x-id=GetObject",
    "Authorization: Bearer {}",
    "authorization: bearer {}",
    "AWS4-HMAC-SHA256 Credential=abcdef/20261123, SignedHeaders=host, Signature={}",
    "AWS_SECRET_ACCESS_KEY={}",
    "export AWS_SESSION_TOKEN='{}'",
    '{{"aws_secret_access_key": "{}"}}',
    '"secretKey": "{}"',
    "HF_TOKEN={}",
    "hf_token: {}",
    "token={}",
    "password: {}",
    "api_key={}",
    "https://user:{}@example.org/path",
]


@settings(max_examples=300)
@given(
    secret=AWS_ID | HUB_TOKEN,
    before=st.sampled_from(["", " ", "\n", "'", '"', "=", "/", "key_", ", ", "(", "ключ "]),
    after=st.sampled_from(["", " ", "\n", "'", '"', "/", ", ", ")", " ключ", ". Next"]),
    around=st.text(max_size=20),
)
def test_an_identifier_that_is_secret_by_its_shape_never_shows(
    secret: str, before: str, after: str, around: str
) -> None:
    text = f"{around} {before}{secret}{after} {around}"
    assert contains_secret(text)
    assert secret not in redact(text)
    assert "***" in redact(text)


@settings(max_examples=400)
@given(secret=OPAQUE, lead=st.sampled_from(LEADS), before=st.sampled_from(["", "error: ", "\n\t", "{'a': 1} "]))
def test_what_follows_a_word_for_secret_never_shows(secret: str, lead: str, before: str) -> None:
    if "@" in lead:
        secret = secret.replace("/", "")
    masked = redact(before + lead.format(secret))
    assert secret not in masked
    assert masked.startswith(before)


@settings(max_examples=200)
@given(st.text(max_size=200))
def test_redacting_twice_changes_nothing_more(text: str) -> None:
    assert redact(redact(text)) == redact(text)


ORDINARY = [
    "training.global_batch_size: 7 rows cannot be shared by 2 ranks; write 6 or 8",
    "s3://finetune-job/imdb/runs/nightly-2026-11-23/checkpoints/e0001-s00000250-0123abcd/manifest.json: no such object",
    "tokenizer: distilbert-base-uncased has 30522 entries, tokens: 123456, tokens_per_second: 5120.25",
    "pad_token: <|endoftext|>, eos_token=<|endoftext|>, mask_token: [MASKED]",
    "HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN are read from the environment; set HF_TOKEN to a token that may read it",
    "model.id: 'org/hf_distilbert' is neither a local path nor on the Hub",
    "http://127.0.0.1:9000/bucket/a:b@c: cannot read; check the credentials and their permissions on the prefix",
    "sha256 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08 differs from the manifest",
    "org/hf_customersupporttickets and hf_distilbertbasefinetuned in data/hf_sentimentanalysis/train.csv",
    "git@github.com:org/repo.git and ssh://git@github.com/org/repo",
    "the secret of good labels is patience: read the password-reset rows first",
    "АКІА is Cyrillic, asiatic and akiabcdefghijklmnopq are words",
]


@pytest.mark.parametrize("sentence", ORDINARY, ids=lambda sentence: sentence[:30])
def test_an_ordinary_sentence_stays_as_it_is(sentence: str) -> None:
    assert redact(sentence) == sentence
    assert not contains_secret(sentence)


@pytest.mark.parametrize("piece", ["a-", "token", "hf_", "AKIA", "://a:", "secret_", "X-Amz-", " ", "bearer "])
def test_a_megabyte_of_log_is_redacted_at_once(piece: str) -> None:
    text = piece * (1_000_000 // len(piece))
    started = time.process_time()
    redact(text)
    assert time.process_time() - started < 60, "in the square of its length it would take hours"


def test_15_a_full_disk_is_78_also_where_a_library_in_rust_found_it() -> None:
    for error in (
        Exception("No space left on device (os error 28)"),
        Exception("Disk quota exceeded (os error 122)"),
        OSError(28, "No space left on device"),
        OSError(28, "No space left on device", "/work/file"),
        shutil.Error([("/work/a", "/work/b", "[Errno 28] No space left on device: '/work/a' -> '/work/b'")]),
    ):
        verdict = judge_error(error)
        assert verdict["exit_code"] == 78, error
        assert "--work-dir" in verdict["reason"]
    assert judge_error(Exception("os error 280"))["exit_code"] == 1


def test_15_a_file_that_numpy_cannot_write_to_its_end_is_78(tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(OSError) as caught:
            np.save(tmp_path / "answers.npy", np.zeros(1 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert caught.value.errno is None, "there is nothing but its text"
    assert judge_error(caught.value)["exit_code"] == 78
    assert judge_error(OSError("Not enough free space to write 33554432 bytes after offset 128"))["exit_code"] == 78


def test_a_limit_of_open_files_or_processes_is_78_and_named() -> None:
    for error in (
        OSError(24, "Too many open files", "/work/file"),
        OSError(23, "Too many open files in system"),
        BlockingIOError(11, "Resource temporarily unavailable"),
        RuntimeError("can't start new thread"),
        RuntimeError("Too many open files. Communication with the workers is no longer possible."),
    ):
        verdict = judge_error(error)
        assert verdict["exit_code"] == 78, error
        assert "ulimit -n" in verdict["reason"]


def test_a_value_that_a_user_wrote_says_nothing_of_this_node() -> None:
    for cell in ("too many open files", "[Errno 28] No space left on device", "cannot allocate memory"):
        error = ValueError(f"Failed to parse string: {cell!r} as a scalar of type int64")
        assert not (lacks_disk(error) or lacks_memory(error) or exceeds_limits(error))
        assert lacks_disk(OSError(cell)) or lacks_memory(RuntimeError(cell)) or exceeds_limits(RuntimeError(cell))
