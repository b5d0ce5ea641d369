"""The ladder's order, and which matrices it leaves out first."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from job.data import TokenTable
from job.export.ladder import Rung, list_rungs
from job.export.sensitivity import (
    _round_blocks,
    choose_rows,
    estimate_block_error,
    estimate_error,
    list_dynamic_products,
    rank_matrices,
)

TARGETS = ("portable", "avx512_vnni", "avx2", "arm64")


@pytest.mark.parametrize("target", ["portable", "avx2"])
def test_where_16_bit_sums_may_overflow_no_rung_of_8_bit_signed_weights_is_tried(target: str) -> None:
    for rung in list_rungs(target, "auto"):
        assert rung.reduce_range or rung.unsigned_weights, rung.name


@pytest.mark.parametrize("target", TARGETS)
def test_the_ladder_goes_from_all_int8_to_fewer_matrices_to_static(target: str) -> None:
    rungs = list(list_rungs(target, "auto"))
    assert rungs[0].embeddings and not rungs[0].left_out
    shares = [rung.left_out for rung in rungs if rung.kind == "dynamic"]
    assert shares == sorted(shares)
    assert shares[-1] > 0
    assert [rung.kind for rung in rungs].index("static") == len(rungs) - 1
    assert len({rung.name for rung in rungs}) == len(rungs)


@pytest.mark.parametrize("mode", ["dynamic", "static", "weights"])
@pytest.mark.parametrize("target", TARGETS)
def test_a_pinned_kind_is_the_only_one(target: str, mode: str) -> None:
    assert {rung.kind for rung in list_rungs(target, mode)} == {mode}


@pytest.mark.parametrize("target", TARGETS)
def test_a_decoder_begins_with_weights_alone_and_has_the_whole_ladder_behind(target: str) -> None:
    first, *others = list_rungs(target, "auto", decoder=True)
    assert first.kind == "weights" and first.bits == 8
    assert others == list(list_rungs(target, "auto"))


@pytest.mark.parametrize("mode", ["auto", "dynamic", "static", "weights"])
def test_int4_is_weights_alone_with_more_and_more_matrices_wider(mode: str) -> None:
    rungs = list(list_rungs("int4", mode))
    assert {(rung.kind, rung.bits) for rung in rungs} == {("weights", 4)}
    assert [rung.left_out for rung in rungs] == sorted(rung.left_out for rung in rungs)
    assert rungs[0].embeddings and rungs[-1].left_out > 0
    assert len({rung.name for rung in rungs}) == len(rungs)


@given(st.integers(1, 100), st.integers(1, 8), st.sampled_from([2, 4, 8]))
def test_rounding_in_blocks_errs_by_a_step_at_most(rows: int, columns: int, bits: int) -> None:
    weight = np.random.default_rng(rows).normal(size=(rows, columns)).astype(np.float32)
    step = (max(weight.max(), 0) - min(weight.min(), 0)) / ((1 << bits) - 1)
    assert np.abs(_round_blocks(weight, bits) - weight).max() <= step * 1.001


def test_fewer_bits_err_more() -> None:
    rng = np.random.default_rng(0)
    rows, weight = rng.normal(size=(64, 96)).astype(np.float32), rng.normal(size=(96, 16)).astype(np.float32)
    two, four, eight = (estimate_block_error(rows, weight, bits) for bits in (2, 4, 8))
    assert 0.5 > two > 4 * four > 40 * eight > 0


def test_rungs_say_what_they_are() -> None:
    assert Rung().name == "dynamic u8s8 per channel"
    assert "the 20% most sensitive matrices left alone" in Rung(left_out=0.2).name


def test_an_outlier_among_activations_makes_a_matrix_sensitive() -> None:
    rng = np.random.default_rng(0)
    rows, weight = rng.normal(size=(64, 32)).astype(np.float32), rng.normal(size=(32, 16)).astype(np.float32)
    calm = estimate_error(rows, weight)
    assert 0.001 < calm < 0.02
    rows[0, 0] = 1000
    assert estimate_error(rows[1:], weight) == pytest.approx(calm, rel=0.2)
    others = rows[1:].copy()
    others[0, 0] = 1000
    mixed = estimate_error(others, np.where(np.arange(32)[:, None] == 0, 0, weight).astype(np.float32))
    assert mixed > 20 * calm
    assert estimate_error(np.zeros((4, 32), np.float32), weight) == 0.0


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two matrices, the second of which takes outliers, and a product of two activations."""
    rng = np.random.default_rng(0)
    spread = np.ones((8, 8), dtype=np.float32)
    spread[:, 0] = 1000
    initializers = [
        numpy_helper.from_array(rng.normal(size=(100, 8)).astype(np.float32), "table"),
        numpy_helper.from_array(rng.normal(size=(8, 8)).astype(np.float32), "calm_weight"),
        numpy_helper.from_array(rng.normal(size=(8, 8)).astype(np.float32) * spread, "wild_weight"),
        numpy_helper.from_array(rng.normal(size=(8, 8)).astype(np.float32) / spread.T, "outlier_weight"),
    ]
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["embedded"], "embed"),
        helper.make_node("MatMul", ["embedded", "calm_weight"], ["calm"], "calm"),
        helper.make_node("MatMul", ["calm", "wild_weight"], ["wild"], "wild"),
        helper.make_node("MatMul", ["wild", "outlier_weight"], ["outlier"], "outlier"),
        helper.make_node("Transpose", ["outlier"], ["turned"], "turn", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["outlier", "turned"], ["product"], "product"),
        helper.make_node("ReduceSum", ["product"], ["logits"], "sum", keepdims=0),
    ]
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [])
    graph = helper.make_graph(nodes, "test", [ids], [logits], initializers)
    path = tmp_path / "model.onnx"
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def test_matrices_are_ranked_by_their_own_error_and_products_of_activations_are_left_alone(model: Path) -> None:
    count = 40
    tokens = np.arange(count * 5, dtype=np.uint16) % 100
    offsets = np.arange(0, count * 5 + 1, 5, dtype=np.int64)
    rows = np.zeros(count, dtype=np.int64)
    table = TokenTable(tokens, None, offsets, rows, rows)
    ranking = rank_matrices(model, table.pad(choose_rows(table), 0), estimate_error)
    assert ranking[0][0] == "outlier", ranking
    assert {name for name, _ in ranking} == {"calm", "wild", "outlier"}
    assert all(math.isfinite(error) and error > 0 for _, error in ranking)
    assert list_dynamic_products(model) == ["product"]
    assert [path.name for path in model.parent.iterdir()] == ["model.onnx"], "nothing is left behind"
