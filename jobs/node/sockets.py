"""Where the ranks of a job listen: at the address by which they reach each other, and nowhere else."""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import socket

log = logging.getLogger(__name__)

BACKLOG = 4096  # all ranks of a large job may come at once


def listen(address: str, port: int, *, across_nodes: bool = False) -> int | None:
    """Return the descriptor of a socket that listens at `address` and `port`, for a `TCPStore` to own.

    None, with a warning, where the address says nothing about how other nodes come here: it is none of this machine, or
    a name that means loopback on this machine alone. Raises ConnectionError when the port is taken.
    """
    family, place = _resolve(address, port)
    if across_nodes and _loopback(place[0]) and not _is_number(address):
        log.warning("%s means %s here: listening on every interface; MASTER_ADDR may be a number", address, place[0])
        return None
    try:
        return socket.create_server(place, family=family, backlog=BACKLOG).detach()
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            log.warning("%s is no address of this machine: listening on every interface", address)
            return None
        raise ConnectionError(error.errno, f"rank 0 cannot listen at {address}:{port}: {error.strerror}") from error


def bind_collectives(address: str, port: int) -> None:
    """Let collectives listen on the interface from which this process reaches rank 0; what the shell names stays.

    NCCL chooses an interface by itself; on one machine alone it need not be one that others reach.
    """
    family, place = _resolve(address, port)
    with socket.socket(family, socket.SOCK_DGRAM) as probe:  # sends nothing: asks the kernel for the route
        try:
            probe.connect(place)
        except OSError:
            return
        own = probe.getsockname()[0]
    name = interface_of(own)
    if not name:
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    if _loopback(own):
        os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def interface_of(address: str) -> str:
    """Return the name of the interface that has `address`, "" if none has."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == address for one in addresses):
            return name
    return ""


def _resolve(address: str, port: int) -> tuple[socket.AddressFamily, tuple[str, int]]:
    """Return family and place of `address`, IPv4 first, as TCPStore's own clients find it."""
    found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    family, *_, place = min(found, key=lambda one: one[0] != socket.AF_INET)
    return family, (str(place[0]), int(place[1]))


def _is_number(address: str) -> bool:
    try:
        ipaddress.ip_address(address)
    except ValueError:
        return False
    return True


def _loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
