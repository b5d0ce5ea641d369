"""The folder that a Triton server takes as it is: `<name>/config.pbtxt` and `<name>/1/model.onnx`.

config.pbtxt is what https://github.com/triton-inference-server/server/blob/main/docs/user_guide/model_configuration.md
describes; inputs and outputs are read from the model.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

MAX_BATCH_SIZE = 64
_TYPES = {1: "TYPE_FP32", 6: "TYPE_INT32", 7: "TYPE_INT64", 10: "TYPE_FP16"}
"""onnx.TensorProto's numbers of the types that a text model takes and gives."""


def write_triton(model: Path, folder: Path, name: str) -> None:
    """Lay out `folder`/`name` with a copy of an ONNX file and its external data."""
    import onnx

    graph = onnx.load(str(model), load_external_data=False).graph
    place = folder / name
    (place / "1").mkdir(parents=True)
    for path in model.parent.glob(f"{model.name}*"):  # external data is found by its name, so it keeps that
        shutil.copyfile(path, place / "1" / ("model.onnx" if path == model else path.name))
    (place / "config.pbtxt").write_text(
        f'name: "{name}"\nplatform: "onnxruntime_onnx"\nmax_batch_size: {MAX_BATCH_SIZE}\n'
        f"input [{_list_tensors(graph.input)}\n]\noutput [{_list_tensors(graph.output)}\n]\n"
        # requests of one length are put together; others are answered one by one
        "dynamic_batching { }\n"
    )


def _list_tensors(entries: Iterable[object]) -> str:
    blocks = []
    for entry in entries:
        tensor = entry.type.tensor_type  # type: ignore[attr-defined]
        sizes = [dimension.dim_value or -1 for dimension in tensor.shape.dim][1:]  # Triton adds the batch itself
        dims = f"[ {', '.join(map(str, sizes))} ]"
        about = f'name: "{entry.name}" data_type: {_TYPES[tensor.elem_type]} dims: {dims}'  # type: ignore[attr-defined]
        blocks.append(f"\n  {{ {about} }}")
    return ",".join(blocks)
