"""Every field of a cell says what it means, in the schema and in the reference."""

from __future__ import annotations

import dataclasses

from orchestrator.grid.reference import reference
from orchestrator.grid.schema import grid_schema
from orchestrator.spec.cell import Cell, JudgeSpec, Resources, TaskSpec
from orchestrator.spec.descriptions import descriptions
from orchestrator.spec.fields import dataclass_in, fields_of


def parts(owner: type) -> set[type]:
    inner = {part for field in fields_of(owner).values() if (part := dataclass_in(field.hint)) is not None}
    return {owner, *(one for part in inner for one in parts(part))}


def test_every_field_is_described() -> None:
    owners = parts(Cell) | {TaskSpec, JudgeSpec, Resources}
    assert len(owners) > 10
    missing = [
        f"{owner.__name__}.{field.name}"
        for owner in owners
        for field in dataclasses.fields(owner)
        if not descriptions(owner).get(field.name)
    ]
    assert missing == []


def test_the_schema_shows_the_descriptions() -> None:
    pretrain = grid_schema()["$defs"]["set"]["properties"]["pretrain.lr"]
    assert pretrain == {"description": "Peak learning rate.", "type": "number", "exclusiveMinimum": 0}


def test_the_reference_lists_every_field_with_its_bounds_and_default() -> None:
    page = reference()
    assert "| `lr` | number > 0 | `0.0003` | Peak learning rate. |" in page
    assert "| `holdout` | number ≥ 0 ≤ 0.5 | `0.02` |" in page
    for owner in parts(Cell) | {TaskSpec, JudgeSpec, Resources}:
        for name in fields_of(owner):
            assert owner is Cell or f"| `{name}` |" in page
    for heading in ("model.moe", "pretrain.data.mix", "pretrain.balance", "evaluate.tasks (each)", "execution"):
        assert f"## {heading}" in page
