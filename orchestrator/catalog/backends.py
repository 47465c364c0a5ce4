"""Backends: what starts jobs, by the name that a site file gives (`backend: slurm`).

The code runs where the driver runs. `code` is a function `open(settings, store) -> Backend`
(`orchestrator.backends.base` has the protocol, and `node_command` for what a job runs); `settings` is the frozen
dataclass that the site file's other lines fill, all fields with defaults; a backend's own `name` is the declaration's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from orchestrator.registry import Registry


@dataclass(frozen=True, slots=True)
class BackendKind:
    """One backend: dotted paths of its settings and of the function that opens it; `lists` says what lists them."""

    name: str
    settings: str
    code: str
    lists: str = ""


def _ours(name: str, settings: str, lists: str = "") -> BackendKind:
    lists = f"infra/sites/{name}.yaml lists and explains the settings{lists}"
    return BackendKind(name, settings, f"orchestrator.backends.{name}:open_site", lists)


BUILTINS: Mapping[str, BackendKind] = MappingProxyType(
    {
        "local": _ours("local", "orchestrator.backends.local:LocalSite", ": cores, memory_gb, gpus, warm"),
        "slurm": _ours("slurm", "orchestrator.backends.slurm_script:SlurmSite"),
        "ray": _ours("ray", "orchestrator.backends.ray:RaySite"),
    }
)
BACKENDS = Registry(
    "backends",
    "backend",
    BackendKind,
    BUILTINS,
    "site",
    "jobs are watched, shown and cancelled by their site, also without the grid that they are of",
)
