"""`job`, with the stages named in JOB_STAND_INS ("train=module:function,…") replaced; all else is the real thing.

JOB_BUSY_PORTS: so many times the port that the ranks are to meet on is taken by somebody else just before them.
"""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path

from job import stages, training
from job.__main__ import main

_others: list[socket.socket] = []


def _find_busy_port() -> int:
    """Return a port that is free no more, JOB_BUSY_PORTS times."""
    port = _find_port()
    if len(_others) < int(os.environ.get("JOB_BUSY_PORTS", "0")):
        _others.append(socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True))
    return port


_find_port, training.find_free_port = training.find_free_port, _find_busy_port

if __name__ == "__main__":
    wanted = dict(pair.split("=") for pair in os.environ["JOB_STAND_INS"].split(","))
    stages.STAGES = tuple(replace(stage, target=wanted.get(stage.name, stage.target)) for stage in stages.STAGES)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    main()
