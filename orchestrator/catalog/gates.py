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


@dataclass(frozen=True, slots=True)
class Affine:
    """A matrix with a bias, and a bound: logits are cap * tanh(logits / cap), 0 = no bound."""

    bias: bool = True
    cap: float = 0.0

    def __post_init__(self) -> None:
        if not self.cap >= 0:
            raise ValueError(f"cap must not be negative, it is {self.cap:g}")


def _affine_count(ids: int, hidden_size: int, own: Affine) -> int:
    return ids * hidden_size + (ids if own.bias else 0)


LINEAR = "linear"
_OURS: Mapping[str, GateKind] = MappingProxyType(
    {
        LINEAR: GateKind(
            LINEAR, "jobs.moe.routers.base:Router", description="a matrix, the router's own `weight` [N,D]"
        ),
        "affine": GateKind(
            "affine",
            "jobs.moe.gates:AffineGate",
            parameters=Affine,
            parameter_count=_affine_count,
            description="a matrix with a bias (GPT-OSS), or with logits bounded by a tanh (Laguna)",
        ),
    }
)
GATES = Registry("gates", "gate", GateKind, _OURS)
