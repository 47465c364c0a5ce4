"""Losses on the routing, ours and those of other packages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from orchestrator.registry import Registry

COEFFICIENT = "coef"


@dataclass(frozen=True, slots=True)
class LossKind:
    """One loss on the routing, or an update that keeps the load even.

    `code` is the dotted path of a function (routing: jobs.moe.Routing[, parameters]) -> scalar tensor: the loss, with
    coefficient 1, of one layer on one micro-batch; of a padded one it leaves out the tokens that `routing.mask` does.
    Its gradients flow through `routing.logits`, `scores` and `weights`. Training adds coef times the mean over layers
    and over the micro-batches of a step, so that the loss, as a routing group, belongs to one rank: `aux_scope` does
    not concern it. `parameters` is a frozen dataclass of scalars, None for none; its ValueErrors say what a grid may
    not set. `balance.losses` switches a loss of another package on; it is logged as `train/loss_NAME`.

    Ours are switched on by a `field` of `balance` and logged as `series`. `group` is that of a load-balance loss: over
    what it takes f and P ("" = that of `aux_group`), None for the other losses.
    """

    name: str
    code: str = ""
    parameters: type | None = None
    description: str = ""
    version: int = 1
    field: str = ""
    series: str = ""
    group: str | None = None

    def __post_init__(self) -> None:
        own = getattr(self.parameters, "__dataclass_fields__", {} if self.parameters is None else None)
        if own is None or COEFFICIENT in own:
            raise ValueError(f"the parameters of loss {self.name!r} are no dataclass without a {COEFFICIENT!r}")

    @property
    def how(self) -> str:
        """How a grid switches one of ours on."""
        return f"set balance.{self.field}" + (f", and aux_variant: {self.name}" if self.group is not None else "")

    @property
    def logged(self) -> str:
        """The name of its series, without `train/`."""
        return self.series or f"loss_{self.name}"


def _load(name: str, description: str, group: str = "") -> LossKind:
    return LossKind(name, "jobs.moe.balance:load_balance", None, description, 1, "aux_coef", "aux_loss", group)


_OURS = (
    _load("paper", "sum_i f_i P_i (MoE-Bench, eq. 2)"),
    _load("switch", "N/k sum_i f_i P_i (Switch Transformer)"),
    _load("olmoe_hf", "N sum_i f_i P_i over all layers at once (transformers)", "pooled"),
    _load("sequence", "N/k sum_i f_i P_i of each sequence", "sequence"),
    _load("sigmoid_normalised", "P from sigmoid scores that are put to a sum of 1"),
    _load("sigmoid_raw", "P from sigmoid scores as they are (LibMoE)", "sequence"),
    _load("top1_squared", "f from the best expert alone (LibMoE)", "sequence"),
    _load("heterogeneous", "sum_i eta_i f_i P_i (MoE++)"),
    LossKind("z", "jobs.moe.balance:z_loss", None, "mean (logsumexp h)^2 (ST-MoE)", field="z_coef", series="z_loss"),
    LossKind("bias", description="the bias that moves selection, without a gradient", field="bias_rate"),
    LossKind(
        "entropy",
        "jobs.moe.balance:entropy_loss",
        description="-H(mean softmax(h)) (sigma-MoE)",
        field="entropy_coef",
        series="entropy_loss",
    ),
    LossKind(
        "null",
        "jobs.moe.balance:null_reward",
        description="-(probability of the null experts) (TC-MoE)",
        field="null_coef",
        series="null_reward_loss",
    ),
    LossKind(
        "mutual_information",
        "jobs.moe.balance:mutual_information_loss",
        description="H(e|x) - H(e) (MoLM)",
        field="mutual_information_coef",
        series="mutual_information_loss",
    ),
)
LOSSES = Registry("losses", "loss", LossKind, {kind.name: kind for kind in _OURS})
# Load-balance loss -> the group over which it takes f and P ("" = that of `aux_group`).
LOAD_VARIANTS: Mapping[str, str] = MappingProxyType({one.name: one.group for one in _OURS if one.group is not None})
# The other losses and updates of ours, by the field that turns them on.
BY_FIELD: Mapping[str, LossKind] = MappingProxyType({one.field: one for one in _OURS if one.group is None})
