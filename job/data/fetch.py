"""The stages resolve and fetch on one node: sources found, rows checked, splits tokenized.

Writes `sources.json` and `data.json` into the run's folder, and the tokenizer as it will be
released. Everything else lies in the cache and is found again by content.
"""

from __future__ import annotations

import inspect
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from job.data.columns import LabelMap, RawColumns, check_rows, pick_columns
from job.data.prepared import keep_prepared, name_inputs, note_warnings, take_prepared
from job.data.prompts import choose_prompts, describe_generation
from job.data.sources import DataSource, locate_data, read_split
from job.data.splits import (
    Splits,
    check_splits,
    check_spread,
    cut_train,
    hold_out,
    separate_splits,
    take_shots,
)
from job.data.tokenize import Encoder, TokenTable, identify_tokenizer, tokenize_split
from job.errors import CheckpointMismatch, DataError, NotFound, RecipeError, raise_lack
from job.recipe import Recipe, Run, hash_json
from job.store.cached import SharedFolders
from job.store.manifest import hash_file
from job.store.models import ModelSource, fetch_model, read_config
from job.store.release import latest_release
from job.store.runs import RunStore
from job.tasks import Examples, Task, find_end, get_task

log = logging.getLogger("job.data")

DEFAULT_MAX_LENGTH = 512
_SAMPLE_ROWS = 64
_POSITIONS_BEFORE_FIRST_TOKEN = {
    "roberta": 2, "xlm-roberta": 2, "xlm-roberta-xl": 2, "camembert": 2, "roberta-prelayernorm": 2, "mpnet": 2,
    "longformer": 2, "data2vec-text": 2, "ibert": 2, "esm": 2,
}  # fmt: skip


def fetch_sources(run: Run) -> dict[str, Any]:
    """Bring model and data to this node, check both, tokenize; return what identifies them.

    What was prepared from the same files before is taken as it is.
    """
    recipe = run.recipe
    allow_http = recipe.store.allow_http
    model = _fetch_model(run)
    source = locate_data(recipe.data, run.cache, allow_http=allow_http)
    run.write("sources.json", {"model": _describe(model), "data": _describe(source)})
    key = name_inputs(run, model, source)
    fingerprints = take_prepared(run, key)
    if fingerprints is None:
        with note_warnings() as warnings:
            fingerprints = _prepare(run, model, source)
        if name_inputs(run, model, source) == key:  # else somebody has changed a file while it was read
            keep_prepared(run, key, fingerprints, warnings)
    return _identify(model, source, fingerprints)


def _fetch_model(run: Run) -> ModelSource:
    """Bring the model here; where a run that goes on follows a model's releases, the one that it began with."""
    model, allow_http = run.recipe.model, run.recipe.store.allow_http
    begun = None if os.environ.get("JOB_FRESH") else _recall_release(run)
    if begun:
        try:
            return replace(fetch_model(begun, model.revision, run.cache, allow_http=allow_http), origin=model.id)
        except NotFound as error:
            log.warning("%s; it is what this run began with, so the current release is looked at instead", error)
    return fetch_model(model.id, model.revision, run.cache, allow_http=allow_http)


def _recall_release(run: Run) -> str | None:
    """Return the address of the release that run.json says this run began with, None where it follows none."""
    origin, allow_http = run.recipe.model.id.rstrip("/"), run.recipe.store.allow_http
    is_place = origin.startswith("s3://") or os.path.isdir(origin)
    if not is_place or latest_release(origin, allow_http=allow_http) == origin:
        return None
    version = str((RunStore.of(run).read_json("run.json") or {}).get("parent") or "").rpartition("/")[2]
    return f"{origin}/{version}" if version else None


