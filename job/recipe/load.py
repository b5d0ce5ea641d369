"""Reading a recipe: YAML file, then `JOB__A__B` environment, then `--set`, then one check of all.

Every mistake is reported at once, with the place where its value stands: file and line, variable,
or `--set`. YAML is read by a safe loader that knows `1e-4` as a number and refuses a key given twice.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn, get_args

import yaml
from pydantic import BaseModel, ValidationError

from job.errors import RecipeError, SecurityRefused, contains_secret, redact
from job.recipe.schema import Column, Recipe

KeyPath = tuple[str | int, ...]

_ENV_PREFIX = "JOB__"
_MAX_BYTES = 1 << 17  # PyYAML reads 100 KiB a second
_MAX_PROBLEMS = 50
_MAX_SHOWN = 80  # characters of a value or key in a message

_YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError, RecursionError)
"""What PyYAML raises: besides its own error, whatever an explicit tag on an unfit scalar runs into."""

_SECRET_KEY = re.compile(
    r"(?:^|_)(?:secret|password|passwd|credentials?|(?:api|secret|access)_?key)(?:_|$)"
    r"|(?:^|hf_|hub_|auth_|access_|session_|security_|api_)token$",
    re.IGNORECASE,
)
_OPAQUE = re.compile(r"(?<![\w/+=.-])(?=\w*[a-z])(?=\w*[A-Z])(?=\w*[0-9])[A-Za-z0-9][A-Za-z0-9/+=_]{31,}")
"""A word that can be a key by itself: long, and with lower case, upper case and digits mixed."""
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_FREE_KEYS = {("data", "labels"), ("training", "class_weights")}  # here keys are values of the user's data

_ACCUMULATION = "accumulation is derived: write training.global_batch_size for the whole step"
_SEPARATOR = "it goes by the file's name: commas in .csv, tabs in .tsv"
_HINTS = {
    "per_device_train_batch_size": "the batch is global here: write training.global_batch_size = "
    "per-device batch × accumulation × ranks (for {value} on one rank: global_batch_size: {value})",
    "gradient_accumulation_steps": _ACCUMULATION,
    "gradient_accumulation": _ACCUMULATION,
    "gradient_clipping": "write training.max_grad_norm: {value}",
    "lr": "write training.learning_rate: {value}",
    "epochs": "write training.num_train_epochs: {value}",
    "max_epochs": "write training.num_train_epochs: {value}",
    "optim": "it is AdamW; leave it out",
    "optimizer": "it is AdamW; leave it out",
    "lora_r": "write tuning.r: {value}",
    "rank": "write tuning.r: {value}",
    "delimiter": _SEPARATOR,
    "sep": _SEPARATOR,
    "encoding": "all is read as UTF-8; convert the file",
    "per_device_eval_batch_size": "the evaluation batch is chosen by length; leave it out",
    "metric_for_best_model": "it is the task's own metric; leave it out",
    "greater_is_better": "of every task's metric the higher is the better; leave it out",
    "fp16": "write training.precision: fp16",
    "bf16": "write training.precision: bf16",
    "trust_remote_code": "remote code is never run; use a model that transformers knows itself",
}


class _Loader(yaml.SafeLoader):
    """SafeLoader with the floats (`1e-4`), booleans (not `no`, not `on`) and integers (not `010`, `12:30`) of YAML 1.2.

    It refuses duplicate keys, integers beyond 64 bits, and aliases, which can recurse or grow without bound.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":int"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            _reject("an alias (*name) has no place in a recipe; write the value out", self.peek_event())
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    _reject(f"key {_shorten(repr(key.value))} is given twice", key)
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        number = super().construct_yaml_int(node)
        if not -(2**63) <= number < 2**63:
            _reject("an integer does not fit into 64 bits", node)
        return number


def _reject(problem: str, marked: Any) -> NoReturn:
    raise yaml.MarkedYAMLError(None, None, problem, marked.start_mark)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^(?:[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+)$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)(?:[eE][-+]?[0-9]+)$"),
    list("-+0123456789."),
)


