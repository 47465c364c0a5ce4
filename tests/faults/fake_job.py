"""`jobs.run` with every stage replaced by `tests.faults.fake_stages`."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from jobs import run as node
from orchestrator.catalog.kinds import STAGES
from tests.faults import troubles


def prepare() -> None:
    """Put the fake stages in the place of ours."""
    fake = "tests.faults.fake_stages"
    STAGES.update({name: dataclasses.replace(kind, module=fake, torch=False) for name, kind in STAGES.items()})
    importlib.import_module(fake)


def call(arguments: Sequence[str]) -> int:
    """Run a job."""
    troubles.install()
    return node.main(arguments)


if __name__ == "__main__":
    prepare()
    sys.exit(call(sys.argv[1:]))
