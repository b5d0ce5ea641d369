"""The verbs of the command line: `job run`, `check`, `predict`, `show`, `verify`, `schema`, `s3`.

Only typer is imported before a verb is known, so that help and mistakes are answered at once.
"""

from __future__ import annotations

import os
import signal
import sys

if "run" in sys.argv[1:2]:  # a stop signal while the rest is imported: nothing was begun, so it is 75 and not 143

    def _leave(number: int, frame: object) -> None:
        reason = f"{signal.Signals(number).name} before anything was begun"
        print(f'{{"run_id": null, "status": "interrupted", "exit_code": 75, "reason": "{reason}"}}', flush=True)
        os._exit(75)

    for _number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(_number, _leave)

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

app = typer.Typer(
    name="job",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="Fine-tune a Hugging Face model, export it to ONNX int8, prove it, release it into S3.",
    epilog="Start here:  job s3 -- job run quickstart    Every verb: job VERB --help",
)

_TERMINATION_BYTES = 4096
_STDERR_PATIENCE_S, _RESULT_PATIENCE_S = 5.0, 60.0
"""How long the end of a run waits for who reads its tables, and for who reads its result."""

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, as in training.seed=7; repeatable."),
]
WorkOption = Annotated[
    Path, typer.Option("--work-dir", envvar="JOB_WORK_DIR", help="Folder for runs, caches and the embedded S3.")
]
HttpOption = Annotated[bool, typer.Option("--allow-http", help="Permit plain http to a store that is not loopback.")]


