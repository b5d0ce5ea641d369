"""Weights of 4 bits: the points chosen for them lose less than the nearest ones, and are what the kernel reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

from job.export import rounding
from job.export.rounding import choose_points, lay_grid, pack, replace_points, round_model

Rows = dict[str, np.ndarray]


def quantize_to_nearest(model: Any) -> Any:
    config = DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=False, bits=4)
    quantizer = MatMulNBitsQuantizer(model, algo_config=config)
    quantizer.process()
    return quantizer.model.model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two matrices, one after the other."""
    rng = np.random.default_rng(1)
    weights = {"w": rng.normal(size=(48, 80)), "v": rng.normal(size=(80, 6))}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "first"),
        helper.make_node("MatMul", ["h", "v"], ["y"], "second"),
    ]
    graph = helper.make_graph(
        nodes, "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", "tokens", 48])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", "tokens", 6])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
    )  # fmt: skip
    path = tmp_path / "model.onnx"
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def draw_rows(seed: int) -> Rows:
    """Inputs that move together, as those of real models do: 48 of them made from 8; half of the tokens are padding."""
    rng = np.random.default_rng(seed)
    few = np.random.default_rng(9).normal(size=(8, 48))
    rows = rng.normal(size=(4, 60, 8)) @ few + 0.05 * rng.normal(size=(4, 60, 48))
    mask = np.repeat([[1] * 30 + [0] * 30], 4, axis=0)
    return {"x": np.where(mask[..., None] == 1, rows, 1e3).astype(np.float32), "attention_mask": mask}


def answer(model: Any, rows: Rows) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": rows["x"][:, :30]})[0])


def give_points(model: Any, packed: dict[str, np.ndarray]) -> Any:
    replace_points(model.graph, packed)
    return model


def test_rows_that_were_not_seen_are_answered_with_a_third_of_the_error(model: Path) -> None:
    exact, unseen = onnx.load(str(model)), draw_rows(99)
    packed = round_model(exact.graph, model, lambda: (draw_rows(seed) for seed in range(4)))
    nearest, chosen = (
        quantize_to_nearest(onnx.load(str(model))),
        give_points(quantize_to_nearest(onnx.load(str(model))), packed),
    )

    def err(other: Any) -> float:
        return float(np.linalg.norm(answer(other, unseen) - answer(exact, unseen)))

    assert err(chosen) < err(nearest) / 3


def test_a_graph_that_calls_its_weights_otherwise_gets_the_points_of_its_nodes(model: Path, tmp_path: Path) -> None:
    packed = round_model(onnx.load(str(model)).graph, model, lambda: [draw_rows(1)])
    other = onnx.load(str(model))
    swap = {"w": "v", "v": "w"}
    for tensor in other.graph.initializer:
        tensor.name = swap[tensor.name]
    for node in other.graph.node:
        node.input[1] = swap[node.input[1]]
    onnx.save_model(other, str(tmp_path / "other.onnx"))
    alike, unlike = (
        give_points(quantize_to_nearest(onnx.load(str(path))), packed) for path in (model, tmp_path / "other.onnx")
    )
    np.testing.assert_array_equal(answer(unlike, draw_rows(2)), answer(alike, draw_rows(2)))


def test_padding_decides_nothing(model: Path) -> None:
    rows = draw_rows(1)
    whole = round_model(onnx.load(str(model)).graph, model, lambda: [rows])
    cut = round_model(onnx.load(str(model)).graph, model, lambda: [{name: each[:, :30] for name, each in rows.items()}])
    assert all(np.array_equal(whole[name], cut[name]) for name in ("first", "second"))


def test_where_memory_holds_one_product_the_points_are_the_same(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def batches() -> list[Rows]:
        calls.append(1)
        return [draw_rows(1)]

    graph = onnx.load(str(model)).graph
    together = round_model(graph, model, batches)
    monkeypatch.setattr(rounding, "_HELD_BYTES", 1)
    apart = round_model(graph, model, batches)
    assert len(calls) == 3
    assert all(np.array_equal(together[name], apart[name]) for name in ("first", "second"))


def test_a_gemm_that_onnxruntime_leaves_alone_is_left_alone(model: Path) -> None:
    whole = onnx.load(str(model))
    turned = np.random.default_rng(2).normal(size=(3, 6)).astype(np.float32)
    whole.graph.initializer.append(numpy_helper.from_array(turned, "u"))
    whole.graph.node.append(helper.make_node("Reshape", ["y", "flat"], ["r"], "flatten"))
    whole.graph.initializer.append(numpy_helper.from_array(np.array([-1, 6]), "flat"))
    whole.graph.node.append(helper.make_node("Gemm", ["r", "u"], ["z"], "scaled", alpha=0.5, transB=1))
    onnx.save_model(whole, str(model))
    assert set(round_model(whole.graph, model, lambda: [draw_rows(1)])) == {"first", "second"}


@given(st.integers(1, 100), st.integers(1, 9), st.integers(0, 1000))
def test_inputs_that_have_nothing_in_common_leave_each_weight_to_its_nearest_step(k: int, n: int, seed: int) -> None:
    weight = np.random.default_rng(seed).normal(size=(k, n)).astype(np.float32)
    points = choose_points(weight, lay_grid(weight), np.arange(k), np.eye(k, dtype=np.float32))
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "only")], "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", n])],
        [numpy_helper.from_array(weight, "w")],
    )  # fmt: skip
    nearest = quantize_to_nearest(helper.make_model(graph))
    (theirs,) = (each for each in nearest.graph.initializer if each.name == "w_Q4")
    grid = lay_grid(weight)
    unpacked = numpy_helper.to_array(theirs).reshape(n, -1)
    near = np.stack([unpacked & 15, unpacked >> 4], axis=-1).reshape(n, -1)[:, :k].T
    # ties may go either way; elsewhere both are the same
    exact = weight / grid.scale + grid.zero
    tied = np.abs(exact - np.floor(exact) - 0.5) < 1e-4
    assert np.array_equal(points[~tied], near[~tied])
    assert pack(points).shape == numpy_helper.to_array(theirs).shape


@pytest.mark.parametrize("damage", [lambda rows: rows * 0, lambda rows: rows[:, :1] * np.ones((1, 48), np.float32)])
def test_inputs_that_are_zero_or_all_alike_are_no_error(
    model: Path, damage: Callable[[np.ndarray], np.ndarray]
) -> None:
    rows = draw_rows(1)
    flat = rows | {"x": damage(rows["x"].reshape(-1, 48)).reshape(4, 60, 48).astype(np.float32)}
    packed = round_model(onnx.load(str(model)).graph, model, lambda: [flat])
    assert np.isfinite(answer(give_points(quantize_to_nearest(onnx.load(str(model))), packed), rows)).all()
