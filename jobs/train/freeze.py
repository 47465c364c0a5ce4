"""Freezing by rule (orchestrator.catalog.freezing), and the proof that what was frozen did not move."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from itertools import islice
from typing import TYPE_CHECKING

from torch import nn

from jobs.models.adapters import kept_by_adapters
from jobs.models.backbones import CausalLM
from jobs.models.roles import parameter_roles
from orchestrator.catalog.freezing import FREEZING, FreezeRule, Part, parts_of
from orchestrator.errors import MoegridError
from orchestrator.registry import load
from orchestrator.spec.model import ModelSpec

if TYPE_CHECKING:
    from jobs.train.engine import Engine

_LAYER = re.compile(r"^backbone\.model\.layers\.(\d+)\.")
Asked = Callable[[str, str, ModelSpec], bool]


def _matcher(model: CausalLM, frozen: str, *, code: bool) -> Callable[[str, str], bool]:
    """Return whether the word `frozen` freezes (a name in a state, its role); rules are asked by `code` as well."""
    parts = []
    for part in parts_of(frozen):
        rule = FREEZING.get(part.rule) if part.rule else None
        asked: Asked | None = load(rule.code, FREEZING.who(rule.name)) if code and rule and rule.code else None
        parts.append((part, rule, asked))

    def frozen_by(part: Part, rule: FreezeRule | None, asked: Asked | None, name: str, role: str) -> bool:
        if part.pattern:
            return fnmatchcase(name, part.pattern)
        found = _LAYER.search(name)
        if not part.in_layer(int(found[1]) if found else None, model.spec.num_layers):
            return False
        if rule is not None and rule.prefix and name.startswith(rule.prefix):
            return True
        return rule is None or role in rule.roles or (asked is not None and asked(name, role, model.spec))

    return lambda name, role: any(frozen_by(*one, name, role) for one in parts)


def frozen_names(model: CausalLM, frozen: str) -> frozenset[str]:
    """Return the parameters that the word `frozen` ("" = none) freezes in this model; MoegridError when none is."""
    kept = kept_by_adapters(model)
    if not frozen:
        return kept
    matches = _matcher(model, frozen, code=True)
    roles = list(parameter_roles(model))
    names = frozenset(name for name, _, role in roles if matches(name, role))
    for part in parts_of(frozen):
        if part.pattern and not any(fnmatchcase(name, part.pattern) for name in names):
            raise MoegridError(
                f"freeze {str(part)!r} names no parameter of the model",
                cause="its names are such as " + ", ".join(name for name, *_ in islice(parameter_roles(model), 3, 6)),
                hint="mend the pattern; * stands for anything",
            )
    if kept and len(kept | names) == len(roles):
        raise MoegridError(f"freeze {frozen!r} leaves no adapter to train", hint="freeze less, or adapt more")
    return kept | names


def frozen_blocks(model: CausalLM, frozen: str) -> frozenset[int]:
    """Return the MoE blocks, by their place, in which the router learns nothing, also without gradients."""
    if model.adapter is not None and model.adapter.router == "frozen":
        return frozenset(range(len(model.moe_blocks)))
    if not frozen:
        return frozenset()
    matches = _matcher(model, frozen, code=False)
    paths = {id(module): path for path, module in model.named_modules()}
    names = (f"{paths[id(block)]}.router.weight" for block in model.moe_blocks)
    return frozenset(place for place, name in enumerate(names) if matches(name, "router"))


def apply_freeze(model: CausalLM, frozen: str) -> frozenset[str]:
    """Stop gradients of what the word `frozen` freezes, let all others have them; return the frozen names."""
    names = frozen_names(model, frozen)
    for name, parameter, _ in parameter_roles(model):
        parameter.requires_grad_(name not in names)
        if not parameter.requires_grad:
            parameter.grad = None
    return names


def _buffers(module: nn.Module, role: str = "other", prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (name, role) of what a module saves besides its parameters."""
    role = getattr(module, "role", role)
    kept = module.state_dict(keep_vars=True)
    yield from ((prefix + name, role) for name, _ in module.named_buffers(recurse=False) if name in kept)
    for name, child in module.named_children():
        yield from _buffers(child, role, f"{prefix}{name}.")


def frozen_digest(engine: Engine, frozen: str) -> str:
    """Return the digest of what `frozen` names: parameters, balancing biases, thresholds ("" when it names nothing)."""
    if not frozen and engine.model.adapter is None:
        return ""
    kept = frozen_names(engine.model, frozen)
    names = [name for name, _, _ in parameter_roles(engine.model) if name in kept]
    matches = _matcher(engine.model, frozen, code=False)
    names += [name for name, role in _buffers(engine.model) if matches(name, role)]
    return engine.digest(names)
