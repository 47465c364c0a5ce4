"""Forms of an expert's feed-forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from orchestrator.errors import MoegridError
from orchestrator.registry import Registry


@dataclass(frozen=True, slots=True)
class ExpertKind:
    """A form by name: down(act(up x)), or down(act(gate x) * up x) where it is `gated`; `bias` adds those of both.

    `code` is the activation, a differentiable function "package.module:name" of a tensor, element by element.
    `parameters` is a frozen dataclass of scalars, the code's last argument (`MoESpec.expert_parameters`), None for
    none.
    """

    name: str
    code: str
    gated: bool = False
    bias: bool = False
    description: str = ""
    version: int = 1
    parameters: type | None = None

    def __post_init__(self) -> None:
        if self.gated and self.bias:
            raise MoegridError(f"expert {self.name!r} is gated and has biases", hint="leave one of them out")

    def parameter_count(self, hidden_size: int, width: int) -> int:
        """Return the trained numbers of one feed-forward of `width` hidden units."""
        biases = hidden_size + width if self.bias else 0
        return (3 if self.gated else 2) * hidden_size * width + biases


_OURS = (
    ExpertKind("swiglu", "torch.nn.functional:silu", gated=True, description="down(silu(gate x) * up x)"),
    ExpertKind("relu_mlp", "torch.nn.functional:relu", description="down(relu(up x))"),
    ExpertKind("gelu_mlp_bias", "torch.nn.functional:gelu", bias=True, description="down(gelu(up x)), with biases"),
)
BUILTINS: Mapping[str, ExpertKind] = MappingProxyType({kind.name: kind for kind in _OURS})
EXPERTS = Registry("experts", "expert", ExpertKind, BUILTINS)
