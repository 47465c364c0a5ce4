"""The fields of a cell as plain data: their types, bounds and choices, and how YAML becomes frozen dataclasses."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from orchestrator.spec import cell as cells
from orchestrator.spec.cell import SUITES, Cell
from orchestrator.spec.model import BACKBONES, CHOICES, PRESETS, UPCYCLES
from orchestrator.spec.problems import Mistake, Problems, did_you_mean
from orchestrator.spec.tasks import TASKS
from orchestrator.spec.units import Length, parse_length

Path = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Rule:
    """What a value may be, beyond its type. `above` is an exclusive lower bound."""

    low: float | None = None
    high: float | None = None
    above: float | None = None
    choices: tuple[Any, ...] = ()

    def check(self, value: Any) -> None:
        """Raise Mistake when `value` breaks the rule."""
        if self.choices and value not in self.choices:
            raise Mistake(f"must be one of {', '.join(map(repr, self.choices))}, not {value!r}", self._near(value))
        if self.low is not None and value < self.low:
            raise Mistake(f"must be at least {self.low:g}, not {value:g}")
        if self.above is not None and value <= self.above:
            raise Mistake(f"must be above {self.above:g}, not {value:g}")
        if self.high is not None and value > self.high:
            raise Mistake(f"must be at most {self.high:g}, not {value:g}")

    def _near(self, value: object) -> str:
        hint = did_you_mean(value, self.choices)
        return hint if hint.startswith("did you mean") else ""


def one_of(*choices: str) -> Rule:
    return Rule(choices=choices)


POSITIVE = Rule(low=1)
NATURAL = Rule(low=0)
NOT_NEGATIVE = Rule(low=0)
ABOVE_ZERO = Rule(above=0)
FRACTION = Rule(low=0, high=1)

RULES: dict[str, dict[str, Rule]] = {
    "Seeds": {name: Rule(low=0, high=2**31 - 1) for name in ("data", "init", "pretrain", "finetune", "eval")},
    "DataSpec": {"format": one_of("text", "instruction"), "rows": NATURAL, "holdout": Rule(low=0, high=0.5)},
    "TokenizerSpec": {"kind": one_of("bpe", "pretrained"), "vocab_size": Rule(low=256, high=1_000_000)},
    "BalanceSpec": {
        "aux_coef": NOT_NEGATIVE,
        "aux_variant": one_of(
            "paper", "switch", "olmoe_hf", "sequence", "sigmoid_normalised", "sigmoid_raw", "top1_squared"
        ),
        "aux_group": one_of("batch", "sequence", "pooled"),
        "aux_scope": one_of("micro_batch", "global"),
        "z_coef": NOT_NEGATIVE,
        "bias_rate": NOT_NEGATIVE,
        "entropy_coef": NOT_NEGATIVE,
        "null_coef": NOT_NEGATIVE,
        "mutual_information_coef": NOT_NEGATIVE,
    },
    "TrainSpec": {
        "steps": POSITIVE,
        "micro_batch": POSITIVE,
        "accumulation": POSITIVE,
        "sequence_length": Rule(low=8),
        "lr": ABOVE_ZERO,
        "router_lr": NOT_NEGATIVE,
        "router_lr_ratio": NOT_NEGATIVE,
        "schedule": one_of("cosine", "linear", "constant"),
        "warmup_ratio": FRACTION,
        "min_lr_ratio": FRACTION,
        "betas": Rule(low=0, high=0.999999),
        "eps": ABOVE_ZERO,
        "weight_decay": NOT_NEGATIVE,
        "clip": NOT_NEGATIVE,
        "precision": one_of("fp32", "bf16", "mixed"),
        "loss": one_of("all", "response"),
        "expert_dropout": Rule(low=0, high=0.9),
    },
    "TaskSpec": {
        "name": one_of(*TASKS),
        "shots": Rule(low=0, high=100),
        "limit": NATURAL,
        "metric": one_of("acc", "acc_norm"),
    },
    "EvaluateSpec": {
        "suites": one_of(*SUITES),
        "at": Rule(above=0, high=1),
        "max_length": Rule(low=16),
        "shots": one_of("per_item", "shared"),
        "precision": one_of("fp32", "bf16"),
        "val_tokens": POSITIVE,
        "efficiency_limit": NATURAL,
        "routing_seeds": POSITIVE,
    },
    "Resources": {
        "nodes": POSITIVE,
        "processes": POSITIVE,
        "cores": POSITIVE,
        "gpus": NATURAL,
        "memory_gb": ABOVE_ZERO,
        "minutes": POSITIVE,
    },
    "Execution": {
        "engine": one_of("torch", "deepspeed"),
        "device": one_of("cpu", "cuda"),
        "checkpoint_steps": NATURAL,
        "checkpoint_seconds": NOT_NEGATIVE,
        "log_every": POSITIVE,
    },
    "MoESpec": {
        **{name: Rule(choices=values) for name, values in CHOICES.items()},
        "preset": one_of(*PRESETS),
        "top_k": POSITIVE,
        "num_experts": POSITIVE,
        "expert_width": POSITIVE,
        "shared_experts": NATURAL,
        "collaboration_top": NATURAL,
        "zero_experts": NATURAL,
        "copy_experts": NATURAL,
        "constant_experts": NATURAL,
        "null_experts": NATURAL,
        "n_group": POSITIVE,
        "topk_group": POSITIVE,
        "threshold_decay": Rule(low=0, high=0.999999),
        "temperature": ABOVE_ZERO,
        "router_init_std": NOT_NEGATIVE,
    },
    "ModelSpec": {
        "backbone": one_of(*BACKBONES),
        "hidden_size": POSITIVE,
        "num_layers": POSITIVE,
        "num_heads": POSITIVE,
        "num_kv_heads": POSITIVE,
        "context": Rule(low=8),
        "vocab_size": NATURAL,
        "rope_theta": ABOVE_ZERO,
        "norm_eps": ABOVE_ZERO,
        "init_std": ABOVE_ZERO,
        "dense_layers": NATURAL,
        "dense_width": NATURAL,
        "upcycle": one_of(*UPCYCLES),
    },
}
STAGE_RESOURCES = ("pretrain", "finetune", "evaluate", "prepare")


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a cell: the dataclass it belongs to, its type, and its rule."""

    owner: type
    name: str
    hint: Any
    rule: Rule | None

    def typed(self, value: Any) -> Any:
        """Return `value` with the field's type. Raises Mistake."""
        if self.owner is cells.TrainSpec and self.name == "steps":
            value = parse_length(value)
            if isinstance(value, Length):
                return value
        value = typed(self.hint, value)
        if self.rule is not None and value is not None:
            for item in value if isinstance(value, tuple) else (value,):
                self.rule.check(item)
        if isinstance(value, tuple) and self.name in ("suites", "at"):
            _distinct(value)
        return value


