"""An ONNX Runtime session on the processor."""

from __future__ import annotations

from pathlib import Path

import onnxruntime

from job.errors import NoValidCheckpoint
from job.processor import count_processors


def count_threads(asked: int) -> int:
    """Return `asked`, but for 0 and for more than that one thread for each processor that it can keep busy."""
    processors = count_processors()
    return min(asked or processors, processors)


def open_session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """Load an ONNX file; raise NoValidCheckpoint (17) for one that does not load."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no other base
        raise NoValidCheckpoint(f"{path}: does not load: {first_line(error)}; export the model again") from None


def first_line(error: Exception) -> str:
    """Return the first line of an error, or its name."""
    return str(error).partition("\n")[0] or type(error).__name__
