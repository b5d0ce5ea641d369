"""Stages that export and quantize as the house does, on a model, a tool or a machine with a fault."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file

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


def export_on_a_full_disk(run: Run) -> dict[str, Any]:
    """What is measured finds no room for its answers."""
    from job.export import export_run

    _fill_disk_of_measuring()
    return export_run(run)


def quantize_on_a_full_disk(run: Run) -> dict[str, Any]:
    """The same for each int8 file."""
    from job.export import quantize_run

    _fill_disk_of_measuring()
    return quantize_run(run)


def _fill_disk_of_measuring() -> None:
    from job.export import measure

    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (512, 512))
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # it would be cut off as well, and stay
    measure.subprocess.run = partial(subprocess.run, preexec_fn=limit)  # type: ignore[misc]


def quantize_badly(run: Run) -> dict[str, Any]:
    """Each int8 file has weights a hundred times too large."""
    return _quantize_then(run, lambda path: _scale_weights(path, 100.0, "_scale"))


def _quantize_then(run: Run, change: Callable[[Path], None]) -> dict[str, Any]:
    from optimum.onnxruntime import ORTQuantizer

    from job.export import quantize_run

    inner = ORTQuantizer.quantize

    def quantize(self: Any, config: Any, folder: Path, **options: Any) -> Any:
        result = inner(self, config, folder, **options)
        change(folder / "model_quantized.onnx")
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


def export_swapped_columns(run: Run) -> dict[str, Any]:
    """The exporter gives the labels in another order."""
    return _export_then(run, lambda path: _append(path, "Gather", [("order", np.array([1, 0]))], axis=1))


def export_noise(run: Run) -> dict[str, Any]:
    """Something in the graph is drawn by chance, as dropout that was left on."""

    def add_noise(graph: onnx.GraphProto) -> None:
        _rename_output(graph)
        graph.node.append(onnx.helper.make_node("RandomNormalLike", ["before"], ["noise"], dtype=1, scale=0.5))
        graph.node.append(onnx.helper.make_node("Add", ["before", "noise"], ["logits"]))

    return _export_then(run, lambda path: _edit(path, add_noise))


def export_without_mask(run: Run) -> dict[str, Any]:
    """The graph takes padding for text."""

    def ignore_mask(graph: onnx.GraphProto) -> None:
        for node in graph.node:
            for place, name in enumerate(node.input):
                if name == "attention_mask":
                    node.input[place] = "all_ones"
        one = numpy_helper.from_array(np.array(1, dtype=np.int64), "one")
        graph.initializer.append(one)
        graph.node.insert(0, onnx.helper.make_node("Max", ["attention_mask", "one"], ["all_ones"]))

    return _export_then(run, lambda path: _edit(path, ignore_mask))


def export_new_head(run: Run) -> dict[str, Any]:
    """The classifier's weights were lost on the way, and new ones drawn."""

    def draw(graph: onnx.GraphProto) -> None:
        for weight in graph.initializer:
            if "classifier" in weight.name and "weight" in weight.name:
                shape = tuple(weight.dims)
                drawn = np.random.default_rng(0).normal(size=shape).astype(np.float32)
                weight.CopyFrom(numpy_helper.from_array(drawn, weight.name))

    return _export_then(run, lambda path: _edit(path, draw))


def export_overflow(run: Run) -> dict[str, Any]:
    """Activations leave the range of their type, as they do in fp16."""
    return _export_then(run, lambda path: _scale_weights(path, 1e20))


def export_stale(run: Run) -> dict[str, Any]:
    """What lies there afterwards is the export of another training."""

    def leave_older(path: Path) -> None:
        weights = onnx.load(path)
        for weight in weights.graph.initializer:
            if weight.data_type == onnx.TensorProto.FLOAT and weight.dims:
                older = numpy_helper.to_array(weight)
                older = older + 0.05 * np.random.default_rng(1).normal(size=older.shape).astype(np.float32)
                weight.CopyFrom(numpy_helper.from_array(older, weight.name))
        onnx.save_model(weights, path)

    return _export_then(run, leave_older)


