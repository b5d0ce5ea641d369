"""A recipe is accepted as a whole, or refused with every mistake, its place and the way out; never a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from fuzzing import fuzz
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel

from job.errors import JobError, RecipeError, SecurityRefused
from job.recipe import Recipe, load_recipe, shipped_recipes

MINIMAL = """\
name: reviews
task: text-classification
model: {id: some/model}
data: {source: some/data}
store: {uri: "s3://bucket/prefix"}
"""
AWS_ID, HUB_TOKEN = "AKIA" + "QWERTYUIOPASDFGH", "hf_" + "aBcDeFgHiJkLmNoPqRsT"

Loader = Callable[..., Recipe]


@pytest.fixture
def load(tmp_path: Path) -> Loader:
    """Load a recipe from its text, with nothing from this process's environment."""

    def load_text(text: str | bytes, *overrides: str, **environment: str) -> Recipe:
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return load_recipe(str(path), overrides, environment)

    return load_text


def refuse(load: Loader, text: str | bytes, *overrides: str, **environment: str) -> str:
    """Return the message with which a recipe is refused as wrong (10)."""
    with pytest.raises(RecipeError) as caught:
        load(text, *overrides, **environment)
    assert caught.value.exit_code == 10
    return str(caught.value)


# --- what is accepted


def test_the_shortest_recipe_is_accepted_with_defaults(load: Loader) -> None:
    recipe = load(MINIMAL)
    assert recipe.training.seed == 42
    assert recipe.data.columns == {"text": "text", "label": "label"}
    assert recipe.export.int8.targets == ["portable", "avx512_vnni"]


def test_what_a_label_is_decides_baselines_and_agreement(load: Loader) -> None:
    kinds = {
        "single_label_classification": ("text-classification", ["majority", "untrained"], 0.95),
        "multi_label_classification": (
            "text-classification:multi_label_classification", ["majority", "untrained"], 0.9,
        ),
        "regression": ("text-classification:regression", ["mean", "untrained"], 0.95),
    }  # fmt: skip
    for problem_type, expected in kinds.items():
        recipe = load(MINIMAL, f"data.problem_type={problem_type}")
        assert (recipe.kind, recipe.baselines, recipe.export.int8.min_agreement) == expected


def test_every_shipped_recipe_is_valid() -> None:
    shipped = shipped_recipes()
    assert len(shipped) == 12
    for name, path in shipped.items():
        assert load_recipe(name, environment={}) == load_recipe(str(path), environment={})
        assert load_recipe(name, environment={}).name == name


def test_numbers_and_words_mean_what_people_write(load: Loader) -> None:
    recipe = load(
        MINIMAL + "training: {learning_rate: 1e-4, weight_decay: .5e-1, adam_epsilon: 1.0e-08, max_grad_norm: 1E0}\n"
    )
    assert (recipe.training.learning_rate, recipe.training.weight_decay) == (1e-4, 0.05)
    assert (recipe.training.adam_epsilon, recipe.training.max_grad_norm) == (1e-8, 1.0)
    assert load(MINIMAL.replace("some/data}", "some/data, labels: [no, yes, off]}")).data.labels == ["no", "yes", "off"]


def test_a_tuning_method_has_its_own_defaults_and_no_key_of_another(load: Loader) -> None:
    lora = load(MINIMAL + "tuning: {method: lora, targets: [query, value]}\n").tuning
    assert (lora.r, lora.alpha, lora.dropout, lora.rslora, lora.dora, lora.unfreeze) == (8, 16, 0.0, False, False, None)
    partial = load(MINIMAL + "tuning: {method: partial, unfreeze: last-2-layers, r: }\n").tuning
    assert (partial.last_layers, partial.embeddings, partial.r) == (2, "frozen", None)
    assert load(MINIMAL).tuning.model_dump(exclude_none=True) == {"method": "full"}


def test_shots_and_a_limit_both_count_rows_and_only_labels_have_shots(load: Loader) -> None:
    assert load(MINIMAL, "tuning.shots=8").tuning.shots == 8
    assert "tuning: shots and data.limit both say" in refuse(load, MINIMAL, "tuning.shots=8", "data.limit=100")
    assert "causal-lm has no labels; use data.limit" in refuse(load, MINIMAL, "tuning.shots=8", "task=causal-lm")


