"""The names of a bundle's ONNX files: what consumers look for (Optimum, transformers.js), by what a file is made of.

A model of two files, encoder and decoder, is named by its decoder; the encoder lies beside it under the like name.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import TypeVar

MODEL, ENCODER, DECODER = "model", "encoder_model", "decoder_model_merged"

_ENDINGS = {"fp32": "", "portable": "_quantized", "int4": "_q4"}

AnyPath = TypeVar("AnyPath", bound=PurePath)


def name_file(stem: str, precision: str) -> str:
    """Return the file name of `stem` (MODEL, ENCODER or DECODER) in fp32 or as made for an int8 target."""
    return f"{stem}{_ENDINGS.get(precision, f'_int8_{precision}')}.onnx"


def list_parts(model: AnyPath) -> list[AnyPath]:
    """Return the ONNX files of the model that `model` names, in the order in which they compute."""
    if not model.name.startswith(DECODER):
        return [model]
    return [model.with_name(model.name.replace(DECODER, ENCODER, 1)), model]
