"""The stages of a run in order, and the hash by which one is known to be done."""

from __future__ import annotations

from dataclasses import dataclass, replace

from job.identity import material_sections
from job.recipe import Recipe, hash_json
from job.recipe.schema import DEFINES_TRAINING


@dataclass(frozen=True)
class Stage:
    """`target` is run in a process; `reads` are recipe sections; `files` (in the run's folder) are its outputs."""

    name: str
    target: str
    reads: tuple[str, ...]
    files: tuple[str, ...]

    def key(self, recipe: Recipe, inputs: str) -> str:
        """Return the hash of all that the stage reads; `inputs` is that of what the stage before has left."""
        return hash_json([self.name, inputs, material_sections(recipe, self.reads)])


FETCH = "job.data:fetch_sources"


def list_fetch_variables(fresh: bool) -> dict[str, str]:
    """Return what the process that fetches is told; a run that begins `fresh` does not look at what it was made of."""
    return {"TOKENIZERS_PARALLELISM": "true", "JOB_FRESH": "1" if fresh else ""}


EXPORTABLE = "job.export:refuse_unexportable"
STAGES = (
    Stage("train", "job.train:run_rank", DEFINES_TRAINING, ("final/config.json", "final/model.safetensors")),
    Stage("merge", "job.train:merge_run", (), ("merged/config.json", "merged/model.safetensors")),
    Stage(
        "evaluate",
        "job.evaluate:evaluate_run",
        ("baselines",),
        ("evaluate/validation.npy", "evaluate/test.npy", "evaluate/analysis.json"),
    ),
    Stage("export", "job.export:export_run", (), ()),
    Stage("quantize", "job.export:quantize_run", ("export",), ()),
    # numbers go into the report that no file of an earlier stage shows, so it and what follows is always made anew
    Stage("report", "job.report:write_report", ("name", "baselines", "export"), ()),
    Stage("rehearse", "job.export:rehearse_bundle", (), ()),
)
ADAPTER = ("merged/adapter/adapter_config.json", "merged/adapter/adapter_model.safetensors")
COMPARE = "job.evaluate:compare_with_current"
RELEASE = Stage("release", "", ("name", "release"), ())
"""The last one, which the supervisor does itself."""


def list_stages(recipe: Recipe) -> list[Stage]:
    """Return the stages of a recipe but the last; where the training leaves the whole model, nothing is merged."""
    stages = [stage for stage in STAGES if stage.name != "merge" or recipe.merges]
    extra = {"merge": ADAPTER} if recipe.tuning.method == "lora" else {}
    return [replace(stage, files=stage.files + extra.get(stage.name, ())) for stage in stages]
