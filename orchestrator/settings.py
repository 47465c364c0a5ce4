"""Where things are: store, tracker, site. From the command line, else the environment, else the embedded defaults."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import resources
from orchestrator.errors import MoegridError

if TYPE_CHECKING:
    from orchestrator.backends.base import Backend

NO_TRACKER = "none"


@dataclass(frozen=True, slots=True)
class Site:
    """Where jobs run: the fields of `infra/sites/<name>.yaml`."""

    name: str
    backend: str
    tick_seconds: float = 0.5
    lease_seconds: float = 30.0
    options: Mapping[str, Any] = field(default_factory=dict)


def store_url(given: str | None) -> str:
    """Return the store's URL; a folder becomes an absolute path, so that every process finds the same one."""
    url = given or os.environ.get("MOEGRID_STORE") or "runs"
    return url if "://" in url else str(Path(url).expanduser().resolve())


def tracking_uri(given: str | None, store: str) -> str:
    """Return the tracker's URI: MOEGRID_TRACKING, MLFLOW_TRACKING_URI, else sqlite beside the store.

    "" is none: asked for, or nothing was named and mlflow is not installed.
    """
    uri = given or os.environ.get("MOEGRID_TRACKING") or os.environ.get("MLFLOW_TRACKING_URI") or ""
    if uri == NO_TRACKER:
        return ""
    if uri:
        if not installed("mlflow"):
            raise MoegridError(
                f"the tracker {uri} cannot be used: mlflow is not installed",
                hint="pip install 'moegrid[mlflow]', or --tracking none: moegrid sync fills a tracker later",
            )
        return uri
    if not installed("mlflow"):
        return ""
    folder = Path(store.removeprefix("file://")) if "://" not in store or store.startswith("file://") else Path.cwd()
    return f"sqlite:///{folder}/mlflow.db"


def installed(module: str) -> bool:
    """Return whether a module of the data plane can be imported, without importing it."""
    return importlib.util.find_spec(module) is not None


def require(module: str, why: str) -> None:
    """Raise MoegridError with the command that installs it when `module` is missing here."""
    if not installed(module):
        raise MoegridError(
            f"{module} is not installed",
            cause=f"{why}, which needs what the extra [train] brings",
            hint="pip install 'moegrid[train]', or make setup in a clone",
        )


def load_site(name: str) -> Site:
    """Read the site `name`, or the YAML file `name`; raises MoegridError with what is wrong."""
    import yaml

    path = Path(name) if name.endswith((".yaml", ".yml")) else resources.find("site", name)
    if path is None or not path.is_file():
        from orchestrator.ui.console import did_you_mean

        known = sorted(resources.files("site"))
        raise MoegridError(
            f"unknown site {name!r}",
            cause=f"there is no {path or f'infra/sites/{name}.yaml'}",
            hint=did_you_mean(name, known) or f"sites: {', '.join(known)}",
        )
    try:
        document = yaml.safe_load(path.read_text()) or {}
        fields = dict(document)
        return Site(
            name=path.stem,
            backend=str(fields.pop("backend")),
            tick_seconds=float(fields.pop("tick_seconds", 0.5)),
            lease_seconds=float(fields.pop("lease_seconds", 30.0)),
            options=fields,
        )
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise MoegridError(
            f"site {name!r} cannot be used", cause=f"{path}: {error}", hint="see infra/sites/local.yaml"
        ) from error


def open_backend(site: Site, store: str = "") -> Backend:
    """Return the backend of a site for jobs of the store with this URL."""
    if site.backend == "local":
        from orchestrator.backends.local import Budget, LocalBackend

        options = dict(site.options)
        if unknown := sorted(options.keys() - {"cores", "memory_gb", "gpus"}):
            raise MoegridError(
                f"site {site.name!r} has an unknown field {unknown[0]!r}", hint="fields: cores, memory_gb, gpus"
            )
        gpus = options.get("gpus")
        budget = Budget.of_machine(
            cores=int(options.get("cores", 0)),
            memory_gb=float(options.get("memory_gb", 0)),
            gpus=None if gpus is None else int(gpus),
        )
        return LocalBackend(budget=budget, store=store)
    if site.backend == "slurm":
        from orchestrator.backends.slurm import SlurmBackend, SlurmSite

        return SlurmBackend(SlurmSite.of(site.options))
    if site.backend == "ray":
        from orchestrator.backends.ray import RayBackend, RaySite

        return RayBackend(RaySite.of(site.options))
    raise MoegridError(
        f"site {site.name!r} asks for the backend {site.backend!r}, which does not exist",
        hint="backends: local, slurm, ray",
    )


def module_environment() -> dict[str, str]:
    """Return the environment in which another process finds this project's modules, wherever it is started."""
    path = [str(resources.ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "PYTHONSAFEPATH": "1"}
