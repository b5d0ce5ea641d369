"""The verbs `job release list`, `promote`, `rollback`, `prune`: which release of a model is the current one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from job.ending import finish
from job.options import HttpOption, list_examples

if TYPE_CHECKING:
    from job.store import ModelPointer

ModelArgument = Annotated[str, typer.Argument(metavar="URI", help="A model: …/models/<name>.")]
SoleOption = Annotated[
    bool,
    typer.Option("--single-writer", help="The store has no conditional writes; nothing else writes there now."),
]

releases = typer.Typer(no_args_is_help=True, help="Which release of a model is the current one, and changing that.")


@releases.command("list", epilog=list_examples("job release list s3://bucket/prefix/models/reviews"))
def list_releases(uri: ModelArgument, allow_http: HttpOption = False) -> None:
    """List the releases of a model: which is current, and which a rollback would lead to."""

    def action() -> int:
        from job.report.console import print_listing
        from job.store.inventory import list_versions

        print_listing(*list_versions(uri, allow_http=allow_http))
        return 0

    finish(action)


@releases.command("promote", epilog=list_examples("job release promote s3://bucket/prefix/models/reviews VERSION"))
def promote_release(
    uri: ModelArgument,
    version: Annotated[str, typer.Argument(metavar="VERSION", help="As `job release list` names it.")],
    single_writer: SoleOption = False,
    allow_http: HttpOption = False,
) -> None:
    """Make a release the current one, whatever is current now; nobody's gate is asked."""

    def action() -> int:
        print(f"current: {_open_pointer(uri, allow_http, single_writer).promote(version).version}")
        return 0

    finish(action)


@releases.command("rollback", epilog=list_examples("job release rollback s3://bucket/prefix/models/reviews"))
def rollback_release(uri: ModelArgument, single_writer: SoleOption = False, allow_http: HttpOption = False) -> None:
    """Make the release current again that was current before this one."""

    def action() -> int:
        print(f"current: {_open_pointer(uri, allow_http, single_writer).rollback().version}")
        return 0

    finish(action)


@releases.command(
    "prune",
    epilog=list_examples(
        "job release prune s3://bucket/prefix/models/reviews --keep 5 --dry-run   # says what would go, and why not",
        "job release prune s3://bucket/prefix/models/reviews --keep 5",
    ),
)
def prune_releases(
    uri: ModelArgument,
    keep: Annotated[int, typer.Option(min=1, help="Newest releases that stay, beside those that are needed.")] = 10,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Delete nothing; list every release and its fate.")
    ] = False,
    single_writer: SoleOption = False,
    allow_http: HttpOption = False,
) -> None:
    """Delete a model's oldest releases and the runs that made them.

    Never the current release, the one a rollback leads to, or one that another model or a run is made of.
    """

    def action() -> int:
        from job.report.console import print_listing
        from job.store import Pruner

        pruner = Pruner(uri, allow_http=allow_http, single_writer=single_writer)
        if dry_run:
            rows = [[version.name, version.why or "goes"] for version in pruner.plan(keep)]
            print_listing(f"releases of {uri}", ["version", "kept as"], rows)
            return 0
        deleted, runs = pruner.prune(keep)
        print("\n".join([*(f"deleted release {name}" for name in deleted), *(f"deleted run {run}" for run in runs)]))
        return 0

    finish(action)


def _open_pointer(uri: str, allow_http: bool, single_writer: bool) -> ModelPointer:
    """Return the pointer of the model at `uri`."""
    from job.store import ModelPointer, open_store

    return ModelPointer(open_store(uri.rstrip("/"), allow_http=allow_http, single_writer=single_writer))
