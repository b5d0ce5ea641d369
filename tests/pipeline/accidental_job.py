"""`job`, with the stages named in JOB_STAND_INS ("train=module:function,…") replaced; all else is the real thing."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from job import pipeline
from job.__main__ import main

if __name__ == "__main__":
    wanted = dict(pair.split("=") for pair in os.environ["JOB_STAND_INS"].split(","))
    pipeline.STAGES = tuple(replace(stage, target=wanted.get(stage.name, stage.target)) for stage in pipeline.STAGES)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    main()