def _examples(*lines: str) -> str:
    """Click folds paragraphs; \\b keeps these lines as they are."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


@app.command(
    epilog=_examples(
        "job run recipe.yaml",
        "job run quickstart --set training.num_train_epochs=2 --set data.limit=2000",
        "job run recipe.yaml --run-id nightly-2026-11-23      # the same id goes on where it stopped",
        "job s3 -- job run quickstart                          # with an S3 server of its own",
    )
)
def run(
    recipe: RecipeArgument,
    set_: SetOption = None,
    run_id: Annotated[str, typer.Option(envvar="JOB_RUN_ID", help="Name of this run; the same id resumes it.")] = "",
    fresh: Annotated[bool, typer.Option("--fresh", help="Train anew, whatever this run has committed.")] = False,
    work: WorkOption = Path("work"),
) -> None:
    """Fine-tune, evaluate, export, prove and release; what is already committed is skipped.

    Progress and tables go to stderr. The last line on stdout is the result, one JSON object.
    """

    def action() -> int:
        from job.launch import find_place
        from job.recipe import load_recipe

        place = find_place()
        known = run_id or place.run_id
        with _early_result(work, _check_run_id(known) if known and place.node_rank == 0 else None):
            loaded = load_recipe(recipe, set_ or [])
        from job.identity import name_run

        name = known or name_run(loaded)
        if place.node_rank:
            from job.member import run_member

            result = run_member(loaded, name, work, fresh, place)
            _leave_termination_message(result)
        else:
            from job.pipeline import run_pipeline
            from job.report import format_result

            result = run_pipeline(loaded, name, work, fresh, place)
            _leave_result(result, format_result(result))
        if result["exit_code"]:
            os._exit(int(result["exit_code"]))  # a transfer that was given up may still run in its threads
        return 0

    _finish(action, as_json=True)


@app.command(
    epilog=_examples("job check recipe.yaml", "job check imdb-distilbert --offline   # the recipe alone, no network")
)
def check(
    recipe: RecipeArgument,
    set_: SetOption = None,
    offline: Annotated[bool, typer.Option("--offline", help="Probe neither data, model nor store.")] = False,
    work: WorkOption = Path("work"),
) -> None:
    """Validate a recipe, print the plan, and probe data, model and store."""

    def action() -> int:
        from job.recipe import load_recipe

        loaded = load_recipe(recipe, set_ or [])
        from job.plan import print_plan

        print_plan(loaded, work, offline)
        return 0

    _finish(action)


@app.command(
    epilog=_examples(
        'job predict s3://bucket/prefix/models/reviews "what a film"          # the current release',
        'job predict s3://bucket/prefix/models/reviews/VERSION "what a film"  # a pinned one',
        "cat texts.txt | job predict ./bundle --precision fp32",
    )
)
def predict(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="…/models/<name>, …/models/<name>/<version>, or a folder.")
    ],
    text: Annotated[list[str] | None, typer.Argument(metavar="[TEXT]...", help="Without: lines from stdin.")] = None,
    precision: Annotated[str, typer.Option(help="auto (int8 where released), int8, fp32 or an int8 target.")] = "auto",
    pairs: Annotated[bool, typer.Option("--pairs", help="Each text is two, with a tab between them.")] = False,
    allow_http: HttpOption = False,
    work: WorkOption = Path("work"),
) -> None:
    """Answer from the released ONNX, one JSON line per text. Imports neither torch nor transformers."""

    def action() -> int:
        from job.predict import open_predictor

        predictor = open_predictor(model, cache=work / "cache" / "bundles", precision=precision, allow_http=allow_http)
        texts = text or [line.rstrip("\r\n") for line in sys.stdin]
        for answer in predictor.predict([_split_pair(line) for line in texts] if pairs else texts):
            print(json.dumps(answer, ensure_ascii=False))
        return 0

    _finish(action)


@app.command(
    epilog=_examples(
        "job show s3://bucket/prefix                  # runs and releases",
        "job show s3://bucket/prefix/runs/RUN-ID      # one run: phase, lease, attempts, stages, checkpoints",
        "job show s3://bucket/prefix/runs/RUN-ID --events   # what happened when, over all attempts",
        "job show s3://bucket/prefix/runs/RUN-ID --follow   # the same as it happens, until the run ends",
    )
)
def show(
    uri: Annotated[str, typer.Argument(metavar="URI", help="A store, or one run in it.")],
    events: Annotated[bool, typer.Option("--events", help="What every attempt of this run noted, in order.")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Events as they come, until this run ends.")] = False,
    allow_http: HttpOption = False,
) -> None:
    """List runs, attempts, checkpoints and releases under a store; reads only the store."""

    def action() -> int:
        from job.report.console import print_listing
        from job.store.inventory import follow_events, list_events, list_inventory

        if follow:
            for row in follow_events(uri, allow_http=allow_http):
                print("  ".join(filter(None, row)), flush=True)
            return 0
        listing = list_events if events else list_inventory
        for title, headings, rows in listing(uri, allow_http=allow_http):
            print_listing(title, headings, rows)
        return 0

    _finish(action)


@app.command(
    epilog=_examples(
        "job verify s3://bucket/prefix/models/reviews",
        "job verify s3://bucket/prefix/runs/RUN-ID             # every checkpoint of a run",
        "job verify s3://bucket/prefix/runs/RUN-ID/checkpoints/e0001-s00000500-0f3c9a12",
    )
)
def verify(
    uri: Annotated[
        str, typer.Argument(metavar="URI", help="A release, a model (its current release), a checkpoint, a run.")
    ],
    allow_http: HttpOption = False,
    work: WorkOption = Path("work"),
) -> None:
    """Download every object and compare size and sha256 with the manifest; names what differs (exit code 17)."""

    def action() -> int:
        from job.errors import NoValidCheckpoint
        from job.store.inventory import verify_uri

        count, problems = verify_uri(uri, work / "cache" / "verify", allow_http=allow_http)
        if problems:
            raise NoValidCheckpoint("\n".join(problems))
        print(f"{uri}: {count} objects match their manifest")
        return 0

    _finish(action)


@app.command(epilog=_examples("job schema > recipe.schema.json   # point your editor's YAML plug-in at it"))
def schema() -> None:
    """Print the recipe's JSON Schema."""

    def action() -> int:
        from job.recipe import Recipe

        print(json.dumps(Recipe.model_json_schema(), indent=2))
        return 0

    _finish(action)


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog=_examples(
        "job s3 -- job run quickstart",
        "job s3 --dir /data/s3 -- bash            # AWS_* are set inside",
        "job s3 --bucket reviews -- job run recipe.yaml",
    ),
)
def s3(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="What to run beside the server.")],
    folder: Annotated[Path | None, typer.Option("--dir", help="Where objects lie (default: <work-dir>/s3).")] = None,
    bind: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    bucket: Annotated[list[str] | None, typer.Option(help="Bucket to create beside finetune-job; repeatable.")] = None,
    work: WorkOption = Path("work"),
) -> None:
    """Run COMMAND beside a real S3 server (SeaweedFS), with the AWS_* variables that lead to it.

    The server listens on loopback and stops with the command; its objects stay in DIR. It has the
    bucket s3://finetune-job. The exit code is the command's.
    """

    def action() -> int:
        from job.store.server import DEFAULT_BUCKET, run_beside_server

        return run_beside_server(command, (folder or work / "s3").absolute(), bind, [DEFAULT_BUCKET, *(bucket or [])])

    _finish(action)