def _prepare(run: Run, model: ModelSource, source: DataSource) -> dict[str, Any]:
    """Check and tokenize all rows; leave the records and the tokenizer, return the fingerprints of both."""
    recipe, config = run.recipe, read_config(model.path)
    splits, labels, origin = read_splits(recipe, source, config)
    task = get_task(recipe.kind)
    tokenizer = load_tokenizer(model.path, config, task)
    start = find_decoder_start(model.path) if task.is_encoder_decoder else None
    encoder = Encoder(task, tokenizer, _decide_max_length(recipe.data.max_length, tokenizer, config), start)
    # a model that writes on may be given longer prompts than it was trained on, as long as it has positions for them
    writes_on = task.generates and not task.is_encoder_decoder
    tokenizer.model_max_length = (_count_positions(config) if writes_on else None) or encoder.max_length
    about = _tokenize(run, splits, encoder) | {"labels": labels.names}
    sample = task.sample(tokenizer, _choose_sample(splits["test"]), encoder.max_length)
    asked = describe_examples(sample)
    if task.generates:
        about["generation"] = describe_generation(model.path, config, tokenizer)
        about["generation"] |= {} if start is None else {"decoder_start_token_id": start}
        asked["prompts"] = choose_prompts(splits["test"], tokenizer, encoder.max_length)
    else:
        about["tokens"]["sample"] = str(tokenize_split(sample, encoder, run.cache))
    run.write("data.json", origin | about)
    run.write("sample.json", asked)
    # for the report's worst mistakes, and for a current release, which reads them with its own tokenizer
    run.write("test.json", describe_examples(splits["test"]))
    end = {"end": find_end(tokenizer)} if task.generates else {}
    return {"data": fingerprint_splits(splits), "tokenizer": identify_tokenizer(tokenizer, splits["train"]), **end}


def read_splits(recipe: Recipe, source: DataSource, config: dict[str, Any]) -> tuple[Splits, LabelMap, dict[str, Any]]:
    """Return checked train, validation and test examples, the label map, and counts for the report."""
    data, seed = recipe.data, recipe.training.seed
    raw = {"train": _read(source, recipe, data.train)}
    for split in ("validation", "test"):
        named = getattr(data, split)
        if isinstance(named, str):
            raw[split] = _read(source, recipe, named)
    labels = LabelMap.build(data, raw["train"], _model_labels(config))
    _check_class_weights(recipe, labels)
    splits = {split: check_rows(columns, labels, data) for split, columns in raw.items()}
    set_aside = {split: examples.set_aside for split, examples in splits.items() if examples.set_aside}
    total = len(splits["train"])
    for split in ("test", "validation"):
        fraction = getattr(data, split)
        if not isinstance(fraction, str):
            # a share of all rows, of which test may have taken its part already
            share = fraction * total / max(len(splits["train"]), 1)
            by_source = raw["train"].columns[1] == "target"
            splits["train"], splits[split] = hold_out(splits["train"], share, seed, by_source=by_source)
    classes = labels.names if raw["train"].columns[2] in ("label", "labels") else []
    check_splits(splits, classes)
    before = {name: len(split) for name, split in splits.items()}
    splits = separate_splits(splits, data)
    leaked = {name: before[name] - len(split) for name, split in splits.items() if len(split) < before[name]}
    splits["train"] = take_shots(cut_train(splits["train"], data.limit, seed), recipe.tuning.shots, classes, seed)
    check_splits(splits, classes)
    if raw["train"].columns[2] == "number":
        check_spread(splits)
    return (
        splits,
        labels,
        {"rows": {name: len(split) for name, split in splits.items()}, "set_aside": set_aside, "leaked": leaked},
    )


def _check_class_weights(recipe: Recipe, labels: LabelMap) -> None:
    """Raise RecipeError (10) where `training.class_weights` names a label that the data have not."""
    weights = recipe.training.class_weights
    unknown = [name for name in weights if name not in labels.names] if isinstance(weights, dict) else []
    if unknown:
        raise RecipeError(
            f"training.class_weights: {unknown[0]!r} is no label of these data; they have "
            f"{', '.join(map(repr, labels.names[:20]))}"
        )


