"""The ladder of int8: the ways to quantize that a target tries in order, gentlest loss of speed and size first.

Full range → reduced range (7-bit weights, which cannot overflow the 16-bit sums of processors without
VNNI, onnxruntime #5849) → per tensor instead of per channel → embeddings left alone → the most
sensitive matrices left alone, few at a time → static with ranges calibrated on train rows. The first
rung that passes is taken; where none does, the target is refused. Decoders begin with weights only: their
activations have outliers that int8 loses, and writing a token at a time they wait for weights, not for sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["dynamic", "static", "weights"]
MATRICES = ("MatMul", "Gemm")
"""Operators whose constant weights are quantized (weight-only: MatMul alone)."""
EMBEDDINGS = ("Gather",)
BLOCK = 32
"""Weights that share a scale, where weights alone are quantized."""


@dataclass(frozen=True)
class Rung:
    """One way to quantize: what with `kind` says, `embeddings` too or not, `left_out` the most sensitive matrices.

    dynamic: int8 weights, activations by the range of each batch · static: by ranges that were calibrated · weights:
    of `bits` in blocks, activations stay floating-point. `left_out` is the share of matrices that stay floating-point,
    or 8 bits wide where the others have 4.
    """

    kind: Kind = "dynamic"
    unsigned_weights: bool = False
    per_channel: bool = True
    reduce_range: bool = False
    embeddings: bool = True
    left_out: float = 0.0
    bits: int = 8

    @property
    def name(self) -> str:
        """Say it as reports do: `dynamic u8s8 per channel, reduced range`."""
        if self.kind == "weights":
            words = [f"weights only, {self.bits} bits in blocks of {BLOCK}{' (GPTQ)' if self.bits == 4 else ''}"]
            words += [f"embeddings {self.bits} bits"] if self.embeddings else []
            words += [f"the {self.left_out:.0%} most sensitive matrices 8 bits"] if self.left_out else []
            return ", ".join(words)
        scales = "per channel" if self.per_channel else "per tensor"
        words = [f"{self.kind} {'u8u8' if self.unsigned_weights else 'u8s8'} {scales}"]
        words += ["reduced range"] if self.reduce_range else []
        words += [] if self.embeddings else ["embeddings left alone"]
        words += [f"the {self.left_out:.0%} most sensitive matrices left alone"] if self.left_out else []
        return ", ".join(words)


_FULL, _REDUCED = Rung(), Rung(reduce_range=True)
_WIDE = Rung(unsigned_weights=True, per_channel=False)
"""Unsigned weights are widened to 16 bits before they are multiplied: slow, but nothing overflows anywhere."""
_LEFT_OUT, _WIDER = (0.1, 0.2, 0.4), (0.2, 0.4, 0.6, 0.8)
_WEIGHTS = Rung(kind="weights", embeddings=False)
_NARROW = replace(_WEIGHTS, bits=4)


def list_rungs(target: str, mode: str, decoder: bool = False, encoder: bool = False) -> Iterator[Rung]:
    """Yield the rungs of a target (`Recipe.export.int8.targets`) in order; `mode` pins a kind instead of `auto`.

    portable and avx2 begin with what overflows on no processor; int4 knows weights alone. A decoder with an `encoder`
    has its embeddings twice: they are quantized as long as that loses little.
    """
    if target == "int4":
        yield from (replace(_NARROW, embeddings=True), _NARROW)
        yield from (replace(_NARROW, left_out=share) for share in _WIDER)
        return
    if mode == "weights" or (decoder and mode == "auto"):
        yield from (replace(_WEIGHTS, embeddings=True), _WEIGHTS) if encoder else (_WEIGHTS,)
    if mode == "weights":
        return
    safe = target in ("portable", "avx2")
    if mode in ("auto", "dynamic"):
        yield from (_REDUCED, replace(_REDUCED, per_channel=False), _WIDE) if safe else (
            _FULL, _REDUCED, replace(_FULL, per_channel=False)
        )  # fmt: skip
        gentle = replace(_REDUCED if safe else _FULL, embeddings=False)
        yield gentle
        yield from (replace(gentle, left_out=share) for share in _LEFT_OUT)
    if mode in ("auto", "static"):
        yield Rung(kind="static", reduce_range=safe, embeddings=False)
