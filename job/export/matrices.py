"""Matrices as quantizers look for them: constants that a MatMul takes.

A model with tied embeddings (most decoders, masked language models) is exported with one table for both, and a
Transpose before the last product: the largest matrix of the model would be left out. That is right where weights alone
are quantized, for it costs nothing beside the table. Others (GPT-2) have Gemm where MatMulNBits wants MatMul. And
embeddings, which are tables that a Gather takes rows of; and what a quantizer leaves that a file is slower with.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from job.export.ladder import BLOCK, MATRICES
from job.export.onnx import onnx_size

_ONE_FILE_BYTES = 2 << 30
_SMALL_TABLE = 1 << 16
"""Numbers in a table that is not worth to be made smaller: positions by their distance, kinds of segments."""


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
        if is_transposed(node):
            turned = onnx.numpy_helper.to_array(weights[second]).T.copy()
            second = f"{node.name}_weight"
            graph.initializer.append(onnx.numpy_helper.from_array(turned, second))
        product = f"{node.output[0]}_product" if biased else node.output[0]
        nodes.append(onnx.helper.make_node("MatMul", [node.input[0], second], [product], node.name))
        if biased:
            nodes.append(onnx.helper.make_node("Add", [product, node.input[2]], [node.output[0]], f"{node.name}_bias"))
    del graph.node[:]
    graph.node.extend(nodes)


def shrink_embeddings(graph: Any) -> None:
    """Replace every table that rows are gathered from by one of int8, and a scale for each row, in place."""
    import onnx

    weights = {tensor.name: tensor for tensor in graph.initializer}
    nodes, shrunk = [], set()
    for node in graph.node:
        table = weights.get(node.input[0]) if node.op_type == "Gather" else None
        if table is None or not _is_embedding(node, table):
            nodes.append(node)
            continue
        small, scales, row = f"{table.name}_int8", f"{table.name}_scales", node.output[0]
        if table.name not in shrunk:
            for name, array in zip((small, scales), _round_rows(onnx.numpy_helper.to_array(table)), strict=True):
                graph.initializer.append(onnx.numpy_helper.from_array(array, name))
        shrunk.add(table.name)
        make = onnx.helper.make_node
        nodes += [
            make("Gather", [small, node.input[1]], [f"{row}_int8"], f"{node.name}_int8"),
            make("Gather", [scales, node.input[1]], [f"{row}_scale"], f"{node.name}_scale"),
            make("Cast", [f"{row}_int8"], [f"{row}_float"], f"{node.name}_float", to=onnx.TensorProto.FLOAT),
            make("Mul", [f"{row}_float", f"{row}_scale"], [row], node.name),
        ]
    del graph.node[:]
    graph.node.extend(nodes)
    unused = shrunk - {name for node in nodes for name in node.input}
    for place in reversed(range(len(graph.initializer))):
        if graph.initializer[place].name in unused:
            del graph.initializer[place]


def forget_shapes(model: Path) -> None:
    """Take out of a file whose layers end as BERT's the shapes of inner tensors that onnxruntime's quantizer infers.

    With them, or where a session fixes the sizes of its inputs, onnxruntime fuses Add and LayerNormalization into
    SkipLayerNormalization, whose kernel takes several times as long on a processor as the two do (1.32.0; BERT shapes
    in int8: the whole model 8 to 20 % longer). Other models are fused better with them (ModernBERT: 2 %).
    """
    import onnx

    proto = onnx.load(str(model), load_external_data=False)
    if _normalizes_sums(proto.graph):
        del proto.graph.value_info[:]
        onnx.save_model(proto, str(model))


def configure_blocks(bits: int, operators: tuple[str, ...] = ("MatMul",)) -> Any:
    """Return how onnxruntime cuts weights into blocks: signed for 8 bits, with a zero point for fewer."""
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig

    # accuracy_level 4: activations are rounded to int8 inside the kernel, which is where its speed comes from
    return DefaultWeightOnlyQuantConfig(
        block_size=BLOCK, is_symmetric=bits == 8, accuracy_level=4, bits=bits, op_types_to_quantize=operators
    )


def find_matrices(graph: Any, operators: tuple[str, ...] = MATRICES) -> list[tuple[Any, Any]]:
    """Return (node, weights) of every product with a constant matrix."""
    weights = {tensor.name: tensor for tensor in graph.initializer}
    return [
        (node, weights[node.input[1]]) for node in graph.node if node.op_type in operators and node.input[1] in weights
    ]


def is_transposed(node: Any) -> bool:
    """Tell whether a Gemm takes its matrix transposed."""
    return any(attribute.name == "transB" and attribute.i for attribute in node.attribute)


def _normalizes_sums(graph: Any) -> bool:
    """Tell whether layers end in a LayerNormalization of a sum that nothing else takes.

    Where the norm comes first, what is added goes on to the next layer as well; only the last sum does not.
    """
    taken = Counter(name for node in graph.node for name in node.input)
    sums = {node.output[0] for node in graph.node if node.op_type == "Add"}
    normed = [node.input[0] for node in graph.node if node.op_type == "LayerNormalization"]
    return sum(name in sums and taken[name] == 1 for name in normed) > 1


def _is_embedding(node: Any, table: Any) -> bool:
    """Tell whether a Gather takes rows of a table that is large enough."""
    rows_of = all(attribute.i == 0 for attribute in node.attribute if attribute.name == "axis")
    return rows_of and len(table.dims) == 2 and table.data_type == 1 and math.prod(table.dims) > _SMALL_TABLE


def _round_rows(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return int8 [rows, k] and float32 [rows, 1], whose product is nearly the table."""
    scales = np.maximum(np.abs(table).max(axis=1, keepdims=True) / 127, 1e-12).astype(np.float32)
    return np.clip(np.round(table / scales), -127, 127).astype(np.int8), scales


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
