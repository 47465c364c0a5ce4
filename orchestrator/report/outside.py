"""Which packages and plugin files made the numbers, and where rows of one table come from several versions of one."""

from __future__ import annotations

from orchestrator.report.collect import CellResult, Results
from orchestrator.spec.providers import Use, of_all

_MEMORY = ("uses from outside",)


def uses(results: Results) -> tuple[Use, ...]:
    """Return what the artifacts of a grid were made with from outside, () as a rule."""
    return of_all(use for found in _recorded(results).values() for use in found)


def cell_uses(results: Results, cell: CellResult) -> tuple[Use, ...]:
    """Return what one cell's artifacts were made with from outside."""
    if not (recorded := _recorded(results)):
        return ()
    return of_all(use for key in cell.document["stages"] for use in recorded.get(key, ()))


def mixed(results: Results) -> list[str]:
    """Return a sentence for each provider of which the rows have several versions."""
    settings: dict[str, dict[str, dict[str, None]]] = {}
    for cell in results.cells:
        for use in cell_uses(results, cell):
            made = settings.setdefault(use.origin.provider, {}).setdefault(str(use.origin), {})
            made[cell.name] = None
    return [
        "this table mixes versions: "
        + " | ".join(f"{origin} in {', '.join(names)}" for origin, names in sorted(by_version.items()))
        for by_version in settings.values()
        if len(by_version) > 1
    ]


def _recorded(results: Results) -> dict[str, tuple[Use, ...]]:
    """Return artifact -> what its manifest names, of those that name anything; all manifests are looked at once."""
    if _MEMORY not in results.memory:
        results.memory[_MEMORY] = {
            key: tuple(map(Use.from_json, told))
            for key, manifest in results.manifests.items()
            if (told := manifest.provenance.get("plugins"))
        }
    found: dict[str, tuple[Use, ...]] = results.memory[_MEMORY]
    return found
