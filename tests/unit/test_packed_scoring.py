"""Sequences that lie behind one another in one row score as each does alone, whatever routes and attends."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from jobs.evaluate import scoring
from jobs.evaluate.generation import _read
from jobs.evaluate.packed_pass import BRANCH, PackedPass, passes
from jobs.evaluate.prefix_tree import Ints, Schedule, cut, plan
from jobs.evaluate.scoring import Model, Scorer
from jobs.models.backbones import CausalLM
from jobs.models.building import build_model
from jobs.moe.interventions import pruned, random_routing, temperature
from jobs.node import machine
from orchestrator.spec.attention import LatentSpec
from orchestrator.spec.model import ModelSpec, MoESpec
from orchestrator.spec.resolve import block_spec, resolve_model
from tests.unit.test_moe_matrix import PARTS, combinations
from tests.unit.test_moe_matrix import SIZES as MOE_SIZES

VOCABULARY = 64
CONTEXT = 512
SIZES: dict[str, Any] = {"hidden_size": 32, "num_layers": 3, "num_heads": 4, "context": CONTEXT, "init_std": 0.3}
Request = tuple[Ints, Ints]
Intervention = Callable[[nn.Module], AbstractContextManager[None]]


def _requests(seed: int = 0) -> list[Request]:
    """Return what shares a long prefix, a short one and none, with long and short ends."""
    drawn = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [drawn.randrange(VOCABULARY) for _ in range(count)]

    made = []
    for shots, items in ((150, 4), (90, 2), (0, 5)):
        before = tokens(shots)
        for _ in range(items):
            asked = before + tokens(drawn.randint(3, 80))
            made += [cut(asked, tokens(drawn.randint(1, 6)), CONTEXT) for _ in range(3)]
    made += [cut(tokens(4), tokens(70), CONTEXT), cut(tokens(1), tokens(1), CONTEXT)]
    drawn.shuffle(made)
    return made


@torch.inference_mode()
def _alone(model: nn.Module, requests: Sequence[Request]) -> list[float]:
    """Return each request's log-likelihood from a plain pass over its whole sequence."""
    found = []
    for fed, targets in requests:
        logprobs = model(torch.from_numpy(fed)[None]).logits[0, -len(targets) :].log_softmax(-1)
        found.append(float(logprobs[torch.arange(len(targets)), torch.from_numpy(targets)].double().sum()))
    return found


def _packed(model: nn.Module, requests: Sequence[Request]) -> list[float]:
    """Return the scores that packed passes give, of few tokens so that a trunk takes several."""
    callee = Model(model)
    assert callee.packs
    return list(Scorer(callee, tokens_per_batch=200).run(plan(requests)).loglikelihood)


def _model(moe: MoESpec | None = None, **fields: Any) -> CausalLM:
    torch.manual_seed(0)
    moe = moe or MoESpec(num_experts=4, top_k=2, expert_width=16, router_init_std=0.5)
    model = build_model(resolve_model(ModelSpec(moe=moe, **{**SIZES, **fields})), VOCABULARY).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sinks" in name:
                parameter.normal_()
    return model


ATTENTION: dict[str, dict[str, Any]] = {
    "plain": {},
    "groups": {"num_kv_heads": 2},
    "one group, normed by head": {"num_kv_heads": 1, "qk_norm": "head"},
    "sinks": {"attention_sinks": True, "num_kv_heads": 2},
    "window": {"attention_window": 20},
    "short window in every second layer, sinks": {"attention_window": 5, "full_every": 2, "attention_sinks": True},
    "latent": {
        "backbone": "llama",
        "latent": LatentSpec(kv_rank=16, q_rank=8, plain_dim=8, rotary_dim=4, value_dim=10),
    },
    "latent, wide values": {
        "backbone": "llama",
        "latent": LatentSpec(kv_rank=16, plain_dim=4, rotary_dim=4, value_dim=12),
    },
    "post-norm": {"norm_order": "post"},
}


@pytest.mark.parametrize("name", ATTENTION)
def test_packed_scores_are_those_of_whole_sequences(name: str) -> None:
    model, requests = _model(**ATTENTION[name]), _requests()
    assert _packed(model, requests) == pytest.approx(_alone(model, requests), abs=1e-4)


# One of each router and variant, and what may be combined with them.
ROUTED = list({(moe.preset, moe.variant, moe.choice): moe for moe in reversed(combinations())}.values())
ROUTED += [block_spec({**MOE_SIZES, **parts}) for parts in PARTS]


@pytest.mark.parametrize("moe", ROUTED, ids=lambda moe: f"{moe.preset}-{moe.variant}-{moe.choice}")
def test_packed_scores_do_not_depend_on_the_router(moe: MoESpec) -> None:
    model, requests = _model(moe, num_layers=2), _requests(1)[:12]
    if not Model(model).packs:
        pytest.skip("its choice depends on other tokens: nothing is shared")
    assert _packed(model, requests) == pytest.approx(_alone(model, requests), abs=1e-4)
    with random_routing(model, 3):
        assert _packed(model, requests) == pytest.approx(_alone(model, requests), abs=1e-4)


