"""Makes a folder that `slurm/finetune.sbatch` takes for a venv: its `bin/job` is a light run (`chaos/light.py`)."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

LIGHT = Path(__file__).parents[1] / "chaos" / "light.py"


def make_light_venv(folder: Path, store: str, *options: str) -> Path:
    """Return the folder. RECIPE is ignored; the run's id, work folder and place come from the environment.

    Only the first start is as slow as LIGHT_STEP_S says.
    """
    words = [sys.executable, str(LIGHT), store, "$JOB_RUN_ID", "$JOB_WORK_DIR", "--found-place", *options]
    (folder / "bin").mkdir(parents=True)
    script = folder / "bin" / "job"
    command = " ".join(word if word.startswith("$") else shlex.quote(word) for word in words)
    script.write_text(f"#!/bin/bash\n[ ${{SLURM_RESTART_COUNT:-0}} = 0 ] || unset LIGHT_STEP_S\nexec {command}\n")
    script.chmod(0o755)
    return folder
