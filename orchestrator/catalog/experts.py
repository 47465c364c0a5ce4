"""Forms of an expert's feed-forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from orchestrator.registry import Registry


@dataclass(frozen=True, slots=True)
class ExpertKind:
    """A form by name: down(act(up x)), or down(act(gate x) * up x) where it is `gated`; `bias` adds those of all.

    `code` is the activation, a differentiable function "package.module:name" of a tensor, element by element; where the
    form is `paired` it takes both projections, gate and up, and multiplies them itself.
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
    paired: bool = False

    def parameter_count(self, hidden_size: int, width: int) -> int:
        """Return the trained numbers of one feed-forward of `width` hidden units."""
        biases = hidden_size + (2 if self.gated else 1) * width if self.bias else 0
        return (3 if self.gated else 2) * hidden_size * width + biases


@dataclass(frozen=True, slots=True)
class Limit:
    """How far the projections may go."""

    limit: float = 7.0

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise ValueError(f"limit must be above 0, not {self.limit:g}")


@dataclass(frozen=True, slots=True)
class Clamped(Limit):
    """How far the projections may go; of the gate, `after` its silu or before."""

    after: bool = False


@dataclass(frozen=True, slots=True)
class Shifted(Limit):
    """How far the projections may go, and how steep the gate is."""

    alpha: float = 1.702


@dataclass(frozen=True, slots=True)
class SoftCaps:
    """Bounds of the gate's linear factor and of the up projection, kept to by cap * tanh(. / cap)."""

    gate_cap: float = 20.0
    up_cap: float = 20.0

    def __post_init__(self) -> None:
        for name in ("gate_cap", "up_cap"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name):g}")


_OURS = (
    ExpertKind("swiglu", "torch.nn.functional:silu", gated=True, description="down(silu(gate x) * up x)"),
    ExpertKind("relu_mlp", "torch.nn.functional:relu", description="down(relu(up x))"),
    ExpertKind("gelu_mlp_bias", "torch.nn.functional:gelu", bias=True, description="down(gelu(up x)), with biases"),
    ExpertKind(
        "gelu_tanh_mlp_bias",
        "jobs.moe.activations:gelu_tanh",
        bias=True,
        description="gelu_mlp_bias, gelu by tanh (SigLIP)",
    ),
    ExpertKind(
        "relu_mlp_bias", "torch.nn.functional:relu", bias=True, description="down(relu(up x)), with biases (NLLB)"
    ),
    ExpertKind("silu_mlp", "torch.nn.functional:silu", description="down(silu(up x)) (Doge)"),
    ExpertKind(
        "swiglu_softcapped",
        "jobs.moe.activations:swiglu_softcapped",
        gated=True,
        paired=True,
        parameters=SoftCaps,
        description="cap(gate) * sigmoid(gate) * cap(up), caps by tanh (Inkling 2)",
    ),
    ExpertKind("relu2_mlp", "jobs.moe.activations:relu_squared", description="down(relu(up x)^2) (Nemotron-H)"),
    ExpertKind(
        "geglu_tanh",
        "jobs.moe.activations:gelu_tanh",
        gated=True,
        description="down(gelu(gate x) * up x), gelu by tanh (Gemma)",
    ),
    ExpertKind(
        "swiglu_clamped",
        "jobs.moe.activations:swiglu_clamped",
        gated=True,
        paired=True,
        parameters=Clamped,
        description="swiglu of a gate of at most `limit` and an up projection within it (DeepSeek V4, GLM 5, Step 3.7)",
    ),
    ExpertKind(
        "swiglu_shifted",
        "jobs.moe.activations:swiglu_shifted",
        gated=True,
        paired=True,
        parameters=Shifted,
        description="clamped, gate * sigmoid(alpha gate) * (up + 1) (MiniMax M3)",
    ),
    ExpertKind(
        "swiglu_shifted_bias",
        "jobs.moe.activations:swiglu_shifted",
        gated=True,
        paired=True,
        bias=True,
        parameters=Shifted,
        description="swiglu_shifted with biases of all projections (GPT-OSS)",
    ),
)
BUILTINS: Mapping[str, ExpertKind] = MappingProxyType({kind.name: kind for kind in _OURS})
EXPERTS = Registry("experts", "expert", ExpertKind, BUILTINS)
