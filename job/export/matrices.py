"""Matrices as quantizers look for them: constants that a MatMul takes.

A model with tied embeddings (most decoders, masked language models) is exported with one table for both, and a
Transpose before the last product: the largest matrix of the model would be left out. Others (GPT-2) have Gemm where
MatMulNBits wants MatMul.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from job.export.ladder import MATRICES
from job.export.onnx import onnx_size

_ONE_FILE_BYTES = 2 << 30


def untie_weights(model: Path, target: Path) -> Path:
    """Return `model` where nothing in it is tied, else `target`, written with the same answers and no tied matrix."""
    import onnx

    tied = _find_tied(onnx.load(str(model), load_external_data=False).graph)
    if not tied:
        return model
    whole = onnx.load(str(model))
    weights, turned_bytes = {tensor.name: tensor for tensor in whole.graph.initializer}, 0
    for node in [node for node in whole.graph.node if node.output[0] in tied]:
        turned = onnx.numpy_helper.to_array(weights[node.input[0]]).T.copy()
        whole.graph.initializer.append(onnx.numpy_helper.from_array(turned, node.output[0]))
        turned_bytes += turned.nbytes
        whole.graph.node.remove(node)
    target.parent.mkdir(parents=True, exist_ok=True)
    large = onnx_size(model) + turned_bytes > _ONE_FILE_BYTES
    onnx.save_model(whole, str(target), save_as_external_data=large, location=f"{target.name}_data")
    return target


def split_gemms(graph: Any) -> None:
    """Replace every plain Gemm (A·B + C, B constant) by MatMul and Add; the answers stay the same."""
    import onnx

    weights = {tensor.name: tensor for tensor in graph.initializer}
    nodes = []
    for node in graph.node:
        if node.op_type != "Gemm" or node.input[1] not in weights or not _is_plain(node):
            nodes.append(node)
            continue
        second, biased = node.input[1], len(node.input) > 2
        if any(attribute.name == "transB" and attribute.i for attribute in node.attribute):
            turned = onnx.numpy_helper.to_array(weights[second]).T.copy()
            second = f"{node.name}_weight"
            graph.initializer.append(onnx.numpy_helper.from_array(turned, second))
        product = f"{node.output[0]}_product" if biased else node.output[0]
        nodes.append(onnx.helper.make_node("MatMul", [node.input[0], second], [product], node.name))
        if biased:
            nodes.append(onnx.helper.make_node("Add", [product, node.input[2]], [node.output[0]], f"{node.name}_bias"))
    del graph.node[:]
    graph.node.extend(nodes)


def _is_plain(node: Any) -> bool:
    values = {attribute.name: attribute.f or attribute.i for attribute in node.attribute}
    return not values.get("transA") and values.get("alpha", 1.0) == values.get("beta", 1.0) == 1.0


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