def _distinct(values: tuple[Any, ...]) -> None:
    twice = [value for i, value in enumerate(values) if value in values[:i]]
    if twice:
        raise Mistake(f"names {twice[0]!r} twice")
    if not values:
        raise Mistake("must not be empty")


@lru_cache(maxsize=None)
def fields_of(owner: type) -> dict[str, Field]:
    """Return the fields of the dataclass `owner` by name."""
    hints = typing.get_type_hints(owner)
    rules = RULES.get(owner.__name__, {})
    return {f.name: Field(owner, f.name, hints[f.name], rules.get(f.name)) for f in dataclasses.fields(owner)}


def dataclass_in(hint: Any) -> type | None:
    """Return the dataclass that `hint` or `hint | None` names, else None."""
    for candidate in (hint, *typing.get_args(hint)):
        if isinstance(candidate, type) and dataclasses.is_dataclass(candidate):
            return candidate if candidate is hint or type(None) in typing.get_args(hint) else None
    return None


@lru_cache(maxsize=None)
def field_paths() -> dict[Path, Field]:
    """Return every leaf field of a cell by path, without those of `execution.resources`."""
    found: dict[Path, Field] = {}

    def walk(owner: type, path: Path) -> None:
        for name, field in fields_of(owner).items():
            inner = dataclass_in(field.hint)
            if inner is not None:
                walk(inner, (*path, name))
            else:
                found[(*path, name)] = field

    walk(Cell, ())
    return found


def type_name(hint: Any) -> str:
    """Return a type hint in a person's words."""
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    if hint in names:
        return names[hint]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(arg) for arg in args)
    if origin is tuple:
        return f"a list of {type_name(args[0]).removeprefix('a ')}s" if args[-1] is Ellipsis else f"{len(args)} numbers"
    return "a mapping"


