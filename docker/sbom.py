"""Lists what an image holds, as CycloneDX 1.5 JSON on stdout: Python distributions and Debian packages.

Run inside the image: `podman run --rm -i --entrypoint python IMAGE - < docker/sbom.py`. Standard library only: the
image has nothing else for it.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from importlib import metadata
from typing import Any

Component = dict[str, Any]


def list_distributions() -> Iterator[Component]:
    """Yield what pip installed, with its licence where it names one."""
    for found in sorted(metadata.distributions(), key=lambda each: each.name.lower()):
        about = found.metadata
        licence = about.get("License-Expression") or about.get("License") or ""
        component = describe("pypi", found.name.lower(), found.version)
        if 0 < len(licence) <= 60:  # some put the whole text there
            component["licenses"] = [{"license": {"name": licence}}]
        yield component


def list_packages() -> Iterator[Component]:
    """Yield what the base's package manager installed."""
    command = ["dpkg-query", "--show", "--showformat=${Package} ${Version}\n"]
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        yield describe("deb/debian", *line.split(" ", 1))


def describe(kind: str, name: str, version: str) -> Component:
    """Return a component with its package URL (https://github.com/package-url/purl-spec)."""
    return {"type": "library", "name": name, "version": version, "purl": f"pkg:{kind}/{name}@{version}"}


if __name__ == "__main__":
    components = [*list_distributions(), *list_packages()]
    print(
        json.dumps({"bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1, "components": components}, indent=1)
    )
