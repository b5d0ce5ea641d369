"""Weights whose header is no header are the data's fault (11), however it is broken; nothing of it reaches torch."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from job.errors import DataError
from job.launch import judge_error
from job.store.models import inspect_model_folder

HEADERS = {
    "nested deeper than anybody reads": b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}",
    "no end": b'{"a":{"shape":[1],"data_offsets":[]}}',
    "an endless end": b'{"a":{"shape":[1],"data_offsets":[0,1e999]}}',
    "a word": b'"a"',
    "no JSON": b"\xff",
    "nothing": b"",
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_weights_with_a_broken_header_are_11(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(DataError, match="not a whole safetensors file"):
        inspect_model_folder(tmp_path, "model")


def test_a_disk_that_gives_no_answer_is_no_fault_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to("/proc/self/mem")  # to read its first byte is an error of input
    with pytest.raises(OSError) as caught:
        inspect_model_folder(tmp_path, "model")
    assert judge_error(caught.value)["exit_code"] == 78


@pytest.mark.parametrize("name", ["generation_config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_nobody_waits_for_a_pipe_or_reads_a_device_in_a_model_folder(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    if kind == "pipe":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(DataError, match=f"{name} is a pipe or a device"):
        inspect_model_folder(tmp_path, "model")


def test_a_model_of_which_a_file_of_weights_is_not_there_is_11(tmp_path: Path) -> None:
    weights = {name: np.zeros((2, 2), np.float32) for name in ("a", "b")}
    for number, name in enumerate(weights, 1):
        save_file({name: weights[name]}, tmp_path / f"model-{number}-of-2.safetensors")
    places = {name: f"model-{number}-of-2.safetensors" for number, name in enumerate(weights, 1)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    inspect_model_folder(tmp_path, "model")
    (tmp_path / "model-2-of-2.safetensors").unlink()
    with pytest.raises(DataError, match=r"model-2-of-2\.safetensors, which .* names, is not there"):
        inspect_model_folder(tmp_path, "model")


def test_a_config_that_is_larger_than_any_and_a_folder_for_weights_are_11(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(DataError, match="not a whole safetensors file"):
        inspect_model_folder(tmp_path, "model")
    monkeypatch.setattr("job.store.models._MAX_CONFIG_BYTES", 100)
    (tmp_path / "tokenizer_config.json").write_text("{}" + 99 * " ")
    with pytest.raises(DataError, match=r"tokenizer_config\.json is not a JSON object"):
        inspect_model_folder(tmp_path, "model")
