"""The suite `seeing_probe`: answers against plain greedy decoding, routing by component against single passes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs.data.packing import InstructionBatches
from jobs.evaluate.suites.disturbed import interventions
from jobs.evaluate.suites.seeing_probe import Questions, _disturbed, _observed, components
from jobs.models.backbones import CausalLM
from jobs.probe.sets import routings_of
from orchestrator.errors import GridError
from orchestrator.grid.load import load_grid
from orchestrator.plan.cost import PROBE_PASSES, flops, picture_flops
from orchestrator.plan.graph import build_graph
from orchestrator.plan.phases import held_questions
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
    return questions_about(model, tmp_path_factory.mktemp("questions"))


def questions_about(model: CausalLM, folder: Path) -> Questions:
    """Return held-out questions of differing lengths: every second row's answer is the one that the model gives."""
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
                weights = np.concatenate([record.weights.double().numpy() for record in records])
                share = weights / weights.sum(1, keepdims=True)
                spread = -(share * np.log2(share)).sum(1).mean() / math.log2(weights.shape[1])
                assert found["expert_weight_entropy"][layer] == pytest.approx(spread, abs=1e-6)
                best = np.concatenate([np.sort(record.scores.numpy(), 1)[:, -2:] for record in records])
                assert found["router_margin"][layer] == pytest.approx((best[:, 1] - best[:, 0]).mean(), abs=1e-6)


def connected(model: CausalLM, features_PD: np.ndarray, drop: int, tau: float) -> torch.Tensor:
    """Return the connector's tokens of one picture, by plain loops over the stored weights.

    Scores are softmax(logits / tau); the ranks drop + 1 to drop + k serve with their scores, brought to a sum of 1.
    """
    block, moe = model.vision.connector.block, model.spec.moe
    weights = {name: tensor.double().numpy() for name, tensor in block.state_dict().items()}
    square = features_PD.astype(np.float64).reshape(4, 4, -1)
    tokens = []
    for row, column in ((0, 0), (0, 2), (2, 0), (2, 2)):
        x = square[row : row + 2, column : column + 2].mean((0, 1))
        logits = weights["router.weight"] @ x / tau
        scores = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        chosen = sorted(range(moe.num_experts), key=lambda expert: -scores[expert])[drop : drop + moe.top_k]
        y = 0.0
        for expert in chosen:
            hidden = weights["experts.up"][expert] @ x + weights["experts.up_bias"][expert]
            hidden = np.array([h * 0.5 * (1 + math.erf(h / math.sqrt(2))) for h in hidden])
            made = weights["experts.down"][expert] @ hidden + weights["experts.down_bias"][expert]
            y = y + scores[expert] / scores[chosen].sum() * made
        tokens.append(y)
    return torch.tensor(np.array(tokens)[None], dtype=torch.float32)


@torch.inference_mode()
def test_disturbed_accuracies_are_those_of_plain_loops_over_stored_weights(tmp_path, monkeypatch):
    model = upcycled(preset="smoe", router_init_std=2.0)[1]
    experts: Any = model.vision.connector.block.experts
    for matrix in (experts.up, experts.down):  # no longer copies of one another
        matrix += 4 * matrix.std() * torch.randn(matrix.shape, generator=torch.Generator().manual_seed(5))
    questions = questions_about(model, tmp_path)
    pixels = np.load(tmp_path / "pixels.npy")
    pictures, tokens = np.load(tmp_path / "heldout_pictures.npy"), np.load(tmp_path / "heldout_tokens.npy")
    offsets = np.load(tmp_path / "heldout_offsets.npy")
    (component,) = [part for part in components(model) if part.name == "connector"]
    encoded = questions.encoded(model, "cpu")
    base = float(questions.answered(model, "cpu", encoded).mean())

    def answered(switched, name):
        with switched:
            return questions.answered(model, "cpu", encoded)

    found = _disturbed(component, answered, base)
    features = model.vision.encoder(torch.from_numpy(pixels))[0].numpy()
    plain: dict[tuple[int, float], float] = {}
    for drop, tau in ((0, 1.0), (1, 1.0), (2, 1.0), (0, 0.1), (0, 10.0)):
        right = []
        for row, picture in enumerate(pictures):
            ids = tokens[offsets[row] : offsets[row + 1]].tolist()
            made = connected(model, features[picture], drop, tau)
            with monkeypatch.context() as patch:
                patch.setattr(model.vision.connector, "forward", lambda features, made=made: (made, None))
                right.append(greedy(model, ids[:-ANSWER], pixels[picture]) == ids[-ANSWER:])
        plain[drop, tau] = float(np.mean(right))
    assert found["connector/temperature_1"] == base == plain[0, 1.0] == 0.5
    assert found["connector/drop_top1"] == pytest.approx(plain[1, 1.0] - plain[0, 1.0])
    assert found["connector/drop_top12"] == pytest.approx(plain[2, 1.0] - plain[0, 1.0])
    assert found["connector/temperature_0.1"] == pytest.approx(plain[0, 0.1])
    assert found["connector/temperature_10"] == pytest.approx(plain[0, 10.0])
    assert len(set(plain.values())) > 2, "disturbances that change nothing would prove nothing"


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
    stages = [stage for stage in graph.stages.values() if stage.suite == "seeing_probe"]
    held = load_grid("quickstart_vlm", overrides=["set.instruct.data.rows=500", "set.instruct.data.holdout=0.1"])
    assert {stage.shown for stage in stages} == {20}, "of a set whose rows are not known"
    assert held_questions(held.cells[0].cell) == 50
    model = stages[0].form.model
    per_picture = picture_flops(model, 4096)
    assert flops(stages[0], 4096) > 20 * PROBE_PASSES * per_picture > 0
    with pytest.raises(GridError, match="this model reads text alone"):
        load_grid("quickstart", overrides=["evaluate=[lm, seeing_probe]"])
