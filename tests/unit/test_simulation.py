"""Simulations: what is counted without values is what a real run holds, computes and sends."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import simulation as bench
from jobs.models.building import build_model
from jobs.models.shards import write_tensors
from jobs.models.weights import canonical_state
from jobs.simulate.ledger import Ledger
from jobs.simulate.run import answered
from jobs.simulate.training import simulate_training
from orchestrator.catalog.gpus import bytes_sent, gpu_of
from orchestrator.catalog.routers import ROUTERS
from orchestrator.catalog.tasks import TASKS
from orchestrator.cli import main
from orchestrator.commands import simulate as simulating
from orchestrator.grid.load import load_grid
from orchestrator.plan.answers import Answer, Held, keep_answer
from orchestrator.plan.cost import evaluated_tokens, parameters
from orchestrator.plan.fit import fit_of, remedy
from orchestrator.plan.graph import build_graph
from orchestrator.plan.memory import least_bytes, memory_of, refused_memory
from orchestrator.plan.roofline import MEMORY, PRODUCTS, reckoned
from orchestrator.plan.shapes import Shape, shapes_of
from orchestrator.spec.cell import ONE_COPY, Parallel
from orchestrator.spec.identity import plain
from orchestrator.spec.model import ModelSpec, MoESpec
from orchestrator.spec.resolve import resolve_model


def test_a_peak_has_what_lived_together_and_kinds_may_be_given_later():
    ledger = Ledger()
    with FakeTensorMode(), ledger:
        kept = torch.empty(1000)  # 4,000 bytes
        gone = torch.empty(500)
        view = gone[:10]
        del gone
        more = torch.empty(250)  # the view still holds 2,000: 7,000 together
        del view
        mark = ledger.mark()
        last = torch.empty(300)
        ledger.name([kept], "weights")
    peak = ledger.peak()
    assert (peak.total, peak.kinds) == (7000, {"weights": 4000, "activations": 3000})
    assert ledger.peak(mark).total == 4000 + 1000 + 1200
    assert (more.numel(), last.numel()) == (250, 300)


def test_what_a_thread_has_freed_unseen_is_not_measured():
    # Time, address, bytes, inside a collective: 1 lives on, 2 is taken twice and given back by nobody, 3 is freed.
    changes = [
        (0, 1, 100, False),
        (1, 2, 50, False),
        (2, 2, 70, False),
        (3, 3, 30, False),
        (4, 3, -30, False),
        (5, 4, 8, True),
    ]
    assert bench.unseen(changes, alive={1}) == {1, 2}
    assert bench.unseen(changes, alive={1, 2}) == {1}


def test_products_and_bytes_are_those_of_the_arithmetic():
    ledger = Ledger()
    with FakeTensorMode(), ledger, torch.inference_mode():
        x, w = torch.empty(7, 5, dtype=torch.bfloat16), torch.empty(3, 5, dtype=torch.bfloat16)
        F.linear(x, w)
        q = torch.empty(2, 4, 16, 8)
        F.scaled_dot_product_attention(q, q, q, is_causal=True)
    flops = sum(one.flops * times for one, times in ledger.operations.items())
    attention = 2 * (2 * 2 * 4 * 16 * 16 * 8) // 2  # scores and values, half of them masked
    assert flops == 2 * 7 * 5 * 3 + attention
    product = next(one for one in ledger.operations if one.flops == 210)
    assert product.bytes == 2 * (7 * 5 + 5 * 3 + 7 * 3)


def test_a_simulated_step_holds_and_sends_what_a_real_one_does(tmp_path):
    size, engine, ranks, precision = "mini", "fsdp", 2, "bf16"
    asked = bench.shape(size, engine, ranks, precision)
    write_tensors(canonical_state(build_model(asked.model, asked.vocab_size)), tmp_path / "weights.safetensors")
    seen = bench.measured(size, engine, ranks, precision, tmp_path)
    answer = simulate_training(asked)
    for moment in ("start", "step"):
        assert answer.moments[moment].total == pytest.approx(seen[moment], rel=bench.MEMORY)
    sent = sum(times * bytes_sent(name, held, ranks, "gloo") for (name, held), times in answer.collectives.items())
    assert sent == pytest.approx(seen["sent"], rel=bench.SENT)
    kinds = answer.moments["checkpoint"].kinds
    assert kinds["weights"] == 4 * answer.parameters / ranks == kinds["optimizer"] / 2 - 4 * kinds_of_scalars(asked) / 2


def kinds_of_scalars(asked) -> int:
    """Return how many step counts AdamW keeps: one a parameter."""
    return sum(1 for _ in build_model(asked.model, asked.vocab_size).parameters())


def test_a_mesh_is_simulated_as_it_is_laid_out():
    asked = bench.shape("mini", "fsdp", 4, "fp32")
    plain, dealt, copies = (
        simulate_training(dataclasses.replace(asked, parallel=one))
        for one in (ONE_COPY, Parallel(expert=4), Parallel(shard=2, expert=2))
    )
    weights, exchanged = plain.moments["start"].kinds["weights"], {"alltoall_base"}
    assert dealt.moments["start"].kinds["weights"] == pytest.approx(weights, rel=0.01)
    assert copies.moments["start"].kinds["weights"] == pytest.approx(2 * weights, rel=0.01)
    assert {name for name, _ in dealt.collectives} - {name for name, _ in plain.collectives} == exchanged
    # No rank gathers the experts of others.
    assert dealt.moments["step"].kinds["communication"] < plain.moments["step"].kinds["communication"]


def test_what_cannot_be_simulated_is_said_and_ends_nothing():
    asked = {"kind": "training", **dataclasses.asdict(bench.shape("mini", "none_such", 2, "fp32"))}
    assert "none_such" in str(answered(asked)["failed"])


def answer_of(device: int, host: int = 0) -> Answer:
    return Answer(10, {"step": Held(device, {"weights": device})}, host)


def paper_shape(*words: str) -> Shape:
    graph = build_graph(load_grid("quickstart", overrides=["set.execution.device=cuda", *words]))
    return next(shape for shape in shapes_of(graph) if "finetune" in shape.label)


def test_stages_that_differ_in_data_seed_and_learning_rate_are_one_shape():
    few = build_graph(load_grid("finetune_freeze", only=["freeze=none"], seeds=[0]))
    many = build_graph(load_grid("finetune_freeze", seeds=[0, 1]))
    training = [[one for one in shapes_of(graph) if one.kind == "training"] for graph in (few, many)]
    assert len(training[0]) == len(training[1]) == 2  # pretraining and fine-tuning
    assert training[1][1].question["words"] == ["", "expert", "router"]
    stages = sum(stage.kind == "train" for stage in many.stages.values())
    assert sum(sum(shape.stages.values()) for shape in training[1]) == stages


def test_initial_values_make_no_shapes_of_their_own():
    words = ["set.model.init_std=0.1", "set.model.norm_eps=1e-6", "set.model.moe.router_init_std=0.5"]
    changed = [shape.question for shape in shapes_of(build_graph(load_grid("quickstart", overrides=words)))]
    assert changed == [shape.question for shape in shapes_of(build_graph(load_grid("quickstart")))]


def test_what_does_not_fit_is_told_with_the_smallest_change_that_makes_it_fit():
    gpu, shape, asked = gpu_of("h100"), paper_shape(), []

    def ask(changed: Shape) -> Answer:
        asked.append((changed.engine, changed.ranks, changed.question["recompute"]))
        return answer_of(200 * 10**9 // changed.ranks)

    fit = fit_of(shape, answer_of(200 * 10**9), gpu)
    assert fit.short == 200 * 10**9 - int(80 * 2**30 * 0.94)
    words = remedy(shape, fit, gpu, ask)
    levels = ("none", "block", "layer")
    tried = [("torch", 1, level) for level in levels[1:]]
    tried += [(engine, 2, level) for engine in ("torch", "fsdp") for level in levels]
    assert asked == [*tried, ("torch", 4, "none")]
    assert words[:2] == (
        "set.execution.resources.finetune.processes=4",
        "set.execution.resources.finetune.gpus=4",
    )
    # Four processes need more host memory than the one of before had.
    assert words[2:] == ("set.execution.resources.finetune.memory_gb=10",)
    lacking = fit_of(shape, answer_of(10**9, host=30 * 10**9), gpu)
    assert remedy(shape, lacking, gpu, ask) == ("set.execution.resources.finetune.memory_gb=33",)


def test_a_time_is_the_longer_one_of_products_and_bytes():
    gpu = gpu_of("h100")
    rows = [(10**12, 10**6, "torch.bfloat16", 2), (0, 10**9, "torch.float32", 1)]
    found = reckoned(Answer(operations=rows, collectives=[("allreduce", 8000, 1)]), gpu, 4, 1)
    assert found.compute == pytest.approx(2 * 1e12 / (PRODUCTS * 989e12) + 1e9 / (MEMORY * 3.35e12))
    assert found.sent == 2 * 3 / 4 * 8000


def on_gpus(tmp_path, monkeypatch, *words: str):
    monkeypatch.setenv("MOEGRID_CACHE", str(tmp_path))
    fields = ["set.execution.device=cuda", *words]
    return build_graph(load_grid("quickstart", overrides=[*fields, "set.execution.resources.finetune.gpus=1"]))


def test_a_plan_knows_kept_answers_and_else_the_least_bytes(tmp_path, monkeypatch):
    graph = on_gpus(tmp_path, monkeypatch)
    before = {one.label: one for one in memory_of(graph)}
    assert not any(one.simulated for one in before.values())
    shape = next(shape for shape in shapes_of(graph) if "finetune" in shape.label)
    count = parameters(shape.model, shape.vocabulary).total
    assert before[shape.label].bytes == 16 * count  # fp32: weights, gradients, two moments
    keep_answer(shape.question, {"moments": {"step": {"bytes": 200 * 10**9, "kinds": {}}}})
    after = {one.label: one for one in memory_of(graph)}
    assert (after[shape.label].bytes, after[shape.label].simulated) == (200 * 10**9, True)
    refused = refused_memory(list(after.values()), None)
    assert refused is not None
    assert "200.0 GB" in refused.error
    assert "--force-memory" in refused.hint
    assert refused_memory(list(before.values()), gpu_of("h100")) is None


@pytest.mark.parametrize(
    ("engine", "bytes_a_parameter"),
    [("torch", 18), ("deepspeed:1", 4 + 12 / 4), ("deepspeed:2", 2 + 14 / 4), ("deepspeed:3", 16 / 4), ("fsdp", 4)],
)
def test_least_bytes_are_what_each_engine_shares(engine, bytes_a_parameter):
    words = ["set.finetune.precision=bf16", f"set.execution.engine={engine}"]
    words += [f"set.execution.resources.{phase}.processes=4" for phase in ("pretrain", "finetune")]
    shape = paper_shape(*words)
    assert least_bytes(shape, 4000) == bytes_a_parameter * 4000


def test_a_run_refuses_what_cannot_fit_unless_it_is_told_to_go_on(tmp_path, monkeypatch, capsys):
    words = ["quickstart", "set.execution.device=cuda", "set.execution.resources.finetune.gpus=1"]
    words += [f"set.execution.resources.{phase}.gpus=1" for phase in ("pretrain", "evaluate")]
    words += ["--store", str(tmp_path / "store"), "--tracking", "none"]
    graph = on_gpus(tmp_path, monkeypatch, *words[2:5])
    monkeypatch.setenv("MOEGRID_GPUS", "1")
    shape = next(shape for shape in shapes_of(graph) if "finetune" in shape.label)
    keep_answer(shape.question, {"moments": {"step": {"bytes": 100 * 10**9, "kinds": {}}}})
    assert main(["run", *words, "--gpu", "h100"]) == 2
    assert "does not fit: 100.0 GB a GPU (simulated), and h100 has 80.7" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()
    assert main(["plan", *words, "--gpu", "h100"]) == 0
    assert "finetune: 100.0 GB a GPU, more than h100 has (simulated)" in capsys.readouterr().out


def test_evaluated_tokens_are_those_of_all_items_with_their_shots():
    graph = build_graph(load_grid("finetune_freeze", scale="paper", only=["freeze=none"], seeds=[0]))
    work = next(stage for stage in graph.stages.values() if stage.suite == "reasoning")
    tasks = [("winogrande", 5), ("hellaswag", 10), ("arc_easy", 25), ("arc_challenge", 25), ("piqa", 0), ("mmlu", 0)]
    kinds = {name: TASKS.get(name) for name, _ in tasks}
    assert sum(kind.items for kind in kinds.values()) == 30_737
    expected = sum(kinds[name].items * kinds[name].tokens * (shots + 2) for name, shots in tasks)
    assert evaluated_tokens(work) == expected


def test_shapes_are_simulated_side_by_side_and_told_in_their_order(monkeypatch):
    monkeypatch.setattr(simulating, "cores", lambda: 3)
    meeting = threading.Barrier(3, timeout=20)
    asked: dict[int, object] = {}

    def simulated(shape, ask):
        if shape < 3:
            meeting.wait()  # the first three are under way together
        asked[shape] = ask.__self__
        return shape * 10

    assert simulating.side_by_side(simulated, range(7), 7) == [0, 10, 20, 30, 40, 50, 60]
    assert len({id(nodes) for nodes in asked.values()}) == 3


def test_after_a_fault_no_further_shape_is_begun(monkeypatch):
    monkeypatch.setattr(simulating, "cores", lambda: 1)
    begun = []

    def simulated(shape, ask):
        begun.append(shape)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulating.side_by_side(simulated, range(50), 50)
    assert len(begun) < 50


@pytest.mark.parametrize("preset", sorted(name for name, kind in ROUTERS.builtins.items() if name != "dense"))
def test_an_evaluation_of_every_preset_is_simulated(preset):
    moe = MoESpec(preset=preset, num_experts=8, top_k=2, expert_width=32)
    spec = resolve_model(ModelSpec(hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=2, context=128, moe=moe))
    question = {"model": plain(spec), "vocab_size": 96, "kind": "evaluation", "max_length": 128, "precision": "fp32"}
    answer = answered({**question, "device": "cpu", "reads": ["text", "tasks"]})
    assert "failed" not in answer, answer["failed"]
    moments = answer["moments"]
    assert isinstance(moments, dict)
    assert set(moments) == {"start", "text", "routing", "tasks"}
