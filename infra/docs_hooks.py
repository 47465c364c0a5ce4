"""Pages of the documentation site that are made from the code."""

from __future__ import annotations

import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from orchestrator.grid.reference import reference


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the reference of all fields."""
    files.append(File.generated(config, "reference.md", content=reference()))
    return files
