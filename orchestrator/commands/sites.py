"""The sites that earlier drivers submitted to, whatever has become of the site files they were given."""

from __future__ import annotations

from pathlib import Path

from orchestrator.backends.base import Backend, Handle
from orchestrator.catalog.backends import BACKENDS
from orchestrator.errors import MoegridError
from orchestrator.settings import Site, default_site, load_site, open_backend
from orchestrator.store.attempts import Submission

# A detail that a backend's own handles have.
_MARKS = {"ray": "ray", "name": "slurm", "pid": "local"}


def site_of(submission: Submission | None, handle: Handle | None, given: str = "") -> Site:
    """Return the site that a batch was submitted to: as its file says now, else with its backend's defaults.

    `given` is the site of the command line, which may say where the file has gone. A scheduler is asked by the name it
    gives a job, so a file that is gone keeps nobody from it. Raises MoegridError when nothing tells which scheduler.
    """
    name, path = (submission.site, submission.site_file) if submission else ("", "")
    kind = (submission.backend if submission else "") or _kind(handle)
    moved = given if given and Path(given).stem == name else ""
    for candidate in filter(None, (moved, path, name)):
        try:
            site = load_site(candidate)
        except MoegridError:
            continue
        if site.backend == kind or not kind:
            return site
    if kind not in BACKENDS:
        raise MoegridError(
            f"unknown site {name!r}",
            cause="jobs of it are in the store, but not which scheduler has them",
            hint="name its site file: --site FILE",
        )
    return default_site(kind)


def backend_of(submission: Submission | None, handle: Handle | None, store: str, given: str = "") -> Backend:
    """Return the backend that has the jobs of a batch in the store with this URL."""
    return open_backend(site_of(submission, handle, given), store)


def _kind(handle: Handle | None) -> str:
    return next((kind for mark, kind in _MARKS.items() if handle is not None and mark in handle.details), "")
