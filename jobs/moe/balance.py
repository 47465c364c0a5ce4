"""Losses and updates that keep the experts' load even; every published scaling is a named variant.

f_i is the share of assignments to id i (assignments / tokens), P_i the mean probability, N the ids, k = top_k. `group`
says over what f and P are taken: `batch` (a layer's micro-batch), `sequence` (then mean over sequences), `pooled` (over
all layers).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from jobs.moe.selection import count
from orchestrator.catalog.losses import BY_FIELD, COEFFICIENT, LOAD_VARIANTS, LOSSES, LossKind
from orchestrator.catalog.parameters import code_of
from orchestrator.catalog.uses import Values
from orchestrator.errors import MoegridError
from orchestrator.spec.cell import BalanceSpec

if TYPE_CHECKING:
    from jobs.moe.routing import Routing  # which returns its own losses, and so imports this file


def balanced_value(variant: str, top_k: int, num_ids: int) -> float | None:
    """Return the loss of a perfectly even routing, None where it depends on the scores."""
    if variant == "paper":
        return top_k / num_ids
    if variant == "olmoe_hf":
        return float(top_k)
    return None if variant in ("sigmoid_raw", "heterogeneous") else 1.0


def collective(balance: BalanceSpec) -> bool:
    """Return whether the loss is summed over ranks: then every rank must compute it equally often."""
    return balance.aux_scope == "global" and (LOAD_VARIANTS[balance.aux_variant] or balance.aux_group) != "sequence"


def load_balance(
    routings: Sequence[Routing],
    variant: str = "switch",
    group: str = "batch",
    scope: str = "micro_batch",
    *,
    spare: bool = False,
) -> Tensor:
    """Return the load-balance loss with coefficient 1, a mean over layers unless the group is `pooled`.

    `scope: global` takes f from the assignments of all data-parallel ranks, where f is not a sequence's; P stays the
    rank's own. What a rank routes as a `spare` it adds to no f. Sources: MoE-Bench
    eq. 2 (`paper`), Switch Transformer (`switch`), transformers (`olmoe_hf`), LibMoE (`sigmoid_raw`, `top1_squared`),
    MoE++ (`heterogeneous`).
    """
    group = LOAD_VARIANTS[variant] or group
    # f and P as [layers, groups, N]; the loss of a group is a dot product. The layers of a model have as many ids.
    f, p, share = _shares(routings, variant, group == "sequence", scope == "global", spare)
    if group == "pooled":
        return _scaled(_product(f.mean(0), p.mean(0), variant, routings[0]).mean(), variant, routings[0])
    return _scaled((_product(f, p, variant, routings[0]) * share).sum(-1), variant, routings[0]).mean()


def _product(f_GN: Tensor, p_GN: Tensor, variant: str, routing: Routing) -> Tensor:
    """Return sum_i f_i P_i of each group [G]; the heterogeneous loss weighs every id with its cost."""
    product = f_GN * p_GN
    if variant == "heterogeneous" and routing.cost is not None:
        product = product * routing.cost
    return product.sum(-1)


def _scaled(value: Tensor, variant: str, routing: Routing) -> Tensor:
    num, k = routing.num_ids, routing.top_k
    if variant in ("paper", "heterogeneous"):
        return value
    if variant in ("olmoe_hf", "top1_squared"):
        return value * num
    return value * (num / k)


def _shares(
    routings: Sequence[Routing], variant: str, per_sequence: bool, reduce: bool, spare: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return f [L,G,N], P [L,G,N] and each group's share of a layer's mean [L or 1,G], 0 without a real token."""
    first = routings[0]
    groups, num = first.batch if per_sequence else 1, first.num_ids
    # One pass over the probabilities of each layer; all else is as small as the experts are many.
    totals = torch.stack([_total(routing, variant, groups) for routing in routings])
    counts = torch.stack([_assigned(routing, variant, groups) for routing in routings]).to(totals.dtype)
    tokens = _real_tokens(routings, groups)
    present = (tokens > 0).to(totals.dtype)
    share = (present / present.sum(1, keepdim=True).clamp_min(1)).squeeze(-1)
    mean = totals / tokens.clamp_min(1)
    # A sequence lies on one rank: its f is complete there.
    if reduce and not per_sequence and torch.distributed.is_available() and torch.distributed.is_initialized():
        summed = torch.cat([counts, tokens.expand(len(counts), groups, 1)], dim=2) * float(not spare)
        torch.distributed.all_reduce(summed)
        counts, tokens = summed.split([num, 1], dim=2)
    return counts / tokens.clamp_min(1), mean, share