def typed(hint: Any, value: Any) -> Any:
    """Return the JSON value `value` as the scalar or tuple type `hint`; whole numbers pass for numbers. Raises Mistake."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return typed(next(arg for arg in args if arg is not type(None)), value)
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else None
        if items is None or (args[-1] is not Ellipsis and len(items) != len(args)):
            raise Mistake(f"must be {type_name(hint)}, not {value!r}")
        return tuple(typed(args[0], item) for item in items)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is hint and not (hint is float and not math.isfinite(value)):
        return value
    quoted = hint in (int, float) and isinstance(value, str) and value.replace(".", "", 1).isdigit()
    raise Mistake(f"must be {type_name(hint)}, not {value!r}", "remove the quotes" if quoted else "")


class Builder:
    """Builds a cell from nested plain data; `place(path)` says where a path was written."""

    def __init__(self, problems: Problems, place: typing.Callable[[Path], str]) -> None:
        self.problems = problems
        self.place = place
        self.lengths: dict[str, Length] = {}

    def build(self, owner: type, data: Any, path: Path) -> Any:
        """Return an `owner` made of `data`, or None when something was wrong with it."""
        if not isinstance(data, Mapping):
            self._add(path, f"must be a mapping, not {data!r}")
            return None
        fields = fields_of(owner)
        for name in data:
            if name not in fields:
                known = [".".join((*path, known)) for known in fields]
                self.problems.add(
                    f"{'.'.join((*path, str(name)))!r} is not a field of a cell",
                    self.place((*path, str(name))),
                    ".".join((*path, str(name))),
                    near_field((*path, str(name)), known),
                )
        values: dict[str, Any] = {}
        sound = True
        for name, field in fields.items():
            if name not in data:
                if field_required(owner, name):
                    self._add((*path, name), "is required")
                    sound = False
                continue
            try:
                values[name] = self._field(field, data[name], (*path, name))
            except Mistake as mistake:
                self._add((*path, name), mistake.message, mistake.hint)
                sound = False
            else:
                sound = sound and not (values[name] is None and data[name] is not None)
        return owner(**values) if sound else None

    def _field(self, field: Field, value: Any, path: Path) -> Any:
        inner = dataclass_in(field.hint)
        if inner is not None:
            if value is None and inner is not field.hint:
                return None
            return self.build(inner, value, path)
        if path == ("evaluate", "tasks"):
            return self._tasks(value, path)
        if path == ("execution", "resources"):
            return self._resources(value, path)
        result = field.typed(value)
        if isinstance(result, Length):
            self.lengths[path[0]] = result
            return 1
        return result

    def _tasks(self, value: Any, path: Path) -> Any:
        """Tasks by name (`{arc_easy: {shots: 5}}`, merged by layer) or as a list of names or of mappings with a name."""
        if isinstance(value, Mapping):
            value = [{"name": name, **(spec or {})} for name, spec in value.items() if spec is not False]
        if not isinstance(value, list):
            raise Mistake(f"must be a mapping of tasks or a list of their names, not {value!r}")
        tasks = []
        for item in value:
            spec = {"name": item} if isinstance(item, str) else item
            name = spec.get("name") if isinstance(spec, Mapping) else None
            if name in TASKS:
                default = TASKS[name]
                spec = {"shots": default.shots, "metric": default.metric, **spec}
            tasks.append(self.build(cells.TaskSpec, spec, (*path, str(name)) if name else path))
        names = [task.name for task in tasks if task]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise Mistake(f"names {name!r} twice")
        return None if None in tasks else tuple(tasks)

    def _resources(self, value: Any, path: Path) -> Any:
        if not isinstance(value, Mapping):
            raise Mistake(f"must be a mapping, not {value!r}")
        for kind in value:
            if kind not in STAGE_RESOURCES:
                self._add((*path, str(kind)), "is not a kind of stage", did_you_mean(kind, STAGE_RESOURCES, "kinds"))
        built = {kind: self.build(cells.Resources, spec, (*path, kind)) for kind, spec in value.items()}
        return None if None in built.values() else built

    def _add(self, path: Path, message: str, hint: str = "") -> None:
        key = ".".join(path)
        self.problems.add(f"{key} {message}", self.place(path), key, hint)


def field_required(owner: type, name: str) -> bool:
    """Return whether the dataclass `owner` has no default for `name`."""
    field = next(f for f in dataclasses.fields(owner) if f.name == name)
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def near_field(path: Path, siblings: typing.Iterable[str] = ()) -> str:
    """Return a hint for the unknown field `path`: a sibling of a similar name, or a field elsewhere that is called so."""
    near = did_you_mean(".".join(path), siblings)
    if near.startswith("did you mean"):
        return near
    elsewhere = [".".join(known) for known in field_paths() if known[-1] == path[-1]]
    if elsewhere:
        return f"did you mean {elsewhere[0]!r}?"
    near = did_you_mean(path[-1], {known[-1] for known in field_paths()})
    if near.startswith("did you mean"):
        word = near.split("'")[1]
        return next(f"did you mean {'.'.join(known)!r}?" for known in field_paths() if known[-1] == word)
    return near if len(list(siblings)) else "moegrid schema lists every field"
