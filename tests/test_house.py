"""The house keeps its order: who may import whom, who owns which heavy library, and what no file may call."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

import job

PACKAGE = Path(job.__file__).parent
EVERYWHERE = {"__version__", "errors", "failpoints", "liveness", "processor", "recipe", "store"}
MAY_IMPORT = {
    "recipe": EVERYWHERE,
    "launch": EVERYWHERE | {"streams"},
    "store": EVERYWHERE,
    "tasks": EVERYWHERE,
    "data": EVERYWHERE | {"tasks"},
    "train": EVERYWHERE | {"tasks", "data"},
    "evaluate": EVERYWHERE | {"tasks", "data"},
    "export": EVERYWHERE | {"tasks", "data"},
    "report": EVERYWHERE | {"streams", "tasks"},
    "predict": EVERYWHERE | {"tasks"},
}
OWNERS = {
    "boto3": "store/s3.py",
    "botocore": "store/s3.py",
    "s3transfer": "store/s3.py",
    "deepspeed": "train/",
    "datasets": "data/",
    "peft": "train/",
    "optimum": "export/",
    "onnxruntime_genai": "export/genai.py",
    "resvg_py": "report/images.py",
}
WITHOUT_TORCH_AT_IMPORT = (
    "__init__.py",
    "__main__.py",
    "errors.py",
    "failpoints.py",
    "launch/",
    "liveness.py",
    "recipe/",
    "store/",
    "tasks/",
    "predict/",
)
TORCH = {"torch", "transformers", "accelerate", "deepspeed", "peft"}
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
NAMELESS = {"utils", "util", "common", "helpers", "helper", "misc", "shared", "tools"}


@dataclass(frozen=True)
class Module:
    """One file of the package: `name` is its path in job/."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.relative_to(PACKAGE).as_posix()

    @property
    def room(self) -> str:
        return self.name.split("/")[0].removesuffix(".py")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text(encoding="utf-8"))

    def imports(self, *, at_import_only: bool = False) -> Iterator[tuple[int, str]]:
        """Yield (line, dotted name) of what is imported; `at_import_only` leaves out functions and TYPE_CHECKING."""
        nodes = run_at_import(self.tree) if at_import_only else ast.walk(self.tree)
        for node in nodes:
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                origin = "." * node.level + (node.module or "")
                yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)

    def calls(self) -> Iterator[ast.Call]:
        return (node for node in ast.walk(self.tree) if isinstance(node, ast.Call))


def run_at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that run when a module is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from run_at_import(node)


MODULES = [Module(path) for path in sorted(PACKAGE.rglob("*.py"))]


def violations(find: Callable[[Module], Iterator[tuple[int, str]]]) -> list[str]:
    """Return «file:line: what» for everything that `find` yields of any module."""
    return [f"job/{module.name}:{line}: {what}" for module in MODULES for line, what in find(module)]


def test_every_room_is_known_and_has_a_docstring() -> None:
    rooms = {path.parent.name: path for path in PACKAGE.glob("*/__init__.py")}
    assert set(rooms) <= set(MAY_IMPORT), "a new room needs a line in MAY_IMPORT and in the README"
    assert len(MODULES) > 20
    for path in rooms.values():
        assert len((ast.get_docstring(Module(path).tree) or "").splitlines()) >= 2, path
    assert [module.name for module in MODULES if not ast.get_docstring(module.tree)] == []


def test_the_front_of_a_room_holds_imports_and_nothing_else() -> None:
    def find(module: Module) -> Iterator[tuple[int, str]]:
        if not module.name.endswith("/__init__.py"):
            return
        for node in module.tree.body[1:]:
            if isinstance(node, (ast.Import, ast.ImportFrom)) or ast.unparse(node).startswith("__all__ = "):
                continue
            yield node.lineno, ast.unparse(node).splitlines()[0]

    assert violations(find) == []


