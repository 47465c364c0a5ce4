"""The parameters of a model's vision side: encoder and connector, by the roles that freeze rules name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from orchestrator.catalog.encoders import ENCODERS
from orchestrator.catalog.experts import EXPERTS
from orchestrator.catalog.routers import kind_of
from orchestrator.spec.model import Model, Moe
from orchestrator.spec.resolve import connector_block, encoder_block, sighted


def of_sight(model: Model) -> Mapping[str, int]:
    """Return the parameters of encoder and connector by role."""
    return of_encoder(model) + of_connector(model)


def of_encoder(model: Model) -> Counter[str]:
    """Return the parameters of the vision encoder by role, to the last one."""
    vision = sighted(model)
    kind, d, layers = ENCODERS.get(vision.encoder), vision.hidden_size, vision.num_layers
    around = 3 * vision.patch_size**2 * d + d + (vision.positions**2 + 2 * kind.class_token) * d + 2 * d
    around += layers * (4 * d + 2 * d * kind.layer_scale)
    roles = Counter(attention=layers * 4 * (d * d + d), other=around)
    for layer in range(layers):
        roles += _of_block(encoder_block(model), d, d, first=layer == 0)
    return roles


def of_connector(model: Model) -> Counter[str]:
    """Return the parameters of the connector by role."""
    return _of_block(connector_block(model), sighted(model).hidden_size, model.hidden_size, first=True)


def by_component(model: Model, total: int) -> Mapping[str, int]:
    """Return the parameters of encoder, connector and language model, {} of a model that reads text alone."""
    if model.vision is None:
        return {}
    seeing = {"encoder": of_encoder(model).total(), "connector": of_connector(model).total()}
    return {**seeing, "language": total - sum(seeing.values())}


def active_encoder(model: Model) -> int:
    """Return the parameters of the encoder that a patch's products use."""
    vision = sighted(model)
    return vision.num_layers * (4 * vision.hidden_size**2 + _active(encoder_block(model), vision.hidden_size))


def active_connector(model: Model) -> int:
    """Return the parameters of the connector that a token's products use."""
    return _active(connector_block(model), sighted(model).hidden_size, model.hidden_size)


def _active(moe: Moe, hidden_size: int, out_size: int = 0) -> int:
    experts = moe.top_k + moe.shared_experts if kind_of(moe).routes else 1
    return experts * _feed_forward(moe, moe.expert_width, hidden_size, out_size or hidden_size)


def _of_block(moe: Moe, hidden_size: int, out_size: int, *, first: bool) -> Counter[str]:
    width, kind = moe.expert_width, kind_of(moe)
    if not kind.routes:
        return Counter(other=_feed_forward(moe, width * moe.top_k, hidden_size, out_size))
    roles = Counter(
        routed_expert=moe.num_experts * _feed_forward(moe, width, hidden_size, out_size),
        router=kind.count(moe, hidden_size, first=first),
    )
    if moe.shared_experts:
        roles["shared_expert"] = _feed_forward(moe, width * moe.shared_experts, hidden_size, out_size)
    roles["shared_expert"] += hidden_size * moe.shared_gate
    return roles


def _feed_forward(moe: Moe, width: int, hidden_size: int, out_size: int) -> int:
    """Return the parameters of one feed-forward with biases from `hidden_size` to `out_size`."""
    return EXPERTS.get(moe.expert).parameter_count(hidden_size, width) + (width + 1) * (out_size - hidden_size)
