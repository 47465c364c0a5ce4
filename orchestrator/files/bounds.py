"""How large a grid may be before it is taken for a mistake; a variable of the environment raises each bound."""

from __future__ import annotations

import os

from orchestrator.errors import MoegridError

# What one value of YAML may hold inside another; no grid needs a tenth of it.
MAX_DEPTH = 40
DEFAULTS = {
    "MOEGRID_MAX_CELLS": 100_000,  # combinations of the axes, those that `exclude` and `when` drop included
    "MOEGRID_MAX_NODES": 200_000,  # keys and values of one YAML file, aliases followed
    "MOEGRID_MAX_INCLUDES": 1_000,  # files that a grid includes, directly or through others
}


def bound(variable: str) -> int:
    """Return a bound. Raises MoegridError when its variable is no whole number above 0."""
    text = os.environ.get(variable, "")
    if not text:
        return DEFAULTS[variable]
    if not text.isdecimal() or not int(text):
        raise MoegridError(f"{variable}={text!r} is not a whole number above 0", hint=f"unset {variable}")
    return int(text)


def raising(variable: str, wanted: int) -> str:
    """Return the hint that says how a bound is raised to hold `wanted`."""
    return f"if it is meant: export {variable}={wanted}"
