"""Can this store keep two writers apart? Asked at every start, because the commit protocol hangs on it."""

from __future__ import annotations

from contextlib import suppress

from job.errors import JobError, RecipeError
from job.store.objects import PreconditionFailed, Store
from job.store.records import dump, new_nonce, swap


def probe_conditional_writes(objects: Store) -> None:
    """Write a probe object under both conditions; raise RecipeError (10) when the server ignores one of them."""
    key = f"probe-{new_nonce()}.json"
    try:
        swap(objects, key, {"nonce": new_nonce()}, None)
        found = objects.read(key)
        if found is None:
            raise _refuse(objects, "does not show an object right after it was written")
        etag = found.etag  # what reading tells must hold as a condition: a gateway may change it on the way
        _expect_refusal(objects, key, "If-None-Match", if_absent=True)
        swap(objects, key, {"nonce": new_nonce()}, etag)
        _expect_refusal(objects, key, "If-Match", if_match=etag)
    except PreconditionFailed as error:
        raise _refuse(objects, f"refused a write whose condition held ({error})") from None
    finally:
        with suppress(JobError):  # a probe that stays costs nothing; who may not delete is told at the first retention
            objects.delete([key])


def _expect_refusal(
    objects: Store, key: str, name: str, *, if_absent: bool = False, if_match: str | None = None
) -> None:
    with suppress(PreconditionFailed):
        objects.write(key, dump({"nonce": new_nonce()}), if_absent=if_absent, if_match=if_match)
        raise _refuse(objects, f"ignores {name}")


def _refuse(objects: Store, what: str) -> RecipeError:
    return RecipeError(
        f"store.uri: {objects.uri} {what}, so two attempts of a run could not be kept apart; use a store with "
        "conditional writes, or set store.single_writer: true (--single-writer) if nothing else ever writes here"
    )
