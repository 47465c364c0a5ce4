"""The settings that an exhibit is made of, their names in its legend, and its panels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations

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


def short_names(settings: Sequence[Setting], factor: str = "") -> dict[str, str]:
    """Return setting -> its name in a legend: the value of `factor`, with as few others as tell the settings apart.

    Where `factor` has one value alone, it is one of the others.
    """
    names = dict.fromkeys(name for setting in settings for name in setting.factors)
    values = {name: {_value(setting, name) for setting in settings} for name in names}
    first = [factor] if len(values.get(factor, ())) > 1 else []
    others = sorted((name for name in names if name not in first), key=lambda name: len(values[name]) == 1)
    for count in range(not first, len(others) + 1):
        for more in combinations(others, count):
            chosen_names = (*first, *more)
            told = [", ".join(filter(None, (_value(s, name) for name in chosen_names))) for s in settings]
            if all(told) and len(set(told)) == len(told):
                return {setting.name: text for setting, text in zip(settings, told, strict=True)}
    return {setting.name: setting.name for setting in settings}


def _value(setting: Setting, name: str) -> str:
    return str(setting.factors.get(name, ""))


def split(results: Results, exhibit: Exhibit, settings: Sequence[Setting], drawn: str) -> dict[str, list[Setting]]:
    """Return panel -> settings: by the factor `panels`, or by everything but `drawn` where `split` says rest."""
    found: dict[str, list[Setting]] = {}
    for setting in settings:
        name = str(setting.factors.get(exhibit.panels, "")) if exhibit.panels else ""
        if exhibit.split == "rest":
            name = ", ".join(f"{k}={v}" for k, v in setting.factors.items() if k != drawn and k in results.factors)
        found.setdefault(name, []).append(setting)
    return found