def test_a_recipe_cannot_be_changed_afterwards(load: Loader) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(MINIMAL).training.seed = 7  # type: ignore[misc]


def test_the_hash_depends_on_the_named_sections_alone(load: Loader) -> None:
    one, other = load(MINIMAL), load(MINIMAL, "store.uri=/elsewhere")
    assert one.hash_sections("model", "training") == other.hash_sections("training", "model")
    assert one.hash_sections("store") != other.hash_sections("store")
    assert one.hash_sections("training") != load(MINIMAL, "training.seed=7").hash_sections("training")


def test_the_schema_for_editors_knows_every_key_and_refuses_others() -> None:
    schema = Recipe.model_json_schema()
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["Training"]["properties"]["seed"]["default"] == 42
    assert all(section.get("additionalProperties") is False for section in schema["$defs"].values())
    json.dumps(schema)


def test_reading_a_recipe_imports_neither_torch_nor_transformers() -> None:
    program = (
        "import sys; from job.recipe import load_recipe; load_recipe('quickstart')\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'boto3', 'huggingface_hub'} & set(sys.modules)))\n"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "[]\n"


# --- the order: defaults < file < environment < --set


def test_set_beats_environment_beats_file_beats_default(load: Loader) -> None:
    text = MINIMAL + "training: {seed: 1}\n"
    assert load(MINIMAL).training.seed == 42
    assert load(text).training.seed == 1
    assert load(text, JOB__TRAINING__SEED="2").training.seed == 2
    assert load(text, "training.seed=3", JOB__TRAINING__SEED="2").training.seed == 3
    assert load(text, "training.seed=3", "training.seed=4").training.seed == 4
    assert load(text, JOB__TRAINING__SEED="2", JOB_TRAINING__SEED="9", OTHER="x").training.seed == 2


def test_an_override_is_read_like_a_value_in_the_file(load: Loader) -> None:
    recipe = load(
        MINIMAL + "training:\n", "training.learning_rate=1e-4", "export.int8.targets=[portable]", "data.validation=dev",
        "launch={grace_s: 30}", "data.columns.text=review=text", "training.max_steps=", "distributed.zero_stage=2",
    )  # fmt: skip
    assert recipe.training.learning_rate == 1e-4
    assert recipe.export.int8.targets == ["portable"]
    assert recipe.data.validation == "dev"
    assert recipe.launch.grace_s == 30
    assert recipe.data.columns["text"] == "review=text"
    assert recipe.training.max_steps is None
    assert recipe.distributed.zero_stage == 2


def test_a_wrong_override_is_blamed_on_where_it_came_from(load: Loader) -> None:
    text = MINIMAL + "training: {seed: 1}\n"
    assert refuse(load, text, "training.seed=many").startswith("--set: training.seed: ")
    assert refuse(load, text, JOB__TRAINING__SEED="many").startswith("JOB__TRAINING__SEED: training.seed: ")
    assert "did you mean 'seed'" in refuse(load, text, "training.sed=7")
    assert "'name' is no section" in refuse(load, text, "name.x=7")
    for override in ("training.seed", "=7", "", "seed"):
        assert "write it as key.path=value" in refuse(load, text, override)
    for override in ("a..b=1", ".=1", "training.=1", "x" * 500 + "=1", "name.x.y=[", "training.seed.x=1"):
        refuse(load, text, override)


# --- what is refused


@pytest.mark.parametrize(
    "key",
    ["data.limit", "data.num_workers", "training.max_steps", "training.learning_rate", "training.warmup_ratio",
     "data.max_bad_fraction", "launch.grace_s", "distributed.zero_stage", "distributed.processes_per_node",
     "training.early_stopping_patience", "training.class_weights"],
)  # fmt: skip
@pytest.mark.parametrize("value", ["true", "false"])
def test_a_number_is_not_true_or_false(load: Loader, key: str, value: str) -> None:
    said = refuse(load, MINIMAL, f"{key}={value}")
    assert f"{key}: cannot be true or false (found {value.title()})" in said


def test_all_mistakes_are_told_at_once_each_with_its_line(load: Loader, tmp_path: Path) -> None:
    text = """\
name: reviews
task: image-classification
model: {id: some/model}
data:
  source: some/data
  max_length: 4
  colums: {text: review}
trainig: {seed: 1}
training:
  learning_rate: fast
  global_batch_size: 0
  per_device_train_batch_size: 8
export: {int8: {targets: [portable, gpu]}}
"""
    lines = refuse(load, text).splitlines()
    path = tmp_path / "recipe.yaml"
    expected = {
        f"{path}:2: task: ": "found 'image-classification'",
        f"{path}:6: data.max_length: ": "greater than or equal to 8",
        f"{path}:7: data.colums: ": "did you mean 'columns'?",
        f"{path}:8: trainig: ": "did you mean 'training'?",
        f"{path}:10: training.learning_rate: ": "found 'fast'",
        f"{path}:11: training.global_batch_size: ": "greater than 0",
        f"{path}:12: training.per_device_train_batch_size: ": "global_batch_size: 8",
        f"{path}:13: export.int8.targets.1: ": "'avx512_vnni'",
        f"{path}: store: ": "is missing",
    }
    for start, end in expected.items():
        assert any(line.startswith(start) and end in line for line in lines), (start, lines)
    assert len(lines) == len(expected)


def test_a_key_in_the_wrong_section_is_sent_home(load: Loader) -> None:
    assert "did you mean training.learning_rate?" in refuse(load, MINIMAL + "learning_rate: 1\n")
    assert "did you mean data.max_length?" in refuse(load, MINIMAL + "training: {max_length: 128}\n")
    assert "known here: method" in refuse(load, MINIMAL + "tuning: {zzz: 1}\n")


@pytest.mark.parametrize(
    ("section", "answers"),
    [
        (
            "training: {lr: 1, max_epochs: 3, gradient_clipping: 1, gradient_accumulation: 2, optim: sgd, warmup: 10}",
            {
                "lr": "write training.learning_rate: 1",
                "max_epochs": "write training.num_train_epochs: 3",
                "gradient_clipping": "write training.max_grad_norm: 1",
                "gradient_accumulation": "accumulation is derived",
                "optim": "it is AdamW; leave it out",
                "warmup": "did you mean 'warmup_ratio'?",
            },
        ),
        (
            "training: {deepspeed: x, load_best: 1}",
            {"deepspeed": "known here", "load_best": "'load_best_model_at_end'"},
        ),
        ("tuning: {lora_r: 8, lora_alpha: 16}", {"lora_r": "write tuning.r: 8", "lora_alpha": "did you mean 'alpha'?"}),
        (
            "data: {source: d, text: body, label_column: stars, delimiter: ';', valid: 0.1}",
            {
                "text": "write data.columns: {text: body}",
                "label_column": "write data.columns: {label: stars}",
                "delimiter": "commas in .csv, tabs in .tsv",
                "valid": "did you mean 'validation'?",
            },
        ),
    ],
    ids=["names of others", "what only looks like it", "peft's", "columns"],
)
def test_a_key_that_other_programs_have_is_answered_with_ours_and_never_with_one_that_only_looks_like_it(
    load: Loader, section: str, answers: dict[str, str]
) -> None:
    kept = [line for line in MINIMAL.splitlines() if not line.startswith(f"{section.split(':')[0]}:")]
    lines = refuse(load, "\n".join([*kept, section])).splitlines()
    assert len(lines) == len(answers)
    for line, (key, answer) in zip(lines, answers.items(), strict=True):
        assert f".{key}: unknown key; " in line and answer in line


def test_a_section_or_list_that_is_given_as_one_word_is_shown_how_it_is_written(load: Loader) -> None:
    said = refuse(
        load, MINIMAL.replace('{uri: "s3://bucket/prefix"}', "/tmp/store") + "baselines: majority\nlaunch: 3\n"
    )
    assert "store: is a section, as in {uri: …} (found '/tmp/store')" in said
    assert "launch: is a section, as in {grace_s: …} (found 3)" in said
    assert "baselines: is a list; write [majority]" in said


def test_a_key_given_twice_is_refused_at_its_second_line(load: Loader, tmp_path: Path) -> None:
    message = refuse(load, MINIMAL + "training:\n  seed: 1\n  max_steps: 5\n  seed: 2\n")
    assert message == f"{tmp_path / 'recipe.yaml'}:9: not valid YAML: key 'seed' is given twice"


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ("data: {source: d, test: train}", "test is the same split as train"),
        ("data: {source: d, validation: train}", "validation is the same split as train"),
        ("data: {source: d, validation: 0.5, test: 0.5}", "leave some to train"),
        ("data: {source: d, validation: 2}", "a fraction between 0 and 1"),
        ("data: {source: d, columns: {txt: a}}", "'text'"),
        ("tuning: {r: 8}", "r is a key of method: lora; write method: lora"),
        ("tuning: {method: lora, unfreeze: head}", "unfreeze is a key of method: partial"),
        ("tuning: {method: partial, unfreeze: last-0-layers}", "must be head or last-N-layers"),
        ("tuning: {method: partial, dora: false}", "dora is a key of method: lora"),
        ("tuning: {method: lora, targets: []}", "at least 1 item"),
        ("tuning: {method: qlora}", "found 'qlora'"),
        ("data: {source: d, problem_type: regresion}", "'regression'"),
        ("data: {source: d, problem_type: regression, labels: [a, b]}", "labels: text-classification:regression has"),
        (
            "training: {torch_compile: true}\ndistributed: {engine: deepspeed}",
            "torch_compile is offered with engine: ddp, not with deepspeed",
        ),
        ("training: {early_stopping_threshold: 0.1}", "early_stopping_threshold is for early_stopping_patience"),
        ("training: {early_stopping_patience: 0}", "greater than 0"),
        ("training: {early_stopping: {patience: 3}}", "did you mean 'early_stopping_patience'?"),
        ("training: {metric_for_best_model: f1}", "it is the task's own metric; leave it out"),
        ("training: {class_weights: {}}", "at least 1 item"),
        ("training: {class_weights: {yes: 0}}", "training.class_weights.yes: input should be greater than 0"),
        ("training: {class_weights: rare}", "input should be 'balanced' (found 'rare')"),
        ("store: {uri: 'gs://bucket/x'}", "has scheme 'gs'"),
        ("store: {uri: ~nobody-here/x}", "names a home folder that does not exist"),
        ("store: {uri: 's3://B/x'}", "valid bucket name"),
        ("store: {uri: 's3:/bucket/x'}", "must read s3://bucket/prefix"),
        ("store: {uri: s3:bucket}", "must read s3://bucket/prefix"),
        ("name: a/b", "letters, digits"),
        ("name: 2026-11-23", "valid string"),
        ("export: {int8: {targets: [avx2, avx2]}}", "names a target twice"),
        ("baselines: [few-shot]", "few-shot:N"),
        ("training: {learning_rate: .inf}", "finite"),
        ("training: {learning_rate: .nan}", "finite"),
        ("training: {seed: 123456789012345678901234567890}", "64 bits"),
        ("model: some/model", "found 'some/model'"),
        ("1: x", "1: "),
        ("str: x", "str: unknown key"),
        ("training: {int: 1}", "training.int: unknown key"),
    ],
)
def test_a_rule_that_is_broken_is_named(load: Loader, change: str, rule: str) -> None:
    key = change.split(":")[0]
    kept = [line for line in MINIMAL.splitlines() if not line.startswith(f"{key}:")]
    assert rule in refuse(load, "\n".join([*kept, change]))


