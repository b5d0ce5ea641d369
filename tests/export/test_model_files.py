"""A model of two ONNX files: what they are called, and that neither goes anywhere, or changes, without the other."""

from __future__ import annotations

from pathlib import Path

import pytest

from job.errors import NotFound
from job.export.bundle import has_onnx, hash_onnx
from job.export.onnx import move_model, onnx_size
from job.predict.bundle import choose_model
from job.tasks import DECODER, MODEL, list_parts, name_file

NAMES = {
    "fp32": ("encoder_model.onnx", "decoder_model_merged.onnx"),
    "portable": ("encoder_model_quantized.onnx", "decoder_model_merged_quantized.onnx"),
    "int4": ("encoder_model_q4.onnx", "decoder_model_merged_q4.onnx"),
    "avx512_vnni": ("encoder_model_int8_avx512_vnni.onnx", "decoder_model_merged_int8_avx512_vnni.onnx"),
}


@pytest.mark.parametrize("precision", NAMES)
def test_each_precision_is_called_what_optimum_and_transformers_js_look_for(precision: str) -> None:
    encoder, decoder = NAMES[precision]
    assert [part.name for part in list_parts(Path("onnx") / name_file(DECODER, precision))] == [encoder, decoder]
    single = Path("onnx") / name_file(MODEL, precision)
    assert list_parts(single) == [single]
    assert name_file(MODEL, precision) == decoder.replace("decoder_model_merged", "model")


@pytest.fixture
def decoder(tmp_path: Path) -> Path:
    """A decoder, and its encoder beside it."""
    (tmp_path / "encoder_model.onnx").write_bytes(b"encoder")
    (tmp_path / "decoder_model_merged.onnx").write_bytes(b"decoder")
    return tmp_path / "decoder_model_merged.onnx"


def test_another_encoder_or_none_is_not_the_model_that_passed(decoder: Path) -> None:
    passed, encoder = hash_onnx(decoder), decoder.with_name("encoder_model.onnx")
    assert has_onnx(decoder, passed)
    encoder.write_bytes(b"Encoder")
    assert not has_onnx(decoder, passed)
    encoder.unlink()
    assert not has_onnx(decoder, passed)


def test_a_decoder_takes_its_encoder_along_and_both_have_a_size(decoder: Path) -> None:
    assert onnx_size(decoder) == len(b"encoder" + b"decoder")
    target = decoder.with_name(name_file(DECODER, "portable"))
    move_model(decoder, target)
    assert sorted(path.name for path in decoder.parent.iterdir()) == sorted(NAMES["portable"])
    assert onnx_size(target) == 14


def test_prediction_wants_both_files_of_a_precision() -> None:
    names = {f"onnx/{name}" for precision in ("fp32", "portable") for name in NAMES[precision]}
    assert choose_model(names, "auto", "here") == "onnx/decoder_model_merged_quantized.onnx"
    assert choose_model(names, "fp32", "here") == "onnx/decoder_model_merged.onnx"
    with pytest.raises(NotFound, match="q4"):
        choose_model(names, "int4", "here")
    with pytest.raises(NotFound, match="decoder_model_merged_quantized"):
        choose_model(names - {"onnx/encoder_model_quantized.onnx"}, "int8", "here")
