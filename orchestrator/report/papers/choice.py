"""The settings that an exhibit is made of, and its panels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from orchestrator.report.collect import Results, Setting
from orchestrator.report.papers.declared import Exhibit


def chosen(results: Results, exhibit: Exhibit, factors: Iterable[str] = ()) -> list[Setting]:
    """Return the settings that `where` names and that have all of `factors`."""
    return [
        setting
        for setting in results.settings
        if all(str(setting.factors.get(name, "")) in values for name, values in exhibit.where.items())
        and all(name in setting.factors for name in factors if name)
    ]


def split(results: Results, exhibit: Exhibit, settings: Sequence[Setting], drawn: str) -> dict[str, list[Setting]]:
    """Return panel -> settings: by the factor `panels`, or by everything but `drawn` where `split` says rest."""
    found: dict[str, list[Setting]] = {}
    for setting in settings:
        name = str(setting.factors.get(exhibit.panels, "")) if exhibit.panels else ""
        if exhibit.split == "rest":
            name = ", ".join(f"{k}={v}" for k, v in setting.factors.items() if k != drawn and k in results.factors)
        found.setdefault(name, []).append(setting)
    return found
