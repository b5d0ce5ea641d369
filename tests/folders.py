"""What lies in a folder."""

from __future__ import annotations

from pathlib import Path


def read_all(folder: Path) -> dict[str, bytes]:
    """Return relative path → content of every file below `folder`."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
