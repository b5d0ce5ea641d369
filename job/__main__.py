"""The verbs of the command line: `job run`, `check`, `compare`, `predict`, `show`, `verify`, `schema`, `s3`.

Only typer is imported before a verb is known, so that help and mistakes are answered at once.
"""

from __future__ import annotations

import os
import signal
import sys

if sys.argv[1:2] in (["run"], ["compare"]):  # a stop signal during the imports: nothing was begun, so it is 75, not 143

    def _leave(number: int, frame: object) -> None:
        reason = f"{signal.Signals(number).name} before anything was begun"
        print(f'{{"run_id": null, "status": "interrupted", "exit_code": 75, "reason": "{reason}"}}', flush=True)
        os._exit(75)

    for _number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(_number, _leave)

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from job.ending import early_result, finish, leave_result, leave_termination_message
from job.options import HELP, HttpOption, RecipeArgument, SetOption, WorkOption, list_examples
from job.release_verbs import releases
from job.streams import escape_controls, prepare_streams, speak_utf8

app = typer.Typer(
    name="job",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings=HELP | {"max_content_width": 110},
    help="Fine-tune a Hugging Face model, export it to ONNX int8, prove it, release it into S3.",
    epilog="Start here:  job s3 -- job run quickstart    Every verb: job VERB --help",
)
app.add_typer(releases, name="release", context_settings=HELP)