def test_who_stops_early_takes_the_best_model_unless_the_recipe_says_otherwise(load: Loader) -> None:
    patient = MINIMAL + "training: {early_stopping_patience: 3}\n"
    assert load(patient).training.load_best_model_at_end
    assert not load(patient, "training.load_best_model_at_end=false").training.load_best_model_at_end
    assert not load(MINIMAL).training.load_best_model_at_end
    assert not load(patient, "training.early_stopping_patience=").training.watches_metric


def test_labels_are_weighed_by_name_and_only_where_there_are_labels(load: Loader) -> None:
    weighted = MINIMAL + "training: {class_weights: {3: 2, true: .5, password: 1e1}}\n"
    assert load(weighted).training.class_weights == {"3": 2.0, "true": 0.5, "password": 10.0}
    assert load(weighted, "training.class_weights=balanced").training.class_weights == "balanced"
    for labelled in ("task=token-classification", "data.problem_type=multi_label_classification"):
        load(weighted, labelled)
    for other in ("task=causal-lm", "task=question-answering", "data.problem_type=regression"):
        assert "class_weights: " in (message := refuse(load, weighted, other)) and "has no labels" in message


@pytest.mark.parametrize(
    ("export", "rule"),
    [("triton: true", "encoder and decoder"), ("int8: {mode: static, targets: [portable]}", "mode: static")],
)
def test_what_there_is_no_way_for_with_a_model_of_two_files_is_named(load: Loader, export: str, rule: str) -> None:
    two_files = MINIMAL.replace("text-classification", "seq2seq-lm")
    assert load(two_files).data.columns == {"source": "source", "target": "target"}
    assert rule in refuse(load, two_files + f"export: {{{export}}}\n")


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "7", "just text", "a: [", "a: b: c", "\tx: 1", "--- {}\n--- {}", "\x00",
        "a: !!python/object:os.system x",
        "a: !!int ''", "a: !!float ''", "a: !!bool maybe", "a: !!timestamp soon", "a: 2026-99-99", "a: !unknown x",
        "? [a, b]\n: 1", "? {a: b}\n: 1", "[" * 5000, "{a: " * 5000, "- " * 5000 + "x", "%YAML 9.9\n---\na: 1",
        "a: 0x" + "F" * 5000, "a: " + "9" * 5000, "<<: 7", "a: &x [*x]", "a: &x {b: *x}", "!!set {a, b}",
        "a: !!binary '!'", "~: 1", "? \n: 2",
    ],
    ids=lambda text: ascii(text[:20]),
)  # fmt: skip
def test_odd_yaml_is_refused_with_one_line_a_problem(load: Loader, text: str) -> None:
    for line in refuse(load, text).splitlines():
        assert ": " in line
        assert len(line) < 600


