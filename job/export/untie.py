"""Matrices that are another weight, transposed: made weights of their own, so that they can be quantized.

A model with tied embeddings (most decoders, masked language models) is exported with one table for both, and a
Transpose before the last product. Quantizers look for constants; the largest matrix of the model would be left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from job.export.ladder import MATRICES

_ONE_FILE_BYTES = 2 << 30


def untie_weights(model: Path, target: Path) -> Path:
    """Return `model` where nothing in it is tied, else `target`, written with the same answers and no tied matrix."""
    import onnx

    tied = _find_tied(onnx.load(str(model), load_external_data=False).graph)
    if not tied:
        return model
    whole = onnx.load(str(model))
    weights = {tensor.name: tensor for tensor in whole.graph.initializer}
    for node in [node for node in whole.graph.node if node.output[0] in tied]:
        turned = onnx.numpy_helper.to_array(weights[node.input[0]]).T.copy()
        whole.graph.initializer.append(onnx.numpy_helper.from_array(turned, node.output[0]))
        whole.graph.node.remove(node)
    target.parent.mkdir(parents=True, exist_ok=True)
    large = whole.ByteSize() > _ONE_FILE_BYTES
    onnx.save_model(whole, str(target), save_as_external_data=large, location=f"{target.name}_data")
    return target


def _find_tied(graph: Any) -> set[str]:
    """Return the names of transposed weights that a matrix product takes second."""
    weights = {tensor.name for tensor in graph.initializer}
    taken = {node.input[1] for node in graph.node if node.op_type in MATRICES}
    return {
        node.output[0]
        for node in graph.node
        if node.op_type == "Transpose" and node.input[0] in weights and node.output[0] in taken and _swaps(node)
    }


def _swaps(node: Any) -> bool:
    """Tell whether a Transpose turns a table of two dimensions, which is what it does unless it says otherwise."""
    return all(list(attribute.ints) == [1, 0] for attribute in node.attribute if attribute.name == "perm")
