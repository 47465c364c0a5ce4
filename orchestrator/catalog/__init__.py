"""What has a name: our own declarations, by kind, as plain data. Packages declare more (orchestrator.registry)."""

from __future__ import annotations

import importlib
import pkgutil


def load_all() -> None:
    """Import every kind, so that `registry.REGISTRIES` is complete: for what looks at all of them."""
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        importlib.import_module(module.name)
