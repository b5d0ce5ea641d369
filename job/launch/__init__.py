"""Launching: processes of a stage started, watched, stopped, and their exit code decided.

`topology.py` says which node this is and how many ranks it runs · `supervisor.py` starts and watches
a group of processes, with `pulse.py` (hangs) and `memory.py` (OOM kills) · `host.py` and `guest.py`
are the supervisors of several nodes talking to each other over a `line.py` · `worker.py` is the shell
around a stage inside such a process, `surroundings.py` what that takes over of the caller's environment ·
`verdict.py` turns an error into an exit code · `signals.py` remembers that somebody asked to stop · `logs.py`
is what people read meanwhile. No torch at import.
"""

from job.launch.guest import Guest
from job.launch.host import Host
from job.launch.line import find_free_port, find_interface
from job.launch.logs import set_up_logging
from job.launch.signals import StopRequest
from job.launch.supervisor import ALONE, Limits, Peers, Supervisor
from job.launch.topology import Place, Topology, find_place, find_topology
from job.launch.verdict import Verdict, decide, judge_error

__all__ = [
    "ALONE", "Guest", "Host", "Limits", "Peers", "Place", "StopRequest", "Supervisor", "Topology", "Verdict", "decide",
    "find_free_port", "find_interface", "find_place", "find_topology", "judge_error", "set_up_logging",
]  # fmt: skip
