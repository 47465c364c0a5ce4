"""A model that sees: pictures before the text, phases that freeze parts, upcycling in place, exact bits."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.models.backbones import CausalLM
from jobs.models.building import build_model
from jobs.models.layouts import public_layout
from jobs.models.shards import fetch_shards
from jobs.models.upcycle import carried_weights, initial_model
from jobs.models.weights import canonical_state, materialise
from jobs.node.context import StageContext
from jobs.train.freeze import frozen_names
from orchestrator.errors import MoegridError
from orchestrator.spec.model import ModelSpec, MoESpec
from orchestrator.spec.resolve import before_upcycling, resolve_model, resolve_moe
from orchestrator.spec.validity import model_problems
from orchestrator.store import Store
from orchestrator.store.manifest import WEIGHTS
from tests.seeing import SEES, VISION, chain, prepare_pictures
from tests.training import VOCABULARY, run_chain

PIXELS = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
TEXT = torch.arange(10).view(2, 5)


def upcycled(**moe: Any) -> tuple[CausalLM, CausalLM]:
    """Return a model whose vision side is dense, and the one that begins in its state with these experts."""
    spec = dataclasses.replace(
        SEES, moe=resolve_moe(MoESpec(**{"top_k": 3, "num_experts": 6, "expert_width": 32, **moe}))
    )
    dense = initial_model(before_upcycling(spec), VOCABULARY)
    with torch.no_grad():
        for name, tensor in dense.named_parameters():
            if name.endswith("bias"):
                tensor.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    model, weights = carried_weights(spec, VOCABULARY, canonical_state(dense))
    materialise(model, dict(weights))
    return dense.eval(), model.eval()


def change(**moe: Any) -> float:
    """Return by how much the logits move when experts begin, relative to the largest."""
    dense, model = upcycled(**moe)
    with torch.no_grad():
        before, after = (one(TEXT, images=PIXELS).logits for one in (dense, model))
    return float((before - after).abs().max() / before.abs().max())


@pytest.mark.parametrize("moe", [{"preset": "smoe"}, {"preset": "xmoe", "renormalise": True}])
def test_copies_whose_weights_sum_to_one_change_nothing(moe: dict[str, Any]) -> None:
    assert change(**moe) <= 1e-5


@pytest.mark.parametrize(
    ("moe", "least"),
    [
        ({"preset": "xmoe"}, 1e-4),
        ({"preset": "sigma_moe"}, 1e-3),
        ({"preset": "sharede_v2", "top_k": 2, "num_experts": 5}, 1e-3),
        ({"preset": "sharede_v3", "top_k": 2, "num_experts": 5}, 1e-3),
        ({"preset": "moepp"}, 1e-3),
    ],
)
def test_the_others_begin_elsewhere(moe: dict[str, Any], least: float) -> None:
    assert change(**moe) > least


def test_pictures_stand_before_the_text() -> None:
    model = initial_model(SEES, VOCABULARY).eval()
    with torch.no_grad():
        whole = model(TEXT, images=PIXELS)
        assert whole.logits.shape == (2, 5, VOCABULARY)
        # One layer of the encoder after the other, then the connector; no layer of the decoder has experts.
        assert [len(routing.indices) for routing in whole.routings] == [34, 34, 8]
        assert len(whole.routings) == len(model.moe_blocks)
        first = model(TEXT[:, :3], images=PIXELS, use_cache=True)
        rest = model(TEXT[:, 3:], past_key_values=first.past_key_values, use_cache=True)
        other = model(TEXT, images=255 - PIXELS).logits
    assert torch.allclose(torch.cat([first.logits, rest.logits], 1), whole.logits, atol=1e-5)
    assert not torch.allclose(other, whole.logits, atol=1e-3)


def test_a_padded_row_is_the_row_alone() -> None:
    model = initial_model(SEES, VOCABULARY).eval()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    with torch.no_grad():
        padded = model(TEXT, attention_mask=mask, images=PIXELS).logits[0, :3]
        alone = model(TEXT[:1, :3], images=PIXELS[:1]).logits[0]
    assert torch.allclose(padded, alone, atol=1e-5)


def test_the_loss_is_that_of_the_text_after_the_picture() -> None:
    model = build_model(SEES, VOCABULARY).eval()
    labels = TEXT.clone()
    labels[:, 0] = -100
    with torch.no_grad():
        output = model(TEXT, images=PIXELS, labels=labels)
        logits = model(TEXT, images=PIXELS).logits
        wanted = torch.nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, VOCABULARY), TEXT[:, 1:].reshape(-1), reduction="sum"
        )
    assert int(output.tokens) == 8
    assert torch.allclose(output.loss, wanted, rtol=1e-5)


def test_parts_are_frozen_by_name() -> None:
    model = build_model(SEES, VOCABULARY)
    names = {name for name, _ in model.named_parameters()}
    for word, prefix in {
        "vision": "vision.encoder.",
        "connector": "vision.connector.",
        "language": "backbone.",
    }.items():
        assert frozen_names(model, word) == {name for name in names if name.startswith(prefix)} != set()
    # Layers are those of the language model.
    assert all(name.startswith("backbone.") for name in frozen_names(model, "layers(0)"))


def weights_of(store: Store, key: str) -> str:
    return str(store.artifacts.load(key).info[WEIGHTS])


def test_a_cell_trains_and_align_moves_the_connector_alone(tmp_path: Path) -> None:
    store = prepare_pictures(str(tmp_path / "a"))
    works = chain()
    job = run_chain(store, works)
    context = StageContext(job, works[-1].key(), "train")
    states = [dict(fetch_shards(context, work.key(), "weights")) for work in works if work.kind in ("init", "train")]
    _, seen, aligned, begun, taught = states
    moved = {name for name in seen if not torch.equal(seen[name], aligned[name])}
    assert moved == {name for name in seen if name.startswith("vision.connector.")}
    assert {name for name in begun if "experts" in name} == {name for name in taught if "experts" in name} != set()
    losses = [store.artifacts.load(work.key()).metrics["train_loss"] for work in works if work.kind == "train"]
    assert losses[-1] < losses[0]


def test_bits_do_not_depend_on_where_a_cell_is_cut(tmp_path: Path) -> None:
    ends = []
    for name, cuts in {"whole": {}, "cut": {"align": [3, 5], "instruct": [2]}}.items():
        store = prepare_pictures(str(tmp_path / name))
        works = chain(cuts=cuts)
        if name == "whole":
            run_chain(store, works)
        else:  # each stage in a process of its own
            for number, work in enumerate(works):
                run_chain(store, [work], f"a-{number}")
        ends.append(weights_of(store, works[-1].key()))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("upcycle", ["", "copy"])
def test_experts_are_not_looked_up_for_tokens_of_pictures(upcycle: str) -> None:
    moe = MoESpec(top_k=3, num_experts=6, expert_width=32, hash_layers=1)
    spec = ModelSpec(dense_layers=0, vision=dataclasses.replace(VISION, upcycle=upcycle), moe=moe)
    assert any("no id" in fault.message for fault in model_problems(spec))
    assert not model_problems(dataclasses.replace(spec, vision=None))


def test_a_model_that_sees_is_not_exported_as_one_that_reads() -> None:
    moe = MoESpec(preset="dense", top_k=1, num_experts=1, expert_width=32)
    blind = resolve_model(ModelSpec(backbone="llama", moe=moe))
    assert public_layout(blind) == "llama"
    with pytest.raises(MoegridError, match="has a vision side"):
        public_layout(dataclasses.replace(blind, vision=VISION))