@pytest.mark.parametrize("data", [b"\xff\xfe\x00", b"a: \xe9", b"\xef\xbb\xbf" + MINIMAL.encode()])
def test_bytes_that_are_no_utf8_are_refused_and_a_byte_order_mark_is_not(load: Loader, data: bytes) -> None:
    if data.startswith(b"\xef\xbb\xbf"):
        assert load(data).name == "reviews"
    else:
        refuse(load, data)


def test_a_bomb_of_aliases_is_refused_at_once(load: Loader) -> None:
    bomb = "a0: &a0 {x: 1}\n" + "".join(
        f"a{n}: &a{n} {{{', '.join(f'k{k}: *a{n - 1}' for k in range(10))}}}\n" for n in range(1, 20)
    )
    assert "an alias (*name) has no place in a recipe" in refuse(load, bomb)


def test_a_huge_recipe_is_refused_at_once(load: Loader) -> None:
    assert "larger than 128 KiB" in refuse(load, "x" * (1 << 17) + "x")
    started = time.process_time()
    message = refuse(load, MINIMAL + "".join(f"k{number}: 1\n" for number in range(10_000)))
    assert len(message.splitlines()) <= 51
    assert "more; correct these first" in message
    assert time.process_time() - started < 20


@pytest.mark.parametrize("reference", ["absent.yaml", "", ".", "/", "x" * 300, "a\x00b", "quickstart.yaml"])
def test_a_missing_recipe_is_a_recipe_error_and_the_shipped_ones_are_named(reference: str) -> None:
    with pytest.raises(RecipeError, match="quickstart") as caught:
        load_recipe(reference, environment={})
    assert caught.value.exit_code == 10