def test_rooms_import_only_the_rooms_that_they_may() -> None:
    def find(module: Module) -> Iterator[tuple[int, str]]:
        for line, name in module.imports():
            if name.startswith("."):
                yield line, f"relative import {name}"
            parts = name.split(".")
            if parts[0] != "job" or module.room not in MAY_IMPORT or len(parts) < 2:
                continue
            if parts[1] not in MAY_IMPORT[module.room] | {module.room}:
                yield line, f"{module.room} may not import job.{parts[1]}"

    assert violations(find) == []


def test_errors_import_nothing_of_the_house() -> None:
    names = {name for module in MODULES if module.name == "errors.py" for _, name in module.imports()}
    assert not any(name.split(".")[0] == "job" for name in names)


def test_what_answers_fast_imports_no_torch() -> None:
    def find(module: Module) -> Iterator[tuple[int, str]]:
        if module.name.startswith(WITHOUT_TORCH_AT_IMPORT):
            for line, name in module.imports(at_import_only=True):
                if name.split(".")[0] in TORCH:
                    yield line, f"imports {name} when it is imported"

    assert violations(find) == []


def test_prediction_never_imports_torch() -> None:
    def find(module: Module) -> Iterator[tuple[int, str]]:
        for line, name in module.imports():
            if module.room == "predict" and name.split(".")[0] in TORCH:
                yield line, f"imports {name}"

    assert violations(find) == []


@pytest.mark.parametrize(("library", "owner"), OWNERS.items())
def test_a_heavy_library_has_one_owner(library: str, owner: str) -> None:
    def find(module: Module) -> Iterator[tuple[int, str]]:
        for line, name in module.imports():
            if name.split(".")[0] == library and not module.name.startswith(owner):
                yield line, f"{library} belongs to job/{owner}"

    assert violations(find) == []


def test_no_pickle_is_read_or_written() -> None:
    def find(module: Module) -> Iterator[tuple[int, str]]:
        for line, name in module.imports():
            if name.split(".")[0] in PICKLES:
                yield line, f"imports {name}"
        for call in module.calls():
            named = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            if ast.unparse(call.func) in ("torch.load", "torch.save", "pd.read_pickle", "joblib.load"):
                yield call.lineno, ast.unparse(call.func)
            if named.get("weights_only") == "False" or named.get("allow_pickle") == "True":
                yield call.lineno, "reads a pickle"

    assert violations(find) == []


def test_nothing_that_was_read_is_run() -> None:
    forbidden = {
        "eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput",
        "subprocess.getstatusoutput", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "yaml.unsafe_load_all",
    }  # fmt: skip

    def find(module: Module) -> Iterator[tuple[int, str]]:
        for call in module.calls():
            function = ast.unparse(call.func)
            named = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            if function in forbidden:
                yield call.lineno, f"calls {function}"
            if function == "yaml.load" and named.get("Loader") != "_Loader":
                yield call.lineno, "yaml.load without the safe _Loader"
            if named.get("shell", "False") != "False":
                yield call.lineno, "a shell reads the command"
            if named.get("trust_remote_code", "False") != "False":
                yield call.lineno, "trusts remote code"

    assert violations(find) == []


def test_the_one_yaml_loader_is_a_safe_one() -> None:
    import yaml

    from job.recipe import load

    assert issubclass(load._Loader, yaml.SafeLoader)


def test_no_module_has_a_name_that_says_nothing() -> None:
    assert [module.name for module in MODULES if set(Path(module.name).with_suffix("").parts) & NAMELESS] == []


def test_the_checks_above_see_what_they_forbid(tmp_path: Path) -> None:
    path = tmp_path / "sample.py"
    path.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import torch\n"
        "try:\n    import transformers.trainer\nexcept ImportError:\n    pass\n"
        "class A:\n    import accelerate\n"
        "def f():\n    import deepspeed\n"
    )
    module = Module(path)
    assert [name for _, name in module.imports(at_import_only=True)] == [
        "typing.TYPE_CHECKING", "transformers.trainer", "accelerate",
    ]  # fmt: skip
    assert {name for _, name in module.imports()} >= {"torch", "deepspeed"}
