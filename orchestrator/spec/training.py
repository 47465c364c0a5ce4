"""One training phase: its data, its steps, and what they do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from orchestrator.catalog.losses import COEFFICIENT, LOAD_VARIANTS, LOSSES
from orchestrator.catalog.optimizers import OPTIMIZERS
from orchestrator.catalog.parameters import Parameters
from orchestrator.catalog.schedules import SCHEDULES
from orchestrator.catalog.uses import Names, Uses
from orchestrator.spec.data import DataSpec
from orchestrator.spec.identity import NEUTRAL, parameters_of
from orchestrator.spec.rules import ABOVE_ZERO, FRACTION, NATURAL, NOT_NEGATIVE, POSITIVE, Rule, one_of


def named_in(registry: Names, main: str = "") -> Mapping[str, object]:
    """Return the metadata of a field that maps names of a registry's declarations to their parameters.

    It is neutral, and holds what differs from the parameters' defaults alone. `main` is what a bare number sets.
    """
    return {**NEUTRAL, "registry": registry, "main": main}


@dataclass(frozen=True, slots=True)
class BalanceSpec:
    """Losses and updates that keep the experts' load even; `losses` are those of other packages, by name."""

    aux_coef: Annotated[float, NOT_NEGATIVE] = 0.01
    """Coefficient of the load-balance loss, 0 = none."""
    aux_variant: Annotated[str, one_of(*LOAD_VARIANTS)] = "switch"
    """Formula of the load-balance loss (docs: models)."""
    aux_group: Annotated[str, one_of("batch", "sequence", "pooled")] = "batch"
    """Tokens over which fractions and probabilities are taken: a micro-batch, each sequence, or all layers together."""
    aux_scope: Annotated[str, one_of("micro_batch", "global")] = "micro_batch"
    """`global` counts the tokens of all micro-batches and ranks of a step, `micro_batch` those of one."""
    z_coef: Annotated[float, NOT_NEGATIVE] = 0.001
    """Coefficient of the router z-loss (ST-MoE)."""
    bias_rate: Annotated[float, NOT_NEGATIVE] = 0.0
    """Step of the bias of loss-free balancing, 0 = off."""
    bias_center: bool = True
    """Whether the mean of the biases is kept at 0."""
    entropy_coef: Annotated[float, NOT_NEGATIVE] = 0.0
    """Coefficient of sigma-MoE's entropy regulariser."""
    null_coef: Annotated[float, NOT_NEGATIVE] = 0.0
    """Coefficient of TC-MoE's reward loss."""
    mutual_information_coef: Annotated[float, NOT_NEGATIVE] = 0.0
    """Coefficient of the mutual-information loss."""
    aux_schedule: Annotated[str, Rule(names=SCHEDULES)] = field(default="constant", metadata=NEUTRAL)
    """How the coefficient of the load-balance loss goes over the phase: a learning-rate schedule, down to 0."""
    aux_schedule_parameters: Parameters = field(default=Parameters(), metadata=parameters_of("aux_schedule"))
    """Parameters of that schedule, by name."""
    z_schedule: Annotated[str, Rule(names=SCHEDULES)] = field(default="constant", metadata=NEUTRAL)
    """How the coefficient of the router z-loss goes over the phase."""
    z_schedule_parameters: Parameters = field(default=Parameters(), metadata=parameters_of("z_schedule"))
    """Parameters of that schedule, by name."""
    losses: Uses = field(default_factory=dict, hash=False, metadata=named_in(LOSSES, COEFFICIENT))
    """Losses of other packages: name -> coefficient, or a mapping of `coef` and the loss's own parameters."""


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """Low-rank adapters (LoRA): beside them nothing else trains, but for the router where that is asked for."""

    rank: Annotated[int, NATURAL] = 0
    """Rank of each adapter, 0 = no adapters: the weights themselves train."""
    alpha: Annotated[float, ABOVE_ZERO] = 16.0
    """An adapter adds alpha / rank times its product."""
    targets: str = "attention"
    """What is adapted: `attention`, `expert` (or `routed_expert`, `shared_expert`), joined by `+`."""
    router: Annotated[str, one_of("frozen", "trained")] = "frozen"
    """Whether the router is `trained` as well, with all its weights, or `frozen`."""

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles of the adapted weights, each once, in order."""
        both = ("routed_expert", "shared_expert")
        words = (word.strip() for word in self.targets.split("+"))
        return tuple(sorted({role for word in words for role in (both if word == "expert" else (word,))}))


STOP_METRICS = ("", "lm_loss", "loss")


@dataclass(frozen=True, slots=True)
class StopSpec:
    """Early stopping: a condition on the mean of a training metric over windows of `every` steps.

    The phase stays as long as it was planned: learning rates, fractions of the run and shared prefixes are those of its
    whole length, and its remaining states have the weights that it stopped with.
    """

    metric: Annotated[str, one_of(*STOP_METRICS)] = ""
    """What is watched: the language-model loss (`lm_loss`) or that with the balance losses (`loss`); "" = nothing."""
    every: Annotated[int, POSITIVE] = 10
    """Steps of a window."""
    patience: Annotated[int, NATURAL] = 0
    """Training stops after so many windows without improvement, 0 = not by that."""
    improvement: Annotated[float, NOT_NEGATIVE] = 0.0
    """By how much a window's mean must lie below that of the last improvement to be one."""
    below: Annotated[float, NOT_NEGATIVE] = 0.0
    """Training stops after a window whose mean lies below it, 0 = not by that."""


