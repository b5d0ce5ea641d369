"""Matrices become constants of a MatMul with the same answers; a model where they are stays the file it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from job.export.matrices import forget_shapes, shrink_embeddings, split_gemms, untie_weights


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    """A table that embeds ids and, transposed, answers with their logits."""
    table = numpy_helper.from_array(np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32), "table")
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["embedded"], "embed"),
        helper.make_node("Transpose", ["table"], ["turned"], "turn", perm=[1, 0]),
        helper.make_node("MatMul", ["embedded", "turned"], ["logits"], "head"),
    ]
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["rows"])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["rows", 20])
    graph = helper.make_graph(nodes, "test", [ids], [logits], [table])
    path = tmp_path / "model.onnx"
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def answer(path: Path) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"input_ids": np.arange(20)})[0])


def test_a_tied_matrix_becomes_a_constant_that_answers_the_same(tied: Path, tmp_path: Path) -> None:
    untied = untie_weights(tied, tmp_path / "rungs" / "untied.onnx")
    assert untied != tied
    graph = onnx.load(str(untied)).graph
    assert [node.op_type for node in graph.node] == ["Gather", "MatMul"]
    assert {tensor.name for tensor in graph.initializer} == {"table", "turned"}
    np.testing.assert_array_equal(answer(untied), answer(tied))


def test_where_nothing_is_tied_nothing_is_written(tied: Path, tmp_path: Path) -> None:
    untied = untie_weights(tied, tmp_path / "untied.onnx")
    assert untie_weights(untied, tmp_path / "again.onnx") == untied
    assert not (tmp_path / "again.onnx").exists()


@pytest.mark.parametrize(("turned", "biased"), [(False, True), (True, True), (True, False), (False, False)])
def test_a_gemm_becomes_a_product_and_a_sum(turned: bool, biased: bool) -> None:
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(6, 4)).astype(np.float32), rng.normal(size=4).astype(np.float32)
    constants = [
        numpy_helper.from_array(weight.T.copy() if turned else weight, "w"),
        numpy_helper.from_array(bias, "b"),
    ]
    node = helper.make_node("Gemm", ["x", "w", "b"][: 2 + biased], ["y"], "dense", transB=int(turned))
    entry = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 6])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 4])
    model = helper.make_model(
        helper.make_graph([node], "test", [entry], [result], constants),
        opset_imports=[helper.make_opsetid("", 17)], ir_version=9,
    )  # fmt: skip
    split_gemms(model.graph)
    assert [other.op_type for other in model.graph.node] == ["MatMul", "Add"][: 1 + biased]
    rows = rng.normal(size=(3, 6)).astype(np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": rows})[0], rows @ weight + (bias if biased else 0), rtol=1e-5)


def test_a_gemm_that_scales_is_left_alone() -> None:
    node = helper.make_node("Gemm", ["x", "w"], ["y"], "dense", alpha=0.5)
    graph = helper.make_graph([node], "test", [], [], [numpy_helper.from_array(np.eye(2, dtype=np.float32), "w")])
    split_gemms(graph)
    assert [other.op_type for other in graph.node] == ["Gemm"]


@pytest.mark.parametrize("rows", [300, 20])
def test_embeddings_become_rows_of_int8_each_with_its_scale_unless_they_are_few(rows: int) -> None:
    table = np.random.default_rng(0).normal(size=(rows, 256)).astype(np.float32) * np.logspace(-3, 3, rows)[:, None]
    table = table.astype(np.float32)
    node = helper.make_node("Gather", ["table", "input_ids"], ["logits"], "embed")
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "length", 256])
    graph = helper.make_graph([node], "test", [ids], [logits], [numpy_helper.from_array(table, "table")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    before = model.ByteSize()
    shrink_embeddings(model.graph)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {"input_ids": np.arange(rows).reshape(2, -1)})[0].reshape(rows, 256)
    if rows == 20:
        assert model.ByteSize() == before
    assert model.ByteSize() < 0.3 * before or rows == 20
    worst = np.abs(found - table).max(axis=1) / np.abs(table).max(axis=1)
    assert worst.max() <= (0.51 / 127 if rows == 300 else 0.0)


def write_layers(path: Path, norm_first: bool) -> None:
    """Write two residual layers and a last norm, with the shapes of all inner tensors."""
    constants = {"weight": np.eye(8), "scale": np.ones(8), "bias": np.zeros(8)}
    tensors = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in constants.items()]
    nodes, stream = [], "x"
    for layer in "ab":
        normed, product, added = f"normed_{layer}", f"product_{layer}", f"added_{layer}"
        read = normed if norm_first else stream
        norm = helper.make_node("LayerNormalization", [stream if norm_first else added, "scale", "bias"], [normed])
        rest = [helper.make_node("MatMul", [read, "weight"], [product]),
                helper.make_node("Add", [product, stream], [added])]  # fmt: skip
        nodes += [norm, *rest] if norm_first else [*rest, norm]
        stream = added if norm_first else normed
    nodes.append(helper.make_node("LayerNormalization", [stream, "scale", "bias"], ["y"]))
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", "tokens", 8]) for name in "xy")
    graph = helper.make_graph(nodes, "test", [x], [y], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save_model(onnx.shape_inference.infer_shapes(model), path)


@pytest.mark.parametrize("norm_first", [False, True])
def test_shapes_are_forgotten_where_layers_end_in_a_norm_and_stay_where_they_begin_with_it(
    norm_first: bool, tmp_path: Path
) -> None:
    write_layers(tmp_path / "model.onnx", norm_first)
    forget_shapes(tmp_path / "model.onnx")
    graph = onnx.load(str(tmp_path / "model.onnx")).graph
    assert bool(graph.value_info) == norm_first
