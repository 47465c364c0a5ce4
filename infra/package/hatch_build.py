"""What the wheel holds beside the public face; an editable installation holds paths alone."""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# In the repository -> in the wheel. `jobs` and `orchestrator` are common names: installed, they lie inside the package
# `moegrid` in the layout of the repository, with grids, sites and labs beside them.
PARTS = (
    "orchestrator",
    "jobs",
    "grids",
    "infra/sites",
    "infra/slurm",
    "infra/ray",
    "infra/s3",
    "infra/mlflow",
    "infra/container",
    "infra/init",
    "infra/new",
    "infra/lab.sh",
    "constraints.txt",
)
INCLUDED = {"infra/package/moegrid": "moegrid", **{part: f"moegrid/_parts/{part}" for part in PARTS}}


class Parts(BuildHookInterface[Any]):
    """Adds the parts to a wheel; a copy of them beside an editable installation would be run instead of the clone."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before a wheel is made: `version` is standard or editable."""
        if version == "standard":
            build_data["force_include"].update(INCLUDED)