def _choose_sample(test: Examples) -> Examples:
    """Return test rows, the longest among them: the release is rehearsed on them."""
    longest = max(range(len(test)), key=lambda row: len(test.texts[row]))
    positions = sorted({longest, *range(min(len(test), _SAMPLE_ROWS))})
    return test.take(np.array(positions))


def describe_examples(examples: Examples) -> dict[str, Any]:
    """Return examples as JSON: {texts, pairs, targets, labels, rows}."""
    about = {"texts": examples.texts, "pairs": examples.pairs, "targets": examples.targets}
    return about | {"labels": examples.labels.tolist(), "rows": examples.rows.tolist()}


def _identify(model: ModelSource, source: DataSource, fingerprints: dict[str, Any]) -> dict[str, Any]:
    """Return what fixes the training beside the recipe: commits and fingerprints."""
    end = {"end": fingerprints["end"]} if "end" in fingerprints else {}
    return {
        "model": {"id": model.origin, "commit": model.commit, "sha256": _hash_model(model)},
        "data": {"source": source.origin, "commit": source.commit, "fingerprint": fingerprints["data"]},
        "tokenizer_sha256": fingerprints["tokenizer"],
        **end,
    }


def fingerprint_splits(splits: Splits) -> str:
    """Return one sha256 (hex) over the content of all splits."""
    return hash_json({name: examples.fingerprint for name, examples in splits.items()})


def _read(source: DataSource, recipe: Recipe, split: str) -> RawColumns:
    return pick_columns(read_split(source, recipe.data, split), recipe.data, split)


def _describe(source: ModelSource | DataSource) -> dict[str, Any]:
    about = {"origin": source.origin, "path": str(source.path), "commit": source.commit}
    return about | ({"release": source.release} if isinstance(source, ModelSource) else {})


def _model_labels(config: dict[str, Any]) -> list[str] | None:
    """Return the label names of a model that was fine-tuned before; None for LABEL_0, LABEL_1, …"""
    table = config.get("id2label") or {}
    try:
        names = [str(table[key]) for key in sorted(table, key=int)]
    except (TypeError, ValueError):
        return None
    return None if not names or all(name.startswith("LABEL_") for name in names) else names


def load_tokenizer(folder: Path, config: dict[str, Any], task: Task) -> Any:
    """Return the fast tokenizer in `folder`, with a pad token and only inputs that the task's model takes."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False)
    except Exception as error:  # the loaders of dozens of tokenizers raise errors of any kind
        raise_lack(error)
        raise DataError(f"model.id: no usable tokenizer in {folder}: {str(error)[:200]}; restore its files") from None
    if not tokenizer.is_fast:
        raise DataError(
            f"model.id: {folder} has no fast tokenizer (tokenizer.json); convert it with transformers first"
        )
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    _match_inputs(tokenizer, folder, config, task)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise DataError(f"model.id: the tokenizer in {folder} has no pad, eos or unk token; add one to its files")
    tokens = max(tokenizer.get_vocab().values(), default=0) + 1  # numbers may be left out, so they are more than it has
    if tokens > int(config.get("vocab_size", 1 << 31)):
        raise CheckpointMismatch(
            f"model.id: the tokenizer numbers {tokens:,} tokens, the model's embedding {config['vocab_size']:,}; "
            "they do not belong together, restore the tokenizer of this model"
        )
    return tokenizer


def _match_inputs(tokenizer: Any, folder: Path, config: dict[str, Any], task: Task) -> None:
    """Let the tokenizer, as it is released, give only inputs that the model takes.

    BERT's tokenizer files are often used for models without segments (DistilBERT, MPNet), and a released folder
    must work as it is: `model(**tokenizer(text))`.
    """
    names = list(tokenizer.model_input_names)
    taken = inspect.signature(find_model_class(folder, task).forward).parameters
    segments = "token_type_ids" in taken and int(config.get("type_vocab_size") or 0) > 1
    if "token_type_ids" in names and not segments:
        names.remove("token_type_ids")
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names


def find_model_class(folder: Path, task: Task) -> Any:
    """Return the task's class for models of this folder's architecture; raise DataError (11) where there is none."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model_class = getattr(transformers, task.auto_class)._model_mapping[type(config)]
    except (KeyError, ValueError, OSError, TypeError, AttributeError) as error:
        raise_lack(error)
        raise DataError(
            f"model.id: transformers has no {task.name} model of the kind in {folder}; name another model"
        ) from None
    if task.generates and not task.is_encoder_decoder and type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING:
        raise DataError(
            f"model.id: {folder} is an encoder ({config.model_type}) and sees the tokens to come; name a decoder"
        )
    return model_class


