"""Writes int8 files of an encoder and a decoder; the decoder's two ways become one file, as Optimum's do in fp32.

A decoder is exported twice, as it begins and as it goes on with what is cached, and each graph is quantized alone:
quantizers do not look into branches. What both have in common stands once in the file that is made of them.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from job.data import TokenTable
from job.export.ladder import Rung
from job.export.measure import open_session, read_source
from job.export.onnx import FIRST, FOLLOWING, UNMERGED
from job.export.quantizer import Quantizer
from job.recipe import Run
from job.tasks import ENCODER, IGNORED_LABEL, list_parts, name_file


class EncoderDecoderQuantizer:
    """Quantizes encoder and decoder of a run, both by the same rung."""

    def __init__(self, run: Run) -> None:
        folder = run.folder / "onnx"
        encoder = folder / name_file(ENCODER, "fp32")
        self._encoder = Quantizer(run, encoder)
        self._first = _First(run, folder / UNMERGED / FIRST, encoder)
        self._following = _Following(run, folder / UNMERGED / FOLLOWING, self._first)

    def write(self, rung: Rung, output: Path) -> Path:
        """Write the decoder of one rung to `output` and its encoder beside it; return `output`."""
        from optimum.onnx import merge_decoders

        encoder, _ = list_parts(output)
        self._encoder.write(rung, encoder)
        ways = [output.with_name(f"{name}-{output.name}") for name in ("first", "following")]
        for quantizer, way in zip((self._first, self._following), ways, strict=True):
            quantizer.write(rung, way)
        data = [way.with_name(f"{way.name}_data") for way in ways]
        if any(path.exists() for path in data):
            output.with_name(f"{output.name}_data").touch()  # where there is one, the new one is written beside, too
        merge_decoders(*ways, save_path=output, strict=False)
        for path in (*ways, *data):
            path.unlink(missing_ok=True)
        return output


class _First(Quantizer):
    """The decoder as it begins: it reads whole targets, and what the fp32 encoder says of their sources."""

    def __init__(self, run: Run, exported: Path, encoder: Path) -> None:
        super().__init__(run, exported)
        self._reader = encoder

    def measure(self, table: TokenTable) -> np.ndarray:
        return table.label_lengths

    @cached_property
    def _encoder(self) -> Any:
        return open_session(self._reader)

    def read(self, table: TokenTable, rows: np.ndarray) -> dict[str, np.ndarray]:
        batch = read_source(self._encoder, table.pad(rows, self._pad_id))
        return batch | {"attention_mask": (table.pad_labels(rows) != IGNORED_LABEL).astype(np.int64)}


class _Following(Quantizer):
    """The decoder as it goes on. Its matrices are those of the first one, by name, and so is what they lose."""

    def __init__(self, run: Run, exported: Path, first: Quantizer) -> None:
        super().__init__(run, exported)
        self._first = first

    def rank(self, bits: int) -> list[tuple[str, float]]:
        return self._first.rank(bits)

    @cached_property
    def rounded(self) -> dict[str, np.ndarray]:
        return self._first.rounded
