"""Building and running the image with podman on a Debian host, without a Docker daemon or an image registry.

The base of docker/Dockerfile is stood in for by a Debian of mmdebstrap's under the same name.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
IMAGE = "localhost/finetune-job-under-test:cpu"
# crun refuses the hybrid cgroups of some hosts; a container of one's own limits may not be raised above the host's
CONTAINERS_CONF = """
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=32768:32768"]
netns = "host"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""


def podman(*words: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Run podman; its failure is the caller's to judge."""
    # its monitor leaves files where it is started
    options |= {"cwd": tempfile.gettempdir()}
    return subprocess.run(["podman", *words], capture_output=True, text=True, timeout=600, **options)  # type: ignore[call-overload]


def configure(folder: Path) -> None:
    """Have podman and buildah of this process' children use what works on any Debian host."""
    conf = folder / "containers.conf"
    conf.write_text(CONTAINERS_CONF)
    os.environ["CONTAINERS_CONF"] = str(conf)


def build_image() -> str:
    """Build the `cpu` target with `make image`; return what that printed."""
    import_base()
    with tempfile.TemporaryDirectory() as folder:
        options = ["--isolation", "chroot", "--network", "host", "--build-arg", "TORCH_INDEX="]
        for source, target in list_pip_mounts(Path(folder)):
            options += ["-v", f"{source}:{target}:ro"]
        words = [f"IMAGE_OPTIONS={shlex.join(options)}", "TARGET=cpu", f"IMAGE={IMAGE}", "ENGINE=podman"]
        done = subprocess.run(["make", "image", *words], cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def import_base() -> None:
    name = re.findall(r"^ARG BASE=(\S+)", (ROOT / "docker/Dockerfile").read_text(), re.MULTILINE)[0]
    if podman("image", "exists", name).returncode == 0:
        return
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "base.tar"
        packages = "--include=python3,python3-venv,ca-certificates"
        subprocess.run(
            ["mmdebstrap", "--quiet", "--variant=minbase", packages, "bookworm", str(archive)], check=True, timeout=600
        )
        assert podman("import", "--quiet", str(archive), name).returncode == 0


def list_pip_mounts(folder: Path) -> list[tuple[Path, str]]:
    """Return what the build must see of this host so that pip works there as here: certificates, settings, indexes."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    found = dict(re.findall(r"^[^.]+\.(?:\.)?([a-z-]+)='(.*)'$", listed, re.MULTILINE))
    settings = {name: found[name] for name in ("index-url", "extra-index-url", "find-links") if name in found}
    settings["cert"] = "/etc/ssl/certs/ca-certificates.crt"
    conf = folder / "pip.conf"
    conf.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
    places = {Path(word.removeprefix("file://")) for value in settings.values() for word in value.split()}
    roots = {Path(*place.parts[:3]) for place in places if place.is_absolute() and place.is_dir()}
    return [(Path("/etc/ssl/certs"), "/etc/ssl/certs"), (conf, "/etc/pip.conf"), *((root, str(root)) for root in roots)]


@dataclass(frozen=True)
class Container:
    """One container of the image, started in the background and kept until it is removed."""

    id: str

    @staticmethod
    def run(*words: str) -> Container:
        """Start `podman run` with these words."""
        started = podman("run", "--detach", *words)
        assert started.returncode == 0, started.stderr
        return Container(started.stdout.strip())

    def wait(self, timeout_s: float = 300) -> int:
        """Wait for its end; return the exit code."""
        deadline = time.monotonic() + timeout_s
        while self.inspect("{{.State.Running}}") == "true":
            assert time.monotonic() < deadline, self.logs()[-3000:]
            time.sleep(0.5)
        return int(self.inspect("{{.State.ExitCode}}"))

    def stop(self, timeout_s: int) -> int:
        """Send SIGTERM as `podman stop` does; return the exit code."""
        podman("stop", "--time", str(timeout_s), self.id)
        return self.wait()

    def logs(self) -> str:
        done = podman("logs", self.id)
        return done.stdout + done.stderr

    def result(self) -> dict[str, Any]:
        """Return the last line of stdout."""
        return dict(json.loads(podman("logs", self.id).stdout.strip().splitlines()[-1]))

    def inspect(self, template: str) -> str:
        return podman("inspect", "--format", template, self.id).stdout.strip()

    def remove(self) -> None:
        podman("rm", "--force", "--volumes", self.id)
