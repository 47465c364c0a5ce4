"""A freeze rule: which parameters a word of a freeze schedule freezes."""

from __future__ import annotations

import re
from typing import Any


def lower_half(name: str, role: str, model: Any) -> bool:
    """Return whether a parameter lies in the first half of the layers."""
    layer = re.search(r"\.layers\.(\d+)\.", name)
    return layer is not None and int(layer[1]) < model.num_layers // 2
