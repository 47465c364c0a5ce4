"""`jobs.run` with every stage replaced by `tests.faults.fake_stages`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from jobs import run as node
from orchestrator.catalog.kinds import STAGES
from tests.faults import troubles

if __name__ == "__main__":
    fake = "tests.faults.fake_stages"
    STAGES.update({name: dataclasses.replace(kind, module=fake, torch=False) for name, kind in STAGES.items()})
    troubles.install()
    sys.exit(node.main())
