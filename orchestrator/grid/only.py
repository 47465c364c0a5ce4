"""Which cells of a grid a command is about: `--only freeze=none->router`, `--only 5303feb1be93`."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.errors import did_you_mean
from orchestrator.files.problems import Mistake, Problems
from orchestrator.grid.axes import show_value, written
from orchestrator.grid.expand import GridCell
from orchestrator.grid.factors import Factor, find_factor
from orchestrator.grid.renamed import renewed_value


def select(
    cells: Sequence[GridCell], only: Sequence[str], phase: str, plain_seed: str, problems: Problems
) -> list[GridCell]:
    """Return the cells with an id or a factor's value in `only`; several values of one factor: any of them."""
    kept = list(cells)
    ids = [text for text in only if "=" not in text]
    for text in ids:
        if not text or not any(item.id.startswith(text) for item in cells):
            hint = "write FACTOR=VALUE or a cell's id"
            problems.add(f"--only {text!r}: no cell has this id", "command line", hint=hint)
    if ids:
        kept = [item for item in kept if item.id.startswith(tuple(ids))]
    wanted: dict[str, tuple[Factor, list[str]]] = {}  # factor -> its values, written as in names
    for text in only:
        name, equals, said = text.partition("=")
        if equals:
            try:
                named = any(name.strip() in item.factors for item in cells)
                factor = _found(name.strip(), phase, plain_seed, named)
            except Mistake as mistake:
                problems.add(mistake.message, "command line", name, mistake.hint)
            else:
                value = renewed_value(f"factors.{factor.name}", said.strip(), "command line")
                wanted.setdefault(factor.name, (factor, []))[1].append(written(factor, str(value)))
    for name, (factor, values) in wanted.items():
        shown = [_shown(factor, item) for item in kept]
        for value in values:
            if value not in shown:
                hint = did_you_mean(value, sorted(set(shown)), "values")
                problems.add(f"--only {name}={value} matches no cell", "command line", name, hint)
        kept = [item for item, text in zip(kept, shown, strict=True) if text in values]
    return kept


def _found(name: str, phase: str, plain_seed: str, named: bool) -> Factor:
    """Return the factor called `name`; what cells have and no field is are named settings. Raises Mistake."""
    try:
        return find_factor(name, phase, plain_seed)
    except Mistake:
        if named:
            return Factor(name, ())
        raise


def _shown(factor: Factor, item: GridCell) -> str:
    value: object = item.factors[factor.name] if factor.name in item.factors else factor.read(item.cell)
    return show_value(list(value) if isinstance(value, tuple) else value)