def load_recipe(reference: str, overrides: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> Recipe:
    """Return the checked recipe that `reference` (a path or the name of a shipped recipe) names.

    `overrides` are `a.b=c` strings, `environment` defaults to os.environ. Raises SecurityRefused for
    credentials in the recipe, RecipeError with all mistakes or for a missing file.
    """
    path = find_recipe(reference)
    tree, places = _read_yaml(path)
    problems = _overlay(tree, places, overrides, os.environ if environment is None else environment)
    _refuse_secrets(tree, places)
    problems += [
        f"{_find_place(keys, places) or path}: {_name(keys)}: holds half a character (a lone surrogate); write it anew"
        for keys in _find_surrogates(tree)
    ]
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        problems += [_describe(dict(item), path, places) for item in error.errors()[:_MAX_PROBLEMS]]
        if error.error_count() > _MAX_PROBLEMS:
            problems.append(f"{path}: and {error.error_count() - _MAX_PROBLEMS} more; correct these first")
    if problems:
        raise RecipeError(*dict.fromkeys(map(redact, problems)))
    return recipe


def find_recipe(reference: str) -> Path:
    """Return the file for a path or a shipped name; raise RecipeError with the names that exist."""
    path = Path(reference)
    try:
        if path.is_file():
            return path
    except OSError:  # a name that no file can have, such as one of 300 characters
        pass
    shipped = shipped_recipes()
    if reference in shipped:
        return shipped[reference]
    names = ", ".join(sorted(shipped))
    raise RecipeError(
        f"recipe {_shorten(repr(reference))}: no such file, nor a shipped recipe ({names}); check the path"
    )


def shipped_recipes() -> dict[str, Path]:
    """Return name → file of the recipes that come with the package."""
    folder = Path(str(resources.files("job"))) / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    """Return the tree of values, and for each key path where it stands."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise RecipeError(f"{path}: larger than 128 KiB; a recipe is a short YAML file")
        loader = _Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        tree = loader.construct_document(node) if node else {}
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}; correct the path or its permissions") from None
    except _YAML_ERRORS as error:
        raise RecipeError(redact(_describe_yaml(path, error))) from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}:1: holds a {type(tree).__name__}; a recipe is a mapping of keys, see `job schema`")
    return tree, {keys: f"{path}:{line}" for keys, line in _walk_lines(node, ())}


def _describe_yaml(path: Path, error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"{path}:{mark.line + 1}" if mark else str(path)
    what = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"{where}: not valid YAML: {what}"


def _walk_lines(node: yaml.Node | None, path: KeyPath) -> Iterator[tuple[KeyPath, int]]:
    """Yield (key path, 1-based line) for every value."""
    if node is None or len(path) > 8:
        return
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                yield (*path, key.value), key.start_mark.line + 1
                yield from _walk_lines(value, (*path, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value[:1000]):
            yield (*path, index), value.start_mark.line + 1


def _overlay(
    tree: dict[str, Any], places: dict[KeyPath, str], overrides: Sequence[str], environment: Mapping[str, str]
) -> list[str]:
    """Lay environment, then overrides over `tree` and `places`; return what could not be laid."""
    pairs = [
        (name, name.removeprefix(_ENV_PREFIX).lower().replace("__", "."), value)
        for name, value in sorted(environment.items())
        if name.startswith(_ENV_PREFIX)
    ]
    problems = []
    for override in overrides:
        key, separator, value = override.partition("=")
        if separator and key.strip():
            pairs.append(("--set", key.strip(), value))
        else:
            problems.append(f"--set {_shorten(override)!r}: write it as key.path=value")
    for origin, key, value in pairs:
        keys = tuple(key.split("."))
        problem = _assign(tree, keys, _read_value(value))
        if problem:
            problems.append(f"{origin}: {_shorten(key)}: {problem}")
        for covered in [place for place in places if place[: len(keys)] == keys]:
            del places[covered]
        places[keys] = origin
    return problems


def _read_value(text: str) -> Any:
    """Read the text of an override as YAML, so that 3 is a number; what is no YAML is taken as it stands."""
    try:
        return yaml.load(text, Loader=_Loader)
    except _YAML_ERRORS:
        return text


def _assign(tree: dict[str, Any], keys: Sequence[str], value: Any) -> str | None:
    for key in keys[:-1]:
        if tree.get(key) is None:  # absent, or a section whose keys are all left out
            tree[key] = {}
        tree = tree[key]
        if not isinstance(tree, dict):
            return f"{_shorten(repr(key))} is no section, so nothing can be set inside it; set it as a whole"
    tree[keys[-1]] = value
    return None


def _walk(tree: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Yield (key path, value) of every key and list item, a section before what is in it."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        inner = (*path, key if isinstance(tree, list) else str(key))
        yield inner, value
        yield from _walk(value, inner)


def _texts(path: KeyPath, value: Any) -> list[str]:
    """Return what was written at a place: the key, and the value where it is text."""
    return [text for text in (path[-1], value) if isinstance(text, str)]


def _refuse_secrets(tree: Any, places: Mapping[KeyPath, str]) -> None:
    """Refuse a value or key that is shaped like a credential, and a value under a key that names one."""
    for path, value in _walk(tree):
        named = bool(_SECRET_KEY.search(str(path[-1]))) and path[:-1] not in _FREE_KEYS and value is not None
        if named or any(map(contains_secret, _texts(path, value))):
            raise SecurityRefused(
                f"{_find_place(path, places) or 'recipe'}: {_name(path)}: holds a credential; remove it (and revoke it "
                "if it was shared), and give credentials by environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
                "HF_TOKEN"
            )


def _find_surrogates(tree: Any) -> Iterator[KeyPath]:
    """Yield the place of every text that cannot be written as UTF-8: it could be trained with, but not recorded."""
    return (path for path, value in _walk(tree) if any(map(_SURROGATE.search, _texts(path, value))))


def _find_place(path: KeyPath, places: Mapping[KeyPath, str]) -> str | None:
    """Return where a key, or else the nearest section around it, was written."""
    starts = (path[:end] for end in range(len(path), 0, -1))
    return next((places[start] for start in starts if start in places), None)


def _name(path: KeyPath) -> str:
    return _shorten(".".join(_mask(str(part)) for part in path))


def _describe(item: dict[str, Any], path: Path, places: dict[KeyPath, str]) -> str:
    """Turn one pydantic error into one sentence: place, key, value, rule, next step."""
    last = len(item["loc"]) - 1 if item["type"] in ("extra_forbidden", "missing") else None
    location = tuple(part for at, part in enumerate(item["loc"]) if at == last or not _is_union_branch(part))
    return f"{_find_place(location, places) or path}: {_name(location)}: {_rule(item, location)}"


def _is_union_branch(part: str | int) -> bool:
    kinds = ("literal", "constrained-")
    return isinstance(part, str) and (part in ("str", "float", "int") or "[" in part or part.startswith(kinds))


def _rule(item: dict[str, Any], location: KeyPath) -> str:
    value = item.get("input")
    if item["type"] == "extra_forbidden":
        return _unknown_key(str(location[-1]), location[:-1], value)
    if item["type"] == "missing":
        return "is missing; add it (`job schema` lists every key)"
    message = _mask(item["msg"].removeprefix("Value error, "))
    if item["type"] == "model_type":
        message = f"is a section, as in {{{next(iter(_section_at(location).model_fields))}: …}}"
    if item["type"] == "list_type" and isinstance(value, str):
        return f"is a list; write [{_shorten(value)}]"
    shown = "" if isinstance(value, (dict, list, BaseModel)) else f" (found {_shorten(repr(value))})"
    if item["type"] == "literal_error" and location == ("task",):
        return f"{message}{shown}; this version trains no other task"
    return f"{message[0].lower()}{message[1:]}{shown}"


def _unknown_key(key: str, parent: KeyPath, value: Any) -> str:
    if key in _HINTS:
        return "unknown key; " + _HINTS[key].format(value=_shorten(str(value)))
    known = list(_section_at(parent).model_fields)
    if parent == ("data",) and (column := key.removesuffix("_column")) in get_args(Column):
        return f"unknown key; write data.columns: {{{column}: {_shorten(str(value))}}}"
    if home := next((name for name, section in _sections() if key in section.model_fields), None):
        return f"unknown key; did you mean {home}.{key}?"
    # below this cutoff are keys that only look like it: load_best and adam_beta2
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    close += [name for name in known if min(len(key), len(name)) > 3 and (key in name or name in key)]
    return f"unknown key; did you mean {close[0]!r}?" if close else f"unknown key; known here: {', '.join(known)}"


def _shorten(text: str) -> str:
    """Return what of a value or key may be shown: masked first, because half a secret has no shape any more."""
    text = _SURROGATE.sub("�", _mask(text))
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 1]}…"


def _mask(text: str) -> str:
    return _OPAQUE.sub("***", redact(text))


def _section_at(path: KeyPath) -> type[BaseModel]:
    section: type[BaseModel] = Recipe
    for key in path:
        field = section.model_fields.get(str(key))
        if field is None:
            break
        options = (field.annotation, *get_args(field.annotation))
        section = next(
            (option for option in options if isinstance(option, type) and issubclass(option, BaseModel)), section
        )
    return section


def _sections() -> list[tuple[str, type[BaseModel]]]:
    named = [(name, _section_at((name,))) for name in Recipe.model_fields]
    return [(name, section) for name, section in named if section is not Recipe]
