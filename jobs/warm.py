"""What a fork server on a node imports before the first job: all that stages without a GPU are made of."""

from __future__ import annotations

import importlib
import os

from jobs.node import code, numerics
from orchestrator.catalog.kinds import STAGES

# Imported when they are first used, by nearly every stage.
_LATER = (
    "jobs.train.engines.torch",
    "jobs.train.optimizer",
    "numpy.random",
    "psutil",
    "pyarrow.parquet",
    "tokenizers",
    "torch.profiler",
)


def prepare() -> None:
    """Import the stages without starting a thread, and note the training code as it is now."""
    numerics.prepare_forks()
    # The allocator that Arrow links and does not use would start a thread, and a process with threads cannot be forked.
    os.environ.setdefault("JE_ARROW_MALLOC_CONF", "background_thread:false")
    for module in (*dict.fromkeys(kind.module for kind in STAGES.values()), *_LATER):
        importlib.import_module(module)
    code.code_digest()
