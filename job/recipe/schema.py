"""The keys of a recipe: names, types, defaults, rules. One class per section.

Keys under `training` carry the names of `transformers.TrainingArguments`. Nothing here reads a
file, asks a network, or imports torch; what only data or hardware can tell is checked later.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Split = Fraction | str

TaskName = Literal[
    "text-classification", "token-classification", "question-answering", "masked-lm", "causal-lm", "seq2seq-lm"
]
"""Tasks that this version can train."""

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
"""What the label of a text is, in the words of transformers' `problem_type`."""

Column = Literal[
    "text", "text_pair", "label", "tokens", "tags", "question", "context", "answers", "prompt", "completion",
    "messages", "source", "target",
]  # fmt: skip
Target = Literal["portable", "avx512_vnni", "avx2", "arm64", "int4"]

DEFINES_TRAINING = ("task", "model", "data", "tuning", "training")
"""Sections that fix the trained weights: changed ones are another run."""

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_BASELINE = re.compile(r"majority|mean|untrained|zero-shot|linear-probe|one-shot|few-shot:[1-9][0-9]{0,2}")
_UNFREEZE = re.compile(r"head|last-([1-9][0-9]{0,3})-layers")
_METHOD_KEYS: dict[str, dict[str, Any]] = {
    "partial": {"unfreeze": "head", "embeddings": "frozen"},
    "lora": {"r": 8, "alpha": 16, "dropout": 0.0, "targets": None, "rslora": False, "dora": False},
}
"""The keys of `tuning` that only one method has, and what they are where nothing is said."""


@dataclass(frozen=True)
class TaskKeys:
    """What a task makes of a recipe: sets of columns that it takes, the first by default, and its other defaults.

    `offered`: further baselines that it knows.
    """

    columns: tuple[tuple[Column, ...], ...]
    baselines: tuple[str, ...] = ("majority", "untrained")
    offered: tuple[str, ...] = ()
    targets: tuple[Target, ...] = ("portable", "avx512_vnni")
    min_agreement: float = 0.95


_OF_TEXTS: tuple[tuple[Column, ...], ...] = (("text", "label"), ("text", "text_pair", "label"))

TASK_KEYS = {
    "text-classification": TaskKeys(_OF_TEXTS, offered=("zero-shot", "one-shot", "few-shot", "linear-probe")),
    # a row agrees only where none of its labels changes
    "text-classification:multi_label_classification": TaskKeys(_OF_TEXTS, min_agreement=0.9),
    "text-classification:regression": TaskKeys(_OF_TEXTS, ("mean", "untrained")),
    "token-classification": TaskKeys((("tokens", "tags"),)),
    "question-answering": TaskKeys((("question", "context", "answers"),), ("untrained",), min_agreement=0.9),
    "masked-lm": TaskKeys((("text",),), ("untrained",), min_agreement=0.9),
    # the next token is often a close call: where 19 of 20 labels must not change, 9 of 10 tokens must not
    "causal-lm": TaskKeys(
        (("text",), ("prompt", "completion"), ("messages",)),
        ("untrained",),
        targets=("portable", "int4"),
        min_agreement=0.9,
    ),
    "seq2seq-lm": TaskKeys((("source", "target"),), ("untrained",), targets=("portable",), min_agreement=0.9),
}


_NO_BOOLEAN = "cannot be true or false"


def _list_kinds(annotation: Any) -> Iterator[type]:
    """Yield the types that stand in an annotation, and those of a Literal's values."""
    if not (parts := get_args(annotation)):
        yield annotation if isinstance(annotation, type) else type(annotation)
    for part in parts:
        yield from _list_kinds(part)


