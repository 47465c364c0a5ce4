"""Gates: from a token's hidden state to its logits, one for each id that a router chooses from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    is None. `parameters` is a frozen dataclass of scalars (`MoESpec.gate_parameters`), None for none. `problems(ids,
    parameters)` says why there cannot be that many ids. `causal` is False where a token's logits depend on later ones.
    """

    name: str
    code: str
    parameters: type | None = None
    parameter_count: Callable[..., int] | None = None
    description: str = ""
    version: int = 1
    problems: Callable[..., Iterable[str]] | None = None
    causal: bool = True

    def faults(self, ids: int, given: Mapping[str, object]) -> Iterable[str]:
        """Return why the gate cannot have so many ids."""
        return self.problems(ids, *asked(self, given)) if self.problems else ()

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


@dataclass(frozen=True, slots=True)
class Normed:
    """The epsilon of the norm."""

    eps: float = 1e-6

    def __post_init__(self) -> None:
        if not self.eps >= 0:
            raise ValueError(f"eps must not be negative, it is {self.eps:g}")


@dataclass(frozen=True, slots=True)
class Hidden:
    """Hidden units of a network with one hidden layer."""

    hidden: int = 256

    def __post_init__(self) -> None:
        if self.hidden < 1:
            raise ValueError(f"hidden must be at least 1, it is {self.hidden}")


@dataclass(frozen=True, slots=True)
class Tanh:
    """Hidden units of a network with one hidden layer (0 = as many as ids), and whether training adds learned noise.

    `least` is what is added to the noise's learned size.
    """

    hidden: int = 0
    noise: bool = True
    least: float = 0.01

    def __post_init__(self) -> None:
        if self.hidden < 0:
            raise ValueError(f"hidden must be at least 0, it is {self.hidden}")
        if not self.least >= 0:
            raise ValueError(f"least must not be negative, it is {self.least:g}")


@dataclass(frozen=True, slots=True)
class Rank:
    """Dimensions of the space in which tokens and experts are compared."""

    rank: int = 256

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, it is {self.rank}")


def _normed_count(ids: int, hidden_size: int, own: Normed) -> int:
    return (ids + 1) * hidden_size


def _noisy_count(ids: int, hidden_size: int) -> int:
    return 2 * ids * hidden_size


def _mlp_count(ids: int, hidden_size: int, own: Hidden) -> int:
    return own.hidden * (hidden_size + 1 + ids)


def _tanh_count(ids: int, hidden_size: int, own: Tanh) -> int:
    return (own.hidden or ids) * (hidden_size + ids) + (ids * hidden_size if own.noise else 0)


def _cosine_count(ids: int, hidden_size: int, own: Rank) -> int:
    return own.rank * (hidden_size + ids) + 1


def _keys_count(ids: int, hidden_size: int) -> int:
    return 2 * math.isqrt(ids) * hidden_size


def _square(ids: int) -> Iterator[str]:
    if math.isqrt(ids) ** 2 != ids:
        yield f"product keys make a square number of experts, not {ids}"


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
        "normed": GateKind(
            "normed",
            "jobs.moe.gates:NormedGate",
            parameters=Normed,
            parameter_count=_normed_count,
            description="a matrix over the normed and scaled token, / sqrt(D) (Gemma 4)",
        ),
        "noisy": GateKind(
            "noisy",
            "jobs.moe.gates:NoisyGate",
            parameter_count=_noisy_count,
            description="a matrix, with noise of a learned size in training (noisy top-k, Shazeer et al. 2017)",
        ),
        "mlp": GateKind(
            "mlp",
            "jobs.moe.gates:MLPGate",
            parameters=Hidden,
            parameter_count=_mlp_count,
            description="one hidden layer with gelu (MoLM)",
        ),
        "tanh_mlp": GateKind(
            "tanh_mlp",
            "jobs.moe.gates:TanhGate",
            parameters=Tanh,
            parameter_count=_tanh_count,
            description="one hidden layer with tanh, with noise of a learned size in training (LLaMA-MoE)",
        ),
        "cosine": GateKind(
            "cosine",
            "jobs.moe.gates:CosineGate",
            parameters=Rank,
            parameter_count=_cosine_count,
            description="cosines in a projected space times a learned exp(temperature), before any loss (MoLM's gmm)",
        ),
        "product_keys": GateKind(
            "product_keys",
            "jobs.moe.gates:ProductKeyGate",
            parameter_count=_keys_count,
            problems=_square,
            description="sums of two keys each, of sqrt(N) (product-key memories, Lample et al. 2019)",
        ),
        "product_keys_mixed": GateKind(
            "product_keys_mixed",
            "jobs.moe.gates:MixedProductKeyGate",
            parameter_count=_keys_count,
            problems=_square,
            causal=False,
            description="product keys as Doge is released: a token's keys are scored with two other tokens' states",
        ),
    }
)
GATES = Registry("gates", "gate", GateKind, _OURS)