@app.command(
    epilog=list_examples(
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
        from job.work_folder import refuse_foreign

        place = find_place()
        refuse_foreign(work)
        known = run_id or place.run_id
        with early_result(work, _check_run_id(known) if known else "", place.node_rank):
            loaded = load_recipe(recipe, set_ or [])
        from job.identity import name_run
        from job.opening import run_node

        name = known or name_run(loaded)
        result = run_node(loaded, name, work, fresh, place)
        if place.node_rank:
            leave_termination_message(result)
        else:
            from job.report import format_result

            leave_result(result, format_result(result, loaded))
        if result["exit_code"]:
            os._exit(int(result["exit_code"]))  # a transfer that was given up may still run in its threads
        return 0

    finish(action, as_json=True)


@app.command(
    epilog=list_examples(
        "job check recipe.yaml", "job check imdb-distilbert --offline   # the recipe alone, no network"
    )
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

    finish(action)


@app.command(
    epilog=list_examples(
        "job compare quickstart --methods majority,zero-shot,few-shot:8,partial,lora,full",
        "job compare recipe.yaml --methods partial:head,partial:last-2-layers,lora:8,lora:32,full",
    )
)
def compare(
    recipe: RecipeArgument,
    methods: Annotated[str, typer.Option(help="With commas between: full, partial, lora, and baselines.")],
    set_: SetOption = None,
    run_id: Annotated[
        str, typer.Option(envvar="JOB_RUN_ID", help="Name of this comparison; the same resumes it.")
    ] = "",
    work: WorkOption = Path("work"),
) -> None:
    """Tune by several methods on the same rows and seeds, and write one report of what each bought and cost.

    Every method that trains is a run of its own, whose release nobody follows until `job release promote`.
    """

    def action() -> int:
        from job.launch import find_place
        from job.recipe import load_recipe
        from job.work_folder import refuse_foreign

        place = find_place()
        refuse_foreign(work)
        comparison_recipe = load_recipe(recipe, set_ or [])
        from job.comparing import compare_methods, plan_comparison
        from job.identity import name_run
        from job.report import format_comparison

        comparison = plan_comparison(comparison_recipe, [word.strip() for word in methods.split(",") if word.strip()])
        known = run_id or place.run_id
        name = _check_run_id(known) if known else f"compare-{name_run(comparison_recipe)}"
        result = compare_methods(comparison, name, work, place)
        leave_result(result, format_comparison(result))
        if result["exit_code"]:
            os._exit(int(result["exit_code"]))
        return 0

    finish(action, as_json=True)


@app.command(
    epilog=list_examples(
        'job predict s3://bucket/prefix/models/reviews "what a film"          # the current release',
        'job predict s3://bucket/prefix/models/reviews/VERSION "what a film"  # a pinned one',
        "cat texts.txt | job predict ./bundle --precision fp32",
        "job predict ./bundle --file reviews.csv > answers.jsonl            # columns text and, for pairs, text_pair",
        "job predict ./bundle --file reviews.jsonl --bench                  # how fast is it here",
    )
)
def predict(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="…/models/<name>, …/models/<name>/<version>, or a folder.")
    ],
    text: Annotated[list[str] | None, typer.Argument(metavar="[TEXT]...", help="Without: --file, or stdin.")] = None,
    file: Annotated[Path | None, typer.Option(help="A file of texts: lines, .jsonl, .csv or .tsv.")] = None,
    format_: Annotated[
        Literal["auto", "lines", "jsonl", "csv", "tsv"],
        typer.Option("--format", help="Of --file or stdin; auto: by name."),
    ] = "auto",
    precision: Annotated[str, typer.Option(help="auto (int8 where released), int8, int4, fp32 or a target.")] = "auto",
    pairs: Annotated[bool, typer.Option("--pairs", help="A line is two texts, with a tab between them.")] = False,
    threads: Annotated[int, typer.Option(min=0, help="Threads, at most one per processor; 0: that many.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens that a language model writes, at most.")] = 64,
    chat: Annotated[bool, typer.Option("--chat", help="A text is what a user says to a language model.")] = False,
    bench: Annotated[bool, typer.Option("--bench", help="Answer nothing: print how many texts a second.")] = False,
    allow_http: HttpOption = False,
    work: WorkOption = Path("work"),
) -> None:
    """Answer from the released ONNX, one JSON line per text. Imports neither torch nor transformers."""

    if text and file:
        raise typer.BadParameter("give texts or --file, not both")

    def action() -> int:
        from job.predict import measure_speed, open_predictor, open_texts, split_pair

        speak_utf8()
        cache = work / "cache" / "bundles"
        predictor = open_predictor(
            model, cache, precision, allow_http=allow_http, threads=threads, max_new_tokens=max_new_tokens
        )
        with open_texts(file, format_, pairs) as read:
            texts = (split_pair(line) if pairs else line for line in text) if text else read
            if chat:
                texts = ([{"role": "user", "content": said}] if isinstance(said, str) else said for said in texts)
            answers = [measure_speed(predictor, texts)] if bench else predictor.stream(texts)
            for answer in answers:
                print(json.dumps(answer, ensure_ascii=False))
        return 0

    finish(action)


@app.command(
    epilog=list_examples(
        "job show s3://bucket/prefix                  # runs and releases",
        "job show s3://bucket/prefix/runs/RUN-ID      # one run: phase, lease, attempts, stages, checkpoints",
        "job show s3://bucket/prefix/runs/RUN-ID --events   # what happened when, over all attempts",
        "job show s3://bucket/prefix/runs/RUN-ID --follow   # the same as it happens, until the run ends",
    )
)
def show(
    uri: Annotated[str, typer.Argument(metavar="URI", help="A store, a run in it, or …/models/<name>.")],
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
                print("  ".join(filter(None, map(escape_controls, row))), flush=True)
            return 0
        listing = list_events if events else list_inventory
        for title, headings, rows in listing(uri, allow_http=allow_http):
            print_listing(title, headings, rows)
        return 0

    finish(action)


@app.command(
    epilog=list_examples(
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

    finish(action)


@app.command(epilog=list_examples("job schema > recipe.schema.json   # point your editor's YAML plug-in at it"))
def schema() -> None:
    """Print the recipe's JSON Schema."""

    def action() -> int:
        from job.recipe import Recipe

        print(json.dumps(Recipe.model_json_schema(), indent=2))
        return 0

    finish(action)


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog=list_examples(
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

    finish(action)


def _check_run_id(run_id: str) -> str:
    import re

    from job.errors import RecipeError

    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", run_id) or ".." in run_id:
        raise RecipeError(f"--run-id: {run_id[:140]!r} must be 1–128 letters, digits, '.', '_' or '-'")
    return run_id


def main() -> None:
    """Entry point of the `job` command."""
    prepare_streams()
    app()


if __name__ == "__main__":
    main()