class Section(BaseModel):
    """Base of every section: unknown keys are refused, values cannot be changed afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_booleans(cls, value: Any, info: ValidationInfo) -> Any:
        """To Python true is 1: `limit: true` would train on one row."""
        if isinstance(value, bool):
            kinds = set(_list_kinds(cls.model_fields[str(info.field_name)].annotation))
            if bool not in kinds and {int, float} & kinds:
                raise ValueError(_NO_BOOLEAN)
        return value


class Model(Section):
    """The model to start from."""

    id: str = Field(min_length=1, description="Hub id, local folder, s3:// folder, or s3://…/models/<name>")
    revision: str = Field("main", description="Hub branch, tag or commit; resolved to its commit before loading")


class Data(Section):
    """Where the rows come from and which of them are used for what."""

    source: str = Field(min_length=1, description="file, folder, s3:// object or folder, or Hub id")
    revision: str = Field("main", description="Hub branch, tag or commit; resolved to its commit before loading")
    config: str | None = Field(None, description="configuration of a Hub data set that has several")
    columns: dict[Column, str] = Field({}, description="our name: name in the source; empty: those of the task")
    problem_type: ProblemType = Field(
        "single_label_classification",
        description="text-classification: one label a text, lists of labels, or numbers (regression)",
    )
    labels: list[str | int] | dict[int | str, str] | None = Field(
        None, description="label names in order, or a map from the source's values to names"
    )
    train: str = Field("train", description="split name or file")
    validation: Split = Field(0.1, description="split name or file, or the fraction of train to hold out")
    test: Split = Field("test", description="split name or file, or the fraction of train to hold out")
    max_length: Annotated[int, Field(ge=8)] | None = Field(
        None, description="tokens; null: the model's own limit, ≤ 512"
    )
    limit: Positive | None = Field(None, description="use at most so many train rows")
    max_bad_fraction: Share = Field(0.0, description="share of rows that may be set aside as bad; 0 is strict")
    num_workers: Annotated[int, Field(ge=0, le=64)] = Field(0, description="loader processes per rank")

    @field_validator("labels", mode="before")
    @classmethod
    def _name_booleans(cls, labels: Any) -> Any:
        """YAML's true, false and fractions are label values here, and pydantic would read the first two as 1 and 0."""
        if isinstance(labels, dict):
            return {spell_label(value): spell_label(name) for value, name in labels.items()}
        return [spell_label(name) for name in labels] if isinstance(labels, list) else labels

    @field_validator("labels")
    @classmethod
    def _at_least_two(cls, labels: Any) -> Any:
        names = [str(name) for name in (labels.values() if isinstance(labels, dict) else labels or [])]
        if labels is not None and len(set(names)) < 2:
            raise ValueError(f"names {len(set(names))} label; classification needs at least two different ones")
        if isinstance(labels, list) and len(set(names)) < len(names):
            raise ValueError("names a label twice; a list gives each number its own name")
        return labels

    @field_validator("validation", "test", mode="before")
    @classmethod
    def _refuse_bare_numbers(cls, value: Any) -> Any:
        if isinstance(value, (int, float)) and not 0 < value < 1:
            raise ValueError("must be a split name or a fraction between 0 and 1")
        return value

    @model_validator(mode="after")
    def _leave_rows_to_train(self) -> Data:
        held_out = sum(part for part in (self.validation, self.test) if isinstance(part, float))
        if held_out >= 1:
            raise ValueError(f"validation and test hold out {held_out:.0%} of the rows; leave some to train")
        if isinstance(self.test, str) and self.test in (self.train, self.validation):
            raise ValueError(f"test is the same split as train or validation ({self.test!r}); it must be held out")
        if isinstance(self.validation, str) and self.validation == self.train:
            raise ValueError(f"validation is the same split as train ({self.train!r}); it must be held out")
        return self


def spell_label(value: Any) -> Any:
    """Return one spelling for 1, 1.0 and for true, and fractions as text; what else a label may be, as it is."""
    if isinstance(value, float):
        return str(int(value) if value.is_integer() else value)
    return str(value).lower() if isinstance(value, bool) else value


class Tuning(Section):
    """Which weights are trained, and on how many rows. A key of one method is null under the others."""

    method: Literal["full", "partial", "lora"] = Field(
        "full",
        description="full: every weight; partial: the head, or the last layers too; lora: low-rank factors beside the "
        "weights (Hu et al. 2021), merged for the release",
    )
    unfreeze: str | None = Field(None, description="partial: head (the default), or last-N-layers, the head as well")
    embeddings: Literal["frozen", "trained"] | None = Field(None, description="partial: frozen where nothing is said")
    r: Positive | None = Field(None, description="lora: rank of the factors; 8 where nothing is said")
    alpha: PositiveFloat | None = Field(
        None, description="lora: scale, divided by r (rslora: by its root); 16 where nothing is said"
    )
    dropout: BelowOne | None = Field(None, description="lora: 0 where nothing is said")
    targets: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | None = Field(
        None, description="lora: how the names of the linear layers end, as in [query, value]; null: all in the body"
    )
    rslora: bool | None = Field(None, description="lora: rank-stabilized scale (Kalajdzievski 2023); else false")
    dora: bool | None = Field(None, description="lora: trained magnitudes as well (Liu et al. 2024); else false")
    shots: Positive | None = Field(None, description="train on so many rows of each label, drawn by training.seed")

    @model_validator(mode="before")
    @classmethod
    def _fill_by_method(cls, values: Any) -> Any:
        """Put the method's own defaults where nothing is said, and refuse another method's keys."""
        if not isinstance(values, dict):
            return values
        method = values.get("method", "full")
        for owner, defaults in _METHOD_KEYS.items():
            given = [key for key in defaults if values.get(key) is not None]
            if given and owner != method:
                raise ValueError(f"{given[0]} is a key of method: {owner}; write method: {owner}, or leave it out")
        own = _METHOD_KEYS.get(method, {}) if isinstance(method, str) else {}
        return values | {key: default for key, default in own.items() if values.get(key) is None}

    @field_validator("unfreeze")
    @classmethod
    def _known_part(cls, unfreeze: str | None) -> str | None:
        if unfreeze is not None and not _UNFREEZE.fullmatch(unfreeze):
            raise ValueError("must be head or last-N-layers, as in last-2-layers")
        return unfreeze

    @property
    def last_layers(self) -> int:
        """How many layers `unfreeze` names; 0 for the head alone."""
        found = _UNFREEZE.fullmatch(self.unfreeze or "head")
        return int(found.group(1) or 0) if found else 0


