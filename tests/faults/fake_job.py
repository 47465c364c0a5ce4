"""`jobs.run` with every stage replaced by `tests.faults.fake_stages`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from jobs import run as node
from jobs.node import numerics
from tests.faults import troubles

if __name__ == "__main__":
    fake = "tests.faults.fake_stages"
    node.STAGES = {name: dataclasses.replace(kind, module=fake) for name, kind in node.STAGES.items()}
    setattr(numerics, "TORCH_KINDS", ())  # noqa: B010 (of another length than it is)
    troubles.install()
    sys.exit(node.main())
