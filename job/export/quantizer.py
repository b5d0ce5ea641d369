"""Writes int8 files of one fp32 ONNX model, one for each rung of the ladder; decides nothing.

Dynamic and static go through Optimum's ORTQuantizer, weight-only through onnxruntime's MatMulNBits (the
two owners of what they write). What a rung needs to know of the model (the most sensitive matrices,
calibrated ranges) is found out once.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from job.data import TokenTable
from job.export.ladder import EMBEDDINGS, MATRICES, Rung
from job.export.matrices import configure_blocks, forget_shapes, shrink_embeddings, split_gemms, untie_weights
from job.export.measure import MICRO_BATCH_ROWS, select_inputs
from job.export.onnx import move_model, onnx_size
from job.export.rounding import replace_points, round_model
from job.export.sensitivity import (
    MAX_TOKENS,
    choose_rows,
    estimate_block_error,
    estimate_error,
    list_dynamic_products,
    rank_matrices,
)
from job.recipe import Run
from job.tasks import get_task

_CALIBRATION_ROWS = 256
_ROUNDING_TOKENS = 1 << 15
"""Of train rows by which weights are rounded to 4 bits: several times as many as a matrix of most models has inputs."""
_LARGE_BYTES = 2 << 30
"""Of fp32: what is made of it on the way may pass the 2 GB that one protobuf can hold, so its data lie beside it."""


class Quantizer:
    """Quantizes one exported file of a run."""

    def __init__(self, run: Run, exported: Path) -> None:
        self._exported, self._scratch = exported, run.folder / "rungs"
        self._generates = get_task(run.recipe.kind).generates
        self._pad_id = int(run.read("data.json")["pad_id"])
        self._validation, self._train = run.tokens("validation"), run.tokens("train")
        self._rankings: dict[int, list[tuple[str, float]]] = {}

    def write(self, rung: Rung, output: Path) -> Path:
        """Write the model of one rung to `output` and return it; a file above 2 GB has its data beside it."""
        output.parent.mkdir(parents=True, exist_ok=True)
        if rung.kind == "weights":
            self._write_weights(rung, output)
        else:
            self._write_int8(rung, output)
        return output

    def list_left_out(self, rung: Rung) -> list[str]:
        """Return the matrices that a rung leaves alone: products of two activations, and the most sensitive ones."""
        ranking = self.rank(rung.bits) if rung.left_out else []
        return self._products + [name for name, _ in ranking[: round(rung.left_out * len(ranking))]]

    def rank(self, bits: int) -> list[tuple[str, float]]:
        """Return matrices with constant weights by their own error on validation rows, the largest first.

        8 bits: that of dynamic int8; fewer: that of weights in blocks.
        """
        if bits not in self._rankings:
            estimate = estimate_error if bits == 8 else partial(estimate_block_error, bits=bits)
            table = TokenTable.open(self._validation)
            batch = self.read(table, choose_rows(table))
            self._rankings[bits] = rank_matrices(self._model, batch, estimate)
        return self._rankings[bits]

    def read(self, table: TokenTable, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Return rows as a padded batch of what this file takes, and its masks."""
        return table.pad(rows, self._pad_id)

    def measure(self, table: TokenTable) -> np.ndarray:
        """Return how many tokens of each row this file reads, int64 [rows]."""
        return table.lengths

    @cached_property
    def rounded(self) -> dict[str, np.ndarray]:
        """Every constant matrix rounded to 4 bits on train rows (`round_model`), by the name of its node."""
        import onnx

        graph = onnx.load(str(self._model)).graph
        split_gemms(graph)
        rows = math.ceil(_ROUNDING_TOKENS / float(self.measure(TokenTable.open(self._train)).mean()))
        return round_model(graph, self._model, lambda: self._list_train(rows))

    @cached_property
    def _model(self) -> Path:
        return untie_weights(self._exported, self._scratch / f"{self._exported.stem}-untied.onnx")

    @cached_property
    def _products(self) -> list[str]:
        return list_dynamic_products(self._model)

    def _write_int8(self, rung: Rung, output: Path) -> None:
        from onnxruntime.quantization import QuantFormat, QuantizationMode, QuantType
        from optimum.onnxruntime import ORTQuantizer
        from optimum.onnxruntime.configuration import QuantizationConfig

        static = rung.kind == "static"
        config = QuantizationConfig(
            is_static=static,
            format=QuantFormat.QDQ if static else QuantFormat.QOperator,
            mode=QuantizationMode.QLinearOps if static else QuantizationMode.IntegerOps,
            activations_dtype=QuantType.QUInt8,
            weights_dtype=QuantType.QUInt8 if rung.unsigned_weights else QuantType.QInt8,
            per_channel=rung.per_channel,
            reduce_range=rung.reduce_range,
            operators_to_quantize=[*MATRICES, *(EMBEDDINGS if rung.embeddings else ())],
            nodes_to_exclude=self.list_left_out(rung),
        )
        scratch = output.with_name(f"{output.stem}-scratch")
        ORTQuantizer.from_pretrained(self._model.parent, file_name=self._model.name).quantize(
            config,
            scratch,
            calibration_tensors_range=self._ranges if static else None,
            use_external_data_format=onnx_size(self._model) > _LARGE_BYTES,
        )
        written = scratch / f"{self._model.stem}_quantized.onnx"
        forget_shapes(written)
        move_model(written, output)
        shutil.rmtree(scratch)

    def _write_weights(self, rung: Rung, output: Path) -> None:
        import onnx

        narrow = rung.embeddings and rung.bits == 4  # of embeddings MatMulNBits knows 4 bits alone
        operators = ("MatMul", *EMBEDDINGS) if narrow else ("MatMul",)
        wide = self.list_left_out(rung)
        # an output matrix that is the table of embeddings costs nothing beside it, and decides between the next words
        model = onnx.load(str(self._model if rung.embeddings else self._exported))
        if self._generates:  # GPT-2 is made of them; a classifier's head is small and stays as it is
            split_gemms(model.graph)
        if rung.embeddings and not narrow:
            shrink_embeddings(model.graph)
        model = _quantize_blocks(model, rung.bits, operators, wide)
        if rung.bits == 4:
            replace_points(model.model.graph, self.rounded)
        if rung.left_out:
            model = _quantize_blocks(model.model, 8, ("MatMul",), self._products)
        written = output.with_name(f"{output.stem}-scratch.onnx")
        model.save_model_to_file(str(written), onnx_size(self._model) > _LARGE_BYTES)
        move_model(written, output)

    @cached_property
    def _ranges(self) -> Any:
        """Smallest and largest value of every tensor that a matrix takes or gives, on train rows."""
        from onnxruntime.quantization import create_calibrator

        calibrator = create_calibrator(
            self._model,
            MATRICES,
            augmented_model_path=str(self._model.with_name("calibrated.onnx")),
            use_external_data_format=onnx_size(self._model) > _LARGE_BYTES,
        )
        try:
            session = calibrator.infer_session
            calibrator.collect_data(
                _Rows(select_inputs(session, batch) for batch in self._list_train(_CALIBRATION_ROWS))
            )
            return calibrator.compute_data()
        finally:
            for path in self._model.parent.glob("calibrated.onnx*"):
                path.unlink()

    def _list_train(self, rows: int) -> Iterator[dict[str, np.ndarray]]:
        """Yield batches of so many train rows of like length, from all over the split."""
        table = TokenTable.open(self._train)
        chosen = np.linspace(0, len(table) - 1, min(rows, len(table))).astype(np.int64)
        for part in table.cut(chosen, MAX_TOKENS, MICRO_BATCH_ROWS):
            yield self.read(table, part)


def _quantize_blocks(model: Any, bits: int, operators: tuple[str, ...], left_out: list[str]) -> Any:
    """Return onnxruntime's ONNXModel with weights in blocks."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.WARNING)
    config = configure_blocks(bits, operators)
    quantizer = MatMulNBitsQuantizer(model, algo_config=config, nodes_to_exclude=left_out)
    quantizer.process()
    return quantizer.model


class _Rows:
    """Batches as onnxruntime's calibrators ask for them: one after the other, then None."""

    def __init__(self, batches: Iterator[dict[str, np.ndarray]]) -> None:
        self._batches = batches

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._batches, None)
