"""`job`, with ranks that have the accidents of `trainings.py`; everything around them is the real thing."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from job import pipeline
from job.__main__ import main

if __name__ == "__main__":
    train, *others = pipeline.STAGES
    pipeline.STAGES = (replace(train, target="trainings:run_trial_rank"), *others)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    main()
