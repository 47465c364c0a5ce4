"""The stage graph: what is shared, what is cut, what a run would do. Pure functions, no store."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest

from orchestrator.grid.load import Grid, GridCell
from orchestrator.plan.cost import parameters
from orchestrator.plan.graph import StageGraph, build_graph
from orchestrator.plan.plan import latest_step, make_plan
from orchestrator.plan.root import root_document
from orchestrator.spec.cell import Cell, DataSpec, EvaluateSpec, Seeds, TaskSpec, TokenizerSpec, TrainSpec
from orchestrator.spec.identity import lineage, state_key
from orchestrator.spec.model import ModelSpec, MoESpec
from orchestrator.spec.resolve import resolve_model
from orchestrator.spec.work import TrainWork, work_from_json, work_to_json
from tests.small_grid import SCHEDULES

BASE = Cell(
    model=resolve_model(ModelSpec(hidden_size=32, num_layers=2, moe=MoESpec(top_k=2, num_experts=4, expert_width=16))),
    tokenizer=TokenizerSpec(vocab_size=300),
    evaluate=EvaluateSpec(at=(0.5, 1.0), tasks=(TaskSpec("arc_easy", limit=5),)),
    seed=Seeds(),
    pretrain=TrainSpec(DataSpec("wheel://x==1/passages"), steps=20),
    finetune=TrainSpec(DataSpec("wheel://x==1/instructions", format="instruction"), steps=10, loss="response"),
)


def cell_with(schedule: str = "none", seed: int = 0, at: tuple[float, ...] = (0.5, 1.0), ratio: float = 1.0) -> Cell:
    assert BASE.finetune is not None
    return dataclasses.replace(
        BASE,
        finetune=dataclasses.replace(BASE.finetune, freeze=schedule, router_lr_ratio=ratio),
        seed=dataclasses.replace(BASE.seed, finetune=seed),
        evaluate=dataclasses.replace(BASE.evaluate, at=at),
    )


def grid_of(cells: Sequence[tuple[str, Cell]]) -> Grid:
    items = tuple(
        GridCell(id=f"{i:012x}", name=name, setting=name, factors={"freeze": name}, cell=cell)
        for i, (name, cell) in enumerate(cells)
    )
    template = {f.name: None for f in dataclasses.fields(Grid)}
    known = {
        "name": "g", "description": "", "path": "g.yaml", "scale": "tiny", "recipe": "finetune", "cells": items,
        "factors": ("freeze",), "seed": "finetune", "baseline": {}, "primary": (),
        "runnable": "",
    }  # fmt: skip
    return Grid(**{**template, **known})  # type: ignore[arg-type]


def train_stages(graph: StageGraph, phase: str) -> list[TrainWork]:
    return [s.work for s in graph.stages.values() if s.phase == phase and isinstance(s.work, TrainWork)]


def test_nine_schedules_are_twelve_half_runs_on_one_base_model() -> None:
    graph = build_graph(grid_of([(s, cell_with(s)) for s in SCHEDULES]))
    assert len(train_stages(graph, "pretrain")) == 1
    assert len(train_stages(graph, "finetune")) == 12
    assert graph.unshared()["finetune"][0] == 18
    halves = {work.stop for work in train_stages(graph, "finetune")}
    assert halves == {5, 10}


def test_without_sharing_no_two_cells_have_a_state_in_common() -> None:
    graph = build_graph(grid_of([(s, cell_with(s)) for s in SCHEDULES]), share=False)
    assert len(train_stages(graph, "finetune")) == 18
    assert len(train_stages(graph, "pretrain")) == 9
    assert sum(stage.kind == "tokenizer" for stage in graph.stages.values()) == 1


def test_more_evaluated_fractions_change_no_state_key() -> None:
    few = build_graph(grid_of([("a", cell_with("none->router", at=(1.0,)))]))
    many = build_graph(grid_of([("a", cell_with("none->router", at=(0.2, 0.5, 1.0)))]))
    assert few.cells["000000000000"].final == many.cells["000000000000"].final
    assert {s.key for s in few.stages.values()} <= {s.key for s in many.stages.values()}


def test_equal_conditions_across_a_cut_are_one_span() -> None:
    spans = [("a", 0, 4), ("a", 4, 9), ("b", 9, 9), ("b", 9, 12)]
    assert lineage(spans) == (("a", 0, 9), ("b", 9, 12))
    assert state_key("i", spans) == state_key("i", [("a", 0, 9), ("b", 9, 12)])
    assert state_key("i", [("a", 0, 5)]) != state_key("i", [("a", 1, 6)])


def test_the_phase_boundary_is_not_merged_into_one_span() -> None:
    graph = build_graph(grid_of([("a", cell_with())]))
    final = graph.stages[graph.cells["000000000000"].final].work
    assert isinstance(final, TrainWork)
    assert [span[1:] for span in lineage(final.spans)] == [(0, 20), (0, 10)]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("none", [("", 0, 5), ("", 5, 9)]),
        ("router->expert", [("router", 0, 5), ("expert", 5, 9)]),
        ("none@0.0->router@0.5->expert@0.75", [("", 0, 5), ("router", 5, 7), ("expert", 7, 9)]),
    ],
)
def test_segments_round_half_up_to_whole_steps(schedule: str, expected: list[tuple[str, int, int]]) -> None:
    cell = cell_with(schedule)
    assert cell.finetune is not None
    graph = build_graph(
        grid_of([("a", dataclasses.replace(cell, finetune=dataclasses.replace(cell.finetune, steps=9)))])
    )
    assert [(w.conditions.train.freeze, w.start, w.stop) for w in train_stages(graph, "finetune")] == expected


def test_c2r_begins_with_fine_tuning_so_all_before_is_shared_with_the_model_without_it() -> None:
    moe = resolve_model(BASE.model).moe
    limited = [
        dataclasses.replace(
            BASE, model=dataclasses.replace(BASE.model, moe=dataclasses.replace(moe, collaboration_top=top))
        )
        for top in (0, 1, 2)
    ]
    graph = build_graph(grid_of([(str(i), cell) for i, cell in enumerate(limited)]))
    stages = list(graph.stages.values())
    assert sum(stage.kind == "init" for stage in stages) == 1
    assert sum(stage.phase == "pretrain" for stage in stages) == 1
    tuned = [stage.work for stage in stages if stage.phase == "finetune"]
    assert {work.conditions.collaboration_top for work in tuned} == {0, 1, 2}
    assert len({work.key() for work in tuned}) == len(tuned)
    assert all(work.model.moe.collaboration_top == work.conditions.collaboration_top for work in tuned)


def test_a_run_is_cut_where_another_cell_forks_from_it() -> None:
    alone = build_graph(grid_of([("a", cell_with("none", at=(1.0,)))]))
    both = build_graph(grid_of([("a", cell_with("none", at=(1.0,))), ("b", cell_with("none->router", at=(1.0,)))]))
    assert len(train_stages(alone, "finetune")) == 1
    assert sum(w.stop - w.start for w in train_stages(both, "finetune")) == 15
    assert alone.cells["000000000000"].final == both.cells["000000000000"].final


def test_chains_follow_one_branch_and_group_evaluations_of_a_state() -> None:
    graph = build_graph(grid_of([(s, cell_with(s)) for s in ("none", "none->router")]))
    done = {key for key, stage in graph.stages.items() if stage.phase in ("prepare", "pretrain")}
    first = [w.key() for w in train_stages(graph, "finetune") if w.start == 0]
    jobs = graph.chains(first, done)
    assert len(jobs) == 1
    assert [graph.stages[key].work.start for key in jobs[0]] == [0, 5]
    evaluations = [key for key, stage in graph.stages.items() if stage.state == first[0]]
    assert len(evaluations) == 2
    assert graph.chains(evaluations, done | set(first)) == [evaluations]


def test_evaluations_that_wait_together_are_one_job_a_cell() -> None:
    graph = build_graph(grid_of([(s, cell_with(s)) for s in ("none", "router")]))
    trained = {key for key, stage in graph.stages.items() if stage.phase != "evaluate"}
    waiting = [key for key in graph.stages if key not in trained]
    jobs = graph.chains(waiting, trained)
    assert len(jobs) == 2
    assert sorted(key for job in jobs for key in job) == sorted(waiting)
    for job in jobs:
        assert len({graph.users[key] for key in job}) == 1
        states = [graph.stages[key].state for key in job]
        assert len(set(states)) == 2
        assert states == sorted(states, key=states.index)


def test_preparation_that_only_waits_for_itself_is_one_job() -> None:
    graph = build_graph(grid_of([("a", cell_with())]))
    ready = [key for key, stage in graph.stages.items() if not stage.parents]
    jobs = graph.chains(ready, set())
    together = {graph.stages[key].kind for key in jobs[0]}
    assert {"data", "tokenizer", "tokens", "init"} <= together
    assert len({key for job in jobs for key in job}) == sum(len(job) for job in jobs)


def test_what_needs_torch_is_apart_where_a_job_starts_at_once() -> None:
    graph = build_graph(grid_of([("a", cell_with())]))
    ready = [key for key, stage in graph.stages.items() if not stage.parents]
    jobs = graph.chains(ready, set(), light=True)
    assert {graph.stages[key].kind for job in jobs for key in job} == {"data", "tokenizer", "tokens"}
    done = {key for job in jobs for key in job}
    init = next(key for key, stage in graph.stages.items() if stage.kind == "init")
    assert graph.chains([init], done, light=True) == [[init]]
    trained = next(key for key, stage in graph.stages.items() if stage.kind == "train")
    (chain,) = graph.chains([trained], {*done, init}, light=True)
    assert {graph.stages[key].kind for key in chain} == {"train"}


def test_a_failed_stage_blocks_what_needs_it_and_says_by_what() -> None:
    graph = build_graph(grid_of([("none", cell_with()), ("r", cell_with(ratio=0.5))]))
    first = next(s for s in graph.stages.values() if s.phase == "finetune" and "router_lr" in s.label)
    plan = make_plan(graph, set(), failed={first.key: "loss is NaN at step 3"})
    blocked = plan.keys("blocked")
    assert first.key in blocked
    assert len(blocked) > 1
    assert all("NaN" in plan.actions[key].reason for key in blocked)
    assert plan.actions[graph.cells["000000000000"].final].name == "run"


def test_ancestors_of_finished_results_need_not_exist() -> None:
    graph = build_graph(grid_of([("a", cell_with())]))
    cell = graph.cells["000000000000"]
    plan = make_plan(graph, {cell.final, *(r.key for r in cell.results)})
    assert plan.settled
    assert plan.counts()["done"] == len(graph.stages)


def test_resume_goes_on_from_the_last_committed_state() -> None:
    graph = build_graph(grid_of([("a", cell_with())]))
    work = train_stages(graph, "pretrain")[0]
    present = {work.key_at(7), work.key_at(13)}
    assert latest_step(work, present) == 13
    plan = make_plan(graph, present, attempted={work.key()})
    assert plan.actions[work.key()].name == "resume"
    assert plan.actions[work.key()].step == 13


def test_a_work_survives_the_way_to_a_node() -> None:
    graph = build_graph(grid_of([("a", cell_with("none->router"))]))
    for key, stage in graph.stages.items():
        assert work_from_json(work_to_json(stage.work)).key() == key


def test_the_root_document_reaches_every_artifact() -> None:
    graph = build_graph(grid_of([(s, cell_with(s)) for s in SCHEDULES]))
    document = root_document(graph)
    assert set(document["keys"]) == set(graph.stages)
    assert all(name in document["sections"] for cell in document["cells"] for name in cell["resolved"].values())
    assert {r["key"] for cell in document["cells"] for r in cell["results"]} <= set(document["keys"])


def test_equal_active_width_means_equal_active_parameters() -> None:
    coarse = resolve_model(ModelSpec(moe=MoESpec(top_k=2, num_experts=8, expert_width=128)))
    fine = resolve_model(ModelSpec(moe=MoESpec(top_k=16, num_experts=64, expert_width=16)))
    router = (64 - 8) * coarse.hidden_size * coarse.num_layers
    assert parameters(fine, 4096).active - parameters(coarse, 4096).active == router
