"""The exception tree, which is the table of exit codes, and the redaction of secrets.

    JobError                    1   unexpected
    ├── RecipeError            10   the recipe is wrong
    ├── DataError              11   the data are wrong
    ├── AccessDenied           12   credentials or permissions
    ├── NotFound               13   bucket, model or data set does not exist
    ├── Diverged               14   NaN or Inf in training
    ├── GateFailed             15   parity or quality gate: nothing released, checkpoint kept
    ├── CheckpointMismatch     16   checkpoint does not fit recipe, tokenizer or data
    ├── NoValidCheckpoint      17   checkpoints exist, none is valid
    ├── NoProgress             18   three attempts without progress
    ├── SecurityRefused        19   refused for security
    ├── Interrupted            75   checkpoint committed, run again
    ├── Fenced                 76   a newer attempt owns this run
    ├── Unreachable            77   store or Hub unreachable past the deadline
    ├── ResourceExhausted      78   disk, memory or hardware of this node
    └── PeerLost               79   a peer was lost or hangs

A message names the key or file, the value found, the rule, and the next step. Exceptions of
boto3, ONNX Runtime, DeepSpeed and the like are turned into one of these where they arise.
"""

from __future__ import annotations

import errno
import os
import re


class JobError(Exception):
    """Base of every error that decides an exit code; raised itself only for the unexpected."""

    exit_code = 1
    retry: dict[str, int] | None = None
    """Where the same node should try again at once: the keys of `training` to change for it, {} for none."""

    def __init__(self, *messages: str, retry: dict[str, int] | None = None) -> None:
        super().__init__(*messages)
        self.retry = retry


class RecipeError(JobError):
    """The recipe is wrong. Carries every problem found, one sentence each."""

    exit_code = 10

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class DataError(JobError):
    """Rows, columns, labels or splits are not what the recipe says."""

    exit_code = 11


class AccessDenied(JobError):
    """Wrong or missing credentials, or a permission that the credentials lack."""

    exit_code = 12


class NotFound(JobError):
    """A bucket, key, model or data set does not exist."""

    exit_code = 13


class Diverged(JobError):
    """The loss became NaN or infinite, or fp16 has no scale left at which the gradients are finite."""

    exit_code = 14


class GateFailed(JobError):
    """The export is not as good as the original; nothing is released, the checkpoint is kept."""

    exit_code = 15


class CheckpointMismatch(JobError):
    """What lies in the store belongs to another recipe, tokenizer or data."""

    exit_code = 16


class NoValidCheckpoint(JobError):
    """Something is stored, but nothing of it can be verified."""

    exit_code = 17


class NoProgress(JobError):
    """Three attempts in a row brought no newer commit."""

    exit_code = 18


class SecurityRefused(JobError):
    """Input that could run code, escape a folder or leak a secret."""

    exit_code = 19


class Interrupted(JobError):
    """Stopped by a signal or deadline after committing; run again to go on."""

    exit_code = 75

    def __init__(self, message: str, *, together: bool = False) -> None:
        super().__init__(message)
        self.together = together
        """Whether all processes of the group know of it or can end without this one: nobody needs to be told."""


class Fenced(JobError):
    """A newer attempt owns this run; this one stops quietly."""

    exit_code = 76


class Unreachable(JobError):
    """The store or the Hub did not answer before the deadline."""

    exit_code = 77


class ResourceExhausted(JobError):
    """Disk, memory or hardware of this node gave out."""

    exit_code = 78


class PeerLost(JobError):
    """Another process of this run was lost or hangs."""

    exit_code = 79


PERMANENT = frozenset(range(10, 20)) | {2}
"""Codes that no retry can mend: somebody must change something first."""

_NO_MEMORY = re.compile(
    r"can(?:'t|not) allocate memory|bad_alloc|failed to allocate memory|can't start new thread", re.IGNORECASE
)


def lacks_memory(error: BaseException | str) -> bool:
    """Tell whether an error, or its text, is how Python, torch or ONNX Runtime say that memory is exhausted."""
    return isinstance(error, MemoryError) or _says(error, _NO_MEMORY)


def _says(error: BaseException | str, pattern: re.Pattern[str]) -> bool:
    """Search a text. A ValueError or KeyError is about a value, and quotes it: a user's rows may say anything."""
    return not isinstance(error, (ValueError, KeyError)) and bool(pattern.search(str(error)))


_LIMITS = (errno.EMFILE, errno.ENFILE, errno.EAGAIN)
_NO_MORE = re.compile(r"too many open files|can't start new thread", re.IGNORECASE)