def find_decoder_start(folder: Path) -> int:
    """Return the token that a model's decoder begins with; raise DataError where its files name none.

    The first mBART names none: there each target begins with the token of its language, which stands at its end.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    start = config.decoder_start_token_id
    if start is None and (folder / "generation_config.json").is_file():
        start = transformers.GenerationConfig.from_pretrained(folder).decoder_start_token_id
    if not isinstance(start, int):
        raise DataError(f"model.id: config.json in {folder} has no decoder_start_token_id; name a model that has one")
    return start


def check_max_length(asked: int | None, config: dict[str, Any]) -> int:
    """Return the positions that a model has for tokens; raise RecipeError (10) when `asked` is beyond them."""
    limit = _count_positions(config) or 1 << 20
    if asked is not None and asked > limit:
        raise RecipeError(
            f"data.max_length: {asked} tokens, but this model has {limit} positions; use {limit} or fewer"
        )
    return limit


def _count_positions(config: dict[str, Any]) -> int | None:
    """Return how many tokens a model can tell apart by place; None where it has no limit."""
    positions = config.get("max_position_embeddings")
    if positions is None and "relative_attention_num_buckets" not in config:  # T5's limit nothing
        positions = config.get("n_positions")
    return int(positions) - _POSITIONS_BEFORE_FIRST_TOKEN.get(str(config.get("model_type")), 0) if positions else None


def _decide_max_length(asked: int | None, tokenizer: Any, config: dict[str, Any]) -> int:
    """Return tokens per row: the recipe's, or the model's own limit up to 512."""
    limit = check_max_length(asked, config)
    return asked or min(limit, int(tokenizer.model_max_length), DEFAULT_MAX_LENGTH)


def _tokenize(run: Run, splits: Splits, encoder: Encoder) -> dict[str, Any]:
    """Tokenize every split and save the tokenizer; return paths, length statistics and pad id."""
    tokenizer = encoder.tokenizer
    days = run.recipe.store.keep_tokens_days
    shared = SharedFolders(run, "tokens", days) if days else None
    folders = {name: tokenize_split(split, encoder, run.cache, shared) for name, split in splits.items()}
    # to use it leaves the length at which it cuts in its file; where all tables were there already, nobody has
    next(iter(encoder.task.encode(tokenizer, splits["train"].take(np.arange(1)), encoder.max_length)), None)
    tokenizer.save_pretrained(run.tokenizer)
    lengths = TokenTable.open(folders["train"]).lengths
    return {
        "tokens": {name: str(folder) for name, folder in folders.items()},
        "max_length": encoder.max_length,
        "pad_id": int(tokenizer.pad_token_id),
        "mean_tokens": round(float(np.mean(lengths)), 1),
        "truncated_share": TokenTable.measure_cut(folders["train"]),
    }


def _hash_model(model: ModelSource) -> str:
    """Return the commit where there is one, else one sha256 over config and weights."""
    files = [model.path / "config.json", *sorted(model.path.glob("*.safetensors"))]
    return model.commit or hash_json([hash_file(path) for path in files])
