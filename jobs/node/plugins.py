"""What a job needs from outside, made available before its work is rebuilt: files, and packages of one version."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path

import orchestrator.data.task_files  # noqa: F401  reads the plugins that are task files
from orchestrator import plugins
from orchestrator.errors import MoegridError, PluginError
from orchestrator.spec.providers import Use
from orchestrator.store.attempts import Fields, PlannedJob


def bring_plugins(job: PlannedJob, files: Sequence[Fields], folder: Path) -> None:
    """Register the plugin `files` of a planned job, laid below `folder`, and check the packages that it uses.

    Raises PluginError when a file cannot be imported here, or a package is absent or of another version.
    """
    uses = [Use.from_json(use) for use in job.plugins]
    for use in uses:
        if not use.origin.file:
            _check(use)
    planned = {use.origin.version for use in uses if use.origin.file}
    try:
        plugins.receive(files, planned, folder)
    except MoegridError as error:
        raise PluginError(error.error, cause=error.cause, hint=error.hint) from error


def _check(use: Use) -> None:
    """Raise PluginError unless a package is here in the version that the work was planned with."""
    name, wanted = use.origin.provider, use.origin.version
    try:
        here = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        here = ""
    if here != wanted:
        raise PluginError(
            f"this machine has {name} {here}, and not {wanted}" if here else f"this machine has no {name} {wanted}",
            cause=f"the work was planned with {use}",
            hint=f"pip install {name}=={wanted} where the jobs run, or plan with the version that is there; then: "
            "moegrid resume --retry all",
        )
