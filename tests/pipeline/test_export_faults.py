"""What can go wrong between the trained model and its release, in whole runs (numbers as in the failure catalogue).

Each run is trained once; the export is what fails. Nothing is released then, the training is kept, and the next
attempt goes on from it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import pytest
from conftest import ACCIDENTAL_JOB, Answer, assert_refused, call_job, write_recipe

from job.store import open_store


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, reviews: Path) -> Path:
    """A folder with recipe, store and work folder of a run that was killed after its training."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = write_recipe(
        folder / "recipe.yaml",
        name="tiny",
        task="text-classification",
        model={"id": str(tiny_model)},
        data={"source": str(reviews), "max_length": 64},
        training={"max_steps": 150, "global_batch_size": 16, "learning_rate": 2e-3},
        baselines=[],
        export={"int8": {"targets": ["portable"], "max_metric_drop": 0.1, "min_agreement": 0.9}, "latency": False},
        store={"uri": "store"},
    )
    words = ("run", str(recipe), "--run-id", "faulty", "--set", f"store.uri={folder / 'store'}")
    killed = call_job(*words, "--work-dir", str(folder / "work"), env={"JOB_FAILPOINT": "stage-recorded=kill@2"})
    assert killed.code == -9, killed.stderr
    return folder


@pytest.fixture
def place(trained: Path, tmp_path: Path) -> Path:
    """The trained run once more, for one test."""
    return shutil.copytree(trained, tmp_path / "run")


def run(place: Path, stand_in: str = "", *options: str, env: dict[str, str] | None = None) -> Answer:
    """Go on with the run; `stand_in` is `stage=function of broken_exports`, nothing for the real stages."""
    stage, _, function = stand_in.partition("=")
    words = [word for option in (f"store.uri={place / 'store'}", *options) for word in ("--set", option)]
    words += ["--run-id", "faulty", "--work-dir", str(place / "work")]
    env = {"JOB_STAND_INS": f"{stage}=broken_exports:{function}" if stand_in else "none=none"} | (env or {})
    return call_job("run", str(place / "recipe.yaml"), *words, env=env, timeout_s=300, program=ACCIDENTAL_JOB)


def list_released(place: Path) -> list[str]:
    return [item.key for item in open_store(str(place / "store")).list("models/")]


FAULTS = {
    "61 an operator that ONNX does not know": ("export=export_unknown_operator", 15, "does not export to ONNX"),
    "62 weights that are not torch's": ("export=export_wrong_weights", 15, "differ"),
    "63 int8 weights out of range": ("quantize=quantize_badly", 15, "no target passed"),
    "65 too little memory": ("export=export_with_little_memory", 78, "memory"),
    "16 a disk that fills while answers are measured": ("export=export_on_a_full_disk", 78, "File too large"),
    "16 a disk that fills while int8 is measured": ("quantize=quantize_on_a_full_disk", 78, "File too large"),
    "labels in another order": ("export=export_swapped_columns", 15, "differ"),
    "dropout left on": ("export=export_noise", 15, "differ"),
    "padding taken for text": ("export=export_without_mask", 15, "differ"),
    "a head drawn anew": ("export=export_new_head", 15, "differ"),
    "overflow": ("export=export_overflow", 15, "NaN"),
    "the file of another training": ("export=export_stale", 15, "differ"),
    "external data cut short": ("export=export_truncated_data", 15, "does not run"),
    "an output of another name": ("export=export_other_names", 15, "does not run"),
    "a batch of one only": ("export=export_one_row", 15, "does not run"),
    "an empty file": ("export=export_nothing", 15, "does not run"),
    "int8 labels in another order": ("quantize=quantize_swapped", 15, "no target passed"),
    "int8 that answers the same to all": ("quantize=quantize_constant", 15, "no target passed"),
    "int8 that answers NaN": ("quantize=quantize_nan", 15, "no target passed"),
    "a head lost in the merge": ("evaluate=evaluate_headless", 15, "lacks classifier"),
    "a tokenizer with another vocabulary": ("report=report_other_words", 15, "released tokenizer"),
    "a tokenizer that keeps capitals": ("report=report_case", 15, "released tokenizer"),
    "a tokenizer that cuts too early": ("report=report_short", 15, "released tokenizer"),
    "labels renamed in the bundle": ("report=report_labels", 15, "names the labels"),
    "the base model's weights in the bundle": ("report=report_base_weights", 15, "lacks classifier"),
    "an int8 file that no gate has seen": ("report=report_older_int8", 15, "is not the file that passed"),
    "a bundle that lacks a file": ("report=report_without_tokenizer", 15, "does not open"),
    "a bundle changed after it was proven": ("rehearse=rehearse_then_change", 19, "was changed after"),
    "a link in the bundle": ("rehearse=rehearse_then_link", 19, "README.md"),
}
QUICK = ("62", "a head lost", "a tokenizer with", "a bundle changed")
"""What `make test` runs of them: one of each stage."""


