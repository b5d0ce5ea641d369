"""How much each matrix of a model loses by quantization, on real rows: the most sensitive are left out first.

The error is a node's own: its inputs, as the fp32 model computes them, go through a simulation of
dynamic quantization (u8 activations per tensor, s8 weights per channel), or its weights alone are rounded
in blocks, and the product is compared with the exact one. So no node is blamed for what nodes before it
have done, as it would be where whole models are compared (onnxruntime's qdq_loss_debug).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from job.data import TokenTable
from job.export.ladder import BLOCK, MATRICES
from job.export.matrices import find_matrices, is_transposed
from job.export.measure import open_session, select_inputs

ROWS, MAX_TOKENS = 32, 4096
"""Of a batch: what every matrix takes of every token is held in memory at once."""


def rank_matrices(
    model: Path, batch: dict[str, np.ndarray], estimate: Callable[[np.ndarray, np.ndarray], float]
) -> list[tuple[str, float]]:
    """Return (node name, error) of every matrix with constant weights, the largest error first.

    `estimate` is one of those below, `batch` what the model takes of a few rows (`choose_rows`) and their masks.
    """
    import onnx

    graph = onnx.load(str(model)).graph
    matrices = find_matrices(graph)
    inputs = next(compute_tensors(model, sorted({node.input[0] for node, _ in matrices}), [batch]))
    errors = []
    for node, weights in matrices:
        weight = onnx.numpy_helper.to_array(weights, base_dir=str(model.parent)).astype(np.float32)
        if is_transposed(node):
            weight = weight.T
        errors.append((node.name, estimate(inputs[node.input[0]], weight)))
    return sorted(errors, key=lambda entry: -entry[1])


def list_dynamic_products(model: Path) -> list[str]:
    """Return the matrix products of two activations (attention): int8 makes them neither smaller nor faster."""
    import onnx

    graph = onnx.load(str(model), load_external_data=False).graph
    constant = {tensor.name for tensor in graph.initializer}
    return [node.name for node in graph.node if node.op_type in MATRICES and node.input[1] not in constant]


def estimate_error(rows: np.ndarray, weight: np.ndarray) -> float:
    """Return |exact − int8| / |exact| of the product of activations float [rows, k] and weights float [k, n]."""
    exact = rows @ weight
    size = float(np.linalg.norm(exact))
    return float(np.linalg.norm(exact - _round_unsigned(rows) @ _round_signed(weight))) / max(size, 1e-12)


def estimate_block_error(rows: np.ndarray, weight: np.ndarray, bits: int) -> float:
    """Return the same where only weights are rounded: to 2^bits steps from the least to the largest of each block.

    It is the mean over rows: a few huge ones, which decoders have, would hide what becomes of the others.
    """
    exact = rows @ weight
    errors = np.linalg.norm(exact - rows @ _round_blocks(weight, bits), axis=1)
    return float(np.mean(errors / np.maximum(np.linalg.norm(exact, axis=1), 1e-12)))


def _round_blocks(weight: np.ndarray, bits: int) -> np.ndarray:
    """Round runs of BLOCK weights of a column, as MatMulNBits does with a zero point."""
    steps, padding = (1 << bits) - 1, -len(weight) % BLOCK
    blocks = np.pad(weight, ((0, padding), (0, 0))).reshape(-1, BLOCK, weight.shape[1])
    low, high = np.minimum(blocks.min(axis=1, keepdims=True), 0), np.maximum(blocks.max(axis=1, keepdims=True), 0)
    scale = np.maximum((high - low) / steps, 1e-12)
    zero = np.round(-low / scale)
    rounded = (np.clip(np.round(blocks / scale) + zero, 0, steps) - zero) * scale
    return np.asarray(rounded.reshape(-1, weight.shape[1])[: len(weight)])


def _round_unsigned(values: np.ndarray) -> np.ndarray:
    """Round to 256 steps between the smallest and the largest value, zero among them."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    scale = (high - low) / 255 or 1.0
    zero = round(-low / scale)
    return np.asarray((np.clip(np.round(values / scale) + zero, 0, 255) - zero) * scale)


def _round_signed(weight: np.ndarray) -> np.ndarray:
    """Round each column to 255 steps around zero."""
    scale = np.maximum(np.abs(weight).max(axis=0, keepdims=True) / 127, 1e-12)
    return np.asarray(np.clip(np.round(weight / scale), -127, 127) * scale)


def compute_tensors(
    model: Path, names: list[str], batches: Iterable[dict[str, np.ndarray]]
) -> Iterator[dict[str, np.ndarray]]:
    """Yield, batch by batch, what the fp32 model computes for the tensors `names`, as float32 [tokens, k]."""
    import onnx

    watched = onnx.load(str(model), load_external_data=False)
    given = {entry.name for entry in watched.graph.input}  # a decoder's matrices take what its encoder has read
    computed = [name for name in names if name not in given] or [watched.graph.output[0].name]
    del watched.graph.output[:]  # what nobody asks for is not computed
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in computed)
    path = model.with_name(f"{model.stem}-watched.onnx")  # beside its external data
    onnx.save_model(watched, str(path))
    try:
        session = open_session(path)
    finally:
        path.unlink()
    for batch in batches:
        inputs = select_inputs(session, batch)
        values = inputs | dict(zip(computed, session.run(computed, inputs), strict=True))
        masks = [mask.astype(bool) for name, mask in batch.items() if name.endswith("attention_mask")]
        yield {name: _pick_tokens(values.pop(name), masks) for name in names}


def choose_rows(table: TokenTable) -> np.ndarray:
    """Return the first rows that fit."""
    count = min(ROWS, len(table))
    while count > 1 and count * int(table.lengths[:count].max()) > MAX_TOKENS:
        count -= 1
    return np.arange(count)


def _pick_tokens(value: np.ndarray, masks: list[np.ndarray]) -> np.ndarray:
    """Return rows of real tokens, of whichever text they are; a tensor that has no token axis as it is."""
    mask = next((mask for mask in masks if value.ndim > 2 and value.shape[:2] == mask.shape), None)
    return np.asarray(value.reshape(-1, value.shape[-1]) if mask is None else value[mask], dtype=np.float32)
