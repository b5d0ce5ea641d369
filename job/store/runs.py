"""The part of a store that belongs to one run: `runs/<run-id>/…`, and where it lies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from job.store.objects import PreconditionFailed, Store, open_store
from job.store.records import Record, dump, read_record

if TYPE_CHECKING:
    from job.recipe import Run  # to build its classes takes time that most verbs have not


class RunStore:
    """One run's prefix; keys are relative to it."""

    def __init__(self, uri: str, run_id: str, *, allow_http: bool = False, single_writer: bool = False) -> None:
        self.run_id = run_id
        self.objects: Store = open_store(f"{uri}/runs/{run_id}", allow_http=allow_http, single_writer=single_writer)

    @staticmethod
    def of(run: Run) -> RunStore:
        """Return the store of a run, as its recipe says."""
        where = run.recipe.store
        return RunStore(where.uri, run.run_id, allow_http=where.allow_http, single_writer=where.single_writer)

    @property
    def uri(self) -> str:
        """URI of the run's prefix."""
        return self.objects.uri

    def prove_reachable(self) -> None:
        """List the prefix once, so that a missing bucket or wrong key ends the run before it begins."""
        next(iter(self.objects.list("run.json")), None)

    def read_json(self, key: str) -> Record | None:
        """Return a small JSON object, or None where it is absent; a damaged one is 17."""
        return read_record(self.objects, key)

    def write_json(self, key: str, value: Record) -> None:
        """Write a small JSON object over whatever was there."""
        self.objects.write(key, dump(value))

    def write_once(self, key: str, value: Record) -> Record:
        """Write unless something is there; return what lies there afterwards."""
        try:
            self.objects.write(key, dump(value), if_absent=True)
            return value
        except PreconditionFailed:
            return self.read_json(key) or value

    def upload_report(self, path: Path, key: str) -> None:
        """Copy one file for people to look at; nothing depends on it."""
        self.objects.upload(path, key)