@pytest.mark.parametrize(
    ("stand_in", "code", "words"),
    [pytest.param(*FAULTS[name], id=name, marks=() if name.startswith(QUICK) else pytest.mark.slow) for name in FAULTS],
)
def test_nothing_is_released_and_the_training_is_kept(place: Path, stand_in: str, code: int, words: str) -> None:
    if stand_in.startswith("evaluate"):
        (place / "store/runs/faulty/stages/evaluate.json").unlink()
    failed = run(place, stand_in)
    assert_refused(failed, code, words)
    assert failed.result["release"] is None
    assert "\n" not in failed.result["reason"]
    assert list_released(place) == []
    again = run(place)
    assert again.code == 0, again.stderr
    assert "train: already committed, skipped" in again.stderr
    assert list_released(place)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_a_clean_export_of_any_seed_passes(place: Path, seed: int) -> None:
    done = run(place, "", f"training.seed={seed}", "store.uri=" + str(place / "other"))
    assert done.code == 0, done.stderr
    assert done.result["metrics"]["test"]["macro_f1"] > 0.5, "one that says the same to all shows nothing"
    assert done.result["int8"]["portable"]["accepted"] is True


@pytest.mark.slow
def test_63_int8_that_fails_is_left_out_with_its_numbers_where_the_gate_only_reports(place: Path) -> None:
    done = run(place, "quantize=quantize_badly", "export.int8.gate=report_only")
    assert done.code == 0, done.stderr
    numbers = done.result["int8"]["portable"]
    assert numbers["accepted"] is False
    assert {"drop", "drop_bound", "agreement", "n"} <= numbers.keys()
    files = {key.rpartition("/")[2] for key in list_released(place) if "/onnx/" in key}
    assert files == {"model.onnx"}


def test_a_changed_export_whose_release_was_killed_is_released_by_the_next_attempt(place: Path) -> None:
    first = run(place)
    assert first.code == 0, first.stderr
    left = place / "work/runs/faulty/onnx/model_int8_avx2.onnx"  # of a target that is not asked for any more
    left.write_bytes(b"older")
    changed = ("", "export.int8.mode=weights")
    killed = run(place, *changed, env={"JOB_FAILPOINT": "release-files=kill"})
    assert killed.code == -9, killed.stderr
    again = run(place, *changed)
    assert again.code == 0, again.stderr
    assert again.result["release"] != first.result["release"]
    assert again.result["int8"]["portable"]["rung"].startswith("weights only")
    assert not any(left.name in key for key in list_released(place))


@pytest.mark.slow
def test_64_weights_beside_the_onnx_file_are_released_verified_and_answer(place: Path) -> None:
    done = run(place, "export=export_external_data")
    assert done.code == 0, done.stderr
    release = str(done.result["release"])
    assert any(key.endswith("/onnx/model.onnx_data") for key in list_released(place))
    parts = onnx.load(Path(release) / "onnx/model.onnx", load_external_data=False).graph.initializer
    locations = {entry.value for part in parts for entry in part.external_data if entry.key == "location"}
    assert locations == {"model.onnx_data"}
    assert call_job("verify", release, "--work-dir", str(place / "verify")).code == 0
    words = ("a film to remember", "--precision", "fp32", "--work-dir", str(place / "predict"))
    answered = call_job("predict", release, *words)
    assert answered.code == 0, answered.stderr
    assert any((Path(release) / "onnx").glob("model_quantized.onnx"))
