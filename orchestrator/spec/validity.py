"""The validity matrix: which combinations of MoE factors mean something, and why the others do not."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.spec.model import BACKBONES, CHOICES, DEFAULTS, UPCYCLES, ModelSpec, MoESpec, resolve_moe

COUNTS = ("shared_experts", "zero_experts", "copy_experts", "constant_experts", "null_experts", "collaboration_top")
SIZES = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "context")


def moe_problems(moe: MoESpec) -> tuple[str, ...]:
    """Return every reason why `moe` cannot be built, empty when it can; works on unresolved specs."""
    try:
        moe = resolve_moe(moe)
    except ValueError as error:
        return (str(error),)
    problems = [
        f"{name} {getattr(moe, name)!r} is none of {', '.join(map(str, allowed))}"
        for name, allowed in CHOICES.items()
        if getattr(moe, name) not in allowed
    ]
    problems += _number_problems(moe, ("top_k", "num_experts", "expert_width", "n_group", "topk_group"), least=1)
    problems += _number_problems(moe, COUNTS, least=0)
    if not (moe.routed_scaling or 0) > 0:
        problems.append(f"routed_scaling {moe.routed_scaling} must be positive")
    if not 0 <= (moe.threshold_decay or 0) < 1:
        problems.append(f"threshold_decay {moe.threshold_decay} must be at least 0 and below 1")
    if not moe.router_init_std >= 0:
        problems.append(f"router_init_std {moe.router_init_std} must not be negative")
    if problems:
        return tuple(problems)
    if moe.preset == "dense":
        return tuple(_dense_problems(moe))
    return (*_routing_problems(moe), *_preset_problems(moe), *_group_problems(moe))


def _number_problems(spec: MoESpec | ModelSpec, names: Sequence[str], least: int) -> list[str]:
    values = {name: getattr(spec, name) for name in names}
    return [
        f"{name} {value!r} must be a whole number of at least {least}"
        for name, value in values.items()
        if not isinstance(value, int) or isinstance(value, bool) or value < least
    ]


def _dense_problems(moe: MoESpec) -> list[str]:
    kept = ("expert", "shared_experts")
    changed = [name for name, value in DEFAULTS.items() if name not in kept and getattr(moe, name) != value]
    return [f"{name} does not apply: preset 'dense' has no router" for name in changed]


def _routing_problems(moe: MoESpec) -> list[str]:
    problems = []
    if moe.top_k > moe.num_experts:
        problems.append(f"top_k {moe.top_k} exceeds num_experts {moe.num_experts} (both are the routed numbers)")
    if moe.choice == "expert":
        if moe.unit != "token":
            problems.append(
                f"choice 'expert' with unit {moe.unit!r}: experts pick single tokens, which splits the spans"
            )
        if moe.score != "softmax":
            problems.append(f"choice 'expert' needs score 'softmax' (a softmax over experts), not {moe.score!r}")
        if moe.balance_bias:
            problems.append("choice 'expert' with balance_bias: the load is balanced by construction")
    else:
        if moe.top_k == 1 and moe.renormalise:
            problems.append("top_k 1 with renormalise: the weight is always 1 and the router gets no task gradient")
        for name in ("train_select", "eval_select", "choice_group"):
            if getattr(moe, name) != DEFAULTS[name]:
                problems.append(f"{name} applies to choice 'expert' only")
    if moe.unit == "token" and moe.pool != DEFAULTS["pool"]:
        problems.append("pool applies to the units word and sentence only")
    if moe.combine == "weighted" and not moe.shared_experts:
        problems.append("combine 'weighted' needs shared_experts")
    if not (moe.temperature or 0) > 0:
        problems.append("temperature must be positive")
    return problems


def _preset_problems(moe: MoESpec) -> list[str]:
    problems = []
    if (moe.score == "cosine") != (moe.preset == "xmoe"):
        problems.append("score 'cosine' and preset 'xmoe' belong together (the cosine needs its projection)")
    if moe.preset == "xmoe" and moe.num_experts < 2:
        problems.append("preset 'xmoe' projects to num_experts / 2 dimensions: it needs at least 2 experts")
    if moe.preset in ("sigma_moe", "sharede_v3") and moe.score != "sigmoid":
        problems.append(f"preset {moe.preset!r} has score 'sigmoid' by definition")
    if moe.preset in ("sharede_v2", "moepp", "tc_moe") and moe.score != "softmax":
        problems.append(f"preset {moe.preset!r} has score 'softmax' by definition")
    if moe.preset.startswith("sharede") and not moe.shared_experts:
        problems.append(f"preset {moe.preset!r} needs shared_experts")
    special = (moe.zero_experts or 0) + (moe.copy_experts or 0) + (moe.constant_experts or 0)
    if moe.preset == "moepp" and not special:
        problems.append("preset 'moepp' needs zero_experts, copy_experts or constant_experts")
    if moe.preset != "moepp" and (special or moe.gating_residual or moe.gating_layers != 1):
        problems.append("zero, copy, constant experts, gating_residual and gating_layers belong to preset 'moepp'")
    if (moe.preset == "tc_moe") != bool(moe.null_experts):
        problems.append("null_experts and preset 'tc_moe' belong together")
    if moe.preset in ("moepp", "tc_moe"):
        if moe.choice == "expert":
            problems.append(f"choice 'expert' with preset {moe.preset!r}: its ids are not all experts of equal cost")
        if moe.balance_bias:
            problems.append(
                f"balance_bias with preset {moe.preset!r}: ids without a full expert must not be loaded evenly"
            )
    if moe.preset == "tc_moe" and moe.renormalise:
        problems.append("renormalise with preset 'tc_moe': its weights have a normalisation of their own")
    if moe.preset == "moepp" and moe.variant != "paper" and not moe.renormalise:
        problems.append(f"preset 'moepp' variant {moe.variant!r} renormalises by definition")
    if moe.preset == "xmoe" and moe.choice == "expert":
        problems.append("choice 'expert' with preset 'xmoe': scores are cosines of a token, not comparable over tokens")
    if moe.preset == "xmoe" and moe.variant == "libmoe_vlm" and moe.top_k == 1:
        problems.append("preset 'xmoe' variant 'libmoe_vlm' with top_k 1: a softmax over one weight has no gradient")
    return problems


def _group_problems(moe: MoESpec) -> list[str]:
    problems = []
    n_group, topk_group = moe.n_group or 1, moe.topk_group or 1
    if moe.num_experts % n_group:
        problems.append(f"n_group {n_group} does not divide num_experts {moe.num_experts}")
    elif not 1 <= topk_group <= n_group:
        problems.append(f"topk_group {topk_group} must lie between 1 and n_group {n_group}")
    elif topk_group * (moe.num_experts // n_group) < moe.top_k:
        problems.append(f"topk_group {topk_group} leaves fewer than top_k {moe.top_k} experts to choose from")
    elif n_group > 1 and moe.group_score == "top2_sum" and moe.num_experts // n_group < 2:
        problems.append("group_score 'top2_sum' needs at least 2 experts in a group")
    if n_group > 1 and (moe.choice == "expert" or moe.preset in ("moepp", "tc_moe", "xmoe")):
        problems.append("n_group > 1 applies to plain token choice (softmax or sigmoid) only")
    if moe.collaboration_top or moe.preset == "c2r":
        if not moe.top_k - 1 <= (moe.collaboration_top or 0) <= moe.num_experts - 1:
            problems.append(
                f"collaboration_top must lie between top_k - 1 and num_experts - 1, is {moe.collaboration_top}"
            )
        if moe.top_k < 2:
            problems.append("collaboration_top limits which experts work together: it needs top_k of at least 2")
        if moe.choice == "expert" or moe.preset in ("moepp", "tc_moe") or n_group > 1:
            problems.append("collaboration_top applies to plain token choice without groups only")
    return problems


def model_problems(model: ModelSpec) -> tuple[str, ...]:
    """Return every reason why `model` cannot be built, those of its MoE block included."""
    problems = list(moe_problems(model.moe))
    if model.backbone not in BACKBONES:
        problems.append(f"backbone {model.backbone!r} is none of {', '.join(BACKBONES)}")
    if model.upcycle not in UPCYCLES:
        problems.append(f"upcycle {model.upcycle!r} is none of {', '.join(u or 'empty' for u in UPCYCLES)}")
    wrong = _number_problems(model, SIZES, least=1)
    if not model.init_std >= 0:
        wrong.append(f"init_std {model.init_std} must not be negative")
    if not model.norm_eps >= 0:
        wrong.append(f"norm_eps {model.norm_eps} must not be negative")
    if wrong:
        return (*problems, *wrong)
    if model.hidden_size % model.num_heads:
        problems.append(f"num_heads {model.num_heads} does not divide hidden_size {model.hidden_size}")
    elif (model.hidden_size // model.num_heads) % 2:
        problems.append("hidden_size / num_heads must be even (rotary embedding)")
    if model.num_heads % model.num_kv_heads:
        problems.append(f"num_kv_heads {model.num_kv_heads} does not divide num_heads {model.num_heads}")
    if not 0 <= model.dense_layers < max(model.num_layers, 1):
        problems.append("dense_layers must be at least 0 and below num_layers")
    if model.dense_layers and not model.dense_width:
        problems.append("dense_layers needs dense_width")
    if model.upcycle == "shared_only" and not problems and not resolve_moe(model.moe).shared_experts:
        problems.append("upcycle 'shared_only' needs shared_experts")
    if model.upcycle and model.moe.preset == "dense":
        problems.append("upcycle applies to MoE models: preset 'dense' takes the dense checkpoint as it is")
    if model.upcycle and model.moe.expert not in (None, "swiglu"):
        problems.append(f"upcycle with expert {model.moe.expert!r}: the dense feed-forward is a 'swiglu'")
    return tuple(problems)