def export_truncated_data(run: Run) -> dict[str, Any]:
    """The weights beside the file are cut short."""

    def cut(path: Path) -> None:
        onnx.save_model(onnx.load(path), path, save_as_external_data=True, location="model.onnx_data", size_threshold=0)
        data = path.with_name("model.onnx_data")
        os.truncate(data, data.stat().st_size // 2)

    return _export_then(run, cut)


def export_other_names(run: Run) -> dict[str, Any]:
    """The output has a name that no consumer knows."""

    def rename(graph: onnx.GraphProto) -> None:
        _rename_output(graph)
        graph.output[0].name = "before"

    return _export_then(run, lambda path: _edit(path, rename))


def export_one_row(run: Run) -> dict[str, Any]:
    """The graph takes one row at a time only."""

    def fix(graph: onnx.GraphProto) -> None:
        for entry in graph.input:
            entry.type.tensor_type.shape.dim[0].dim_value = 1

    return _export_then(run, lambda path: _edit(path, fix))


def export_nothing(run: Run) -> dict[str, Any]:
    """The exporter says that all is well, and leaves an empty file."""
    return _export_then(run, lambda path: path.write_bytes(b""))


def quantize_swapped(run: Run) -> dict[str, Any]:
    """Each int8 file gives the labels in another order."""
    return _quantize_then(run, lambda path: _append(path, "Gather", [("order", np.array([1, 0]))], axis=1))


def quantize_constant(run: Run) -> dict[str, Any]:
    """Each int8 file answers the same to everything."""
    return _quantize_then(run, lambda path: _append(path, "Mul", [("nothing", np.zeros((1, 1), np.float32))]))


def quantize_nan(run: Run) -> dict[str, Any]:
    """Each int8 file answers NaN."""
    return _quantize_then(run, lambda path: _append(path, "Mul", [("nan", np.full((1, 1), np.nan, np.float32))]))


def evaluate_headless(run: Run) -> dict[str, Any]:
    """The classifier was lost between training and evaluation, as in a merge of adapters."""
    from job.evaluate import evaluate_run

    path = run.final_model / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if "classifier" not in name}
    save_file(kept, path)
    return evaluate_run(run)


def report_other_words(run: Run) -> dict[str, Any]:
    """The tokenizer of the bundle has another vocabulary."""

    def shift(content: dict[str, Any]) -> None:
        vocabulary = content["model"]["vocab"]
        words = sorted(vocabulary, key=vocabulary.get)
        plain = [word for word in words if not word.startswith("[")]
        for word, other in zip(plain, plain[1:] + plain[:1], strict=True):
            vocabulary[word] = words.index(other)

    return _report_then(run, "tokenizer.json", shift)


def report_case(run: Run) -> dict[str, Any]:
    """tokenizer.json keeps capitals; transformers mends that by tokenizer_config.json, others do not."""
    return _report_then(run, "tokenizer.json", lambda content: content["normalizer"].update(lowercase=False))


def report_short(run: Run) -> dict[str, Any]:
    """The tokenizer of the bundle cuts texts after eight tokens."""
    return _report_then(run, "tokenizer_config.json", lambda content: content.update(model_max_length=8))


def report_labels(run: Run) -> dict[str, Any]:
    """The bundle names the labels in another order."""

    def swap(content: dict[str, Any]) -> None:
        content["id2label"] = {"0": content["id2label"]["1"], "1": content["id2label"]["0"]}

    return _report_then(run, "config.json", swap)


def report_base_weights(run: Run) -> dict[str, Any]:
    """The bundle has the weights of the model that the training began with."""
    from job.report import write_report

    record = write_report(run)
    shutil.copyfile(run.base_model / "model.safetensors", run.bundle / "model.safetensors")
    return record


def report_older_int8(run: Run) -> dict[str, Any]:
    """The bundle has an int8 file that no gate has seen."""
    from job.report import write_report

    record = write_report(run)
    _scale_weights(run.bundle / "onnx" / "model_quantized.onnx", 1.01, "_scale")
    return record


def report_without_tokenizer(run: Run) -> dict[str, Any]:
    """The bundle lacks a file."""
    from job.report import write_report

    record = write_report(run)
    (run.bundle / "tokenizer.json").unlink()
    return record


def rehearse_then_change(run: Run) -> dict[str, Any]:
    """Somebody writes into the bundle after it was proven."""
    from job.export import rehearse_bundle

    record = rehearse_bundle(run)
    _scale_weights(run.bundle / "onnx" / "model.onnx", 1.01)
    return record


def rehearse_then_link(run: Run) -> dict[str, Any]:
    """Somebody puts a link to another file into the bundle after it was proven."""
    from job.export import rehearse_bundle

    record = rehearse_bundle(run)
    (run.bundle / "README.md").unlink()
    (run.bundle / "README.md").symlink_to("/etc/hostname")
    return record


def _report_then(run: Run, name: str, change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    from job.report import write_report

    record = write_report(run)
    content = json.loads((run.bundle / name).read_text())
    change(content)
    (run.bundle / name).write_text(json.dumps(content))
    return record


def _edit(path: Path, change: Callable[[onnx.GraphProto], None]) -> None:
    model = onnx.load(path)
    change(model.graph)
    onnx.save_model(model, path)


def _rename_output(graph: onnx.GraphProto) -> None:
    """Let what gave `logits` give `before`."""
    for node in graph.node:
        for place, name in enumerate(node.output):
            if name == "logits":
                node.output[place] = "before"


def _append(path: Path, operator: str, constants: list[tuple[str, np.ndarray]], **attributes: Any) -> None:
    """Put one more node behind what gave `logits`."""

    def append(graph: onnx.GraphProto) -> None:
        _rename_output(graph)
        graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants)
        names = ["before", *(name for name, _ in constants)]
        graph.node.append(onnx.helper.make_node(operator, names, ["logits"], **attributes))

    _edit(path, append)
