"""Stages that export and quantize as the house does, on a model, a tool or a machine with a fault."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
from onnx import numpy_helper

from job.recipe import Run


def export_unknown_operator(run: Run) -> dict[str, Any]:
    """The model computes with an operator that ONNX does not know."""
    import torch
    from transformers.models.bert.modeling_bert import BertPooler

    from job.export import export_run

    inner = BertPooler.forward
    BertPooler.forward = lambda self, states: inner(self, states) + torch.special.bessel_j0(inner(self, states))
    return export_run(run)


def export_wrong_weights(run: Run) -> dict[str, Any]:
    """The exporter writes a weight that differs from torch's."""
    return _export_then(run, lambda path: _scale_weights(path, 1.5))


def export_external_data(run: Run) -> dict[str, Any]:
    """The exporter keeps the weights beside the file, as it must above 2 GB."""

    def move_weights(path: Path) -> None:
        onnx.save_model(onnx.load(path), path, save_as_external_data=True, location="model.onnx_data", size_threshold=0)

    return _export_then(run, move_weights)


def export_with_little_memory(run: Run) -> dict[str, Any]:
    """The process may take no more memory than it has when the export begins."""
    from optimum.exporters.onnx import main_export as _  # noqa: F401

    from job.export import export_run

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (4 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return export_run(run)


def quantize_badly(run: Run) -> dict[str, Any]:
    """Each int8 file has one weight a hundred times too large."""
    from optimum.onnxruntime import ORTQuantizer

    from job.export import quantize_run

    inner = ORTQuantizer.quantize

    def quantize(self: Any, config: Any, folder: Path, **options: Any) -> Any:
        result = inner(self, config, folder, **options)
        _scale_weights(folder / "model_quantized.onnx", 100.0, "_scale")
        return result

    ORTQuantizer.quantize = quantize
    return quantize_run(run)


def _export_then(run: Run, change: Callable[[Path], None]) -> dict[str, Any]:
    from optimum.exporters import onnx as exporters

    from job.export import export_run

    inner = exporters.main_export

    def main_export(name: str, folder: Path, **options: Any) -> None:
        inner(name, folder, **options)
        change(folder / "model.onnx")

    exporters.main_export = main_export
    return export_run(run)


def _scale_weights(path: Path, factor: float, suffix: str = "") -> None:
    """Multiply all floating-point weights whose name ends so, in place."""
    model = onnx.load(path)
    for weight in model.graph.initializer:
        if weight.data_type == onnx.TensorProto.FLOAT and weight.name.endswith(suffix):
            weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * factor, weight.name))
    onnx.save_model(model, path)
