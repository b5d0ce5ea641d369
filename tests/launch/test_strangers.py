"""Nothing that comes to the port where nodes meet is authenticated: whoever does not belong here is sent away."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest

from job.launch import Host, Place, Topology, find_free_port

OURS = {"run": "run-1", "recipe": "sha", "processes": 1}


@pytest.fixture(scope="module")
def port() -> int:
    """Where node 0 of two listens, as long as this process lives."""
    place = Place(2, 0, "localhost", find_free_port())
    Host(Topology(place, 1, 0), OURS, 60.0)
    return place.port


@pytest.mark.parametrize("rank", [[1], {"1": 1}, "1", None, True, 1.0, 0, 2, -1, 10**30], ids=repr)
def test_who_calls_with_a_number_that_no_node_has_is_answered_and_hung_up_on(rank: Any, port: int) -> None:
    """Else each such call would keep a connection and two threads of node 0, which shows its sign of life for ever."""
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(json.dumps(OURS | {"kind": "hello", "rank": rank}).encode() + b"\n")
        stranger.settimeout(60)
        said = b""
        while data := stranger.recv(4096):
            said += data
            assert said.count(b"\n") < 5, said
    assert json.loads(said.splitlines()[-1])["code"] == 79