def test_an_unreadable_recipe_is_named(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").symlink_to("/proc/self/mem")
    with pytest.raises(JobError, match=r"recipe\.yaml"):
        load_recipe(str(tmp_path / "recipe.yaml"), environment={})


def test_where_no_number_is_wanted_a_boolean_is_refused_with_what_is(load: Loader) -> None:
    assert "'fail' or 'report_only'" in refuse(load, MINIMAL, "export.int8.gate=false")
    assert "valid string" in refuse(load, MINIMAL, "data.train=true")
    weighted = MINIMAL + "training: {class_weights: {a: true, b: 2}}\n"
    assert "class_weights: cannot be true or false" in refuse(load, weighted)


# --- secrets


@pytest.mark.parametrize(
    ("line", "secret"),
    [
        (f"model: {{id: {AWS_ID}}}", AWS_ID),
        (f"model: {{id: some/model, revision: {HUB_TOKEN}}}", HUB_TOKEN),
        ("store: {uri: 's3://user:pass-word@bucket/x'}", "pass-word"),
        ("data: {source: 'https://user:pass-word@example.org/x.csv'}", "pass-word"),
        (f"{AWS_ID}: 1", AWS_ID),
        (f"baselines: [majority, {AWS_ID}]", AWS_ID),
        ("store: {uri: 's3://bucket/x', aws_secret_access_key: wJalrXUtnFEMI}", "wJalrXUtnFEMI"),
        ("hf_token: opaque-value", "opaque-value"),
        ("training: {api_key: opaque-value}", "opaque-value"),
        ("store: {password: 12345678}", "12345678"),
    ],
)
def test_a_credential_in_a_recipe_is_refused_and_not_repeated(load: Loader, line: str, secret: str) -> None:
    key = line.split(":")[0]
    kept = [old for old in MINIMAL.splitlines() if not old.startswith(f"{key}:")]
    with pytest.raises(SecurityRefused, match="give credentials by environment") as caught:
        load("\n".join([*kept, line]))
    assert caught.value.exit_code == 19
    assert secret not in str(caught.value)


def test_a_credential_in_an_override_is_refused_and_not_repeated(load: Loader) -> None:
    for arguments in (
        ([f"model.id={HUB_TOKEN}"], {}),
        ([], {"JOB__MODEL__ID": AWS_ID}),
        (["store.token=opaque-value"], {}),
    ):
        with pytest.raises(SecurityRefused) as caught:
            load(MINIMAL, *arguments[0], **arguments[1])
        assert not any(secret in str(caught.value) for secret in (HUB_TOKEN, AWS_ID, "opaque-value"))
    assert AWS_ID not in refuse(load, MINIMAL, AWS_ID)
    for text in (f"a: *{AWS_ID}", f"a: !{HUB_TOKEN} x", f"{AWS_ID}: 1\n{AWS_ID}: 2"):
        message = refuse(load, text)
        assert AWS_ID not in message
        assert HUB_TOKEN not in message


@pytest.mark.parametrize(
    ("uri", "kept"), [("/", "/"), ("file:///", "/"), ("a/b//", os.path.abspath("a/b")), ("s3://bucket/", "s3://bucket")]
)
def test_a_store_is_absolute_and_has_no_trailing_slash(load: Loader, uri: str, kept: str) -> None:
    assert load(MINIMAL, f"store.uri={uri}").store.uri == kept


def test_labels_may_be_called_what_they_like(load: Loader) -> None:
    text = MINIMAL.replace("some/data}", "some/data, labels: {password: secret, token: other}}")
    assert load(text).data.labels == {"password": "secret", "token": "other"}


# --- whatever is written: a recipe or an error with an exit code


def load_anything(folder: Path, data: bytes, *overrides: str) -> None:
    """Load; whatever is accepted must also be usable for what follows."""
    path = folder / "fuzzed.yaml"
    path.write_bytes(data)
    try:
        recipe = load_recipe(str(path), overrides, {})
    except JobError as error:
        assert error.exit_code in (10, 19)
        str(error).encode()
        return
    assert recipe.hash_sections(*Recipe.model_fields)
    assert Recipe.model_validate(json.loads(json.dumps(recipe.model_dump(mode="json")))) == recipe


@pytest.mark.parametrize("text", ['"\\ud800"', '"\\ude00x"'])
def test_half_a_character_is_refused_with_its_place(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL + f"baselines: [{text}]\n")
    with pytest.raises(RecipeError, match=r"baselines\.0: holds half a character"):
        load_recipe(str(path), [], {})
    path.write_text(MINIMAL)
    with pytest.raises(RecipeError, match=r"--set: data\.train: holds half a character"):
        load_recipe(str(path), ["data.train=a\udcff"], {})


def key_names(model: type[BaseModel] = Recipe) -> set[str]:
    """Every key of every section."""
    names = set(model.model_fields)
    for field in model.model_fields.values():
        for option in (field.annotation, *get_args(field.annotation)):
            if isinstance(option, type) and issubclass(option, BaseModel):
                names |= key_names(option)
    return names


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**400), 10**400), st.integers(0, 10), st.floats(), st.text(max_size=12),
    st.text(st.characters(), max_size=3),  # lone surrogates as well
    st.binary(max_size=6), st.dates(), st.datetimes(),
    st.sampled_from(["auto", "full", "main", "portable", "s3://bucket/x", "/", "0.1", "1e-4"]),
)  # fmt: skip
KEYS = st.sampled_from([*sorted(key_names()), "str", "int", "float", "[key]", "literal", "list[int]"]) | SCALARS.filter(
    lambda key: not isinstance(key, float) or key == key
)
TREES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)
VALID = yaml.safe_load(MINIMAL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@fuzz(300)
@given(st.text(max_size=80) | st.binary(max_size=40))
def test_any_text_is_a_recipe_or_an_error(folder: Path, text: str | bytes) -> None:
    load_anything(folder, text if isinstance(text, bytes) else text.encode(errors="surrogatepass"))


@fuzz(300)
@given(
    st.lists(
        st.sampled_from([*"{}[]:,-?&*!|>'\"%#@`\n \t", "a", "1", "<<", "!!", ": ", "- ", "? ", "&a ", "*a", "---\n"]),
        max_size=25,
    )
)
def test_any_punctuation_is_a_recipe_or_an_error(folder: Path, parts: list[str]) -> None:
    load_anything(folder, "".join(parts).encode())


@fuzz(400)
@given(st.dictionaries(st.sampled_from(sorted(Recipe.model_fields)), TREES, max_size=6))
def test_any_values_under_real_keys_are_a_recipe_or_an_error(folder: Path, tree: dict[str, Any]) -> None:
    load_anything(folder, yaml.safe_dump(VALID | tree, allow_unicode=True).encode(errors="surrogatepass"))


SECTIONS = {
    name: field.annotation
    for name, field in Recipe.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
}
LEAVES = [f"{name}.{key}" for name, section in SECTIONS.items() for key in section.model_fields]


@fuzz(400)
@given(st.lists(st.tuples(st.sampled_from(LEAVES), TREES | SCALARS), max_size=3))
def test_any_value_under_any_single_key_is_a_recipe_or_an_error(folder: Path, changes: list[tuple[str, Any]]) -> None:
    tree: dict[str, Any] = yaml.safe_load(MINIMAL)
    for leaf, value in changes:
        section, key = leaf.split(".")
        tree.setdefault(section, {})[key] = value
    load_anything(folder, yaml.safe_dump(tree).encode(errors="surrogatepass"))


@fuzz(300)
@given(st.lists(st.text("abc.=[]{}:,'\"&*!\n-1e ", max_size=20) | st.sampled_from(LEAVES).flatmap(
    lambda leaf: st.text(max_size=12).map(lambda value: f"{leaf}={value}")), max_size=3))  # fmt: skip
@example(overrides=["store.uri=~nobody-here/x"])
def test_any_override_is_accepted_or_an_error(folder: Path, overrides: list[str]) -> None:
    load_anything(folder, MINIMAL.encode(), *overrides)