def exceeds_limits(error: BaseException | str) -> bool:
    """Tell whether an error, or its text, is how Python or torch says that no more files or processes are allowed."""
    return getattr(error, "errno", None) in _LIMITS or _says(error, _NO_MORE)


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _list_numbers(numbers: tuple[int, ...]) -> str:
    """Return a pattern for one, as Python writes it or a library in Rust (safetensors, tokenizers), in no OSError."""
    return rf"(?:os error |\[Errno )({'|'.join(map(str, numbers))})\b"


_NO_DISK = re.compile(rf"{_list_numbers(_FULL)}|\d requested and \d+ written|Not enough free space to write \d")
"""A full disk, an exhausted quota and a file that is too large for RLIMIT_FSIZE. What `shutil.Error` is about stands
only in its text; so it does in NumPy's two.
"""


def lacks_disk(error: BaseException | str) -> bool:
    """Tell whether an error, or its text, is how Python, NumPy or a Rust library says that a disk or quota is full."""
    return getattr(error, "errno", None) in _FULL or _says(error, _NO_DISK)


_BROKEN = (errno.EIO, errno.ESTALE)
_NO_ANSWER = re.compile(rf"{_list_numbers(_BROKEN)}|(?:Input/output error|Stale file handle) \(\d")
"""A disk or a mount that is broken, as they say it, or torch, which writes the number in brackets."""


def lacks_answer(error: BaseException | str) -> bool:
    """Tell whether an error, or its text, is how Python or a Rust library says that a disk or a mount is broken."""
    return getattr(error, "errno", None) in _BROKEN or _says(error, _NO_ANSWER)


def blames_node(error: BaseException | str) -> bool:
    """Tell whether an error, or its text, says that this node lacks memory, disk, files, processes or a mount."""
    return lacks_memory(error) or lacks_disk(error) or exceeds_limits(error) or lacks_answer(error)


def raise_lack(error: BaseException) -> None:
    """Raise the error, or that of those which led to it, that says something of this node; return where none does.

    For whoever is about to say that a file is wrong: transformers raises its own error where one cannot be read.
    """
    cause: BaseException | None = error
    while cause is not None:
        if blames_node(cause):
            raise cause from None
        cause = cause.__cause__ or cause.__context__


_SECRETS = re.compile(
    r"""(?P<aws>(?-i:(?<![A-Za-z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Z0-9])))
      | (?P<hub>(?-i:(?<![A-Za-z0-9])hf_(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{16,}))
      | (?P<query>[?&](?:[a-z0-9_-]{0,40}[_-])?(?:token|sig|signature|credential|secret|password|key)=)[^\s&"',}]{6,}
      | (?P<lead>(?<![A-Za-z0-9])(?:(?:X-Amz-)?(?:Signature|Security-Token|Credential)= | bearer\s+
          | (?:[A-Za-z0-9_-]{0,40}[_-])?  # AWS_SECRET_ACCESS_KEY, hf_token, but neither tokenizer nor pad_token
            (?:secret | password | passwd | (?:secret|access|api)[_-]?(?:access[_-]?)?key
              | (?<!pad_)(?<!eos_)(?<!bos_)(?<!sep_)(?<!cls_)(?<!unk_)(?<!mask_)token)
            ["']?\s*[=:]\s*["']?))
        (?P<value>[^\s&"',}]{6,})
      | (?P<scheme>://)(?P<user>[^/@\s:]+:[^/@\s]+|[^/@\s:]{16,})@""",
    re.VERBOSE | re.IGNORECASE,
)
_SECRET_VARIABLE = re.compile(
    r"(?:secret|password|passwd|token|credentials?|(?:api|access|account|storage|private)_?key)(?:_id)?$", re.IGNORECASE
)
_MIN_SECRET_LENGTH = 8


def contains_secret(text: str) -> bool:
    """Tell whether `text` holds something shaped like a credential (AWS key id, Hub token, one in a URL)."""
    kinds = ("aws", "hub", "query", "user")
    return any(match.group(kind) for match in _SECRETS.finditer(text) for kind in kinds)


def redact(text: str) -> str:
    """Return `text` with `***` for everything shaped like a credential or held as one by this process' environment."""

    def mask(match: re.Match[str]) -> str:
        if match.group("user"):
            return "://***@"
        return (match.group("query") or match.group("lead") or "") + "***"

    for value in _list_own_secrets():
        text = text.replace(value, "***")
    return _SECRETS.sub(mask, text)


def _list_own_secrets() -> list[str]:
    """Return the values of variables such as HF_TOKEN, and the user and password of addresses, longest first."""
    named = [value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name)]
    named += [value.partition("://")[2].rpartition("@")[0] for value in os.environ.values()]  # HTTPS_PROXY and others
    return sorted((value for value in named if len(value) >= _MIN_SECRET_LENGTH), key=len, reverse=True)
