"""The work folder: whose it is, and that it serves for temporary files where nothing else can be written to."""

from __future__ import annotations

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from job.errors import SecurityRefused

_READ_BACK = ("runs", "cache")
"""What lies in a work folder and is read again, see `job.recipe.Run`."""


def refuse_foreign(work: Path) -> None:
    """Raise SecurityRefused (19) where `work` was put by somebody else where everybody may put folders, such as /tmp.

    So it is with what lies in it, where it is such a folder itself. What a run reads back from it, from its recipe to
    weights, they could replace at any moment, and what is written there they could lead elsewhere by a link. (Below a
    folder that somebody else owns, as a project's, one is a guest.)
    """
    for folder in (work, *(work / name for name in _READ_BACK)):
        if _is_open_to_all(folder.absolute().parent):
            with suppress(FileNotFoundError):
                owner = folder.lstat().st_uid  # of a link, who has laid it
                if owner not in (os.getuid(), 0):
                    raise SecurityRefused(
                        f"{folder} belongs to somebody else (uid {owner}); name another folder by --work-dir"
                    )


def make_work_folder(work: Path) -> None:
    """Make the work folder, for this user alone where everybody may put some beside it; raises as `refuse_foreign`.

    In a folder that everybody may write to, what is read back is made as well, before somebody else does so.
    """
    _make_folders(*reversed(work.absolute().parents), work)
    refuse_foreign(work)
    if _is_open_to_all(work):
        _make_folders(*(work / name for name in _READ_BACK))
        refuse_foreign(work)  # somebody else may have been faster


def _make_folders(*folders: Path) -> None:
    for folder in (each for each in folders if not each.is_dir()):
        with suppress(FileExistsError):  # what is no folder is found by whoever writes into it
            folder.mkdir(0o700 if _is_open_to_all(folder.absolute().parent) else 0o777)


def provide_temporary_folder(work: Path) -> None:
    """Have this process and those that it starts use one in `work` where the system has none that can be written to.

    Python would take the current folder, or none: of a container that is read-only, `work` alone may be written to.
    """
    named = filter(None, map(os.environ.get, ("TMPDIR", "TEMP", "TMP")))
    if any(os.access(folder, os.W_OK | os.X_OK) for folder in (*named, "/tmp", "/var/tmp", "/usr/tmp")):
        return
    folder = work.absolute() / "tmp"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)


def _is_open_to_all(folder: Path) -> bool:
    """Tell whether everybody may put something into a folder that its owner may then not take away."""
    open_to_all = stat.S_ISVTX | stat.S_IWOTH
    return folder.is_dir() and folder.stat().st_mode & open_to_all == open_to_all
