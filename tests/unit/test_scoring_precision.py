"""Scoring in bf16 rounds weights, never what decides which experts a token gets."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from jobs.evaluate import state
from jobs.models.backbones import CausalLM
from jobs.models.building import build_model
from jobs.models.roles import parameter_roles
from jobs.models.weights import canonical_state
from orchestrator.catalog.routers import ROUTERS
from orchestrator.spec.model import ModelSpec, MoESpec


def model_of(**fields: object) -> CausalLM:
    torch.manual_seed(0)
    moe = MoESpec(**{"top_k": 2, "num_experts": 8, "expert_width": 16, "router_init_std": 1.0, **fields})  # type: ignore[arg-type]
    return build_model(ModelSpec(hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=2, moe=moe), 64).eval()


def loaded(model: CausalLM, precision: str, monkeypatch: pytest.MonkeyPatch) -> CausalLM:
    """Return what an evaluation makes of a committed state with the weights of `model`."""
    monkeypatch.setattr(state, "Words", lambda folder: range(64))
    monkeypatch.setattr(state, "span_function", lambda model, folder: None)
    monkeypatch.setattr(state, "fetch_shards", lambda context, key, kind: canonical_state(model))
    job, execution = SimpleNamespace(live={}), SimpleNamespace(device="cpu")
    made = SimpleNamespace(info={"vocab_size": 64})
    context = SimpleNamespace(job=job, execution=execution, directory=lambda key: Path(), manifest=lambda key: made)
    work = SimpleNamespace(state="s", tokenizer="t", precision=precision, model=model.spec)
    return state.load_state(context, work).model  # type: ignore[arg-type]


@pytest.mark.parametrize("preset", [preset for preset in ROUTERS.builtins if preset != "dense"])
def test_in_bf16_the_same_experts_serve(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(preset=preset)
    for router in (block.router for block in model.moe_blocks):
        for name in ("bias", "threshold"):
            if hasattr(router, name):
                getattr(router, name).add_(torch.linspace(-0.1, 0.1, router.num_ids))
    exact, rounded = (loaded(model, precision, monkeypatch) for precision in ("fp32", "bf16"))
    assert {p.dtype for _, p, role in parameter_roles(rounded) if role != "router"} == {torch.bfloat16}
    buffers = dict(exact.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in rounded.named_buffers())
    x = torch.randn(4, 64, 32).bfloat16()
    spans = torch.arange(64).expand(4, 64) // 3
    for ours, theirs in zip(rounded.moe_blocks, exact.moe_blocks, strict=True):
        known = theirs.router.state_dict()
        assert all(torch.equal(tensor, known[name]) for name, tensor in ours.router.state_dict().items())
        one, other = ours(x, spans)[1], theirs(x.float(), spans)[1]
        assert torch.equal(one.indices, other.indices)
        assert torch.equal(one.weights, other.weights)
    ids = torch.randint(0, 64, (4, 64))
    with torch.no_grad():
        assert torch.isfinite(rounded(ids, spans=spans).logits).all()
