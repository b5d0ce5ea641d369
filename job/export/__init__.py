"""Export: the trained model to ONNX and int8, each held against the original before it is released.

Enters: the final model folder and the answers of the fp32 torch model. Leaves: a bundle folder and
numbers. `supported.py` says what can be exported, `onnx.py` exports it · `quantize.py` is the int8
stage: `ladder.py` has the rungs, `quantizer.py` writes them from `matrices.py`'s constants,
`encoder_decoder.py` where there are two files, `sensitivity.py` ranks what int8 hurts most,
`rounding.py` rounds to 4 bits, `gate.py` decides · `measure.py` runs an ONNX file in a fresh process,
`decode.py` token by token, `latency.py` races them · `bundle.py` lays out what is released,
`triton.py` for Triton · `rehearse.py` opens it as consumers do
(`rehearse_answers.py`, `rehearse_writing.py`, `consumers.py`). optimum is used here only.
"""

from job.export.bundle import build_bundle, has_onnx
from job.export.onnx import export_run
from job.export.quantize import quantize_run
from job.export.rehearse import rehearse_bundle
from job.export.supported import check_exportable, is_certain, refuse_unexportable

__all__ = [
    "build_bundle", "check_exportable", "export_run", "has_onnx", "is_certain", "quantize_run", "refuse_unexportable",
    "rehearse_bundle",
]  # fmt: skip
