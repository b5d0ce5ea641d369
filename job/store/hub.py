"""The Hugging Face Hub as a read-only store: revisions to commits, snapshots to folders.

Endpoint, token, proxy and CA come from HF_ENDPOINT, HF_TOKEN, HTTPS_PROXY and the usual CA
variables. A revision is resolved to its 40-hex commit before anything is downloaded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

from job.errors import AccessDenied, JobError, NotFound, SecurityRefused, Unreachable, raise_lack, redact
from job.store.objects import is_safe

Kind = Literal["model", "dataset"]
Result = TypeVar("Result")

MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "README.md", "LICENSE*"]
DATA_FILES = ["*.parquet", "*.csv", "*.tsv", "*.json", "*.jsonl", "*.txt", "README.md"]

_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPOSITORY = re.compile(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)?")


def is_repository(reference: str) -> bool:
    """Tell whether `reference` has the shape of a Hub id (`name` or `owner/name`)."""
    return bool(_REPOSITORY.fullmatch(reference)) and not reference.startswith(".")


def resolve_commit(repository: str, kind: Kind, revision: str) -> str:
    """Return the 40-hex commit that `revision` names now."""
    if _COMMIT.fullmatch(revision) and os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "True"):
        return revision

    def ask() -> str:
        from huggingface_hub import HfApi

        info = HfApi().repo_info(repository, repo_type=kind, revision=revision, timeout=30)
        return str(info.sha)

    return _call(ask, repository, kind, revision)


def list_files(repository: str, kind: Kind, commit: str) -> list[str]:
    """Return the paths of a commit's files."""

    def ask() -> list[str]:
        from huggingface_hub import HfApi

        return list(HfApi().list_repo_files(repository, repo_type=kind, revision=commit))

    return _call(ask, repository, kind, commit)


def download_snapshot(repository: str, kind: Kind, commit: str, cache: Path) -> Path:
    """Return a local folder with the files of a commit that this project reads (never code)."""

    def fetch() -> str:
        from huggingface_hub import snapshot_download

        patterns = MODEL_FILES if kind == "model" else DATA_FILES
        ignore = ["*/*"] if kind == "model" else None  # sub-folders hold other formats of the same weights
        folder = snapshot_download(
            repository,
            repo_type=kind,
            revision=commit,
            cache_dir=cache,
            allow_patterns=patterns,
            ignore_patterns=ignore,
        )
        return str(folder)

    return Path(_call(fetch, repository, kind, commit))


def _call(request: Callable[[], Result], repository: str, kind: Kind, revision: str) -> Result:
    key = "model.id" if kind == "model" else "data.source"
    os.environ.pop("HF_HUB_ENABLE_HF_TRANSFER", None)  # of others' images: a package that this one does not have
    import requests
    from huggingface_hub import errors

    _check_endpoint()
    try:
        return request()
    except errors.GatedRepoError:
        error: JobError = AccessDenied(
            f"{key}: {repository!r} is gated; accept its licence on the Hub and set HF_TOKEN to one that may read it"
        )
    except errors.RepositoryNotFoundError:
        error = NotFound(
            f"{key}: {kind} {repository!r} is neither a local path nor on the Hub (or it is private: set HF_TOKEN); "
            "check the spelling"
        )
    except errors.LocalEntryNotFoundError:  # an EntryNotFoundError, too
        error = Unreachable(f"{key}: {repository!r} is no local path, and the Hub is unreachable; run again later")
    except (errors.RevisionNotFoundError, errors.EntryNotFoundError):
        error = NotFound(f"{key}: {repository!r} has no revision {revision!r}; it was moved or removed, name another")
    except errors.OfflineModeIsEnabled:
        error = NotFound(
            f"{key}: {repository!r} is no local path, and HF_HUB_OFFLINE forbids asking the Hub; "
            "correct the path or unset HF_HUB_OFFLINE"
        )
    except errors.HfHubHTTPError as reason:
        error = _translate_status(getattr(reason.response, "status_code", 0), f"{key}: {repository!r}")
    except (errors.HFValidationError, ValueError) as reason:
        error = NotFound(f"{key}: {repository!r} is neither a local path nor a Hub id ({reason})")
    except (requests.RequestException, OSError) as reason:
        raise_lack(reason)
        if getattr(reason, "filename", None):  # of the cache: this disk's trouble
            raise
        error = Unreachable(f"{key}: {repository!r}: the Hub is unreachable ({type(reason).__name__}); run again later")
    raise error


def _check_endpoint() -> None:
    """Refuse (19) to send a token in clear text to another machine."""
    from huggingface_hub import constants, get_token

    if not (constants.HF_HUB_OFFLINE or is_safe(constants.ENDPOINT)) and get_token():
        endpoint = redact(constants.ENDPOINT)
        raise SecurityRefused(f"HF_ENDPOINT: {endpoint} would get your token in clear text; use https")


def _translate_status(status: int, what: str) -> JobError:
    if status in (401, 403):
        return AccessDenied(f"{what}: the Hub answers {status}; set HF_TOKEN to a token that may read it")
    if status == 404:
        return NotFound(f"{what}: the Hub answers 404; check id and revision")
    return Unreachable(f"{what}: the Hub answers {status}; run again later")
