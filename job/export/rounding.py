"""Rounds weights to 4 bits so that what their matrix answers changes least: GPTQ (Frantar et al., arXiv 2210.17323).

What a matrix takes moves together, so an error in one weight can be made good by those that are rounded after it: on
real rows a model loses several times less than where each weight goes to its nearest step. onnxruntime lays the grid (a
scale and a zero point for each block); here the points on it are chosen. Every matrix is given what the fp32 model
computes, so its points are found once for all rungs. onnxruntime's own GPTQ runs the whole model for every matrix.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from job.export.ladder import BLOCK
from job.export.matrices import configure_blocks, find_matrices
from job.export.sensitivity import MAX_TOKENS, compute_tensors

log = logging.getLogger("job.export")

BITS = 4
_LAST = (1 << BITS) - 1
_DAMPING = 0.01
"""Of the mean of the diagonal, added to it: inputs that hardly ever differ from zero decide nothing."""
_COLUMNS = 128
"""Weights that are rounded before all that follow them hear of it."""
_SLICE = 8192
"""Columns of a matrix that are rounded at once: each takes several times its weights."""
_HELD_BYTES = 1 << 30
"""Of inputs and their products at once; where there are more, the rows are computed again for the others."""

Batch = dict[str, np.ndarray]


class Grid(NamedTuple):
    """Steps of a matrix [k, n]: a float32 `scale` and a `zero` point of 0 … 15 for each weight, as `lay_grid` says."""

    scale: np.ndarray
    zero: np.ndarray

    def round(self, row: int, weights: np.ndarray) -> np.ndarray:
        """Return the nearest points, 0 … 15, of a row of weights."""
        return np.asarray(np.clip(np.rint(weights / self.scale[row]) + self.zero[row], 0, _LAST))


def round_model(graph: Any, model: Path, batches: Callable[[], Iterable[Batch]]) -> dict[str, np.ndarray]:
    """Return node → points packed as MatMulNBits wants them, uint8 [n, blocks, BLOCK / 2], of every constant matrix.

    `graph` has the matrices, `model` is the file that computes what they take, on `batches` of real rows.
    Nodes, not weights: a decoder's two graphs call their nodes alike, but number their weights each for itself.
    """
    import onnx

    began = time.monotonic()
    matrices = [(node, weights) for node, weights in find_matrices(graph, ("MatMul",)) if len(weights.dims) == 2]
    sizes = {node.input[0]: weights.dims[0] for node, weights in matrices}
    packed = {}
    for names in _group(sizes):
        products = sum_products(model, names, batches())
        for name in names:
            order, factors = _factor(products.pop(name))
            for node, weights in (each for each in matrices if each[0].input[0] == name):
                weight = onnx.numpy_helper.to_array(weights).astype(np.float32)
                packed[node.name] = pack(_round_columns(weight, order, factors))
    log.info("rounded %d matrices to %d bits in %.0f s", len(packed), BITS, time.monotonic() - began)
    return packed


def replace_points(graph: Any, rounded: dict[str, np.ndarray]) -> None:
    """Give the matrices that onnxruntime has quantized to 4 bits the points of `round_model`."""
    import onnx

    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        points = rounded.get(node.name.removesuffix(f"_Q{BITS}")) if node.op_type == "MatMulNBits" else None
        if points is not None:
            replaced = tensors[node.input[1]]
            if list(replaced.dims) != list(points.shape):
                raise ValueError(f"{node.name}: points for {list(points.shape)} weights, not {list(replaced.dims)}")
            replaced.CopyFrom(onnx.numpy_helper.from_array(points, replaced.name))


def sum_products(model: Path, names: list[str], batches: Iterable[Batch]) -> dict[str, np.ndarray]:
    """Return name → XᵀX, float32 [k, k], of all rows X [tokens, k] that the model computes for a tensor."""
    products: dict[str, np.ndarray] = {}
    for tensors in compute_tensors(model, names, batches):
        while tensors:  # none of them is held while the next batch is computed
            name, rows = tensors.popitem()
            products[name] = products.get(name, 0) + rows.T @ rows
    return products


def _round_columns(weight: np.ndarray, order: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Return the points uint8 [k, n] of a matrix; columns know nothing of each other, and a vocabulary has many."""
    parts = (np.ascontiguousarray(weight[:, start : start + _SLICE]) for start in range(0, weight.shape[1], _SLICE))
    return np.concatenate([choose_points(part, lay_grid(part), order, factors) for part in parts], axis=1)


def lay_grid(weight: np.ndarray) -> Grid:
    """Return the grid that onnxruntime lays over float32 [k, n]."""
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantizer

    _, scales, zeros = DefaultWeightOnlyQuantizer(configure_blocks(BITS)).qbits_block_quant(weight)
    zeros = np.stack([zeros & _LAST, zeros >> BITS], axis=-1).reshape(len(zeros), -1)[:, : scales.shape[1]]
    scale, zero = (np.repeat(each, BLOCK, axis=1)[:, : len(weight)].T.astype(np.float32) for each in (scales, zeros))
    return Grid(np.where(scale == 0, np.float32(1), scale), zero)


def choose_points(weight: np.ndarray, grid: Grid, order: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Return uint8 [k, n], 0 … 15: row by row in `order` the nearest points, with each error spread over rows to come.

    `factors` is float32 [k, k], upper triangular, as `_factor` returns it with the order.
    """
    left, grid = weight[order], Grid(grid.scale[order], grid.zero[order])
    points = np.empty(weight.shape, dtype=np.uint8)
    for start in range(0, len(left), _COLUMNS):
        stop = min(start + _COLUMNS, len(left))
        errors = np.empty((stop - start, left.shape[1]), dtype=np.float32)
        for row in range(start, stop):
            chosen = grid.round(row, left[row])
            points[row] = chosen
            errors[row - start] = left[row] - (chosen - grid.zero[row]) * grid.scale[row]
            left[row + 1 : stop] -= factors[row, row + 1 : stop, None] * errors[row - start]
        left[stop:] -= factors[start:stop, stop:].T @ errors
    placed = np.empty_like(points)
    placed[order] = points
    return placed


def pack(points: np.ndarray) -> np.ndarray:
    """Return points uint8 [k, n] as MatMulNBits has them: uint8 [n, blocks, BLOCK / 2], the first of a pair below."""
    lines = np.pad(points.T, ((0, 0), (0, -len(points) % BLOCK)))
    return (lines[:, 0::2] | lines[:, 1::2] << BITS).reshape(len(lines), -1, BLOCK // 2)


def _factor(product: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of a matrix by how much their inputs weigh, and how an error of each spreads over those after it.

    That is the inverse's Cholesky factor, transposed, each row of it over its diagonal.
    """
    weight = np.diag(product).astype(np.float64)
    order = np.argsort(-weight, kind="stable")
    damped = product[np.ix_(order, order)].astype(np.float64)
    damped[np.diag_indices(len(damped))] += _DAMPING * weight.mean() or 1.0
    factors = np.linalg.cholesky(np.linalg.inv(damped)).T
    return order, (factors / np.diag(factors)[:, None]).astype(np.float32)


def _group(sizes: dict[str, int]) -> Iterator[list[str]]:
    """Yield names in groups that fit in memory together: a batch of each, and its product [size, size], in float32."""
    group: list[str] = []
    held = 0
    for name, size in sizes.items():
        needed = 4 * size * (size + MAX_TOKENS)
        if group and held + needed > _HELD_BYTES:
            yield group
            group, held = [], 0
        group.append(name)
        held += needed
    if group:
        yield group
