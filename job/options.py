"""Arguments and options that several verbs of the command line have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

HELP = {"help_option_names": ["-h", "--help"]}
RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, as in training.seed=7; repeatable."),
]
WorkOption = Annotated[
    Path, typer.Option("--work-dir", envvar="JOB_WORK_DIR", help="Folder for runs, caches and the embedded S3.")
]
HttpOption = Annotated[bool, typer.Option("--allow-http", help="Permit plain http to a store that is not loopback.")]


def list_examples(*lines: str) -> str:
    """Click folds paragraphs; \\b keeps these lines as they are."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)
