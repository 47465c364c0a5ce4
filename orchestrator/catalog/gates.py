"""Gates: from a token's hidden state to its logits, one for each id that a router chooses from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from orchestrator.catalog.parameters import asked
from orchestrator.registry import Registry


@dataclass(frozen=True, slots=True)
class GateKind:
    """A gate by name.

    `code` is a class "package.module:Class" of torch.nn.Module, made as (ids, hidden_size[, parameters]). Its forward
    takes fp32 hidden states [T,D] and returns logits [T,N]; `reset_parameters(std)` draws its weights.
    `parameter_count(ids, hidden_size[, parameters])` is how many it trains, a row of `hidden_size` for each id where it
    is None. `parameters` is a frozen dataclass of scalars (`MoESpec.gate_parameters`), None for none.
    """

    name: str
    code: str
    parameters: type | None = None
    parameter_count: Callable[..., int] | None = None
    description: str = ""
    version: int = 1

    def count(self, ids: int, hidden_size: int, given: Mapping[str, object]) -> int:
        """Return the trained numbers of one layer's gate."""
        if self.parameter_count is None:
            return ids * hidden_size
        return self.parameter_count(ids, hidden_size, *asked(self, given))


LINEAR = "linear"
_OURS: Mapping[str, GateKind] = MappingProxyType(
    {LINEAR: GateKind(LINEAR, "jobs.moe.routers.base:Router", description="a matrix, the router's own `weight` [N,D]")}
)
GATES = Registry("gates", "gate", GateKind, _OURS)
