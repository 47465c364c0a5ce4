"""Every valid combination builds, trains, saves, loads and gives the same loss; the others say why they do not."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs.models.building import build_model
from jobs.models.weights import canonical_state, load_canonical, weights_sha256
from jobs.moe import build_block
from jobs.moe.balance import balance_loss
from orchestrator.catalog.backbones import BACKBONES
from orchestrator.catalog.routers import ROUTERS
from orchestrator.errors import MoegridError
from orchestrator.spec.cell import BalanceSpec
from orchestrator.spec.identity import plain
from orchestrator.spec.model import ModelSpec, MoESpec
from orchestrator.spec.resolve import block_spec, is_causal, resolve_moe
from orchestrator.spec.validity import model_problems, moe_problems

VOCAB, BATCH, LENGTH = 64, 3, 24
# What may be combined with plain routers, a few parts at a time.
PARTS: list[dict[str, Any]] = [
    {"preset": "aux_free", "select_by": "logits", "hash_layers": 1},
    {"preset": "aux_free", "n_group": 4, "topk_group": 2, "group_score": "top2_sum", "group_mask": "zero"},
    {"preset": "smoe", "logit_std": 1.5, "temperature": 2.0, "z_after_temperature": True, "weight_norm": 2.0},
    {"preset": "olmoe", "weights_on": "input", "expert_scale": True, "router_jitter": 0.1, "input_jitter": 0.1},
    {"preset": "smoe", "overflow": "capacity", "overflow_parameters": {"factor": 1.5}, "renormalise_kept": True},
    {
        "preset": "smoe",
        "overflow": "capacity",
        "overflow_parameters": {"tokens": 5, "group": "batch", "order": "score", "eval_fraction": 0.2},
    },
    {"preset": "smoe", "selection": "sampled_others", "gate": "noisy"},
    {"preset": "olmoe", "selection": "random_others", "gate": "mlp", "gate_parameters": {"hidden": 12}},
    {"preset": "smoe", "gate": "cosine", "gate_parameters": {"rank": 4}, "score": "sigmoid"},
    {"preset": "smoe", "gate": "product_keys", "num_experts": 16, "expert": "silu_mlp", "expert_width": 1},
    {"preset": "smoe", "gate": "product_keys_mixed", "num_experts": 16},
    {
        "preset": "smoe",
        "gate": "normed",
        "shared_experts": 2,
        "shared_width": 24,
        "shared_input": "rms_norm",
        "shared_output": "unit_rms_norm",
        "routed_input": "rms_norm",
        "routed_output": "rms_norm",
        "block_output": "bias",
    },
    {
        "preset": "deepseek_moe",
        "latent_size": 8,
        "latent_input": "rms_norm",
        "expert_output": "scaled_rms_norm",
        "block_output": "rms_norm",
    },
    {"preset": "smoe", "expert": "relu2_mlp", "expert_output": "bias", "weights_on": "input"},
    {"preset": "moepp", "balance_bias": True, "logit_std": 1.0, "gating_layers": 2},
    {"preset": "xmoe", "parameters": {"rank": 6}, "overflow": "capacity", "z_after_temperature": True},
    {"preset": "zaya", "parameters": {"router_size": 12}, "latent_size": 8},
    {"preset": "sparsemixer", "parameters": {"jitter": 0.5}},
    {"preset": "inkling", "shared_width": 8, "temperature": 2.0},
]
SIZES: dict[str, Any] = {"num_experts": 8, "top_k": 2, "expert_width": 16}
BALANCE = BalanceSpec(bias_rate=0.01, entropy_coef=0.01, null_coef=0.01, mutual_information_coef=0.01)


def combinations() -> list[MoESpec]:
    """Preset and variant x choice x unit and pool x shared x balancing x combination, the valid ones."""
    found = []
    for preset, kind in ROUTERS.builtins.items():
        for variant, choice, (unit, pool), shared, bias in itertools.product(
            kind.variants,
            (None, "expert"),
            ((None, None), ("word", None), ("word", "causal_mean"), ("sentence", "full_mean")),
            (None, 1),
            (None, True),
        ):
            moe = MoESpec(
                preset=preset,
                variant=variant,
                choice=choice,
                unit=unit,
                pool=pool,
                shared_experts=shared,
                balance_bias=bias,
                **SIZES,
            )
            if not moe_problems(moe):
                found.append(moe)
    extra: list[dict[str, Any]] = [
        {"preset": "expert_choice", "train_select": "threshold", "eval_select": "threshold"},
        {"preset": "expert_choice", "choice_group": "batch", "renormalise": True},
        {"preset": "moepp", "gating_layers": 2},
        {"preset": "deepseek_moe", "variant": "v2", "n_group": 4, "topk_group": 2},
        {"preset": "deepseek_moe", "variant": "v3", "n_group": 4, "topk_group": 2},
        {"preset": "sharede_v2", "combine": "weighted"},
        {"preset": "smoe", "expert": "relu_mlp"},
        {"preset": "smoe", "expert": "gelu_mlp_bias", "shared_experts": 1},
        {"preset": "smoe", "collaboration_top": 4},
        {"preset": "smoe", "top_k": 1, "renormalise": False},
        *PARTS,
    ]
    return found + [block_spec({**SIZES, **fields}) for fields in extra]


COMBINATIONS = combinations()


def name(moe: MoESpec) -> str:
    default = MoESpec(**SIZES)
    parts = [moe.preset, moe.variant]
    for field in MoESpec.__dataclass_fields__:
        value = getattr(moe, field)
        if field not in ("preset", "variant") and value != getattr(default, field):
            parts.append(f"{field}={value}")
    return " ".join(part for part in parts if part)


def batch(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=generator)
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[0, 17:] = 0
    spans = (torch.rand(BATCH, LENGTH, generator=generator) < 0.4).long().cumsum(1)
    return {"input_ids": ids, "attention_mask": mask, "spans": spans, "labels": ids.masked_fill(mask == 0, -100)}


@pytest.mark.parametrize("moe", COMBINATIONS, ids=name)
def test_a_valid_combination_trains_saves_and_loads(moe: MoESpec, tmp_path: Path) -> None:
    train_save_and_load(moe, "deepseek_moe" if moe.preset == "deepseek_moe" else "olmoe", tmp_path)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("preset", ROUTERS.builtins)
def test_every_preset_on_every_backbone(preset: str, backbone: str, tmp_path: Path) -> None:
    train_save_and_load(MoESpec(preset=preset, **SIZES), backbone, tmp_path)


def train_save_and_load(moe: MoESpec, backbone: str, tmp_path: Path) -> None:
    """Take 3 steps, save the model, load it again: every weight gets a gradient, and the loss is the same."""
    spec = ModelSpec(
        backbone=backbone,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        dense_layers=int(backbone == "deepseek_moe"),
        dense_width=32,
        moe=moe,
    )
    torch.manual_seed(0)
    model = build_model(spec, VOCAB)
    before = weights_sha256(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(3):
        model.train()
        output = model(**batch(step))
        total, parts = balance_loss(output.routings, BALANCE)
        (output.loss / output.tokens + total).backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == []
        optimizer.step()
        optimizer.zero_grad()
        for block, routing in zip(model.moe_blocks, output.routings, strict=True):
            if block.moe.balance_bias:
                block.update_balance_bias(routing.counts, BALANCE.bias_rate)
            if routing.cutoffs is not None:
                block.update_thresholds(routing.cutoffs)
        assert all(torch.isfinite(value) for value in parts.values())
    assert weights_sha256(model) != before
    assert all(torch.isfinite(tensor).all() for tensor in canonical_state(model).values() if tensor.is_floating_point())

    save_file({key: tensor.contiguous() for key, tensor in canonical_state(model).items()}, tmp_path / "w.safetensors")
    torch.manual_seed(1)
    loaded = build_model(spec, VOCAB)
    load_canonical(loaded, load_file(tmp_path / "w.safetensors"))
    assert weights_sha256(loaded) == weights_sha256(model)
    with torch.no_grad():
        losses = [m.eval()(**batch(9)).loss.item() for m in (model, loaded)]
    assert losses[0] == losses[1]
    assert model.causal == is_causal(moe) == is_causal(plain(resolve_moe(moe)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("expert, width", [("gelu_mlp_bias", 7), ("gelu_mlp_bias", 12), ("swiglu", 7)])
def test_experts_of_any_width_compute_in_every_type(expert: str, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    fields = {"preset": "smoe", "expert": expert, "expert_width": width, "num_experts": 4, "router_init_std": 1.0}
    block = build_block(fields, hidden_size=10, init_std=0.3)
    x = torch.randn(2, 9, 10)
    expected, routing = block(x)
    y, other = block.to(dtype)(x.to(dtype))
    same = (other.indices == routing.indices).all(1).view(2, 9)
    assert same.float().mean() > 0.8
    torch.testing.assert_close(
        y[same].float(), expected[same], atol=1e-5 if dtype != torch.bfloat16 else 0.05, rtol=0.05
    )


def test_the_matrix_is_not_empty_and_every_preset_is_in_it() -> None:
    assert {moe.preset for moe in COMBINATIONS} == set(ROUTERS.builtins)
    assert len(COMBINATIONS) > 60


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"preset": "smo"}, "preset 'smo' is unknown"),
        ({"preset": "xmoe", "variant": "x"}, "no variant"),
        ({"top_k": 1}, "no task gradient"),
        ({"top_k": 9}, "exceeds num_experts"),
        ({"choice": "expert", "unit": "word"}, "splits the spans"),
        ({"choice": "expert", "score": "sigmoid"}, "softmax over experts"),
        ({"choice": "expert", "balance_bias": True}, "balanced by construction"),
        ({"score": "cosine"}, "belong together"),
        ({"preset": "sharede_v2", "shared_experts": 0}, "needs shared_experts"),
        ({"zero_experts": 1}, "belong to preset 'moepp'"),
        ({"preset": "tc_moe", "balance_bias": True}, "must not be loaded evenly"),
        ({"n_group": 3}, "does not divide"),
        ({"n_group": 8, "topk_group": 1}, "fewer than top_k"),
        ({"preset": "c2r", "collaboration_top": 8}, "between top_k - 1 and num_experts - 1"),
        ({"eval_select": "threshold"}, "choice 'expert' only"),
        ({"preset": "dense", "score": "sigmoid"}, "does not apply"),
        ({"combine": "weighted"}, "needs shared_experts"),
        ({"pool": "full_mean"}, "units word and sentence only"),
        ({"top_k": "2"}, "top_k '2' must be a whole number"),
        ({"n_group": 0}, "n_group 0 must be a whole number of at least 1"),
        ({"routed_scaling": 0.0}, "routed_scaling 0.0 must be positive"),
        ({"threshold_decay": 2.0}, "below 1"),
        ({"router_init_std": -1.0}, "must not be negative"),
        ({"choice": "expert", "preset": "expert_choice", "overflow": "capacity"}, "choice 'token' only"),
        ({"preset": "sparsemixer", "selection": "sampled_others"}, "selects and weighs in one"),
        ({"preset": "sparsemixer", "renormalise": True}, "a softmax of its own"),
        ({"preset": "inkling", "combine": "average"}, "weighs shared experts too"),
        ({"preset": "inkling", "shared_experts": 0}, "needs shared_experts"),
        ({"preset": "tc_moe", "weight_norm": 2.0}, "a router of its own"),
        ({"preset": "olmoe", "weight_norm": 2.0}, "needs renormalise"),
        ({"group_mask": "zero"}, "needs n_group > 1"),
        ({"select_by": "logits"}, "needs balance_bias"),
        ({"preset": "tc_moe", "logit_std": 1.0}, "not of the logits alone"),
        ({"preset": "aux_free", "selection": "sampled_others"}, "no probabilities"),
        ({"preset": "moepp", "overflow": "capacity"}, "equal cost"),
        ({"preset": "word", "overflow": "capacity"}, "split the spans"),
        ({"renormalise_kept": True}, "needs an overflow"),
        ({"preset": "c2r", "hash_layers": 1}, "are not limited"),
        ({"preset": "word", "hash_layers": 1}, "single tokens"),
        ({"shared_width": 8}, "needs shared_experts"),
        ({"shared_output": "bias"}, "needs shared_experts"),
        ({"latent_input": "rms_norm"}, "needs latent_size"),
        ({"preset": "moepp", "weights_on": "input"}, "have no input"),
        ({"preset": "tc_moe", "latent_size": 8}, "would not be in it"),
        ({"gate": "product_keys"}, "square number of experts"),
        ({"preset": "dense", "block_output": "bias"}, "has no router"),
    ],
)
def test_an_invalid_combination_is_refused_with_its_reason(fields: dict[str, Any], reason: str) -> None:
    moe = MoESpec(**{**SIZES, **fields})
    assert any(reason in fault.message for fault in moe_problems(moe)), moe_problems(moe)
    with pytest.raises(MoegridError, match="cannot be built"):
        build_block(moe, hidden_size=16)


def test_a_block_draws_every_weight_that_it_has() -> None:
    """Models are initialised in memory that nothing has filled yet."""
    for moe in COMBINATIONS:
        block = build_block(moe, hidden_size=16, vocab_size=VOCAB)
        for parameter in block.parameters():
            parameter.data.fill_(math.nan)
        block.reset_parameters()
        assert not [n for n, p in block.named_parameters() if not bool(p.isfinite().all())], name(moe)


def test_all_problems_come_at_once() -> None:
    spec = ModelSpec(hidden_size=30, num_heads=4, dense_layers=9, backbone="x", moe=MoESpec(top_k=9, num_experts=8))
    assert len(model_problems(spec)) >= 4


def test_resolved_specs_have_no_open_field_and_resolve_to_themselves() -> None:
    for moe in COMBINATIONS:
        resolved = resolve_moe(moe)
        assert all(getattr(resolved, field) is not None for field in MoESpec.__dataclass_fields__)
        assert resolve_moe(resolved) == resolved


def test_choice_by_threshold_is_causal_once_the_first_batch_was_ranked() -> None:
    fields = {"preset": "expert_choice", "train_select": "threshold", "eval_select": "threshold", "num_experts": 4}
    block = build_block(fields, hidden_size=16).train()
    assert (block.causal, block.eval().causal) == (False, True)
    _, routing = block.train()(torch.randn(2, 8, 16))
    block.update_thresholds(routing.cutoffs)
    assert block.causal
