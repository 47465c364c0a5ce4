"""Every MoE block of transformers is one of ours: outputs and all gradients agree to 1e-5 in fp32."""

from __future__ import annotations

import pytest

from tests.architectures.compare import compared
from tests.architectures.rows import ROWS, Row

TOLERANCE = 1e-5


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_a_public_block_is_computed(row: Row) -> None:
    found = compared(row)
    print(f"{row.id:40} {max(found.values()):.1e}  {max(found, key=lambda name: found[name])}")
    assert max(found.values()) <= TOLERANCE, found
