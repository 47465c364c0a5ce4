"""The MoE block that stands in for a transformer's feed-forward: router, experts, combination."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.moe.experts import Experts, SharedExperts, SharedGate
from jobs.moe.frames import Latent, frames_of
from jobs.moe.presets import build_router
from jobs.moe.routers import Context, Part
from jobs.moe.routing import Routing, to_physical
from jobs.moe.spans import SpanState
from jobs.moe.weighing import jittered
from orchestrator.catalog.parameters import Parameters
from orchestrator.catalog.routers import kind_of
from orchestrator.errors import MoegridError
from orchestrator.spec.model import ModelSpec, Moe, MoESpec
from orchestrator.spec.resolve import block_spec, resolve_moe
from orchestrator.spec.validity import moe_problems


class MoEBlock(nn.Module):
    """Routed experts, shared experts and what the router brings, under one router. Build it with `build_block`.

    Its output has `out_size` components, `hidden_size` where that is 0. Where the two differ, an expert that gives its
    input gives the first of its components, and zeros behind them.
    """

    def __init__(self, moe: Moe, hidden_size: int, init_std: float = 0.02, out_size: int = 0) -> None:
        super().__init__()
        self.moe, self.hidden_size, self.init_std = moe, hidden_size, init_std
        self.out_size = out_size or hidden_size
        self.layer = 0
        self.expert_dropout = 0.0
        self.router = build_router(moe, hidden_size)
        shared, own = moe.shared_experts, moe.expert_parameters
        space, out = (moe.latent_size,) * 2 if moe.latent_size else (hidden_size, self.out_size)
        self.experts = Experts(moe.num_experts, space, moe.expert_width, moe.expert, own, out)
        form, own = (moe.shared_expert, Parameters()) if moe.shared_expert else (moe.expert, own)
        self.shared = None
        if shared:
            self.shared = SharedExperts(shared, hidden_size, shared_width(moe), form, own, self.out_size)
        self.shared_gate = SharedGate(hidden_size) if moe.shared_gate else None
        brought = self.router.parts()
        self._parts = tuple(brought)
        for name, part in brought.items():
            self.add_module(name, part)
        self.latent = Latent(hidden_size, moe.latent_size, self.out_size) if moe.latent_size else None
        frames = frames_of(moe, hidden_size, self.out_size)
        self._frames = tuple(frames)
        for name, frame in frames.items():
            self.add_module(name, frame)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial weights from torch's current generator."""
        self.router.reset_parameters()
        if self.moe.expert_scale:  # whatever the router draws itself
            nn.init.ones_(self.router.expert_scale)
        frames = (getattr(self, name) for name in self._frames)
        for part in (self.experts, self.shared, *self.parts.values(), self.shared_gate, self.latent, *frames):
            if part is not None:
                part.reset_parameters(self.init_std)

    @property
    def parts(self) -> dict[str, Part]:
        """What the router brings beside the experts, by name."""
        return {name: getattr(self, name) for name in self._parts}

    @property
    def causal(self) -> bool:
        """True when no later token can change an earlier token's output in the current mode (train or eval)."""
        return self.router.causal

    def forward(
        self,
        x_BSD: Tensor,
        spans: Tensor | None = None,
        padding: Tensor | None = None,
        *,
        previous: Tensor | None = None,
        keys: Tensor | None = None,
        span_states: dict[int, SpanState] | None = None,
        tokens: Tensor | None = None,
    ) -> tuple[Tensor, Routing]:
        """Return the block's output [B,S,O] and its routing record.

        `spans` [B,S] are word or sentence ids, `padding` [B,S] is True where a token is padding, `previous` [T,...] is
        what the previous layer's record carried (MoE++, Zaya), `keys` [T] seed random routing, `span_states` belong to
        a KV cache, `tokens` [B,S] are the ids by which hashed layers look their experts up.
        """
        if x_BSD.dim() != 3 or x_BSD.shape[-1] != self.hidden_size:
            raise MoegridError(
                f"x has shape {tuple(x_BSD.shape)}", cause=f"needed: [batch, length, {self.hidden_size}]"
            )
        batch, length, width = x_BSD.shape
        for name, given in (("padding", padding), ("spans", spans), ("tokens", tokens)):
            if given is not None and given.shape != (batch, length):
                raise MoegridError(f"{name} has shape {tuple(given.shape)}", cause=f"x is {batch} x {length} tokens")
        x = x_BSD.reshape(batch * length, width)
        mask = torch.ones(len(x), dtype=torch.bool, device=x.device) if padding is None else ~padding.reshape(-1).bool()
        if self.training:
            x = jittered(x, self.moe.input_jitter)
        ids = None if tokens is None else tokens.reshape(-1)
        context = Context(batch, mask, padding is not None, spans, previous, keys, span_states, self.layer, ids)
        routing = self.router(x, context)
        scale = self.router.input_scale
        source = x * scale if scale != 1.0 else x
        shared: list[Tensor] = []

        def share() -> None:
            if self.shared is not None and not shared:
                shared.append(self._shared(x, routing.shared))

        routed = self._routed(source, routing, share)
        share()  # unless that was done while tokens travelled
        if self.expert_dropout and self.training:
            routed = F.dropout(routed, self.expert_dropout)
        y = self._framed("block_output", self._combine(routed, *shared) if shared else routed)
        return y.view(batch, length, self.out_size).to(x_BSD.dtype), routing

    def _routed(self, x_TD: Tensor, routing: Routing, meanwhile: Callable[[], None]) -> Tensor:
        indices = routing.indices
        weights = self.router.signed(indices, routing.weights)
        counts = routing.counts if routing.full and routing.physical is None else None
        experts = to_physical(indices, routing.physical)
        rows, after = self.expert_rows(x_TD), self.after_experts
        if self.moe.weights_on == "input":
            # Each slot is a row of its own.
            rows = (rows.unsqueeze(1) * weights.to(rows.dtype).unsqueeze(2)).flatten(0, 1)
            alone = experts.reshape(-1, 1)
            ones = weights.new_ones(alone.shape)
            y = self.experts(rows, alone, ones, counts_N=counts, after=after, meanwhile=meanwhile)
            y = y.view(*experts.shape, -1).sum(1)
        else:
            y = self.experts(rows, experts, weights, counts_N=counts, after=after, meanwhile=meanwhile)
        y = self._framed("routed_output", y if self.latent is None else self.latent.back(y))
        special = self.router.special(x_TD, indices, weights, self.parts)
        return y if special is None else y + fitted(special, self.out_size)

    def expert_rows(self, x_TD: Tensor) -> Tensor:
        """Return what of the (scaled) rows x each expert is given [T,D or L]."""
        rows = self._framed("routed_input", x_TD)
        return self._framed("latent_input", rows if self.latent is None else self.latent(rows))

    @property
    def after_experts(self) -> nn.Module | None:
        """What each expert's output goes through before it is weighed."""
        after: nn.Module | None = getattr(self, "expert_output", None)
        return after

    def _framed(self, place: str, x: Tensor) -> Tensor:
        """Return what the frame of a place makes of x, x itself where there is none."""
        if place not in self._frames:
            return x
        y: Tensor = getattr(self, place)(x)
        return y

    def _shared(self, x_TD: Tensor, weights: Tensor | None) -> Tensor:
        assert self.shared is not None
        y = self._framed("shared_output", self.shared(self._framed("shared_input", x_TD), weights))
        return y if self.shared_gate is None else self.shared_gate(x_TD) * y

    def _combine(self, routed: Tensor, shared: Tensor) -> Tensor:
        if self.moe.combine == "sum":
            return routed + shared
        if self.moe.combine == "average":
            return (routed + shared) / 2
        k, n = self.moe.top_k, self.moe.shared_experts
        return routed * (k / (k + n)) + shared * (n / (k + n))

    @torch.no_grad()
    def update_balance_bias(self, counts: Tensor, rate: float, center: bool = True) -> None:
        """Aux-loss-free balancing: b += rate * sign(mean(c) - c), minus the change's mean when `center`.

        `counts` [N]: of the whole optimizer step. Ids without an expert keep theirs.
        Source: Wang et al. 2024; torchtitan centres, OLMo-core does not.
        """
        if not self.moe.balance_bias:
            raise MoegridError(f"preset {self.moe.preset!r} has no balancing bias", hint="build it with balance_bias")
        if self.router.table is not None:
            return  # nothing is selected by scores
        counts, physical = counts.to(torch.float32), self.router.physical
        if physical is None:
            change = rate * torch.sign(counts.mean() - counts)
            self.router.bias += change - change.mean() if center else change
            return
        real = physical >= 0
        change = rate * torch.sign(counts[real].mean() - counts[real])
        self.router.bias[real] += change - change.mean() if center else change

    @torch.no_grad()
    def update_thresholds(self, cutoffs: Tensor) -> None:
        """Expert choice: move the thresholds towards `cutoffs` [N], the mean C-th best scores of one optimizer step."""
        self.router.update_thresholds(cutoffs)

    def named_weights(self) -> dict[str, Tensor]:
        """Return every parameter and saved buffer by its public name (`router.weight`, `experts.gate`, ...)."""
        named: dict[str, Tensor] = {}
        for name, tensor in self.state_dict().items():
            if name in ("experts.up", "experts.up_bias") and self.experts.kind.gated:
                named[name.replace("up", "gate")] = tensor[:, : self.experts.width]
                named[name] = tensor[:, self.experts.width :]
            else:
                named[name] = tensor
        return named

    def load_named(self, weights: Mapping[str, Tensor]) -> None:
        """Copy `weights` in by public name; what is absent keeps its values.

        Raises MoegridError on a wrong name or shape.
        """
        _copy_named(self.named_weights(), weights)


