"""Contrasted layers: the formula of the paper, the same scores with and without a cache, plausible tokens alone."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from jobs.evaluate.dola import ALPHA, Contrast, contrasted
from jobs.evaluate.generation import Generation, generate
from jobs.evaluate.prefix_tree import plan
from jobs.evaluate.scoring import Model, Scorer
from jobs.models.building import build_model
from orchestrator.spec.attention import MultiplierSpec
from orchestrator.spec.model import ModelSpec, MoESpec

LAYERS = (0, 2)
MOE = MoESpec(num_experts=4, top_k=2, expert_width=16, router_init_std=0.5)
SPEC = ModelSpec(hidden_size=32, num_layers=4, num_heads=2, num_kv_heads=2, context=64, init_std=0.3, moe=MOE)


class Words:
    """A tokenizer for token ids."""

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(65 + token) for token in ids)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model(SPEC, 30).eval()


def by_hand(model: Any, ids: list[int], alpha: float) -> np.ndarray:
    """Return the contrasted log-probabilities [S,V], written out position by position in float64."""
    hidden: list[torch.Tensor] = []
    hooks = [model.backbone.model.embed_tokens, *model.layers]
    handles = [module.register_forward_hook(lambda _, __, out: hidden.append(out)) for module in hooks]
    with torch.inference_mode():
        last = model(torch.tensor([ids])).logits[0].double().numpy()
    for handle in handles:
        handle.remove()
    states = [(out[0] if isinstance(out, tuple) else out)[0] for out in hidden]
    head = model.backbone.lm_head.weight.detach().double()

    def softmax(logits: np.ndarray) -> np.ndarray:
        weights = np.exp(logits - logits.max())
        return weights / weights.sum()

    rows = []
    for position, logits in enumerate(last):
        p = softmax(logits)
        best = (-1.0, p)
        for layer in LAYERS:
            q = softmax((head @ states[layer][position].double()).detach().numpy())
            m = (p + q) / 2
            distance = 0.5 * (p * np.log(p / m)).sum() + 0.5 * (q * np.log(q / m)).sum()
            if distance > best[0]:
                best = (distance, q)
        score = np.where(p >= alpha * p.max(), np.log(p) - np.log(best[1]), -np.inf)
        rows.append(np.log(softmax(score)) if alpha == 0 else score - np.logaddexp.reduce(score))
    return np.array(rows)


def test_scores_are_those_of_the_formula_with_and_without_shared_prefixes(model: torch.nn.Module) -> None:
    generator = np.random.default_rng(0)
    context = generator.integers(0, 30, 12).tolist()
    requests = [(context, generator.integers(0, 30, size).tolist()) for size in (1, 3, 5)]
    wanted = []
    for fed, rest in requests:
        table = by_hand(model, [*fed, *rest], 0.0)
        wanted.append(sum(table[len(fed) - 1 + i, token] for i, token in enumerate(rest)))
    pairs = [(np.array([*fed, *rest[:-1]]), np.array(rest)) for fed, rest in requests]
    for share in (True, False):
        scorer = Scorer(Model(model, None, Contrast(model, LAYERS)))
        found = scorer.run(plan(pairs, share=share, tokens_per_batch=256)).loglikelihood
        assert found == pytest.approx(wanted, abs=2e-4)
    plain = Scorer(Model(model)).run(plan(pairs, share=True, tokens_per_batch=256)).loglikelihood
    assert np.abs(plain - found).max() > 0.1


def test_early_layers_are_scaled_as_the_last_one_is(model: torch.nn.Module) -> None:
    """Granite's constants on embeddings and logits, put into the weights instead, change no score."""
    factors = MultiplierSpec(embedding=3.0, logits=4.0)
    scaled, folded = (build_model(spec, 30).eval() for spec in (dataclasses.replace(SPEC, multipliers=factors), SPEC))
    scaled.load_state_dict(model.state_dict())
    folded.load_state_dict(model.state_dict())
    with torch.no_grad():
        folded.backbone.model.embed_tokens.weight.mul_(3.0)
        folded.backbone.lm_head.weight.div_(4.0)
    pairs = plan([(np.array([3, 1, 4, 1, 5, 9]), np.array([9, 2]))])
    found, wanted = (Scorer(Model(one, None, Contrast(one, LAYERS))).run(pairs) for one in (scaled, folded))
    assert found.loglikelihood == pytest.approx(wanted.loglikelihood, rel=1e-4)


@pytest.mark.parametrize("tokens_per_batch", [16, 512])
def test_generation_takes_the_likeliest_contrasted_token(model: torch.nn.Module, tokens_per_batch: int) -> None:
    contexts = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7]]
    settings = Generation((), 6, 0.0, 0)
    callee = Model(model, None, Contrast(model, LAYERS, ALPHA))
    texts = generate(callee, Words(), [(context, settings) for context in contexts], tokens_per_batch)
    for context, text in zip(contexts, texts, strict=True):
        ids = list(context)
        for _ in range(6):
            ids.append(int(by_hand(model, ids, ALPHA)[-1].argmax()))
        assert text == Words().decode(ids[len(context) :])


def test_only_plausible_tokens_take_part() -> None:
    last = torch.tensor([[4.0, 3.0, -5.0]])
    early = torch.tensor([[4.0, 3.0, -20.0]])  # the last layer adds most to the implausible token
    assert int(contrasted(last, [early], 0.0).argmax()) == 2
    kept = contrasted(last, [early], ALPHA)
    assert kept[0, 2] == -math.inf
    assert float(kept.exp().sum()) == pytest.approx(1.0)


def test_a_layer_contrasted_with_itself_knows_nothing() -> None:
    logits = torch.randn(3, 7)
    assert torch.allclose(contrasted(logits, [logits], 0.0), torch.full((3, 7), -math.log(7)), atol=1e-6)


def test_sampling_does_not_depend_on_the_batch(model: torch.nn.Module) -> None:
    settings = Generation((), 8, 1.0, 5)
    requests = [([i, i + 1], settings) for i in range(6)]
    whole, single = (generate(Model(model), Words(), requests, size) for size in (512, 1))
    assert whole == single
    assert len(set(generate(Model(model), Words(), [([1, 2], settings)] * 6, 512))) > 1


def test_finished_rows_leave_the_batch(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [([i, i + 1, i + 2], Generation((), 12 if i == 3 else 2, 0.0, 0)) for i in range(6)]
    alone = generate(Model(model), Words(), requests, 1)
    rows: list[int] = []
    run = Model._run

    def counted(self: Model, ids_BS: torch.Tensor, *rest: Any, **more: Any) -> Any:
        rows.append(len(ids_BS))
        return run(self, ids_BS, *rest, **more)

    monkeypatch.setattr(Model, "_run", counted)
    assert generate(Model(model), Words(), requests, 512) == alone
    assert rows == [6, *[1] * 10], "contexts are read in one row, which gives the first token"
