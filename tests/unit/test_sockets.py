"""Ranks listen where they reach each other, and exchange no pickles."""

from __future__ import annotations

import ast
import json
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from jobs.node import sockets
from jobs.node.world import free_port
from orchestrator.backends.processes import free_place

ROOT = Path(__file__).resolve().parents[2]
JOIN = """
import json, sys
import psutil, torch
import torch.distributed as dist
from jobs.node.ranks import join
from jobs.node.world import World
from orchestrator.spec.cell import Execution, Resources

rank, address, port = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
assert join(World(rank, rank, 2, address, port), Execution(resources={}), ["stage"]) == ["stage"]
value = torch.ones(1)
dist.all_reduce(value)
dist.all_reduce(value, group=dist.new_group([0, 1]))
assert value.item() == 4
print(json.dumps([c.laddr.ip for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]))
dist.barrier()
"""


def test_every_socket_of_a_job_listens_at_the_address_that_its_ranks_use() -> None:
    place = ["127.0.0.1", str(free_port())]
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_SOCKET_IFNAME")}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", JOIN, str(rank), *place], cwd=ROOT, env=environment, stdout=subprocess.PIPE
        )
        for rank in range(2)
    ]
    listening = [json.loads(rank.communicate(timeout=300)[0]) for rank in ranks]
    assert all(len(each) >= 1 for each in listening)
    assert {one for each in listening for one in each} == {"127.0.0.1"}


def test_collectives_listen_on_the_interface_that_has_the_route(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # its state before the test comes back after it
    for name, addresses in psutil.net_if_addrs().items():
        for address in (a.address for a in addresses if a.family == socket.AF_INET):
            monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
            monkeypatch.setenv("NCCL_SOCKET_IFNAME", "chosen")
            sockets.bind_collectives(address, 1)
            assert os.environ["GLOO_SOCKET_IFNAME"] == name


def test_nothing_that_ranks_exchange_is_unpickled() -> None:
    pickling = ("_object", "_object_list")
    for path in (ROOT / "jobs").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
            collective = name.startswith(("all_gather", "gather", "scatter", "broadcast", "send", "recv"))
            assert not (collective and name.endswith(pickling)), f"{path}:{getattr(node, 'lineno', 0)}"


def test_a_taken_port_is_trouble_from_outside() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as other,
        pytest.raises(ConnectionError, match=r"cannot listen at 127\.0\.0\.1"),
    ):
        sockets.listen("127.0.0.1", other.getsockname()[1])


@pytest.mark.parametrize("across_nodes", [False, True])
@pytest.mark.parametrize("address", ["127.0.0.1", "localhost", "203.0.113.9"])
def test_an_address_that_tells_nothing_is_not_listened_at(
    address: str, across_nodes: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        descriptor = sockets.listen(address, free_port(), across_nodes=across_nodes)
    vague = address == "203.0.113.9" or (address == "localhost" and across_nodes)
    assert (descriptor is None) == vague == ("every interface" in caplog.text)
    if descriptor is not None:
        with socket.socket(fileno=descriptor) as listener:
            assert listener.getsockname()[0] == "127.0.0.1"


def test_what_the_shell_says_of_interfaces_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "chosen")
    sockets.bind_collectives("127.0.0.1", 1)
    assert os.environ["GLOO_SOCKET_IFNAME"] == os.environ["NCCL_SOCKET_IFNAME"] == "chosen"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    sockets.bind_collectives("127.0.0.1", 1)
    assert os.environ["GLOO_SOCKET_IFNAME"] == sockets.interface_of("127.0.0.1")


def test_a_free_place_is_one_of_its_address() -> None:
    address, port = free_place("127.0.0.1")
    with socket.create_server((address, port)) as server:
        assert server.getsockname() == ("127.0.0.1", port)
