"""Freeze rules: the words of a freeze schedule (`none->router`), and which parameters each of them freezes.

A word is a rule's name, in some layers where it says so (`router(0-3)`), `layers(0-3)` for all of these layers, or
`name(*.q_proj.*)` for parameters by a pattern of their names; several are joined by `+`.

A rule freezes whole roles, with all that they learn (also what the router learns without gradients), and those
parameters for which its code says so: a function `frozen(name, role, model) -> bool` of a parameter's name in a state
(`backbone.model.layers.0.self_attn.q_proj.weight`), its role and the ModelSpec. What is frozen keeps every bit, its
optimizer's state too, which is proved at the end of the phase.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

from orchestrator.errors import MoegridError, did_you_mean
from orchestrator.registry import Registry

# The roles of parameters; the gates, norms and dense layers are `other`.
ROLES = ("router", "routed_expert", "shared_expert", "attention", "embedding", "other")
MOE_ROLES = frozenset({"router", "routed_expert", "shared_expert"})
NONE = "none"
# Words that name parameters otherwise than by a rule.
LAYERS, NAME = "layers", "name"
_SPAN = re.compile(r"^(-?\d+)(?:-(\d+))?$")


@dataclass(frozen=True, slots=True)
class FreezeRule:
    """One word: the roles that it freezes whole, and the dotted path of the function that names more parameters.

    With `prefix` it freezes the part of a model whose names in a state begin so.
    """

    name: str
    roles: tuple[str, ...] = ()
    code: str = ""
    version: int = 1
    prefix: str = ""

    def __post_init__(self) -> None:
        if (
            self.name in (NONE, LAYERS, NAME)
            or not self.name.replace("_", "").replace("-", "").isalnum()
            or "->" in self.name
        ):
            raise MoegridError(f"a freeze rule cannot be called {self.name!r}", hint="use letters, digits and _")
        for role in self.roles:
            if role not in ROLES:
                raise MoegridError(
                    f"freeze rule {self.name!r} names the role {role!r}", hint=did_you_mean(role, ROLES, "roles")
                )
        if not self.roles and not self.code and not self.prefix:
            raise MoegridError(f"freeze rule {self.name!r} freezes nothing", hint="give it roles, code or a prefix")


BUILTINS: Mapping[str, FreezeRule] = MappingProxyType(
    {
        "router": FreezeRule("router", ("router",)),
        "expert": FreezeRule("expert", ("routed_expert", "shared_expert")),
        **{role: FreezeRule(role, (role,)) for role in ("routed_expert", "shared_expert", "attention", "embedding")},
        "vision": FreezeRule("vision", prefix="vision.encoder."),
        "connector": FreezeRule("connector", prefix="vision.connector."),
        "language": FreezeRule("language", prefix="backbone."),
    }
)
FREEZING = Registry("freezing", "freeze", FreezeRule, BUILTINS)


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a word: a rule ("" = everything), the spans of layers that it is kept to, a pattern of names.

    A span is (first, last); a layer below 0 is counted from the last one.
    """

    rule: str = ""
    spans: tuple[tuple[int, int], ...] = ()
    pattern: str = ""

    def __str__(self) -> str:
        if self.pattern:
            return f"{NAME}({self.pattern})"
        spans = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in self.spans)
        return f"{self.rule or LAYERS}({spans})" if spans else self.rule

    def in_layer(self, layer: int | None, layers: int) -> bool:
        """Return whether it concerns a parameter of `layer` (None = of none) of a model of so many `layers`."""
        if not self.spans:
            return True
        bounds = [(a + layers, b + layers) if a < 0 else (a, b) for a, b in self.spans]
        return layer is not None and any(a <= layer <= b for a, b in bounds)


@cache
def parts_of(word: str) -> tuple[Part, ...]:
    """Return the parts of a word, in the order of their text ("" = nothing is frozen). Raises ValueError."""
    if word == NONE:
        return ()
    found = {str(part): part for text in word.split("+") if (part := _part(text.strip())) is not None}
    if word and not found:
        raise ValueError(f"{word!r} names nothing")
    return tuple(found[name] for name in sorted(found))


def _part(text: str) -> Part | None:
    if not text:
        return None
    name, opened, inner = text.partition("(")
    if opened and not inner.endswith(")"):
        raise ValueError(f"{text!r} has no closing parenthesis")
    inner = inner[:-1].strip()
    if name == NAME:
        if not inner:
            raise ValueError(f"{text!r} has no pattern, as in {NAME}(*.q_proj.*)")
        return Part(pattern=inner)
    if name != LAYERS and FREEZING.find(name) is None:
        known = ", ".join((NONE, *FREEZING.names()))
        raise ValueError(f"{name!r} is none of {known}")
    if name == LAYERS and not inner:
        raise ValueError(f"{text!r} names no layers, as in {LAYERS}(0-3)")
    spans = []
    for span in inner.split(",") if opened else ():
        match = _SPAN.match(span.strip())
        first = int(match[1]) if match else 0
        last = int(match[2]) if match and match[2] else first
        if match is None or last < first or (first < 0 and match[2]):
            raise ValueError(f"{text!r}: {span.strip()!r} are no layers, as in 0-3, 7 or -1")
        spans.append((first, last))
    return Part("" if name == LAYERS else name, _merged(spans))


def _merged(spans: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Return spans in order, those that touch as one: the same layers are one text."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(spans):
        if merged and first >= 0 and merged[-1][0] >= 0 and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        elif (first, last) not in merged:
            merged.append((first, last))
    return tuple(merged)


def canonical(word: str) -> str:
    """Return the one text of a word that freezes the same. Raises ValueError."""
    return "+".join(map(str, parts_of(word)))


def freezes(word: str, role: str) -> bool:
    """Return whether the word of a phase ("" = nothing is frozen) freezes a whole role."""
    return any(part.rule and not part.spans and role in FREEZING.get(part.rule).roles for part in parts_of(word))


def freezes_part(word: str, name: str) -> bool:
    """Return whether the word of a phase freezes all that the rule `name` does: a part of a model by its prefix."""
    return any(part.rule == name and not part.spans for part in parts_of(word))


def freezes_moe_alone(word: str) -> bool:
    """Return whether a word freezes nothing that a dense model has."""
    rules = [FREEZING.get(part.rule) if part.rule else None for part in parts_of(word)]
    return all(
        rule is not None and not rule.code and not rule.prefix and MOE_ROLES.issuperset(rule.roles) for rule in rules
    )
