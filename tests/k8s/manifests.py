"""Rendering overlays with components as a user would, and finding what starts pods in the result."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2] / "k8s"
OVERLAYS = sorted(path.parent.name for path in ROOT.glob("overlays/*/kustomization.yaml"))
COMPONENTS = sorted(path.parent.name for path in ROOT.glob("components/*/kustomization.yaml"))
Manifest = dict[str, Any]


@dataclass(frozen=True)
class Rendered:
    """What `kubectl kustomize` made of an overlay."""

    objects: list[Manifest]

    def of_kind(self, kind: str) -> list[Manifest]:
        return [each for each in self.objects if each["kind"] == kind]

    def name_of(self, kind: str) -> str:
        (only,) = self.of_kind(kind)
        return str(only["metadata"]["name"])

    def job_specs(self) -> Iterator[tuple[str, Manifest]]:
        """Yield (kind, Job's spec) of everything that makes Jobs."""
        for each in self.objects:
            if each["kind"] == "Job":
                yield "Job", each["spec"]
            elif each["kind"] == "CronJob":
                yield "CronJob", each["spec"]["jobTemplate"]["spec"]
            elif each["kind"] == "JobSet":
                yield from (("JobSet", made["template"]["spec"]) for made in each["spec"]["replicatedJobs"])
            elif each["kind"] == "TrainingRuntime":
                made_of = each["spec"]["template"]["spec"]["replicatedJobs"]
                yield from (("TrainingRuntime", made["template"]["spec"]) for made in made_of)

    def pod_templates(self) -> Iterator[tuple[str, Manifest]]:
        """Yield (kind, pod template) of everything that makes pods."""
        yield from ((kind, spec["template"]) for kind, spec in self.job_specs())
        yield from (("Deployment", each["spec"]["template"]) for each in self.of_kind("Deployment"))


def render(folder: Path, overlay: str, components: Iterable[str] = (), **settings: Any) -> Rendered:
    """Render `overlay` with `components` from a kustomization of the user's own; `settings` are further keys of it."""
    folder.mkdir(exist_ok=True)
    link = folder / "k8s"
    if not link.exists():  # kustomize wants relative paths and follows no links out of a folder
        subprocess.run(["cp", "-r", str(ROOT), str(link)], check=True)
    mine = link / "mine"
    mine.mkdir(exist_ok=True)
    about = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [f"../overlays/{overlay}"],
        "components": [f"../components/{name}" for name in components],
    }
    (mine / "kustomization.yaml").write_text(yaml.safe_dump(about | settings))
    return render_folder(mine)


def render_folder(folder: Path) -> Rendered:
    """Render a kustomization as it is."""
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Rendered(list(yaml.safe_load_all(done.stdout)))


def variables(template: Manifest) -> dict[str, str]:
    """Return the plain variables of the first container."""
    return {each["name"]: each["value"] for each in template["spec"]["containers"][0].get("env", []) if "value" in each}
