"""Probes of built models: streams equal the metrics of whole arrays, padding never counts, similarity is exact."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch

from jobs.models.backbones import CausalLM
from jobs.models.building import build_model
from jobs.probe import metrics as m
from jobs.probe.collect import Collector, probe
from jobs.probe.sets import routings_of, sequence_batches, text_batches, token_batch
from jobs.probe.similarity import off_diagonal, output_similarity, weight_similarity
from orchestrator.spec.model import ModelSpec, MoESpec

VOCABULARY = 97


def model_of(**moe: object) -> CausalLM:
    torch.manual_seed(0)
    fields = {"num_experts": 8, "top_k": 2, "expert_width": 16, **moe}
    spec = ModelSpec(hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=2, moe=MoESpec(**fields))  # type: ignore[arg-type]
    return build_model(spec, VOCABULARY).eval()


def sequences(lengths: tuple[int, ...] = (5, 40, 17, 23, 8)) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCABULARY, length) for length in lengths]


def test_a_probe_equals_the_metrics_of_its_records() -> None:
    model = model_of()
    batch = token_batch([np.arange(60) % VOCABULARY], None, "cpu")
    with torch.inference_mode():
        routings = routings_of(model, batch)
    collector = probe(model, {"heldout": [batch]})
    indices = np.stack([r.indices.numpy() for r in routings])
    weights = np.stack([r.weights.numpy() for r in routings])
    scores = np.stack([r.scores.numpy() for r in routings])
    found = collector.metrics()
    assert found["probe_load_balance"] == pytest.approx(m.load_balance(indices, 8))
    assert found["probe_collaboration"] == pytest.approx(m.collaboration(indices, 8))
    assert found["expert_allocation_entropy"] == pytest.approx(m.expert_allocation_entropy(indices, 8))
    assert found["expert_weight_entropy"] == pytest.approx(m.expert_weight_entropy(weights))
    assert found["router_margin"] == pytest.approx(m.router_margin(scores), abs=1e-6)
    sample = collector.arrays()["sample"]
    assert m.router_saturation(sample, indices) == 1.0


def test_padding_and_batching_change_nothing() -> None:
    model = model_of()
    together = probe(model, {"task": sequence_batches(sequences(), None, "cpu")})
    alone = probe(model, {"task": [token_batch([s], None, "cpu") for s in sequences()]})
    assert np.array_equal(together.totals["task"].counts_LN, alone.totals["task"].counts_LN)
    assert together.totals["task"].tokens_L.tolist() == [93, 93]
    assert together.metrics() == pytest.approx(alone.metrics(), abs=1e-5)


@pytest.mark.parametrize(
    "moe",
    [
        {"preset": "moepp"},
        {"preset": "tc_moe"},
        {"preset": "expert_choice"},
        {"preset": "sharede_v3"},
        {"preset": "xmoe"},
    ],
)
def test_every_kind_of_record_can_be_probed(moe: dict[str, object]) -> None:
    model = model_of(**moe)
    collector = probe(model, {"heldout": sequence_batches(sequences(), None, "cpu")})
    found = collector.metrics()
    assert 0 <= found["probe_load_balance"] <= 3.0
    assert ("null_share" in found) == (moe["preset"] == "tc_moe")


def test_shifted_data_have_a_distance_and_equal_data_none() -> None:
    model = model_of()
    same = list(sequence_batches(sequences(), None, "cpu"))
    shifted = [token_batch([np.full(50, 3)], None, "cpu")]
    found = probe(model, {"heldout": same, "again": same, "shifted": shifted}).metrics()
    assert found["again/routing_distance"] == pytest.approx(0.0, abs=1e-9)
    assert found["shifted/routing_distance"] > 0.01


def test_weight_similarity_is_the_cosine_of_flattened_experts() -> None:
    model = model_of()
    found = weight_similarity(model)
    experts = model.moe_blocks[0].experts
    flat = np.concatenate([p.detach().numpy().reshape(8, -1) for p in experts.parameters()], axis=1)
    assert found[0] == pytest.approx(m.cosine_matrix(flat), abs=1e-9)
    assert off_diagonal(found[:1]) == pytest.approx(m.expert_similarity(flat), abs=1e-9)


def test_output_similarity_runs_every_expert_on_the_same_tokens() -> None:
    model = model_of()
    batch = token_batch([np.arange(60) % VOCABULARY], None, "cpu")
    kept: list[torch.Tensor] = []
    block = model.moe_blocks[1]
    hook = block.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0].detach()[0]))
    with torch.inference_mode():
        routings_of(model, batch)
    hook.remove()
    one = torch.ones(60, 1)
    with torch.inference_mode():
        outputs = [block.experts(kept[0], torch.full((60, 1), e), one).numpy() for e in range(8)]
    found = output_similarity(model, [batch])
    assert off_diagonal(found[1:]) == pytest.approx(m.expert_output_similarity(np.stack(outputs)), abs=1e-5)
    for part in (block.experts.up, block.experts.down):
        part.data[:] = part.data[:1]
    assert off_diagonal(output_similarity(model, [batch])[1:]) == pytest.approx(1.0, abs=1e-5)


def test_outputs_are_those_of_experts_between_their_frames() -> None:
    """Written out: an RMS norm, the latent space, another norm, each expert's own matrices, and a bias of them."""
    frames = {"routed_input": "rms_norm", "latent_input": "rms_norm", "expert_output": "bias"}
    model = model_of(latent_size=16, **frames)
    batch = token_batch([np.arange(60) % VOCABULARY], None, "cpu")
    block, kept = model.moe_blocks[1], list[torch.Tensor]()
    block.expert_output.bias.data.normal_()
    with block.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0].detach()[0])), torch.inference_mode():
        routings_of(model, batch)

    def normed(x: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + block.moe.frame_eps).sqrt()

    weights = {name: tensor.double() for name, tensor in block.named_weights().items()}
    x = normed(normed(kept[0].double()) @ weights["latent.down"].T)
    outputs = []
    for expert in range(8):
        gate, up, down = (weights[f"experts.{part}"][expert] for part in ("gate", "up", "down"))
        hidden = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
        outputs.append((hidden @ down.T + weights["expert_output.bias"]).numpy())
    found = output_similarity(model, [batch])
    assert off_diagonal(found[1:]) == pytest.approx(m.expert_output_similarity(np.stack(outputs)), abs=1e-5)


