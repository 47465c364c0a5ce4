"""Packages that are laid into a folder as pip would, and found on the path: what provides declarations from outside."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator import registry


def install(
    folder: Path, name: str, module: str, entries: Mapping[str, Mapping[str, str]], version: str = "1.2"
) -> None:
    """Lay the package `name` of one module into `folder`; `entries` are entry points by group and name."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.py").write_text(module)
    information = folder / f"{name}-{version}.dist-info"
    information.mkdir(exist_ok=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    groups = (
        f"[moegrid.{group}]\n" + "".join(f"{key} = {value}\n" for key, value in of.items())
        for group, of in entries.items()
    )
    (information / "entry_points.txt").write_text("\n".join(groups))


@contextmanager
def found(folder: Path, *names: str) -> Iterator[Path]:
    """Find the packages in `folder` by import and as distributions; afterwards as if they had never been there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        known = {group: dict(one.outside) for group, one in registry.REGISTRIES.items()}
        registry._names_of_packages.cache_clear()
        try:
            yield folder
        finally:
            registry._names_of_packages.cache_clear()
            for group, outside in known.items():
                registry.REGISTRIES[group].outside = outside
            for name in names:
                sys.modules.pop(name, None)
