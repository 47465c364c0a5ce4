"""Factors: the short names a grid may vary, the cell fields each of them sets, and granularity.

A short name is the last word of a field's path (`top_k` is `model.moe.top_k`); those of a training phase mean the
recipe's phase. A dotted path of a field (`finetune.lr`) is one too, and so is what a grid may write below the
name of a declaration: `losses.NAME` (its coefficient) and `losses.NAME.PARAMETER`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from orchestrator.catalog.freezing import FREEZING, LAYERS, NAME, NONE
from orchestrator.catalog.parameters import Parameters, frozen
from orchestrator.errors import MoegridError, did_you_mean
from orchestrator.files.problems import Mistake
from orchestrator.grid.declared import field_at, opened
from orchestrator.grid.vocabulary import meaning
from orchestrator.spec.cell import AdapterSpec, BalanceSpec, Cell, Resources, Seeds, StopSpec, TrainSpec
from orchestrator.spec.fields import Field, Path, dataclass_in, field_paths, fields_of, is_parameter
from orchestrator.spec.model import ModelSpec, MoESpec
from orchestrator.spec.parameters import declarations_of, default_of
from orchestrator.spec.rules import PHASES, STAGE_RESOURCES
from orchestrator.spec.schedule import parse_freeze
from orchestrator.spec.upcycling import UpcyclingSpec

GRANULARITY = "granularity"
_GRANULARITY = re.compile(r"^(\d+)/(\d+)(?:\+(\d+))?$")
# Fields that cannot be factors, and why.
_NOT_FACTORS = {
    "execution": "execution is not science",
    **{f"{phase}.data.corpora": "the corpora are fixed, their weights vary: weights.NAME" for phase in PHASES},
    "evaluate.at": "it is the grid's own `at`",
    "evaluate.suites": "it is the grid's own `evaluate`",
    "evaluate.tasks": "cells of one grid are measured alike",
    "evaluate.pictures": "cells of one grid are asked alike",
    "evaluate.judges": "cells of one grid are judged alike",
    "evaluate.metrics": "cells of one grid are measured alike",
    "evaluate.suite_parameters": "cells of one grid are measured alike",
}

Assignments = tuple[tuple[Path, Any], ...]


@dataclass(frozen=True, slots=True)
class Factor:
    """A named factor and the fields it sets: of a whole phase that it is left out, of named settings none itself."""

    name: str
    paths: tuple[Path, ...]

    def assign(self, value: object, active_width: int) -> Assignments:
        """Return what `value` (plain data) sets. `active_width` is what granularity keeps equal. Raises Mistake."""
        if self.name == GRANULARITY:
            return tuple(zip(self.paths, granularity(value, active_width), strict=True))
        if not self.paths:
            return ()
        path = self.paths[0]
        if len(path) == 1:
            if value is not None:
                raise Mistake(f"leaves a phase out: null, not {value!r}", f"its fields are {path[0]}.steps and such")
            return ((path, None),)
        if isinstance(value, Mapping):
            raise Mistake(f"must be a value, not {value!r}")
        result = (_resource(path) if path[0] == "execution" else field_at(path)).typed(value)
        if path[-1] == "freeze":
            check_freeze(result)
        return ((path, frozen(result)),)

    def read(self, cell: Cell) -> Any:
        """Return the value of this factor in `cell`."""
        if self.name == GRANULARITY:
            moe = cell.model.moe
            return f"{moe.top_k}/{moe.num_experts}" + (f"+{moe.shared_experts}" if moe.shared_experts else "")
        value: object = cell if self.paths else None
        section: object = None
        for name in self.paths[0] if self.paths else ():
            if isinstance(value, Parameters):
                return value.get(name, default_of(section, self.paths[0][-2], name))
            if isinstance(value, Mapping):
                value = value.get(name)
            else:
                section, value = value, None if value is None else getattr(value, name)
        return value


def companion(name: str, phase: str, plain_seed: str) -> Factor:
    """Return what the section `with` may set: a factor, a stage's resources, or a phase that is left out.

    Raises Mistake as `find_factor` does.
    """
    path = tuple(name.split("."))
    if name in PHASES or path[:2] == ("execution", "resources"):
        return Factor(name, (path,))
    return find_factor(name, phase, plain_seed)


def _resource(path: Path) -> Field:
    """Return the field of `execution.resources.STAGE.FIELD`. Raises Mistake."""
    name, fields = ".".join(path), fields_of(Resources)
    if len(path) != 4:
        raise Mistake(f"{name!r} is not what one stage is given", "write execution.resources.STAGE.FIELD")
    for part, known in ((path[2], STAGE_RESOURCES), (path[3], fields)):
        if part not in known:
            raise Mistake(f"{part!r} in {name!r} is unknown", did_you_mean(part, known))
    return fields[path[3]]


def check_freeze(schedule: str) -> None:
    """Raise Mistake when `schedule` is no freeze schedule."""
    try:
        parse_freeze(schedule)
    except MoegridError as error:  # the package of a rule is broken, or two provide it
        raise Mistake(": ".join(filter(None, (error.error, error.cause))), error.hint) from error
    except ValueError as error:
        words = [part.partition("@")[0].strip() for part in schedule.split("->")]
        bases = [part.partition("(")[0].strip() for word in words for part in word.split("+")]
        known = (NONE, LAYERS, NAME)
        wrong = [base for base in bases if base not in known and FREEZING.find(base) is None]
        offered = (NONE, *FREEZING.names())
        hint = did_you_mean(wrong[0], offered, "roles") if wrong else "as in none->router"
        raise Mistake(str(error), hint, named=True) from None


def granularity(value: object, active_width: int) -> tuple[int, int, int, int]:
    """Return (top_k, num_experts, shared_experts, expert_width) of `2/8` or `1/7+1` at equal active FFN width.

    Raises Mistake when it is malformed or impossible.
    """
    match = _GRANULARITY.match(value) if isinstance(value, str) else None
    if not match:
        raise Mistake(f"{value!r} is not a granularity", "write top_k/num_experts[+shared], as in 2/8 or 1/7+1")
    top_k, num_experts, shared = (int(group or 0) for group in match.groups())
    if top_k < 1:
        raise Mistake(f"granularity {value!r} selects no expert", "top_k is at least 1", named=True)
    if top_k > num_experts:
        message = f"granularity {value!r} selects {top_k} of {num_experts} experts"
        raise Mistake(message, "top_k is at most num_experts", named=True)
    width, rest = divmod(active_width, top_k + shared)
    if rest or not width:
        raise Mistake(
            f"granularity {value!r} divides the active width {active_width} by {top_k + shared} active experts",
            "choose k + shared that divides it, or another model.active_width",
            named=True,
        )
    return top_k, num_experts, shared, width


@cache
def short_names(phase: str, plain_seed: str) -> Mapping[str, tuple[Path, ...]]:
    """Return every short name and the paths it sets, for a recipe of `phase` whose plain seed is `plain_seed`."""
    moe = ("model", "moe")
    names: dict[str, tuple[Path, ...]] = {
        "seed": (("seed", plain_seed),),
        GRANULARITY: tuple((*moe, name) for name in ("top_k", "num_experts", "shared_experts", "expert_width")),
    }
    tables: tuple[tuple[type, Path], ...] = (
        (TrainSpec, (phase,)),
        (BalanceSpec, (phase, "balance")),
        (ModelSpec, ("model",)),
        (MoESpec, moe),
    )
    for owner, prefix in tables:
        for name, field in fields_of(owner).items():
            if dataclass_in(field.hint) is None and field.registry is None:
                names.setdefault(name, ((*prefix, name),))
    names["data"] = ((phase, "data", "source"),)
    names["template"] = ((phase, "data", "template"),)
    names["rows"] = ((phase, "data", "rows"),)
    names["weights"] = ((phase, "data", "weights"),)
    names |= {f"adapter_{name}": ((phase, "adapter", name),) for name in fields_of(AdapterSpec)}
    names |= {f"upcycling_{name}": (("model", "upcycling", name),) for name in fields_of(UpcyclingSpec)}
    names |= {f"stop_{name}": ((phase, "stop", name),) for name in fields_of(StopSpec)}
    names["mix_rows"] = ((phase, "data", "mix", "rows"),)
    names["dola"] = (("evaluate", "dola"),)
    names["vocab_size"] = (("tokenizer", "vocab_size"),)
    return names


@cache
def open_fields(phase: str) -> Mapping[str, Path]:
    """Return the fields that name declarations, by their last word; those of a training phase are of `phase`."""
    found = {path[-1]: path for path, field in field_paths().items() if field.registry is not None}
    return {name: path if path[0] not in PHASES else (phase, *path[1:]) for name, path in found.items()}


def find_factor(name: str, phase: str, plain_seed: str) -> Factor:
    """Return the factor called `name`. Raises Mistake with the nearest name when there is none."""
    names = short_names(phase, plain_seed)
    if name in names:
        return Factor(name, names[name])
    path = tuple(name.split("."))
    long = (*open_fields(phase).get(path[0], path[:1]), *path[1:])
    reason = not_factors(name) or not_factors(".".join(long))
    if reason:
        raise Mistake(f"{name!r} cannot be a factor: {reason}", "put it under set:, evaluate: or at:")
    if path[0] in names and is_parameter(below := (*names[path[0]][0], *path[1:])):
        path = below  # optimizer_parameters.momentum
    if is_parameter(path) or (path in field_paths() and field_paths()[path].registry is None):
        return Factor(name, (path,))
    if (found := opened(long)) is not None:
        field_at(long)
        return Factor(name, (long if found[2] else (*long, found[0].main),))
    if long in field_paths():
        raise Mistake(f"{name!r} cannot be a factor as a whole", f"one of its names can: {name}.NAME")
    meant = meaning(name, phase)
    if meant:
        raise Mistake(f"factor {name!r} is unknown", meant)
    if of := _parameter_of(name, phase):
        raise Mistake(f"factor {name!r} is unknown", of)
    dotted = [".".join(path) for path in field_paths()] if "." in name else list(names)
    hint = did_you_mean(name, dotted)
    raise Mistake(f"factor {name!r} is unknown", hint if hint.startswith("did") else "moegrid schema lists the factors")


def _parameter_of(name: str, phase: str) -> str:
    """Return a hint where `name` is a parameter of kinds that the grid may mean, "" where it is none."""
    found: dict[str, str] = {}
    tables: dict[type, Path] = {TrainSpec: (phase,), BalanceSpec: (phase, "balance"), MoESpec: ("model", "moe")}
    for owner, prefix in tables.items():
        for field, declaration, registry in declarations_of(owner):
            if name in getattr(declaration.parameters, "__dataclass_fields__", {}):
                path = ".".join((*prefix, field, name))
                owner_of = f"{registry.word} {declaration.name!r}"
                found.setdefault(path, f"{owner_of} has a parameter of that name: write {path}")
    return "; ".join(found.values())


def not_factors(name: str) -> str:
    """Return why the field called `name` cannot be a factor, "" when it can."""
    if name.endswith(".digest"):
        return "it follows from the source"
    reasons = (why for prefix, why in _NOT_FACTORS.items() if name == prefix or name.startswith(f"{prefix}."))
    return next(reasons, "")


def replace_path(value: Any, path: Path, new: Any) -> Any:
    """Return the frozen dataclass `value` with the field at `path` replaced; mappings inside are made as needed."""
    if isinstance(value, Parameters):
        return value.replaced(path[0], new)
    if isinstance(value, Mapping):
        inner = new if len(path) == 1 else replace_path(value.get(path[0], {}), path[1:], new)
        return {**value, path[0]: inner}
    if len(path) > 1:
        new = replace_path(getattr(value, path[0]), path[1:], new)
    return dataclasses.replace(value, **{path[0]: new})


def seed_names(plain_seed: str) -> frozenset[str]:
    """Return the factor names that set a seed."""
    return frozenset({"seed", *(f"seed.{name}" for name in fields_of(Seeds))})


def factor_field(factor: Factor) -> Field | None:
    """Return the field a factor sets, None for granularity and for named settings."""
    return field_at(factor.paths[0]) if factor.paths and factor.name != GRANULARITY else None
