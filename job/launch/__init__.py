"""Launching: processes of a stage started, watched, stopped, and their exit code decided.

`topology.py` says how many ranks this node runs · `supervisor.py` starts and watches a group of
processes, with `pulse.py` (hangs) and `memory.py` (OOM kills) · `worker.py` is the shell around a
stage inside such a process · `verdict.py` turns an error into an exit code · `signals.py` remembers
that somebody asked to stop · `logs.py` is what people read meanwhile. No torch at import.
"""

from job.launch.logs import set_up_logging
from job.launch.signals import StopRequest
from job.launch.supervisor import Limits, Supervisor, Verdict
from job.launch.topology import Topology, find_topology
from job.launch.verdict import judge_error

__all__ = [
    "Limits",
    "StopRequest",
    "Supervisor",
    "Topology",
    "Verdict",
    "find_topology",
    "judge_error",
    "set_up_logging",
]