@pytest.mark.parametrize("intervene", [partial(pruned, experts={0: 1, 2: [0, 2]}), partial(temperature, tau=3.0)])
def test_packed_scores_under_an_intervention(intervene: Intervention) -> None:
    model, requests = _model(), _requests(2)
    before = _packed(model, requests)
    with intervene(model):
        after = _packed(model, requests)
        assert after == pytest.approx(_alone(model, requests), abs=1e-4)
    assert max(abs(a - b) for a, b in zip(before, after, strict=True)) > 1e-3


def test_who_watches_records_sees_every_token_in_every_layer() -> None:
    model, requests = _model(), _requests()
    schedule = plan(requests)
    seen = []
    watched = Scorer(Model(model), lambda routings, real: seen.append([len(one.mask) for one in routings]), 200)
    scores = watched.run(schedule).loglikelihood
    assert np.array(seen).sum(0).tolist() == [schedule.tokens] * 3
    assert list(scores) == pytest.approx(_packed(model, requests), abs=1e-4)


def test_each_token_is_computed_once_and_in_the_last_layer_where_it_is_scored() -> None:
    model, requests = _model(), _requests()
    rows: list[list[int]] = [[], [], []]
    for layer, counts in zip(model.moe_blocks, rows, strict=True):
        layer.register_forward_pre_hook(lambda _, args, counts=counts: counts.append(args[0].shape[:-1].numel()))
    schedule = plan(requests)
    _packed(model, requests)
    trunks = [trunk for batch in schedule.trunks for trunk in batch]
    trees = [tree for batch in (*schedule.trees, *(trunk.trees for trunk in trunks)) for tree in batch]
    asked = [tree.scored for tree in trees] + [trunk.scored for trunk in trunks]
    scored = sum(len(set(one.position.tolist())) for one in asked)
    idle = sum(not len(one.scored.position) for one in _passes(schedule))
    assert len(rows[0]) > 3
    assert [sum(counts) for counts in rows] == [schedule.tokens, schedule.tokens, scored + idle]


def test_a_pass_that_is_filled_up_scores_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, requests = _model(), _requests()
    alone = _alone(model, requests)
    rows: list[int] = []
    model.moe_blocks[0].register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[:-1].numel()))
    monkeypatch.setattr(machine, "has_fast_products", lambda: True)
    monkeypatch.setattr(scoring, "FILLED_UP", 0)
    scorer, schedule = Scorer(Model(model), tokens_per_batch=200), plan(requests)
    assert list(scorer.run(schedule).loglikelihood) == pytest.approx(alone, abs=1e-4)
    assert any(one.past for one in _passes(schedule)), "some go on from a cache"
    assert rows == [-(-len(one.ids) // 64) * 64 for one in _passes(schedule)]
    assert scorer.tokens == schedule.tokens, "what fills up is not asked for"


def _passes(schedule: Schedule) -> list[PackedPass]:
    return list(passes(schedule, 200))


@pytest.mark.parametrize("past", [0, 7])
def test_what_a_token_reads_is_itself_what_it_descends_from_and_the_past(past: int) -> None:
    for one in passes(plan(_requests()), 10**9):
        size = len(one.ids)
        row = PackedPass(one.ids, one.positions, one.ends, one.scored, past)
        packing = row.packing(torch.float32, torch.device("cpu"), None)
        counted = torch.zeros(size, past + size, dtype=torch.int)
        for read in (*packing.own, *packing.before):
            seen = read.bias(torch.float32, torch.device("cpu")) == 0
            counted[read.first : read.last, read.start : read.end] += seen
            if read.mask is not None:
                assert read.last - read.first <= BRANCH, "a mask is for small branches alone"
        place = np.arange(size)
        wanted = (place[None, :] <= place[:, None]) & (place[:, None] < one.ends[None, :])
        assert counted[:, :past].eq(1).all()
        assert np.array_equal(counted[:, past:].numpy(), wanted)


@pytest.mark.parametrize("shared", [0, 40])
@pytest.mark.parametrize("name", ATTENTION)
@torch.inference_mode()
def test_texts_go_on_from_contexts_that_were_read_in_one_row(name: str, shared: int) -> None:
    model, drawn = _model(**ATTENTION[name]), random.Random(0)
    front = [drawn.randrange(VOCABULARY) for _ in range(shared)]
    contexts = [front + [drawn.randrange(VOCABULARY) for _ in range(count)] for count in (140, 3, 60)]
    logits, cache, seen = _read(Model(model), contexts)
    wanted = torch.cat([model(torch.tensor([one])).logits[:, -1] for one in contexts])
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)
    assert seen.sum(1).tolist() == [len(one) for one in contexts]
    for held in cache.prefix(0) or ():
        assert held.untyped_storage().nbytes() == held.nbytes, "of the row the prefix alone is held"
    token = torch.tensor([[5], [6], [7]])
    mask = torch.cat([seen, torch.ones_like(token, dtype=torch.bool)], 1).long()
    places = torch.tensor([[len(one)] for one in contexts])
    after = model(token, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True).logits
    wanted = torch.cat([model(torch.tensor([[*one, 5 + row]])).logits[:, -1:] for row, one in enumerate(contexts)])
    torch.testing.assert_close(after, wanted, atol=1e-4, rtol=0)
