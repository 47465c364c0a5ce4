"""Where things are: store, tracker, site. From the command line, else the environment, else the embedded defaults."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import resources
from orchestrator.catalog.backends import BACKENDS, BackendKind
from orchestrator.catalog.trackers import MLFLOW, full_uri, tracker_of
from orchestrator.errors import MoegridError, did_you_mean
from orchestrator.registry import load

if TYPE_CHECKING:
    from orchestrator.backends.base import Backend
    from orchestrator.files.problems import Problems

NO_TRACKER = "none"


@dataclass(frozen=True, slots=True)
class Site:
    """Where jobs run. `settings` are those of its backend, `path` the file that says so."""

    name: str
    backend: str
    settings: Any
    tick_seconds: float = 0.5
    lease_seconds: float = 30.0
    path: str = ""


@dataclass(frozen=True, slots=True)
class _Driving:
    """What a site file says to the driver."""

    backend: str
    tick_seconds: float = field(default=0.5, metadata={"least": 0.01})
    lease_seconds: float = field(default=30.0, metadata={"least": 1})


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
    if uri and uri != MLFLOW:
        uri = full_uri(uri)
        needs = tracker_of(uri).needs
        if needs and not installed(needs):
            install = f"moegrid[{needs}]" if needs == MLFLOW else needs
            raise MoegridError(
                f"the tracker {uri} cannot be used: {needs} is not installed",
                hint=f"pip install {install!r}, or --tracking none: moegrid sync fills a tracker later",
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


def site_file(name: str) -> Path:
    """Return the file of the site `name`, which may be a YAML file; raises MoegridError with those that there are."""
    path = Path(name).expanduser() if name.endswith((".yaml", ".yml")) else resources.find("site", name)
    if path is None or not path.is_file():
        raise MoegridError(
            f"unknown site {name!r}",
            cause=f"there is no {path or f'infra/sites/{name}.yaml'}",
            hint=did_you_mean(name, sorted(resources.files("site")), "sites"),
        )
    return path.resolve()


def load_site(name: str) -> Site:
    """Read the site `name`, or the YAML file `name`; raises MoegridError with everything that is wrong."""
    from orchestrator.files.problems import Problems
    from orchestrator.files.yaml_positions import read_mapping
    from orchestrator.grid.plugin_files import PluginReader
    from orchestrator.grid.site_fields import SettingsReader
    from orchestrator.resources import show

    path, problems = site_file(name), Problems()
    document = read_mapping(path, show(path), problems)
    if not document.data:
        problems.raise_if_any()
    PluginReader(problems, "site").read(document, path)
    problems.raise_if_any()
    backend = document.data.get("backend")
    kind = _backend(str(backend or "local"), document.place(("backend",)), problems)
    problems.raise_if_any()
    assert kind is not None
    settings = load(kind.settings, BACKENDS.who(kind.name))
    reader = SettingsReader(document, problems, kind.lists)
    driving = reader.read(_Driving, frozenset(item.name for item in fields(settings)) | {"plugins"})
    made = reader.read(settings, frozenset(item.name for item in fields(_Driving)) | {"plugins"})
    problems.raise_if_any()
    assert driving is not None
    return Site(path.stem, driving.backend, made, driving.tick_seconds, driving.lease_seconds, str(path))


def default_site(backend: str) -> Site:
    """Return the site of a backend with its default settings."""
    return Site(backend, backend, load(BACKENDS.get(backend).settings, BACKENDS.who(backend))())


def _backend(name: str, place: str, problems: Problems) -> BackendKind | None:
    """Return the declaration of a site's backend; what is wrong with it goes to `problems`."""
    try:
        if (kind := BACKENDS.find(name)) is not None:
            return kind
        problems.add(f"backend {name!r} does not exist", place, "backend", BACKENDS.hint(name))
    except MoegridError as error:  # its package is broken, or two provide it
        problems.add(": ".join(filter(None, (error.error, error.cause))), place, "backend", error.hint)
    return None


def open_backend(site: Site, store: str = "") -> Backend:
    """Return the backend of a site for jobs of the store with this URL."""
    who = BACKENDS.who(site.backend)
    opened: Backend = load(BACKENDS.get(site.backend).code, who)(site.settings, store)
    if opened.name != site.backend:  # by this name later drivers find its jobs
        raise MoegridError(f"{who} opens one that calls itself {opened.name!r}", hint="give both the same name")
    return opened


def module_environment() -> dict[str, str]:
    """Return the environment in which another process finds this project's modules, wherever it is started."""
    path = [str(resources.ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "PYTHONSAFEPATH": "1"}