def test_windows_are_drawn_by_seed_within_the_limit() -> None:
    stream = np.arange(10_000) % VOCABULARY
    first = torch.cat([b.ids for b in text_batches(stream, 50, 1000, 1, None, "cpu")])
    again = torch.cat([b.ids for b in text_batches(stream, 50, 1000, 1, None, "cpu")])
    other = torch.cat([b.ids for b in text_batches(stream, 50, 1000, 2, None, "cpu")])
    assert first.numel() == 1000
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_sample_is_bounded() -> None:
    collector = Collector(sample=70)
    model = model_of()
    with torch.inference_mode():
        for batch in text_batches(np.arange(5000) % VOCABULARY, 50, 0, 0, None, "cpu"):
            collector.observe("heldout", routings_of(model, batch))
    assert collector.arrays()["sample"].shape == (2, 70, 2)


def test_memory_does_not_grow_with_the_number_of_tokens() -> None:
    model = model_of()
    with torch.inference_mode():
        routings = routings_of(model, token_batch([np.arange(60) % VOCABULARY], None, "cpu"))

    def kept(repeats: int) -> int:
        tracemalloc.start(25)
        collector = Collector(sample=70)
        for _ in range(repeats):
            collector.observe("heldout", routings)
            collector.observe("task", routings)
        # What other threads of this process allocate is not the collector's.
        ours = tracemalloc.Filter(inclusive=True, filename_pattern="*/jobs/probe/*", all_frames=True)
        found = tracemalloc.take_snapshot().filter_traces([ours]).statistics("filename")
        tracemalloc.stop()
        assert collector.totals["task"].tokens_L.tolist() == [60 * repeats] * 2
        return sum(statistic.size for statistic in found)

    kept(2)
    assert 1_000 < kept(80) < kept(8) + 2_000


def test_a_probe_is_one_forward_pass_a_batch_without_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = model_of(), []
    genuine = type(model).forward

    def forward(*arguments: Any, **options: Any) -> Any:
        calls.append(options)
        return genuine(*arguments, **options)

    monkeypatch.setattr(type(model), "forward", forward)
    probe(model, {"heldout": sequence_batches(sequences(), None, "cpu")})
    assert [call["logits_to_keep"] for call in calls] == [1]
