"""How a node begins its part of a run: it starts its ranks, whose imports take longer than all that is done meanwhile.

So only what that needs is imported before. What node 0 does from there on is told in `pipeline.py`, the others' part in
`member.py`.
"""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

from job import stages
from job.launch import Place, StopRequest, Topology, find_topology
from job.node import Node
from job.recipe import Recipe, Run
from job.training import list_environments
from job.work_folder import make_work_folder, provide_temporary_folder


def run_node(recipe: Recipe, run_id: str, work: Path, fresh: bool, place: Place) -> dict[str, Any]:
    """Do this node's part of a run and return the result (DESIGN §6); a JobError becomes its exit code."""
    opening = Opening(Run(run_id, recipe, work.absolute()), place)
    try:
        if place.node_rank:
            from job.member import run_member

            return run_member(opening, fresh)
        from job.pipeline import run_pipeline

        return run_pipeline(opening, fresh)
    finally:
        opening.node.drop_ahead()


class Opening:
    """What a node has from the beginning on: `run`, its folder locked, and `node`, whose ranks import.

    What keeps it from beginning is raised where the story is told, by `topology`.
    """

    def __init__(self, run: Run, place: Place) -> None:
        launch = run.recipe.launch
        self.run, self.place, self.node = run, place, Node(launch, StopRequest(launch.time_limit_min))
        self._topology: Future[Topology] = Future()
        try:
            self._topology.set_result(self._start_ranks())
        except Exception as error:
            self._topology.set_exception(error)

    @property
    def topology(self) -> Topology:
        """This node among the others; see the class for what it raises."""
        return self._topology.result()

    def _start_ranks(self) -> Topology:
        make_work_folder(self.run.work)
        provide_temporary_folder(self.run.work)
        self.run = run = self.run.lock_folder(self.place.node_rank)
        topology = find_topology(run.recipe.distributed, self.place)
        self.node.start_ahead(stages.STAGES[0].target, run, list_environments(run, topology))
        return topology
