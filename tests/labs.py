"""Labs are real servers that tests start themselves, once a run, on loopback: what happens when one is missing."""

from __future__ import annotations

import os

import pytest


def lab_missing(lab: str, reason: str) -> None:
    """Skip with the reason on a user's machine; fail in CI, where every lab must be there."""
    message = f"the {lab} lab is missing: {reason}"
    if os.environ.get("MOEGRID_REQUIRE_LABS") == "1":
        pytest.fail(message)
    pytest.skip(message)
