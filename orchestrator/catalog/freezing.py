"""Freeze rules: the words of a freeze schedule (`none->router`), and which parameters each of them freezes.

A rule freezes whole roles, with all that they learn (also what the router learns without gradients), and those
parameters for which its code says so: a function `frozen(name, role, model) -> bool` of a parameter's name in a state
(`backbone.model.layers.0.self_attn.q_proj.weight`), its role and the ModelSpec. What is frozen keeps every bit, its
optimizer's state too, which is proved at the end of the phase.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from orchestrator.errors import MoegridError, did_you_mean
from orchestrator.registry import Registry

# The roles of parameters; the gates, norms and dense layers are `other`.
ROLES = ("router", "routed_expert", "shared_expert", "attention", "embedding", "other")
MOE_ROLES = frozenset({"router", "routed_expert", "shared_expert"})
NONE = "none"


@dataclass(frozen=True, slots=True)
class FreezeRule:
    """One word: the roles that it freezes whole, and the dotted path of the function that names more parameters."""

    name: str
    roles: tuple[str, ...] = ()
    code: str = ""
    version: int = 1

    def __post_init__(self) -> None:
        if self.name == NONE or not self.name.replace("_", "").replace("-", "").isalnum() or "->" in self.name:
            raise MoegridError(f"a freeze rule cannot be called {self.name!r}", hint="use letters, digits and _")
        for role in self.roles:
            if role not in ROLES:
                raise MoegridError(
                    f"freeze rule {self.name!r} names the role {role!r}", hint=did_you_mean(role, ROLES, "roles")
                )
        if not self.roles and not self.code:
            raise MoegridError(f"freeze rule {self.name!r} freezes nothing", hint="give it roles or code")


BUILTINS: Mapping[str, FreezeRule] = MappingProxyType(
    {
        "router": FreezeRule("router", ("router",)),
        "expert": FreezeRule("expert", ("routed_expert", "shared_expert")),
    }
)
FREEZING = Registry("freezing", "freeze", FreezeRule, BUILTINS)


def freezes(word: str, role: str) -> bool:
    """Return whether the word of a phase ("" = nothing is frozen) freezes a whole role."""
    return bool(word) and role in FREEZING.get(word).roles


def freezes_moe_alone(word: str) -> bool:
    """Return whether a word freezes nothing that a dense model has."""
    rule = FREEZING.get(word)
    return not rule.code and MOE_ROLES.issuperset(rule.roles)
