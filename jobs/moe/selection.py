"""Selection: which experts a token (or which tokens an expert) takes. Ties go to the lower index, everywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from jobs.moe.host import is_fake, visible

# Up to this many rounds of max beat torch.topk on a CPU (2048 tokens, 16 experts, k 2: 0.1 ms against 0.3 ms).
_MAX_ROUNDS = 4
# The most experts of a token over the mean, where experts choose tokens and nobody can look.
ASSUMED_MOST = 2


def top_k(values: Tensor, k: int) -> Tensor:
    """Return the indices [..., k] of the k largest of the last dimension, best first, ties to the lower index."""
    if k < values.shape[-1] and visible(values):
        found = _top_k_on_cpu(values, k)
        if found is not None:
            return found
    return torch.sort(values, dim=-1, descending=True, stable=True).indices[..., :k]


def _top_k_on_cpu(values: Tensor, k: int) -> Tensor | None:
    """Return `top_k` without a full sort, None when ties or rows with fewer than k finite values demand the sort."""
    if k > _MAX_ROUNDS:
        best, indices = values.topk(k + 1, dim=-1)
        return None if bool((best[..., 1:] == best[..., :-1]).any()) else indices[..., :k]
    rest, chosen = values, []
    for i in range(k):
        best, index = rest.max(-1, keepdim=True)  # the first of equal values
        chosen.append(index)
        if i < k - 1:
            rest = rest.scatter(-1, index, float("-inf"))
    return None if bool((best == float("-inf")).any()) else torch.cat(chosen, dim=-1)


def limit_groups(
    values_TN: Tensor, n_group: int, topk_group: int, group_score: str, excluded: float = float("-inf")
) -> Tensor:
    """Return `values` with `excluded` outside each token's best `topk_group` groups (DeepSeek-V2: max, V3: top2_sum).

    Values that are -inf already (removed experts) do not count: one that is left alone stands for both of the best two.
    """
    grouped = values_TN.view(len(values_TN), n_group, values_TN.shape[1] // n_group)
    if group_score == "max":
        strength = grouped.amax(-1)
    else:
        first, second = grouped.topk(2, dim=-1).values.unbind(-1)
        strength = first + torch.where(second == float("-inf"), first, second)
    kept = torch.zeros_like(strength, dtype=torch.bool).scatter_(1, top_k(strength, topk_group), True)
    return grouped.masked_fill(~kept.unsqueeze(-1), excluded).view_as(values_TN)


def limit_collaboration(values_TN: Tensor, allowed_NN: Tensor) -> Tensor:
    """Return `values` with -inf outside the first choice and its list (C2R): `allowed[i, j]` = j may work with i."""
    first = top_k(values_TN, 1)
    allowed = allowed_NN[first.squeeze(-1)].scatter(1, first, True)
    return values_TN.masked_fill(~allowed, float("-inf"))


def choose_tokens(scores_GSN: Tensor, mask_GS: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Expert choice: each expert takes its best C = max(1, floor(k * S / N)) of a group's S real tokens.

    Returns the choice [G,S,N] (bool) and the C-th best scores averaged over groups [N]. Ties go to the earlier token.
    """
    groups, _, num = scores_GSN.shape
    real = mask_GS.sum(1)
    capacity = torch.minimum((real * top_k // num).clamp_min(1), real)
    order = torch.sort(
        scores_GSN.masked_fill(~mask_GS.unsqueeze(-1), float("-inf")), dim=1, descending=True, stable=True
    )
    rank = torch.argsort(order.indices, dim=1)
    chosen = (rank < capacity.view(-1, 1, 1)) & mask_GS.unsqueeze(-1)
    last = (capacity - 1).clamp_min(0).view(-1, 1, 1).expand(groups, 1, num)
    cutoff = order.values.gather(1, last).squeeze(1)
    present = (real > 0).unsqueeze(-1)
    cutoffs = torch.where(present, cutoff, 0.0).sum(0) / present.sum().clamp_min(1)
    return chosen, cutoffs


def slots(chosen_TN: Tensor, weights_TN: Tensor, mean: int) -> tuple[Tensor, Tensor]:
    """Turn a choice [T,N] into slots: indices [T,K] best first, -1 in empty ones, weights [T,K]; K = the most used.

    A token has `mean` experts on average. Without values (a simulation) the most is taken for twice as many.
    """
    if is_fake(chosen_TN):
        used = min(ASSUMED_MOST * mean, chosen_TN.shape[1])
    else:
        used = int(chosen_TN.sum(1).max()) if chosen_TN.numel() else 0
    indices = top_k(torch.where(chosen_TN, weights_TN.detach(), float("-inf")), max(used, 1))
    filled = chosen_TN.gather(1, indices)
    weights = torch.where(filled, weights_TN.gather(1, indices), 0.0)
    return torch.where(filled, indices, -1), weights


def random_ids(
    indices_TK: Tensor,
    num_ids: int,
    keys: Tensor | None,
    seed: int,
    layer: int,
    forbidden: Tensor | None = None,
    physical: Tensor | None = None,
) -> Tensor:
    """Return uniform ids of distinct experts for the filled slots; -1 in slots for which no expert is left.

    `forbidden` [N] ids are never drawn; of ids with the same `physical` expert (TC-MoE's signs) one at most is. A pure
    function of (seed, layer, token key): a token gets the same experts whatever the batch, padding or cache.
    """
    if keys is None:
        keys = torch.arange(len(indices_TK), device=indices_TK.device)
    start = _mix(torch.tensor(seed * 1_000_003 + layer, device=keys.device))
    noise = _mix(_mix(keys + start).unsqueeze(-1) + torch.arange(num_ids, device=keys.device))
    last = torch.iinfo(noise.dtype).max
    if physical is not None:
        signed = int((physical >= 0).sum()) - int(physical.max()) - 1  # experts with a second, negative id
        positive, negative = noise[:, :signed], noise[:, signed : 2 * signed]
        lower = positive < negative
        pair = [torch.where(lower, positive, last), torch.where(lower, last, negative)]
        noise = torch.cat([*pair, noise[:, 2 * signed :]], dim=-1)
    if forbidden is not None:
        noise = noise.masked_fill(forbidden, last)
    order = torch.sort(noise, dim=-1, stable=True)
    ids, drawn = (part[:, : indices_TK.shape[1]] for part in (order.indices, order.values))
    return torch.where((indices_TK < 0) | (drawn == last), -1, ids)


def _mix(values: Tensor) -> Tensor:
    """Scramble int64 values (the finaliser of splitmix64; int64 arithmetic wraps)."""
    values = (values ^ ((values >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    values = (values ^ ((values >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return values ^ ((values >> 31) & 0x1FFFFFFFF)


def count(indices_TK: Tensor, num_ids: int, *, full: bool = False) -> Tensor:
    """Return how often each id occurs [N]; -1 (an empty slot) is not counted. `full` promises that there is none."""
    first = 0 if full else 1
    slots = indices_TK.reshape(-1) + 1 if first else indices_TK.reshape(-1)
    if visible(slots):
        return torch.bincount(slots, minlength=num_ids + first)[first:]
    # bincount waits for a GPU.
    counts = torch.zeros(num_ids + first, dtype=torch.long, device=slots.device)
    return counts.scatter_add_(0, slots, slots.new_ones(1).expand_as(slots))[first:]
