"""What outputs may depend on: never on later tokens (causal routers), padding, batch neighbours or the KV cache."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from jobs.models.attention import Attention, behind_prefix, causal_mask
from jobs.models.backbones import CausalLM
from jobs.models.building import build_model
from jobs.models.key_values import KeyValues
from jobs.models.roles import parameter_roles
from jobs.models.rotary import Angles, RotaryTables
from jobs.models.weights import weights_sha256
from jobs.moe.interventions import random_routing
from orchestrator.spec.model import ModelSpec, MoESpec
from orchestrator.spec.resolve import resolve_model

VOCAB, BATCH, LENGTH = 50, 3, 20
MOE = MoESpec(num_experts=8, top_k=2, expert_width=16, router_init_std=1.0)
SPEC = ModelSpec(hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=2, init_std=0.3)

CAUSAL = {
    "smoe": {},
    "olmoe": {"preset": "olmoe"},
    "sigma_moe": {"preset": "sigma_moe"},
    "xmoe": {"preset": "xmoe"},
    "sharede_v3": {"preset": "sharede_v3"},
    "moepp": {"preset": "moepp"},
    "tc_moe": {"preset": "tc_moe"},
    "aux_free": {"preset": "aux_free"},
    "c2r": {"preset": "c2r"},
    "deepseek_v3": {"preset": "deepseek_moe", "variant": "v3", "n_group": 4, "topk_group": 2},
    "word first": {"unit": "word"},
    "sentence causal_mean": {"unit": "sentence", "pool": "causal_mean"},
    "expert_choice threshold": {"preset": "expert_choice", "train_select": "threshold", "eval_select": "threshold"},
}
LEAKY = {
    "word full_mean": {"unit": "word", "pool": "full_mean"},
    "sentence full_mean": {"unit": "sentence", "pool": "full_mean"},
    "expert_choice sequence": {"preset": "expert_choice"},
    "expert_choice batch": {"preset": "expert_choice", "choice_group": "batch"},
}


def model_of(fields: dict[str, Any]) -> CausalLM:
    torch.manual_seed(0)
    return build_model(dataclasses.replace(SPEC, moe=dataclasses.replace(MOE, **fields)), VOCAB).eval()


def tokens(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=generator)
    spans = (torch.rand(BATCH, LENGTH, generator=generator) < 0.4).long().cumsum(1)
    spans[:, -1] = spans[:, -2]  # the changed last token belongs to an open span
    return ids, spans


@torch.no_grad()
def prefix_moves(model: CausalLM) -> bool:
    """Return whether any earlier logit moves when the last token changes, over several batches.

    More than rounding: how many tokens share an expert's GEMM changes its last bits (about 1e-7 here).
    """
    for seed in range(8):
        ids, spans = tokens(seed)
        changed = ids.clone()
        changed[:, -1] = (changed[:, -1] + 1 + seed) % VOCAB
        before, after = (model(x, spans=spans).logits[:, :-1] for x in (ids, changed))
        if not torch.allclose(before, after, atol=1e-5, rtol=1e-5):
            return True
    return False


@pytest.mark.parametrize("fields", CAUSAL.values(), ids=CAUSAL)
def test_no_later_token_moves_an_earlier_output(fields: dict[str, object]) -> None:
    model = model_of(fields)
    assert model.causal
    assert not prefix_moves(model)


@pytest.mark.parametrize("fields", LEAKY.values(), ids=LEAKY)
def test_the_leak_of_leaky_routers_is_real_and_declared(fields: dict[str, object]) -> None:
    model = model_of(fields)
    assert not model.causal
    assert not model.cacheable
    assert prefix_moves(model)


def test_threshold_routing_may_leak_in_training_only() -> None:
    model = model_of({"preset": "expert_choice", "eval_select": "threshold"})
    assert model.eval().causal
    assert not model.train().causal


@torch.no_grad()
@pytest.mark.parametrize("fields", [*CAUSAL.values(), *LEAKY.values()], ids=[*CAUSAL, *LEAKY])
def test_padding_on_either_side_changes_nothing_and_is_not_routed(fields: dict[str, object]) -> None:
    if fields.get("choice_group") == "batch":
        pytest.skip("the batch is one routing group by definition")
    model = model_of(fields)
    ids, spans = tokens()
    expected = model(ids, spans=spans)
    for left, right in ((0, 5), (4, 0)):
        pad = (left, right)
        padded = torch.nn.functional.pad(ids, pad, value=7)
        mask = torch.nn.functional.pad(torch.ones_like(ids), pad)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        output = model(
            padded, attention_mask=mask, position_ids=positions, spans=torch.nn.functional.pad(spans, pad, value=0)
        )
        got = output.logits[:, left : left + LENGTH]
        torch.testing.assert_close(got, expected.logits, atol=1e-4, rtol=1e-5)
        for routing, reference in zip(output.routings, expected.routings, strict=True):
            assert torch.equal(routing.counts, reference.counts)
            assert (routing.indices[~routing.mask] == -1).all()
            assert not routing.weights[~routing.mask].any()
            assert int(routing.counts.sum()) == int((routing.indices >= 0).sum())
            torch.testing.assert_close(routing.losses()["switch"], reference.losses()["switch"])


@torch.no_grad()
@pytest.mark.parametrize("fields", [*CAUSAL.values(), LEAKY["expert_choice sequence"]], ids=[*CAUSAL, "expert_choice"])
def test_a_sequence_does_not_depend_on_its_batch_neighbours(fields: dict[str, object]) -> None:
    model = model_of(fields)
    ids, spans = tokens()
    together = model(ids, spans=spans).logits
    alone = torch.cat([model(ids[i : i + 1], spans=spans[i : i + 1]).logits for i in range(BATCH)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("fields", CAUSAL.values(), ids=CAUSAL)
@pytest.mark.parametrize("cuts", [(7,), (3, 4, 11)])
def test_the_cache_gives_the_logits_of_the_whole_sequence(fields: dict[str, object], cuts: tuple[int, ...]) -> None:
    model = model_of(fields)
    ids, spans = tokens()
    expected = model(ids, spans=spans).logits
    cache, parts = None, []
    for start, stop in zip((0, *cuts), (*cuts, LENGTH), strict=True):
        output = model(ids[:, start:stop], spans=spans[:, start:stop], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_random_routing_is_the_same_with_and_without_cache_and_batch() -> None:
    model = model_of({})
    ids, _ = tokens()
    with random_routing(model, 3):
        whole = model(ids).logits
        first = model(ids[:, :9], use_cache=True)
        rest = model(ids[:, 9:], past_key_values=first.past_key_values, use_cache=True)
        alone = model(ids[1:2]).logits
    with random_routing(model, 4):
        other = model(ids).logits
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(alone, whole[1:2], atol=1e-4, rtol=1e-5)
    assert not torch.allclose(whole, other)
    assert not torch.allclose(whole, model(ids).logits)


@torch.no_grad()
def test_logits_to_keep_and_the_fused_loss_are_the_plain_ones() -> None:
    model = model_of({})
    ids, _ = tokens()
    logits = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, logits[:, -3:])
    picked = torch.tensor([2, 5, 11])
    torch.testing.assert_close(model(ids, logits_to_keep=picked).logits, logits[:, picked])
    labels = ids.clone()
    labels[0, :12] = -100
    output = model(ids, labels=labels)
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1), ignore_index=-100, reduction="sum"
    )
    torch.testing.assert_close(output.loss, expected)
    assert int(output.tokens) == int((labels[:, 1:] != -100).sum())


@pytest.mark.parametrize("masked", [False, True])
def test_the_fused_loss_has_the_plain_gradients(masked: bool) -> None:
    model = model_of({}).train()
    ids, _ = tokens()
    labels = ids.clone()
    if masked:
        labels[:, :9] = -100
    gradients = []
    for fused in (True, False):
        model.zero_grad()
        if fused:
            loss = model(ids, labels=labels).loss
        else:
            logits = model(ids).logits[:, :-1].reshape(-1, VOCAB)
            target = labels[:, 1:].reshape(-1)
            loss = torch.nn.functional.cross_entropy(logits, target, ignore_index=-100, reduction="sum")
        (loss * 0.5).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)


def test_every_parameter_has_a_role_from_its_module_not_its_name() -> None:
    spec = dataclasses.replace(SPEC, backbone="deepseek_moe", num_layers=3, dense_layers=1, dense_width=32)
    moe = dataclasses.replace(MOE, preset="moepp", shared_experts=1)
    model = build_model(dataclasses.replace(spec, moe=moe), VOCAB)
    roles: dict[str, set[str]] = {}
    for name, _, role in parameter_roles(model):
        roles.setdefault(role, set()).add(name.removeprefix("backbone.model.").removeprefix("backbone."))
    layer = "layers.2.mlp.block"
    assert roles["router"] == {
        "layers.1.mlp.block.router.weight", f"{layer}.router.weight", f"{layer}.router.residual"
    }  # fmt: skip
    expert_weights = ("experts.up", "experts.down", "constant.router", "constant.value")
    assert {n for n in roles["routed_expert"] if n.startswith(layer)} == {f"{layer}.{n}" for n in expert_weights}
    shared = {f"{layer}.shared.{n}" for n in ("gate", "up", "down")}
    assert {n for n in roles["shared_expert"] if n.startswith(layer)} == shared
    assert roles["embedding"] == {"embed_tokens.weight", "lm_head.weight"}
    assert {n.split(".")[2] for n in roles["attention"]} == {"self_attn"}
    assert "layers.0.mlp.block.ffn.gate" in roles["other"]
    assert sum(map(len, roles.values())) == len(list(model.parameters()))


def test_the_same_seed_gives_the_same_bits_and_backward_is_deterministic() -> None:
    ids, _ = tokens()
    gradients = []
    for _ in range(2):
        model = model_of({}).train()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# Digests of weights that models had when transformers made what is around the blocks, and drew it twice.
SEEDED = {
    ("olmoe", False): "59a8abf4b8561b79",
    ("deepseek_moe", True): "4679826fb8cc6098",
    ("llama", False): "daef11dcc8d2fa5d",
}


@pytest.mark.parametrize(("backbone", "tied"), SEEDED)
def test_a_seed_keeps_its_weights(backbone: str, tied: bool) -> None:
    torch.manual_seed(3)
    spec = dataclasses.replace(SPEC, backbone=backbone, tie_embeddings=tied, num_kv_heads=1, moe=MOE)
    assert weights_sha256(build_model(spec, VOCAB))[:16] == SEEDED[backbone, tied]


@pytest.mark.parametrize("groups", [1, 2])
def test_attention_with_a_mask_and_grouped_heads_is_that_of_each_head_alone(groups: int) -> None:
    torch.manual_seed(0)
    attention = Attention(
        resolve_model(dataclasses.replace(SPEC, hidden_size=32, num_heads=4, num_kv_heads=4 // groups)), 0
    )
    x = torch.randn(2, 5, 32)
    angles = RotaryTables(8, 10000.0)(torch.arange(5)[None], x.dtype)
    real = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    q, k, v = (
        projected(x).view(2, 5, -1, 8).transpose(1, 2)
        for projected in (
            lambda x: attention.q_norm(attention.q_proj(x)),
            lambda x: attention.k_norm(attention.k_proj(x)),
            attention.v_proj,
        )
    )
    phases = torch.arange(5)[:, None] * 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    turn = torch.polar(torch.ones_like(phases), phases)
    q, k = (_turned(heads, turn) for heads in (q, k))
    seen = torch.ones(5, 5).tril().bool() & real[:, None, None, :]
    expected = torch.zeros(2, 5, 32)
    for head in range(4):
        scores = q[:, head] @ k[:, head // groups].mT / 8**0.5
        weights = scores.masked_fill(~seen[:, 0], float("-inf")).softmax(-1)
        expected[..., 8 * head : 8 * head + 8] = weights @ v[:, head // groups]
    expected = attention.o_proj(expected)
    for mask in (causal_mask(real, 2, 5, 0, x.device), causal_mask(None, 2, 5, 0, x.device)):
        rows = slice(None) if mask is not None else slice(0, 1)  # the first row has no padding
        torch.testing.assert_close(attention(x, angles, mask, None)[rows], expected[rows], atol=1e-5, rtol=1e-5)
    cache, last = KeyValues(), []
    for place in range(5):
        row = Angles(*(table[:, place : place + 1] for table in (angles.cos, angles.sin)))
        mask = causal_mask(real[:, : place + 1], 2, 1, place, x.device)
        last.append(attention(x[:, place : place + 1], row, mask, cache))
    torch.testing.assert_close(torch.cat(last, 1)[0], expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat(last, 1)[1, :3], expected[1, :3], atol=1e-5, rtol=1e-5)


def _turned(heads: Tensor, turn: Tensor) -> Tensor:
    """Return heads whose halves are real and imaginary parts, turned in the complex plane."""
    first, second = heads.chunk(2, -1)
    turned = torch.complex(first, second) * turn
    return torch.cat([turned.real, turned.imag], -1)


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_a_query_behind_a_shared_prefix_is_mixed_as_by_the_kernel(groups):
    torch.manual_seed(0)
    batch, heads, front, own, width = 3, 4, 21, 7, 8
    q = torch.randn(batch, heads, 1, width, dtype=torch.float64)
    prefix = torch.randn(2, 1, groups, front, width, dtype=torch.float64)
    k, v = (torch.randn(batch, groups, own, width, dtype=torch.float64) for _ in range(2))
    seen = torch.rand(batch, 1, 1, front + own) < 0.7
    seen[..., -1] = True
    keys, values = (
        torch.cat([front.expand(batch, -1, -1, -1), x], 2).repeat_interleave(heads // groups, 1)
        for front, x in zip(prefix, (k, v), strict=True)
    )
    for mask in (None, seen):
        wanted = torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        # Scores are taken in fp32, as kernels do for every narrower type.
        torch.testing.assert_close(
            behind_prefix(q, (prefix[0], prefix[1]), k, v, mask, q.shape[-1] ** -0.5), wanted, rtol=0, atol=1e-6
        )
        # A sink is one more key in each head, whose logit is given and whose value is 0.
        sinks = torch.randn(heads, dtype=torch.float64) + 2
        logits = (q @ keys.mT) * q.shape[-1] ** -0.5
        logits = logits if mask is None else logits.masked_fill(~mask, -torch.inf)
        weights = torch.cat([logits, sinks.view(1, -1, 1, 1).expand(batch, -1, 1, 1)], -1).softmax(-1)[..., :-1]
        found = behind_prefix(q, (prefix[0], prefix[1]), k, v, mask, q.shape[-1] ** -0.5, sinks)
        torch.testing.assert_close(found, weights @ values, rtol=0, atol=1e-6)


def test_a_cache_that_was_cropped_grows_from_there():
    torch.manual_seed(0)
    cache, parts = KeyValues(), [torch.randn(2, 1, n, 4) for n in (5, 3, 70, 2)]
    held = torch.empty(2, 1, 0, 4)
    for part in parts:
        keys, values = cache.update(part, -part, 0)
        held = torch.cat([held, part], 2)
        assert torch.equal(keys, held)
        assert torch.equal(values, -held)
        cache.crop(-1)
        held = held[:, :, :-1]
        assert cache.get_seq_length() == held.shape[2]
