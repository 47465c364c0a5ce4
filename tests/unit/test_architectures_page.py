"""docs/architectures.md is made of the table of public blocks."""

from __future__ import annotations

import pytest

from orchestrator.spec.resolve import block_spec
from orchestrator.spec.validity import moe_problems
from tests.architectures.page import PAGE, page
from tests.architectures.rows import ARCHITECTURES, ROWS, Row


def test_the_page_is_that_of_the_table() -> None:
    assert PAGE.read_text() == page(), "run python -m tests.architectures.page"
    assert len(ARCHITECTURES) == 72


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_a_grid_may_write_the_fields_of_a_row(row: Row) -> None:
    sizes = {"num_experts": 8, "top_k": 3, "expert_width": 24}
    assert not moe_problems(block_spec({**sizes, **row.fields}))