def _check_run_id(run_id: str) -> str:
    import re

    from job.errors import RecipeError

    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", run_id) or ".." in run_id:
        raise RecipeError(f"--run-id: {run_id[:140]!r} must be 1–128 letters, digits, '.', '_' or '-'")
    return run_id


@contextmanager
def _early_result(work: Path, run_id: str | None) -> Iterator[None]:
    """Leave a result also where a run with a known name never began: a batch script looks there for the code."""
    from job.errors import JobError

    try:
        yield
    except JobError as error:
        if run_id:
            from job.launch.verdict import judge_error
            from job.recipe import write_json

            with suppress(OSError):
                result = {"run_id": run_id, "status": "failed", "release": None} | judge_error(error)
                write_json(work / "runs" / run_id / "result.json", result)
        raise


def _finish(action: Callable[[], int], as_json: bool = False) -> NoReturn:
    """Run a verb; turn its errors into one sentence each on stderr, and an exit code."""
    from job.launch.logs import set_up_logging
    from job.launch.verdict import judge_error

    set_up_logging(sys.stderr)
    try:
        code = action()
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # of a verb that answers: whoever read has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 0
    except Exception as error:
        code = _report_error(judge_error(error), as_json)
    raise SystemExit(code)


def _split_pair(line: str) -> str | tuple[str, str]:
    first, tab, second = line.partition("\t")
    return (first, second) if tab else line


def _report_error(verdict: dict[str, Any], as_json: bool) -> int:
    text = "".join(f"error: {line}\n" for line in verdict["reason"].splitlines() or [""])
    if as_json:
        _leave_result({"run_id": None, "status": "failed", **verdict, "release": None}, text)
    else:
        print(text, end="", file=sys.stderr)
    return int(verdict["exit_code"])


def _leave_result(result: dict[str, Any], text: str) -> None:
    """Say how a run ended: `text` to people, a line of JSON to programs; no pipe that nobody reads changes its code."""
    from job.launch.logs import write_where_read

    _leave_termination_message(result)
    write_where_read(sys.stderr, text, _STDERR_PATIENCE_S)
    write_where_read(sys.stdout, json.dumps(result) + "\n", _RESULT_PATIENCE_S)


def _leave_termination_message(result: dict[str, Any]) -> None:
    """Kubernetes shows this file as the container's last word; elsewhere it does not exist."""
    message = Path(os.environ.get("JOB_TERMINATION_LOG", "/dev/termination-log"))
    if message.exists():
        with suppress(OSError):
            message.write_bytes(fit_termination_message(result))


def fit_termination_message(result: dict[str, Any]) -> bytes:
    """Return JSON of at most 4,096 bytes (more than that Kubernetes cuts off): texts are shortened until it fits."""
    for length in (3000, 1000, 300, 100):
        about = {key: result.get(key) for key in ("run_id", "status", "exit_code", "reason", "release")}
        about = {key: value[:length] if isinstance(value, str) else value for key, value in about.items()}
        data = json.dumps(about).encode()
        if len(data) <= _TERMINATION_BYTES:
            break
    return data


def main() -> None:
    """Entry point of the `job` command."""
    app()


if __name__ == "__main__":
    main()