@torch.no_grad()
def _copy_named(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    for name, tensor in weights.items():
        if name not in own:
            raise MoegridError(f"the block has no weight {name!r}", hint=f"its weights: {', '.join(own)}")
        value = torch.as_tensor(tensor)
        if value.shape != own[name].shape:
            raise MoegridError(f"weight {name!r} has shape {tuple(value.shape)}, expected {tuple(own[name].shape)}")
        own[name].copy_(value)


class DenseBlock(nn.Module):
    """The dense twin: one feed-forward with the width of all active experts; it routes nothing."""

    def __init__(self, moe: Moe, hidden_size: int, init_std: float = 0.02, width: int = 0, out_size: int = 0) -> None:
        super().__init__()
        self.init_std = init_std
        width = width or dense_width(moe)
        self.ffn = SharedExperts(1, hidden_size, width, moe.expert, moe.expert_parameters, out_size)
        self.ffn.role = "other"
        self.ffn.reset_parameters(init_std)

    causal = True

    def forward(self, x_BSD: Tensor, spans: Tensor | None = None, padding: Tensor | None = None) -> tuple[Tensor, None]:
        """Return the feed-forward of x and no routing record."""
        return self.ffn(x_BSD), None

    def named_weights(self) -> dict[str, Tensor]:
        """Return every parameter by its public name (`ffn.gate`, `ffn.up`, `ffn.down`)."""
        return dict(self.state_dict())

    def load_named(self, weights: Mapping[str, Tensor]) -> None:
        """Copy `weights` in by public name, as `MoEBlock.load_named` does."""
        _copy_named(self.named_weights(), weights)

    def reset_parameters(self) -> None:
        """Draw the initial weights from torch's current generator."""
        self.ffn.reset_parameters(self.init_std)


def dense_width(moe: Moe) -> int:
    """Return the feed-forward width with the active parameters of `moe`'s experts."""
    return moe.expert_width * moe.top_k + shared_width(moe) * moe.shared_experts


def shared_width(moe: Moe) -> int:
    """Return the hidden units of one shared expert."""
    return moe.shared_width or moe.expert_width


def fitted(x_TD: Tensor, size: int) -> Tensor:
    """Return the first `size` components of x, with zeros behind them where it has fewer."""
    return x_TD if x_TD.shape[-1] == size else F.pad(x_TD, (0, size - x_TD.shape[-1]))


def block_of(moe: Moe, hidden_size: int, init_std: float, out_size: int = 0) -> MoEBlock | DenseBlock:
    """Return the block of a resolved spec."""
    if kind_of(moe).routes:
        return MoEBlock(moe, hidden_size, init_std, out_size)
    return DenseBlock(moe, hidden_size, init_std, out_size=out_size)


def build_block(
    spec: MoESpec | ModelSpec | Mapping[str, Any],
    *,
    hidden_size: int | None = None,
    init_std: float = 0.02,
    vocab_size: int = 0,
) -> MoEBlock | DenseBlock:
    """Build one block from a ModelSpec, a MoESpec with `hidden_size`, or a mapping of MoESpec fields and `hidden_size`.

    It is that of a first layer: with `hash_layers` it needs `vocab_size`.
    Raises MoegridError with every reason when the combination is invalid.
    """
    if isinstance(spec, ModelSpec):
        moe, hidden_size, init_std = spec.moe, spec.hidden_size, spec.init_std
        vocab_size = spec.vocab_size or vocab_size
    elif isinstance(spec, MoESpec):
        moe = spec
    else:
        fields = dict(spec)
        hidden_size, vocab_size = fields.pop("hidden_size", hidden_size), fields.pop("vocab_size", vocab_size)
        unknown = set(fields) - {field.name for field in dataclasses.fields(MoESpec)}
        if unknown:
            raise MoegridError(f"unknown MoE field(s): {', '.join(sorted(unknown))}")
        moe = block_spec(fields)
    if not hidden_size:
        raise MoegridError("a block needs hidden_size", hint="pass hidden_size=D or use a ModelSpec")
    problems = moe_problems(moe)
    if problems:
        raise MoegridError("this MoE block cannot be built", cause="; ".join(fault.message for fault in problems))
    if moe.hash_layers and not vocab_size:
        raise MoegridError("a block with hash_layers needs vocab_size", hint="pass vocab_size=V: as many as token ids")
    block = block_of(resolve_moe(moe), hidden_size, init_std)
    if moe.hash_layers and isinstance(block, MoEBlock):
        block.router.look_up(vocab_size)
    return block
