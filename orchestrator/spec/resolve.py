"""From a written model to one with nothing left open, and what its routing promises."""

from __future__ import annotations

import dataclasses
from typing import Any

from orchestrator.catalog.encoders import ENCODERS
from orchestrator.catalog.gates import GATES
from orchestrator.catalog.overflows import OVERFLOWS
from orchestrator.catalog.parameters import Parameters, made
from orchestrator.catalog.routers import DENSE, ROUTERS, Fields, kind_of
from orchestrator.errors import MoegridError
from orchestrator.files.problems import Mistake
from orchestrator.spec.model import DEFAULTS, Model, ModelSpec, Moe, MoESpec
from orchestrator.spec.parameters import parameter_fields, typed_parameters
from orchestrator.spec.vision import VisionSpec


def resolve_moe(moe: MoESpec) -> Moe:
    """Return `moe` with every None field filled from its preset and variant, its parameters typed.

    Raises Mistake (a ValueError) when preset or variant are unknown, or the preset's package is broken.
    """
    try:
        kind = kind_of(moe)
    except MoegridError as error:
        raise Mistake(": ".join(part for part in (error.error, error.cause) if part), error.hint) from None
    variant = moe.variant or next(iter(kind.variants))
    if variant not in kind.variants:
        known = ", ".join(v for v in kind.variants if v) or "none: leave variant empty"
        raise Mistake(f"preset {moe.preset!r} has no variant {variant!r} ({known})")
    values = {**DEFAULTS, **(kind.derived(moe) if kind.derived else {}), **kind.variants[variant]}
    if moe.choice == "expert":
        values["renormalise"] = False
    written = {field.name: getattr(moe, field.name) for field in dataclasses.fields(MoESpec)}
    values |= {name: value for name, value in written.items() if value is not None}
    resolved = Moe(**values | {"variant": variant})
    typed, wrong = typed_parameters(resolved)
    # What is wrong stays as it was written, for `moe_problems` to say.
    return resolved if wrong else typed


def dense_block(form: str, width: int) -> Moe:
    """Return a dense feed-forward of this form and so many hidden units."""
    return resolve_moe(MoESpec(preset=DENSE, top_k=1, num_experts=1, expert_width=width, expert=form))


def encoder_block(model: Model) -> Moe:
    """Return the block of a vision encoder's layers: experts where it is upcycled, as wide as its feed-forward."""
    vision = sighted(model)
    form = ENCODERS.get(vision.encoder).expert
    if vision.upcycle and vision.train == "all" and kind_of(model.moe).routes:
        return _copies(model.moe, form, vision.width)
    return dense_block(form, vision.width)


def connector_block(model: Model) -> Moe:
    """Return the block of a connector: experts where it is upcycled, as wide as what they are copies of."""
    vision, form = sighted(model), "gelu_mlp_bias"
    if vision.upcycle and kind_of(model.moe).routes:
        return _copies(model.moe, form, vision.connector_width)
    return dense_block(form, vision.connector_width)


def before_upcycling(model: Model) -> Model:
    """Return a model that sees as it is until the phase `instruct`, where nothing of its vision side is experts.

    Where no layer of its language model has experts either, all algorithms have one such model.
    """
    vision = dataclasses.replace(sighted(model), upcycle="")
    if model.dense_layers < model.num_layers and kind_of(model.moe).routes:
        return dataclasses.replace(model, vision=vision)
    width = model.dense_width if model.dense_layers else model.moe.expert_width * model.moe.top_k
    dense = dense_block(model.moe.expert, width)
    return dataclasses.replace(model, vision=vision, moe=dense, dense_layers=0, dense_width=0)


def text_part(model: Model) -> Model:
    """Return a model that sees without its vision side: what reads text alone."""
    return dataclasses.replace(before_upcycling(model), vision=None)


def sighted(model: ModelSpec) -> VisionSpec:
    """Return what a model sees with; it must see."""
    assert model.vision is not None, "a model without pictures has no vision side"
    return model.vision


def _copies(moe: Moe, form: str, width: int) -> Moe:
    return dataclasses.replace(moe, expert=form, expert_width=width, expert_parameters=Parameters(), shared_expert="")


def block_spec(fields: Fields) -> MoESpec:
    """Return the block with these fields, whose parameters are plain mappings."""
    return MoESpec(**{**fields, **{name: Parameters(fields.get(name)) for name in parameter_fields(MoESpec)}})


def resolve_model(model: ModelSpec) -> Model:
    """Return `model` with its MoE block resolved."""
    written = {field.name: getattr(model, field.name) for field in dataclasses.fields(ModelSpec)}
    return Model(**{**written, "moe": resolve_moe(model.moe)})


def settings(moe: MoESpec) -> Any:
    """Return the parameters of a block's router as its own dataclass, None when it has none."""
    return made(kind_of(moe), moe.parameters)


def parts_causal(moe: MoESpec) -> bool:
    """Return whether neither the gate nor what becomes of an overflow looks at later tokens."""
    gate = GATES.find(moe.gate)
    if gate is not None and not gate.causal:
        return False
    overflow = OVERFLOWS.find(moe.overflow)
    return overflow is None or overflow.causal


def is_causal(moe: MoESpec | Fields) -> bool:
    """Return whether no later token can change an earlier token's routing, in training and in evaluation.

    `moe` may be the fields as a root document holds them; those of another version that are not known are left out.
    """
    if not isinstance(moe, MoESpec):
        names = {field.name for field in dataclasses.fields(MoESpec)}
        known = {name: value for name, value in moe.items() if name in names}
        moe = block_spec(known)
    try:
        kind = ROUTERS.find(moe.preset)
    except MoegridError:  # its package is broken here, its results can be read
        kind = None
    if kind is not None:
        moe = resolve_moe(moe)
        if not kind.causal:
            return False
    if not parts_causal(moe):
        return False
    if moe.choice == "expert":
        return moe.train_select == moe.eval_select == "threshold"
    return moe.unit == "token" or moe.pool != "full_mean"