class Training(Section):
    """Hyper-parameters, with the names of transformers.TrainingArguments; the batch is global."""

    num_train_epochs: PositiveFloat = 3.0
    max_steps: Positive | None = Field(None, description="optimizer steps; overrides num_train_epochs")
    global_batch_size: Positive = Field(32, description="rows per optimizer step over all ranks")
    max_micro_batch_size: Positive = Field(64, description="rows that one rank computes at once, at most")
    learning_rate: PositiveFloat = 5e-5
    weight_decay: NotNegative = 0.0
    warmup_ratio: Share = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = Field(0, description="overrides warmup_ratio when > 0")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial"] = "linear"
    max_grad_norm: NotNegative = 1.0
    adam_beta1: BelowOne = 0.9
    adam_beta2: BelowOne = 0.999
    adam_epsilon: PositiveFloat = 1e-8
    layerwise_lr_decay: Fraction | None = Field(
        None, description="each layer learns so much slower than the one behind it (Howard & Ruder 2018), as 0.9"
    )
    label_smoothing_factor: BelowOne = 0.0
    class_weights: Literal["balanced"] | Annotated[dict[str, PositiveFloat], Field(min_length=1)] | None = Field(
        None,
        description="what each label counts in the loss: {label: weight}, 1 where nothing is said; balanced: as rare "
        "as it is, rows / (labels · its rows); where a text has any number of labels, the weight of those that it has",
    )
    gradient_checkpointing: bool = False
    group_by_length: bool = Field(True, description="rows of like length share a global batch (less padding)")
    packing: bool = Field(False, description="causal-lm: rows end to end instead of padded; none sees another")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field("auto", description="auto: bf16 where it is supported")
    attention: Literal["auto", "padded", "varlen"] = Field(
        "auto",
        description="varlen: rows end to end without padding, each seeing itself alone; no attention weights are "
        "dropped. auto: varlen on a GPU in 16 bits with group_by_length: false, where the model drops none anyhow",
    )
    torch_compile: bool = Field(
        False,
        description="with ddp: kernels made for this model in the first steps, for which a node needs a compiler and "
        "perhaps a larger launch.hang_timeout_s; a training that goes on may end in other last bits with it",
    )
    logging_steps: Positive = 10
    eval_steps: Positive | None = Field(None, description="null: once an epoch")
    save_steps: Positive | None = Field(None, description="null: once an epoch")
    load_best_model_at_end: bool = Field(
        False,
        description="take the model with the best metric on the validation rows, not the last; true with "
        "early_stopping_patience, where nothing is said",
    )
    early_stopping_patience: Positive | None = Field(
        None, description="stop after so many evaluations in a row without a better metric; null: never"
    )
    early_stopping_threshold: NotNegative = Field(
        0.0, description="only a metric that is better by more than this ends the waiting"
    )
    report_to: list[Literal["tensorboard", "mlflow", "wandb"]] = Field(
        [], description="send the curves there, too; each needs its package, and its own environment variables"
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42

    @model_validator(mode="before")
    @classmethod
    def _take_the_best(cls, values: Any) -> Any:
        """Who stops because the model gets no better does not want the one that was not better."""
        if not isinstance(values, dict) or values.get("early_stopping_patience") is None:
            return values
        return {"load_best_model_at_end": True} | values

    @model_validator(mode="after")
    def _refuse_a_threshold_alone(self) -> Training:
        if self.early_stopping_threshold and self.early_stopping_patience is None:
            raise ValueError("early_stopping_threshold is for early_stopping_patience; set that, or leave this out")
        return self

    @property
    def watches_metric(self) -> bool:
        """Whether the metric on the validation rows decides what is trained, or which model is taken."""
        return self.load_best_model_at_end or self.early_stopping_patience is not None

    @field_validator("class_weights", mode="before")
    @classmethod
    def _name_classes(cls, weights: Any) -> Any:
        """A label is a name here, also where YAML reads a number or true; a weight is a number."""
        if not isinstance(weights, dict):
            return weights
        if any(isinstance(weight, bool) for weight in weights.values()):
            raise ValueError(_NO_BOOLEAN)
        return {str(spell_label(name)): weight for name, weight in weights.items()}


class Distributed(Section):
    """Engine and ranks."""

    engine: Literal["ddp", "deepspeed"] = "ddp"
    zero_stage: Literal["auto", 0, 1, 2, 3] = Field("auto", description="deepspeed only; auto: the lowest that fits")
    processes_per_node: Positive | Literal["auto"] = Field("auto", description="auto: one per GPU, 1 without a GPU")

    @field_validator("zero_stage", mode="before")
    @classmethod
    def _read_digits(cls, value: Any) -> Any:
        return int(value) if isinstance(value, str) and value.isdigit() else value


class Launch(Section):
    """Deadlines of the supervisor."""

    grace_s: Positive = Field(300, description="seconds from a stop signal to being killed")
    hang_timeout_s: Positive = Field(600, description="seconds without a sign of life from a rank")
    join_timeout_min: Positive = Field(
        30, description="minutes until the first step or a sign of life; loads and compiles"
    )
    time_limit_min: PositiveFloat | None = Field(
        None, description="stop with a checkpoint early enough to be gone after so many minutes"
    )


class Int8(Section):
    """Quantization and its gate."""

    targets: list[Target] = Field(
        ["portable", "avx512_vnni"], min_length=1, description="causal-lm: portable and int4, where nothing is said"
    )
    mode: Literal["auto", "dynamic", "static", "weights"] = Field(
        "auto", description="auto: the ladder, dynamic before static; else that kind alone (weights: 8 bits in blocks)"
    )
    max_metric_drop: Fraction = Field(
        0.02,
        description="largest drop of the metric that the one-sided 95 % bound may show; 0.01 is one point, 1 % of "
        "a language model's perplexity, or 1 % of the labels' variance (regression)",
    )
    min_agreement: Share = Field(
        0.95,
        description="share of rows whose label must not change, of tokens for causal-lm; multi-label: the whole set of "
        "labels; regression: the number, by a tenth of the labels' standard deviation (0.9 where nothing is said for "
        "causal-lm, question-answering and multi-label)",
    )
    gate: Literal["fail", "report_only"] = Field("fail", description="report_only: release fp32 and say so")

    @field_validator("targets")
    @classmethod
    def _refuse_twins(cls, targets: list[str]) -> list[str]:
        if len(set(targets)) != len(targets):
            raise ValueError("names a target twice")
        return targets

    @model_validator(mode="after")
    def _int4_is_weights(self) -> Int8:
        if "int4" in self.targets and self.mode in ("dynamic", "static"):
            raise ValueError(f"targets: int4 is made of weights alone, not by mode: {self.mode}; leave one of them out")
        return self


class Export(Section):
    """ONNX export."""

    int8: Int8 = Int8()
    latency: bool = Field(True, description="measure torch and every file at batch 1 and 8, 16 to 512 tokens, too")
    triton: bool = Field(False, description="also lay out triton/<name> as a Triton server takes it")


class Release(Section):
    """When the pointer of the model moves to the new release."""

    promote_if: Literal["proven", "better", "never"] = Field(
        "proven",
        description="proven: when every gate passed; better: when it also beats the current release on the test rows",
    )
    skip_if_unchanged: bool = Field(
        False, description="end at once where data, model and recipe are those of the current release"
    )


class Store(Section):
    """Where checkpoints and releases live."""

    uri: str = Field(min_length=1, description="s3://bucket/prefix, or a local folder")
    keep_checkpoints: Annotated[int, Field(ge=2)] = Field(2, description="newest checkpoints that a run keeps")
    keep_releases: Positive | None = Field(
        10, description="newest releases of a model that a release leaves, with the runs that made them; null: all"
    )
    keep_tokens_days: Positive | None = Field(
        7,
        description="days, at least, for which other nodes find tokenized texts in the store (of recipes that share it "
        "the shortest counts); null: none are put there",
    )
    lease_ttl_s: Annotated[int, Field(ge=1, le=86_400)] = Field(
        30, description="seconds after which a silent owner of the run is replaced"
    )
    max_unsynced_minutes: Positive = Field(
        30, description="minutes without a successful upload, of one rank or all, before stopping"
    )
    single_writer: bool = Field(
        False, description="accept a store without conditional writes; nothing else may ever write this run"
    )
    allow_http: bool = Field(False, description="permit plain http to an endpoint that is not loopback")

    @field_validator("uri")
    @classmethod
    def _known_scheme(cls, uri: str) -> str:
        scheme, separator, rest = uri.partition("://")
        if separator and scheme not in ("s3", "file"):
            raise ValueError(f"has scheme {scheme!r}; use s3://bucket/prefix or a local folder")
        if uri.startswith("s3:") and not separator:  # else a folder of this name would hold the release
            raise ValueError("must read s3://bucket/prefix")
        if scheme == "s3" and separator and not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/.*)?", rest):
            raise ValueError("must read s3://bucket/prefix with a valid bucket name")
        if scheme == "s3" and separator:
            return uri.rstrip("/")
        try:
            return str(Path(uri.removeprefix("file://")).expanduser().absolute())
        except RuntimeError:
            raise ValueError(f"names a home folder that does not exist ({uri.split('/')[0]})") from None


