"""JSON documents that can be damaged: a power cut empties a file, a disk flips a byte, a hand edits.

A sealed document ends with a checksum of what stands before it. One without (an older program's) counts by its shape.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

_SEAL = b',"checksum":"'


def seal(value: object) -> bytes:
    """Return `value` as JSON; the last field of an object that is not empty is a checksum of the rest."""
    data = json.dumps(dict(value) if isinstance(value, Mapping) else value).encode()
    if not isinstance(value, Mapping) or not value:
        return data
    body = data[:-1]
    return body + _SEAL + hashlib.sha256(body).hexdigest().encode() + b'"}'


def parse(data: bytes) -> Any:
    """Return the JSON value of `data` without its seal; ValueError if it is damaged (empty counts as that)."""
    value = json.loads(data)
    if isinstance(value, dict) and "checksum" in value:
        cut = data.rfind(_SEAL)
        if cut < 0 or value.pop("checksum") != hashlib.sha256(data[:cut]).hexdigest():
            raise ValueError("its checksum is not that of its content")
    return value


def sound(data: bytes) -> bool:
    """Return whether a JSON document is undamaged; of a sealed one only the checksum is computed."""
    cut = data.rfind(_SEAL)
    # A view: the root of a hundred thousand cells is hundreds of megabytes.
    if cut > 0 and data[cut + len(_SEAL) :] == hashlib.sha256(memoryview(data)[:cut]).hexdigest().encode() + b'"}':
        return True
    try:
        parse(data)
    except ValueError:
        return False
    return cut < 0