def _real_tokens(routings: Sequence[Routing], groups: int) -> Tensor:
    """Return the real tokens of each group [L,G,1], or [1,G,1] where all layers route the same ones.

    A model that sees routes patches in its encoder, fewer tokens in its connector, and text behind them in its decoder.
    """
    counted: dict[tuple[int, bool], Tensor] = {}
    for routing in routings:
        kind = len(routing.scores), routing.padded
        if kind in counted:
            continue
        length, like = len(routing.scores) // max(groups, 1), routing.scores
        if routing.padded:
            counted[kind] = routing.mask.view(groups, length).sum(1, keepdim=True).to(like.dtype)
        else:
            counted[kind] = like.new_full((groups, 1), float(length))
    if len(counted) == 1:
        return next(iter(counted.values())).unsqueeze(0)
    return torch.stack([counted[len(routing.scores), routing.padded] for routing in routings])


def _total(routing: Routing, variant: str, groups: int) -> Tensor:
    """Return the sum over a group's real tokens of what P is the mean of [G,N]."""
    if variant == "sigmoid_raw":
        p = routing.scores
    elif variant == "sigmoid_normalised":
        p = routing.scores / routing.scores.sum(-1, keepdim=True).clamp_min(torch.finfo(routing.scores.dtype).tiny)
    elif variant == "top1_squared":
        p = torch.softmax(routing.logits, dim=-1) if not routing.softmax else routing.scores
    else:
        p = routing.probabilities
    if routing.padded:
        p = torch.where(routing.mask.unsqueeze(-1), p, 0.0)
    return p.view(groups, len(p) // max(groups, 1), routing.num_ids).sum(1)


def _assigned(routing: Routing, variant: str, groups: int) -> Tensor:
    """Return the assignments of each group [G,N] that f counts: those that were asked for, dropped ones too."""
    if groups == 1 and variant != "top1_squared" and routing.asked is None:
        return routing.counts.unsqueeze(0)
    indices = routing.indices if routing.asked is None else routing.asked
    indices = indices[:, :1] if variant == "top1_squared" else indices
    return _group_counts(indices, groups, routing.num_ids)


def _group_counts(indices_TK: Tensor, groups: int, num: int) -> Tensor:
    """Return the assignments per group and id [G,N]."""
    first = torch.arange(groups, device=indices_TK.device).view(groups, 1, 1) * num
    indices = indices_TK.view(groups, len(indices_TK) // max(groups, 1), indices_TK.shape[1])
    return count(torch.where(indices < 0, -1, first + indices), groups * num).view(groups, num)


def _token_mean(values_T: Tensor, routing: Routing) -> Tensor:
    """Return the mean over the real tokens; 0 where there is none."""
    if not routing.padded and len(values_T):
        return values_T.mean()
    return torch.where(routing.mask, values_T, 0.0).sum() / routing.mask.sum().clamp_min(1)


def z_loss(routing: Routing) -> Tensor:
    """Return mean_t (logsumexp_j h_tj)^2 in natural log (ST-MoE)."""
    logits = routing.logits if routing.tempered is None else routing.tempered
    return _token_mean(torch.logsumexp(logits, dim=-1).square(), routing)


def _mean(p_TN: Tensor, routing: Routing) -> Tensor:
    """Return the mean over the real tokens [N]; 0 where there is none."""
    if not routing.padded and len(p_TN):
        return p_TN.mean(0)
    return torch.where(routing.mask.unsqueeze(-1), p_TN, 0.0).sum(0) / routing.mask.sum().clamp_min(1)


def _entropy(p: Tensor) -> Tensor:
    return -(p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum(-1)


def entropy_loss(routing: Routing) -> Tensor:
    """Return -H(mean softmax(h)) in nats: sigma-MoE's regulariser (lower = more even)."""
    return -_entropy(_mean(torch.softmax(routing.logits, dim=-1), routing))


def mutual_information_loss(routing: Routing) -> Tensor:
    """Return H(e|x) - H(e) in nats, e ~ p (MoLM; MoE-RBench)."""
    return _token_mean(_entropy(routing.probabilities), routing) - _entropy(_mean(routing.probabilities, routing))


def null_reward(routing: Routing) -> Tensor:
    """Return -(mean over tokens of the null experts' probability) (TC-MoE); 0 without null experts."""
    if routing.null is None:
        return routing.scores.new_zeros(())
    return -_token_mean(routing.scores[:, slice(*routing.null)].sum(-1), routing)


def layer_losses(routing: Routing) -> dict[str, Tensor]:
    """Return every loss of one layer by name, with coefficient 1.

    The names: the load variants, `z_loss`, `entropy`, `mutual_information`; of MoE++ `heterogeneous`, of TC-MoE
    `null_reward`. Load variants whose group is free are taken over the whole batch.
    """
    losses = {variant: load_balance([routing], variant) for variant in LOAD_VARIANTS if variant != "heterogeneous"}
    losses["z_loss"] = z_loss(routing)
    losses["entropy"] = entropy_loss(routing)
    losses["mutual_information"] = mutual_information_loss(routing)
    if routing.cost is not None:
        losses["heterogeneous"] = load_balance([routing], "heterogeneous")
    if routing.null is not None:
        losses["null_reward"] = null_reward(routing)
    return losses


def balance_loss(
    routings: Sequence[Routing], balance: BalanceSpec, *, spare: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return (sum of coefficient * loss, losses by name with coefficient 1), each a mean over layers.

    The load-balance and z losses are always among the parts, others, such as those of other packages, only when they
    are used. `spare`: the routings count nothing in what is summed over ranks.
    """
    if not routings:
        return torch.zeros(()), {}
    total = routings[0].logits.new_zeros(())
    parts: dict[str, Tensor] = {}

    def add(name: str, coefficient: float, value: Tensor) -> None:
        nonlocal total
        parts[name] = value.detach()
        if coefficient:
            total = total + coefficient * value

    with torch.set_grad_enabled(torch.is_grad_enabled() and bool(balance.aux_coef)):
        aux = load_balance(routings, balance.aux_variant, balance.aux_group, balance.aux_scope, spare=spare)
    add("aux_loss", balance.aux_coef, aux)
    with torch.set_grad_enabled(torch.is_grad_enabled() and bool(balance.z_coef)):
        z = torch.stack([z_loss(routing) for routing in routings]).mean()
    add("z_loss", balance.z_coef, z)
    for kind, coefficient, given in used(balance):
        add(kind.logged, coefficient, torch.stack([one_loss(kind, routing, given) for routing in routings]).mean())
    return total, parts


def used(balance: BalanceSpec) -> Iterator[tuple[LossKind, float, Values]]:
    """Yield the losses that are computed only when they are used: kind, coefficient, parameters off their defaults."""
    for field, kind in BY_FIELD.items():
        coefficient = getattr(balance, field)
        if coefficient and kind.code and field != "z_coef":
            yield kind, coefficient, {}
    for name in sorted(balance.losses):
        given = dict(balance.losses[name])
        yield LOSSES.get(name), given.pop(COEFFICIENT), given


def one_loss(kind: LossKind, routing: Routing, given: Values) -> Tensor:
    """Return a loss of one layer with coefficient 1; MoegridError when it is no scalar."""
    value = code_of(LOSSES, kind.name, given)(routing)
    if not isinstance(value, Tensor) or value.ndim:
        shown = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise MoegridError(
            f"loss {kind.name!r} is no scalar tensor",
            cause=f"{kind.code} returns {shown:.80}",
            hint="return one value a layer",
        )
    return value
