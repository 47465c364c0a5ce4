"""The `adaptive:` section: seeds are added where results ask for them. They are ordinary cells.

adaptive: {metric: answer_bpb, halfwidth: 0.01, max_seeds: 8}   # until the mean of each setting is known well enough
adaptive: {metric: answer_bpb, race: baseline, max_seeds: 20}   # where they can still decide a difference
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from orchestrator.errors import did_you_mean
from orchestrator.files.problems import Mistake, Problems
from orchestrator.grid.document import GridDocument, Section
from orchestrator.spec.fields import typed
from orchestrator.spec.rules import ABOVE_ZERO, Rule

SEED = "seed"
MOST_SEEDS = 100
# What a race decides: the differences to the grid's baseline, or those of all pairs of settings.
RACES = ("baseline", "pairs")
_TYPES = {"metric": str, "halfwidth": float, "race": str, "max_seeds": int}
_RULES = {"halfwidth": ABOVE_ZERO, "race": Rule(choices=RACES), "max_seeds": Rule(low=2, high=MOST_SEEDS)}
_EXAMPLE = "as in adaptive: {metric: answer_bpb, halfwidth: 0.01, max_seeds: 8}"


@dataclass(frozen=True, slots=True)
class Adaptive:
    """A setting gets seeds until the 95 % interval of its mean `metric` is at most ± `halfwidth`, or `max_seeds`.

    With `race` in place of a `halfwidth` it gets seeds as long as they can decide its differences.
    """

    metric: str
    halfwidth: float | None = None
    max_seeds: int = 10
    race: str = ""


def read_adaptive(document: GridDocument, problems: Problems) -> Adaptive | None:
    """Return the section, or None without one or with problems."""
    section = document.sections.get("adaptive")
    if section is None:
        return None
    if not isinstance(section.data, Mapping):
        problems.add("adaptive must be a mapping", section.place(), "adaptive", _EXAMPLE)
        return None
    before = len(problems.found)
    known = tuple(field.name for field in fields(Adaptive))
    values: dict[str, Any] = {}
    for name, value in section.data.items():
        key, place = f"adaptive.{name}", section.place(name)
        if name not in known:
            problems.add(f"{key} is unknown", place, key, did_you_mean(name, known, "keys"))
            continue
        try:
            values[name] = typed(_TYPES[name], value)
            if name in _RULES:
                _RULES[name].check(values[name])
        except Mistake as mistake:
            problems.add(f"{key} {mistake.message}", place, key, mistake.hint)
    if "metric" not in section.data:
        problems.add("adaptive.metric is missing", section.place(), "adaptive.metric", _EXAMPLE)
    ends = [name for name in ("halfwidth", "race") if name in section.data]
    if not ends:
        hint = f"{_EXAMPLE}, or race: baseline (or pairs) in place of halfwidth"
        problems.add("adaptive.halfwidth is missing", section.place(), "adaptive.halfwidth", hint)
    if len(ends) > 1:
        hint = "halfwidth: each mean known well enough; race: differences decided"
        problems.add("adaptive has both halfwidth and race", section.place("race"), "adaptive.race", hint)
    baseline = document.sections.get("baseline")
    wrong = any(problem.key == "baseline" for problem in problems.found)  # then it is one, and told
    if section.data.get("race") == "baseline" and not wrong and not (baseline and baseline.data):
        hint = "add baseline: {FACTOR: value}, or race: pairs"
        problems.add("adaptive.race: baseline has no baseline", section.place("race"), "adaptive.race", hint)
    if "search" in document.sections:
        hint = "search first, then measure the best with more seeds"
        problems.add("adaptive and search exclude each other", section.place(), "adaptive", hint)
    if len(problems.found) > before:
        return None
    found = Adaptive(**values)
    _check_seeds(document, section, found, problems)
    return found


def more_seeds(document: GridDocument, adaptive: Adaptive) -> GridDocument:
    """Return the document with the seeds of every product continued up to `max_seeds`: 0, 1, 2, then 3, 4, ..."""
    sections = dict(document.sections)
    if "factors" in sections:
        sections["factors"] = replace(sections["factors"], data=_continued(sections["factors"].data, adaptive))
    if "also" in sections:
        sections["also"] = replace(sections["also"], data=[_continued(p, adaptive) for p in sections["also"].data])
    return replace(document, sections=sections, narrowed=True)


def _check_seeds(document: GridDocument, section: Section, adaptive: Adaptive, problems: Problems) -> None:
    products = list(_products(document))
    if not products or any(SEED not in product for product, _ in products):
        place = next((place for product, place in products if SEED not in product), section.place())
        hint = "give every product seed: [0, 1, 2], unpaired"
        problems.add("adaptive needs the factor 'seed' as an axis of its own", place, "adaptive", hint)
        return
    most = max(len(_seeds(product)) for product, _ in products)
    if most >= adaptive.max_seeds and not document.narrowed:
        message = f"adaptive.max_seeds {adaptive.max_seeds} leaves nothing to add to {most} seeds"
        problems.add(message, section.place("max_seeds"), "adaptive.max_seeds", "raise it, or name fewer seeds")


def _products(document: GridDocument) -> Iterator[tuple[Mapping[str, Any], str]]:
    factors, also = document.sections.get("factors"), document.sections.get("also")
    if factors is not None:
        yield factors.data, factors.place()
    for i, product in enumerate(also.data if also is not None and isinstance(also.data, list) else []):
        if isinstance(product, Mapping):
            yield product, also.place(i) if also is not None else ""


def _seeds(product: Mapping[str, object]) -> list[Any]:
    seeds = product[SEED]
    return list(seeds) if isinstance(seeds, list) else [seeds]


def _continued(product: Mapping[str, object], adaptive: Adaptive) -> dict[str, Any]:
    seeds = _seeds(product)
    first = max(seeds) + 1
    return {**product, SEED: [*seeds, *range(first, first + max(0, adaptive.max_seeds - len(seeds)))]}
