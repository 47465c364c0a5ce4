"""The suite `seeing_probe`: answers against plain greedy decoding, routing by component against single passes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.data.packing import InstructionBatches
from jobs.evaluate.suites.disturbed import interventions
from jobs.evaluate.suites.seeing_probe import Questions, _observed, components
from jobs.models.backbones import CausalLM
from jobs.probe.sets import routings_of
from orchestrator.errors import GridError
from orchestrator.grid.load import load_grid
from orchestrator.plan.graph import build_graph
from orchestrator.spec.work import EvaluateWork, TrainWork
from tests.unit.test_vision_training import upcycled

ROWS, PICTURES, PROMPT, ANSWER = 24, 5, 4, 2
SUBTASKS = ["near" if row % 3 else "far" for row in range(ROWS)]


@pytest.fixture(scope="module")
def model() -> CausalLM:
    """A model that sees, whose routers choose apart."""
    return upcycled(preset="smoe", router_init_std=0.5)[1]


def greedy(model: CausalLM, prompt: list[int], picture: np.ndarray) -> list[int]:
    """Return the answer that plain decoding gives: one row, one token at a time, no cache."""
    ids = list(prompt)
    for _ in range(ANSWER):
        logits = model(torch.tensor([ids]), images=torch.from_numpy(picture[None])).logits
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def asked(model: CausalLM, tmp_path_factory: pytest.TempPathFactory) -> Questions:
    """Held-out questions of differing lengths: the answers of every second row are those that the model gives."""
    folder = tmp_path_factory.mktemp("questions")
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (PICTURES, 8, 8, 3), dtype=np.uint8)
    pictures = generator.integers(0, PICTURES, ROWS)
    rows, prompts, lengths = [], [], []
    with torch.inference_mode():
        for row in range(ROWS):
            prompt = generator.integers(0, 40, PROMPT + row % 3).tolist()
            answer = greedy(model, prompt, pixels[pictures[row]])
            if row % 2:
                answer = [answer[0], (answer[1] + 1) % 40]
            rows.append([*prompt, *answer])
            prompts.append(prompt)
            lengths.append(len(rows[-1]))
    flat = np.concatenate(rows)
    mask = np.concatenate(
        [[n >= len(prompt) for n in range(len(row))] for row, prompt in zip(rows, prompts, strict=True)]
    )
    starts = np.ones(len(flat), dtype=bool)
    arrays = {
        "tokens": flat.astype(np.uint16), "offsets": np.cumsum([0, *lengths]), "loss_mask": mask,
        "spans_word": starts, "spans_sentence": starts, "pictures": pictures,
    }  # fmt: skip
    for name, array in arrays.items():
        np.save(folder / f"heldout_{name}.npy", array)
    np.save(folder / "pixels.npy", pixels)
    batches = InstructionBatches(Path(folder), 32, 0, split="heldout", loss="response")
    return Questions(batches, SUBTASKS)


@torch.inference_mode()
def test_a_question_is_answered_when_greedy_decoding_gives_the_answer(model, asked):
    questions = asked
    assert questions.answered(model, "cpu").tolist() == [row % 2 == 0 for row in range(ROWS)]


@torch.inference_mode()
def test_what_a_component_does_is_what_its_records_say_pass_by_pass(model, asked):
    questions = asked
    parts = components(model)
    assert [(part.name, len(part.blocks)) for part in parts] == [("encoder", 2), ("connector", 1)]
    collectors = _observed(model, questions, parts, "cpu", lambda: None)
    for rows, name in ((range(ROWS), "heldout"), ([r for r in range(ROWS) if not r % 3], "far")):
        for part, collector in zip(parts, collectors, strict=True):
            layers = [part.of(routings_of(model, questions.tokens([row], "cpu"))) for row in rows]
            for layer in range(len(part.blocks)):
                records = [one[layer] for one in layers]
                chosen = np.concatenate([record.indices.numpy().reshape(-1) for record in records])
                counts = np.bincount(chosen, minlength=6)
                assert (collector.totals[name].counts_LN[layer] == counts).all()
                shares = counts[counts > 0] / counts.sum()
                entropy = -sum(share * math.log2(share) for share in shares) / math.log2(6)
                found = collector.per_layer(name)
                assert found["expert_allocation_entropy"][layer] == pytest.approx(entropy)
                best = np.concatenate([np.sort(record.scores.numpy(), 1)[:, -2:] for record in records])
                assert found["router_margin"][layer] == pytest.approx((best[:, 1] - best[:, 0]).mean(), abs=1e-6)


@torch.inference_mode()
def test_one_component_is_disturbed_alone(model, asked):
    questions = asked
    batch = questions.tokens(range(4), "cpu")
    encoder, connector = components(model)
    before = routings_of(model, batch)
    for name, switched in interventions(connector.module, connector.blocks):
        with switched:
            after = routings_of(model, batch)
        assert all((a.indices == b.indices).all() for a, b in zip(encoder.of(after), encoder.of(before), strict=True))
        (was,), (now,) = connector.of(before), connector.of(after)
        if name in ("drop_top1", "drop_top12"):
            gone = was.indices[:, : 1 if name == "drop_top1" else 2]
            assert not (now.indices[:, :, None] == gone[:, None, :]).any(), "each token's best experts are left out"
        elif name != "base":
            tau = float(name.removeprefix("temperature_"))
            assert torch.allclose(now.scores, torch.softmax(was.logits / tau, -1), atol=1e-6)
    assert (connector.of(routings_of(model, batch))[0].indices == connector.of(before)[0].indices).all()


def test_a_plan_asks_about_what_the_last_phase_held_out_and_only_models_that_see(tmp_path):
    grid = load_grid("quickstart_vlm", overrides=["evaluate=[seeing, seeing_probe]"])
    graph = build_graph(grid)
    works = [stage.work for stage in graph.stages.values()]
    probes = [work for work in works if isinstance(work, EvaluateWork) and work.suite == "seeing_probe"]
    routed = {item.cell.model.moe.preset for item in grid.cells} - {"dense"}
    assert len(probes) == len(routed), "what is dense routes nothing"
    trained = [work.conditions for work in works if isinstance(work, TrainWork)]
    assert {work.tokens for work in probes} == {one.tokens for one in trained if one.phase == "instruct"}
    with pytest.raises(GridError, match="this model reads text alone"):
        load_grid("quickstart", overrides=["evaluate=[lm, seeing_probe]"])
