"""Tied matrices become constants with the same answers; a model without them stays the file it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from job.export.untie import untie_weights


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
