"""Words of a cell that change nothing beside its others, or teach its router nothing: told, not refused.

A factor without effect is refused (`grid.validate.why_not`). These have one at some values of another factor, so that a
grid that crosses both has cells which compute the same and are each trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from orchestrator.catalog.routers import kind_of
from orchestrator.grid.expand import GridCell
from orchestrator.spec.cell import Cell
from orchestrator.spec.identity import digest
from orchestrator.spec.model import MoESpec


def _z_after_temperature(cell: Cell) -> str:
    moe = cell.model.moe
    if not any(train.balance.z_coef for train in cell.phases.values()):
        return "z_coef is 0"
    plain = kind_of(moe).plain and moe.temperature == 1 and not moe.logit_std
    return "temperature is 1 and logit_std is 0" if plain else ""


def _group_mask(cell: Cell) -> str:
    return "" if cell.model.moe.balance_bias else "without balance_bias no expert is selected by less than 0"


# Field of the block -> why it changes nothing in a cell, "" where it does.
_WHY: Mapping[str, Callable[[Cell], str]] = {
    "z_after_temperature": _z_after_temperature,
    "group_mask": _group_mask,
    "fixed_weight": lambda cell: "the weight of a token's only expert is always 1",
}
_EFFECTS = {"fixed_weight": "leaves the router without a gradient of the task"}
_NEUTRAL = MoESpec()


@dataclass(frozen=True, slots=True)
class Idle:
    """A word that changes nothing in some cells: its value, why, and pairs of cells that compute the same by it."""

    field: str
    value: object
    why: str
    cells: int
    same: tuple[tuple[str, str], ...]

    @property
    def path(self) -> str:
        """The field as a grid writes it."""
        return f"model.moe.{self.field}"

    def __str__(self) -> str:
        where = f"{self.cells} cell{'s' * (self.cells > 1)}"
        effect = _EFFECTS.get(self.field, "changes nothing")
        text = f"{self.path}: {str(self.value).lower()} {effect} in {where}: {self.why}"
        if not self.same:
            return text
        more = f" (and {len(self.same) - 1} more)" if len(self.same) > 1 else ""
        return f"{text}; {self.same[0][0]!r} computes what {self.same[0][1]!r} does{more}"


def idle_words(cells: Iterable[GridCell]) -> list[Idle]:
    """Return the words of a grid's cells that change nothing beside others."""
    items = list(cells)
    found: dict[tuple[str, object, str], list[GridCell]] = {}
    for item in items:
        for name, why in _idle(item.cell):
            found.setdefault((name, getattr(item.cell.model.moe, name), why), []).append(item)
    if not found:
        return []
    first = {_science(item.cell): item for item in items}
    told = []
    for (name, value, why), those in found.items():
        pairs = [(item, first.get(_science(_without(item.cell, name)))) for item in those]
        same = tuple((item.name, other.name) for item, other in pairs if other is not None)
        told.append(Idle(name, value, why, len(those), same))
    return told


def _idle(cell: Cell) -> Iterator[tuple[str, str]]:
    for name, why in _WHY.items():
        if getattr(cell.model.moe, name) != getattr(_NEUTRAL, name) and (told := why(cell)):
            yield name, told


def _without(cell: Cell, name: str) -> Cell:
    moe = replace(cell.model.moe, **{name: getattr(_NEUTRAL, name)})
    return replace(cell, model=replace(cell.model, moe=moe))


def _science(cell: Cell) -> str:
    return digest([cell.model, cell.tokenizer, cell.seed, *cell.phases.items(), cell.evaluate])