class Recipe(Section):
    """Everything that one run is told."""

    name: str = Field(description="name of the released model")
    task: TaskName
    model: Model
    data: Data
    tuning: Tuning = Tuning()
    training: Training = Training()
    distributed: Distributed = Distributed()
    launch: Launch = Launch()
    baselines: list[str] = Field(
        default=["majority", "untrained"],
        description="majority, mean, untrained, zero-shot, one-shot, few-shot:N, linear-probe; measured on the same "
        "test split; every task has untrained, regression mean, and the last four text-classification of one label a "
        "text alone",
    )
    export: Export = Export()
    release: Release = Release()
    store: Store

    @model_validator(mode="before")
    @classmethod
    def _fill_by_task(cls, values: Any) -> Any:
        """Put the task's own defaults where the recipe says nothing."""
        keys = TASK_KEYS.get(_name_kind(_find(values, "task"), _find(values, "data", "problem_type")))
        if keys is None:
            return values
        pinned = _find(values, "export", "int8", "mode") in ("dynamic", "static")
        targets = [target for target in keys.targets if not (pinned and target == "int4")]
        int8 = {"targets": targets, "min_agreement": keys.min_agreement}
        filled = _merge({"baselines": list(keys.baselines), "export": {"int8": int8}}, values)
        if isinstance(filled.get("data"), dict) and isinstance(columns := filled["data"].get("columns", {}), dict):
            filled["data"] = filled["data"] | {"columns": _fill_columns(keys, columns)}
        return filled

    @field_validator("data")
    @classmethod
    def _fit_columns(cls, data: Data, info: ValidationInfo) -> Data:
        task = info.data.get("task")
        if task is None:
            return data
        kind = _name_kind(task, data.problem_type)
        if kind not in TASK_KEYS:
            raise ValueError(f"problem_type: {data.problem_type} is a kind of text-classification, not of {task}")
        offered = TASK_KEYS[kind].columns
        if set(data.columns) not in [set(columns) for columns in offered]:
            raise ValueError(
                f"columns names {', '.join(sorted(data.columns))}; {task} takes "
                + " or ".join(", ".join(columns) for columns in offered)
            )
        if data.labels is not None and not _has_labels(kind):
            raise ValueError(f"labels: {kind} has none; leave it out")
        return data

    @field_validator("training")
    @classmethod
    def _fit_training(cls, training: Training, info: ValidationInfo) -> Training:
        if training.packing and info.data.get("task", "causal-lm") != "causal-lm":
            raise ValueError(f"packing: is for causal-lm, not for {info.data['task']}; leave it out")
        data = info.data.get("data")
        if data is not None and data.problem_type == "regression" and training.label_smoothing_factor:
            raise ValueError("label_smoothing_factor: numbers are not smoothed; leave it out for regression")
        kind = _name_kind(info.data.get("task"), getattr(data, "problem_type", None))
        if training.class_weights is not None and kind in TASK_KEYS and not _has_labels(kind):
            raise ValueError(f"class_weights: {kind} has no labels; leave it out")
        return training

    @field_validator("distributed")
    @classmethod
    def _fit_engine(cls, distributed: Distributed, info: ValidationInfo) -> Distributed:
        training = info.data.get("training")
        if training is not None and training.torch_compile and distributed.engine != "ddp":
            raise ValueError(
                f"training.torch_compile is offered with engine: ddp, not with {distributed.engine}; leave one out"
            )
        return distributed

    @field_validator("tuning")
    @classmethod
    def _fit_shots(cls, tuning: Tuning, info: ValidationInfo) -> Tuning:
        task, data = info.data.get("task"), info.data.get("data")
        if tuning.shots is not None and data is not None and data.limit is not None:
            raise ValueError("shots and data.limit both say how many rows to train on; leave one of them out")
        labelled = task and any("label" in columns for columns in TASK_KEYS[task].columns)
        if data is not None and data.problem_type != "single_label_classification":
            labelled = False
        if tuning.shots is not None and task and not labelled:
            raise ValueError(f"shots are rows of each label, and {task} has no labels; use data.limit")
        return tuning

    @field_validator("name")
    @classmethod
    def _usable_as_key(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError(
                "must be 1–63 letters, digits, '.', '_' or '-', starting and ending with a letter or digit"
            )
        return name

    @field_validator("baselines")
    @classmethod
    def _known_baselines(cls, baselines: list[str], info: ValidationInfo) -> list[str]:
        kind = _name_kind(info.data.get("task"), getattr(info.data.get("data"), "problem_type", None))
        for baseline in baselines:
            known = TASK_KEYS.get(kind)
            offered = (*known.baselines, *known.offered) if known else ()
            if known and _BASELINE.fullmatch(baseline) and baseline.partition(":")[0] not in offered:
                raise ValueError(f"has {baseline!r}, which {kind} does not offer; use {', '.join(offered)}")
            if not _BASELINE.fullmatch(baseline):
                raise ValueError(
                    f"has {baseline!r}; use majority, mean, untrained, zero-shot, one-shot, few-shot:N or linear-probe"
                )
        return baselines

    @field_validator("export")
    @classmethod
    def _fit_export(cls, export: Export, info: ValidationInfo) -> Export:
        if info.data.get("task") == "seq2seq-lm":
            if export.triton:
                raise ValueError("triton: seq2seq-lm is exported as encoder and decoder, which have no layout there")
            if export.int8.mode == "static":
                raise ValueError("int8.mode: static is not offered for seq2seq-lm; use auto, dynamic or weights")
        return export

    @property
    def kind(self) -> str:
        """The name of its task in `job.tasks`."""
        return _name_kind(self.task, self.data.problem_type)

    @property
    def merges(self) -> bool:
        """Whether the trained model is made of what the training leaves: parts of it, or a head in other units."""
        return self.tuning.method != "full" or self.data.problem_type == "regression"

    def hash_sections(self, *sections: str) -> str:
        """Return the sha256 (hex) of the named top-level sections in canonical JSON."""
        return hash_json({section: self.model_dump(mode="json")[section] for section in sections})


def _name_kind(task: Any, problem_type: Any) -> str:
    """Return the key in TASK_KEYS: the task, and what its labels are where they are not single names."""
    return str(task) if problem_type in (None, "single_label_classification") else f"{task}:{problem_type}"


def _has_labels(kind: str) -> bool:
    """Tell whether a kind of task has named labels, of rows or of words."""
    columns = {name for names in TASK_KEYS[kind].columns for name in names}
    return bool({"label", "tags"} & columns) and not kind.endswith(":regression")


def _fill_columns(keys: TaskKeys, columns: dict[str, str]) -> dict[str, str]:
    """Return the columns with those of the task that they leave out, under their own names."""
    wanted = next((names for names in keys.columns if set(columns) <= set(names)), ())
    return {name: name for name in wanted} | columns


def _find(values: Any, *keys: str) -> Any:
    """Return what a tree of mappings has under the keys; None where there is none."""
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _merge(defaults: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Return `values` over `defaults`, section by section."""
    merged = defaults | values
    for key, inner in defaults.items():
        if isinstance(inner, dict) and isinstance(values.get(key), dict):
            merged[key] = _merge(inner, values[key])
    return merged


def hash_json(value: Any) -> str:
    """Return the sha256 (hex) of `value` in canonical JSON (sorted keys, no spaces)."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