@dataclass(frozen=True, slots=True)
class TrainSpec:
    """One training phase. A step is one optimizer step = `accumulation` micro-batches of `micro_batch` sequences.

    Micro-batches are the routing groups, so their size is science. At most one of `router_lr` and `router_lr_ratio`
    differs from its default.
    """

    data: DataSpec
    """What is trained on."""
    steps: Annotated[int, Rule(low=1, high=1e12)] = 100
    """Optimizer steps, or a length: `10k sequences`, `3.5M tokens`, `3 epochs`."""
    micro_batch: Annotated[int, POSITIVE] = 8
    """Sequences of a micro-batch: the group that routing and balance see."""
    accumulation: Annotated[int, POSITIVE] = 1
    """Micro-batches of a step, over all ranks."""
    sequence_length: Annotated[int, Rule(low=8)] = 256
    """Tokens of a sequence."""
    lr: Annotated[float, ABOVE_ZERO] = 3e-4
    """Peak learning rate."""
    router_lr: Annotated[float | None, NOT_NEGATIVE] = None
    """Peak learning rate of the router, absolute; empty = by its ratio."""
    router_lr_ratio: Annotated[float, NOT_NEGATIVE] = 1.0
    """Peak learning rate of the router relative to `lr`."""
    schedule: Annotated[str, Rule(names=SCHEDULES)] = "cosine"
    """Shape of the learning rate after the warm-up, ours or one of an installed package."""
    warmup_ratio: Annotated[float, FRACTION] = 0.03
    """Fraction of the steps over which the rate rises linearly."""
    min_lr_ratio: Annotated[float, FRACTION] = 0.1
    """Last learning rate relative to the peak."""
    betas: Annotated[tuple[float, float], Rule(low=0, high=0.999999)] = (0.9, 0.95)
    """Decay rates of Adam's two moments."""
    eps: Annotated[float, ABOVE_ZERO] = 1e-8
    """Adam's epsilon."""
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.01
    """Decoupled weight decay."""
    clip: Annotated[float, NOT_NEGATIVE] = 1.0
    """Largest norm of the gradient, 0 = no clipping."""
    precision: Annotated[str, one_of("fp32", "bf16", "mixed", "fp16")] = "fp32"
    """`fp32`; `bf16` for everything; bf16 (`mixed`) or `fp16` products beside fp32 weights, fp16 with a loss scale."""
    loss: Annotated[str, one_of("all", "response")] = "all"
    """Tokens that count: `all`, or those of the `response`."""
    freeze: str = "none"
    """What is frozen when: `none->router`, `none@0.0->router@0.5` (fractions of the phase)."""
    expert_dropout: Annotated[float, Rule(low=0, high=0.9)] = 0.0
    """Dropout inside the experts."""
    balance: BalanceSpec = field(default_factory=BalanceSpec)
    """Losses and updates that keep the experts' load even."""
    schedule_parameters: Parameters = field(default=Parameters(), metadata=parameters_of("schedule"))
    """Parameters of a schedule that has its own, by name."""
    optimizer: Annotated[str, Rule(names=OPTIMIZERS)] = field(default="adamw", metadata=NEUTRAL)
    """The optimizer, ours or one of an installed package."""
    optimizer_parameters: Parameters = field(default=Parameters(), metadata=parameters_of("optimizer"))
    """Parameters of an optimizer that has its own, by name."""
    adapter: AdapterSpec = field(default_factory=AdapterSpec, metadata=NEUTRAL)
    """Low-rank adapters that train in place of the weights; merged where the state is evaluated or exported."""
    stop: StopSpec = field(default_factory=StopSpec, metadata=NEUTRAL)
    """When training ends before its last step."""
    trained: bool = field(default=True, metadata=NEUTRAL)
    """Whether the phase is trained; if not, the state before it is measured as it is."""

    @property
    def adapter_keeps_router(self) -> bool:
        """Whether there are adapters beside which the router does not train."""
        return bool(self.adapter.rank) and self.adapter.router == "frozen"
