"""What is submitted first: the same as if every ready stage were looked at, though few are."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path

import pytest

from orchestrator.backends.local import Budget, LocalBackend
from orchestrator.engine import agenda
from orchestrator.engine.agenda import Agenda
from orchestrator.engine.backfill import Backfill, Reservation
from orchestrator.engine.loop import Engine
from orchestrator.grid.load import load_grid
from orchestrator.plan.cost import Clock
from orchestrator.plan.graph import StageGraph, build_graph
from orchestrator.spec.cell import Resources
from orchestrator.store import Store

GRID = """
name: many
description: many ready stages of three kinds of resources
base: finetune
factors: {freeze: [none, router], seed: [%s]}
baseline: {freeze: none}
evaluate: [lm, reasoning]
set: {execution: {resources: {evaluate: {cores: 1}, finetune: {cores: 2}}}}
"""


@pytest.fixture
def graph(tmp_path: Path) -> StageGraph:
    path = tmp_path / "many.yaml"
    path.write_text(GRID % ", ".join(map(str, range(30))))
    return build_graph(load_grid(str(path)))


class Site:
    """A site of some cores that admits whatever still fits, and counts what it was asked."""

    def __init__(self, cores: int) -> None:
        self.cores, self.asked = cores, 0

    def admit(self, wanted: Sequence[Resources]) -> list[bool]:
        self.asked += len(wanted)
        free, answers = self.cores, []
        for resources in wanted:
            answers.append(resources.cores <= free)
            free -= resources.cores if answers[-1] else 0
        return answers


def chosen(
    graph: StageGraph, made: Agenda, ready: set[str], done: set[str], site: Site, room: int = 999
) -> list[list[str]]:
    found = made.choose(ready, done, set(), lambda chain: graph.resources(chain[0]), site.admit, room)
    return [chain for chain, _ in found]


@pytest.mark.parametrize("cores", [1, 3, 40, 10_000])
@pytest.mark.parametrize("first", [1, 2, 7])
def test_looking_at_few_chooses_what_looking_at_all_does(
    graph: StageGraph, cores: int, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = graph.stages.items()
    done = {key for key, stage in stages if stage.phase in ("prepare", "pretrain")}
    trained = [key for key, stage in stages if stage.phase == "finetune"]
    done |= set(trained[::3])
    ready = {key for key, stage in stages if key not in done and set(stage.parents) <= done}
    monkeypatch.setattr(agenda, "FIRST", 10_000)
    everything = chosen(graph, Agenda(graph, Clock()), ready, done, Site(cores))
    monkeypatch.setattr(agenda, "FIRST", first)
    assert chosen(graph, Agenda(graph, Clock()), ready, done, Site(cores)) == everything
    kept = Agenda(graph, Clock())
    for left_out in (5, 60, 1, 0):  # the same agenda as stages come and go
        some = set(sorted(ready)[left_out:])
        assert chosen(graph, kept, some, done, Site(cores)) == chosen(
            graph, Agenda(graph, Clock()), some, done, Site(cores)
        )
    assert chosen(graph, kept, ready, done, Site(cores)) == everything
    assert chosen(graph, kept, ready, done, Site(cores), room=2) == everything[:2]


def test_a_full_site_is_asked_about_few(graph: StageGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agenda, "FIRST", 4)
    done = {key for key, stage in graph.stages.items() if stage.phase in ("prepare", "pretrain")}
    ready = {key for key, stage in graph.stages.items() if key not in done and set(stage.parents) <= done}
    site = Site(0)
    assert chosen(graph, Agenda(graph, Clock()), ready, done, site) == []
    assert len(ready) > 40
    assert site.asked <= 8


def half_done(graph: StageGraph) -> tuple[set[str], set[str]]:
    """Return what is done where every second state of fine-tuning is there and not evaluated, and what is ready."""
    done = {key for key, stage in graph.stages.items() if stage.phase in ("prepare", "pretrain")}
    done |= set([key for key, stage in graph.stages.items() if stage.phase == "finetune"][::2])
    return done, {key for key, stage in graph.stages.items() if key not in done and set(stage.parents) <= done}


def test_training_comes_first_where_the_end_is_near_and_results_do_before(graph: StageGraph) -> None:
    done, ready = half_done(graph)
    made, left = Agenda(graph, Clock()), graph.stages.keys() - done
    phases = {}
    for cores in (2, 10_000):
        made.look(Budget(cores, 1e6, 0), lambda: left, (), now=1e9 * cores)
        phases[cores] = [graph.stages[chain[0]].phase for chain in chosen(graph, made, ready, done, Site(4))]
    assert phases == {2: ["evaluate"] * 4, 10_000: ["finetune"] * 2}


def test_a_job_of_evaluations_is_not_begun_where_training_would_end_last() -> None:
    """Two cores, 2.36 s of training and then 5.34 s of evaluations, twice 5.34 s of evaluations that could start.

    With training first all ends after max(2.36 + 5.34, 2 x 5.34) = 10.68 s, with both evaluations first after 13.04.
    """
    graph = build_graph(load_grid("quickstart"))
    clock = Clock()
    trained = [key for key, stage in graph.stages.items() if stage.phase == "finetune"]
    for key in trained:
        clock.learn(graph.stages[key], graph.resources(key), {"train_seconds": 2.36, "steps_run": 25})
    left = {key for key, stage in graph.stages.items() if stage.phase == "evaluate"} | {trained[-1]}
    done = graph.stages.keys() - left
    ready = {key for key in left if set(graph.stages[key].parents) <= done}
    made = Agenda(graph, clock)
    made.look(Budget(2, 1e6, 0), lambda: left, (), now=0.0)
    first = chosen(graph, made, ready, done, Site(2))[0]
    assert graph.stages[first[0]].phase == "finetune"


def test_the_end_is_looked_for_when_it_could_be_near(graph: StageGraph) -> None:
    done, _ = half_done(graph)
    made, looked = Agenda(graph, Clock()), []

    def left() -> set[str]:
        looked.append(1)
        return graph.stages.keys() - done

    for second in range(1000):
        made.look(Budget(2, 64.0, 0), left, (), float(second))
    assert 0 < len(looked) < 10


def test_of_equal_phases_what_most_hangs_on_comes_first(graph: StageGraph) -> None:
    slow = next(key for key, stage in graph.stages.items() if stage.phase == "finetune" and stage.steps)
    clock, resources = Clock(), graph.resources(slow)
    assert clock.learn(graph.stages[slow], resources, {"train_seconds": 5e4, "steps_run": 10})
    assert not clock.learn(graph.stages[slow], resources, {"train_seconds": 5e4, "steps_run": 10})
    ranks = agenda.upward_ranks(graph, clock)
    children = [ranks[child] for child in graph.children(slow)]
    assert ranks[slow] == 5e3 * graph.stages[slow].steps + max(children)


def test_what_training_waits_for_ranks_before_it(graph: StageGraph) -> None:
    ranks = agenda.upward_ranks(graph, Clock())
    base = next(key for key, stage in graph.stages.items() if stage.phase == "pretrain")
    items = next(key for key, stage in graph.stages.items() if stage.label == "evaluation items")
    assert base not in graph.children(items)
    assert ranks[items] == agenda.seconds_of(graph, Clock(), items) + ranks[base]


def test_evaluations_that_wait_together_are_shared_out_to_idle_cores_alone(graph: StageGraph) -> None:
    done = {key for key, stage in graph.stages.items() if stage.phase != "evaluate"}
    cell = next(iter(graph.cells.values()))
    ready = {result.key for result in cell.results}
    clock = Clock()
    for key in ready:
        clock.learn(graph.stages[key], graph.resources(key), {"seconds": 10.0})

    def jobs(cores: int, *, spread: bool = True) -> list[list[str]]:
        made = Agenda(graph, clock)
        ask = made.choose(
            ready, done, set(), lambda chain: graph.resources(chain[0]), Site(cores).admit, 99, spread=spread
        )
        return [chain for chain, _ in ask]

    assert [len(job) for job in jobs(1)] == [4]
    assert [len(job) for job in jobs(8, spread=False)] == [4]
    assert [len(job) for job in jobs(2)] == [2, 2]
    assert {key for job in jobs(8) for key in job} == ready
    assert [len(job) for job in jobs(8)] == [1, 1, 1, 1]


WIDE = """
name: wide
description: training on three of four cores, evaluations on one
base: finetune
factors: {freeze: [none, router], seed: [0, 1, 2]}
baseline: {freeze: none}
evaluate: [lm]
at: [1.0]
set: {execution: {resources: {evaluate: {cores: 1}, finetune: {cores: %d}}}}
"""


class Afternoon:
    """Six cells trained by half on four cores: each evaluation takes `seconds`, each second half 100."""

    def __init__(self, folder: Path, wide: int, seconds: float = 20.0) -> None:
        path = folder / f"wide{wide}.yaml"
        path.write_text(WIDE % wide)
        self.graph, self.clock = build_graph(load_grid(str(path))), Clock()
        self.budget = Budget(4, 64.0, 0)
        self.agenda = Agenda(self.graph, self.clock)
        for key, stage in self.graph.stages.items():
            told = {"train_seconds": 100.0, "steps_run": stage.steps} if stage.steps else {"seconds": seconds}
            self.clock.learn(stage, self.graph.resources(key), told)
        stages = self.graph.stages.items()
        self.done = {key for key, stage in stages if stage.phase != "evaluate"}
        self.training = next(key for key, stage in stages if stage.phase == "finetune")
        self.done -= {self.training, *self.graph.children(self.training)}
        self.evaluations = [k for k, s in stages if s.phase == "evaluate" and set(s.parents) <= self.done]

    def start(self, now: float, ready: Sequence[str], at_work: Sequence[str], failed: Sequence[str] = ()) -> list[str]:
        """Return what of `ready` is started at a time, beside what is at work and what failed for good."""
        self.agenda.look(self.budget, lambda: [self.training], at_work, now)  # the end is near: training comes first
        held = [self.graph.resources(key) for key in at_work]
        found = self.agenda.choose(
            ready,
            self.done,
            {*at_work, *failed},
            lambda chain: self.graph.resources(chain[0]),
            lambda wanted: self.budget.admits(held, wanted),
            99,
            spread=True,
        )
        return [chain[0] for chain, _ in found]


def test_small_jobs_do_not_keep_apart_the_cores_that_a_wide_one_waits_for(tmp_path: Path) -> None:
    day = Afternoon(tmp_path, wide=4)
    one, two, *rest = day.evaluations
    assert day.start(0.0, [one], []) == [one]
    # The wide one starts when the first evaluation is over; one more would be over ten seconds later.
    assert day.start(10.0, [day.training, two, *rest], [one]) == []
    assert day.start(20.0, [day.training, two, *rest], []) == [day.training]


def test_what_is_over_before_a_wide_job_could_start_goes_ahead(tmp_path: Path) -> None:
    day = Afternoon(tmp_path, wide=4)
    one, two, *rest = day.evaluations
    assert day.start(0.0, [one], []) == [one]
    assert len(day.start(0.0, [day.training, two, *rest], [one])) == 3
    late = Afternoon(tmp_path, wide=4)
    late.start(0.0, [one], [])
    assert late.start(30.0, [late.training, two, *rest], [one]) == []  # it is late, and may end at any time


def test_what_a_wide_job_leaves_free_is_used_meanwhile_and_no_more(tmp_path: Path) -> None:
    day = Afternoon(tmp_path, wide=3)
    one, two, *rest = day.evaluations
    assert day.start(0.0, [one, two], []) == [one, two]
    # Of two free cores one is left beside the wide job from second 20 on.
    (third,) = day.start(10.0, [day.training, *rest], [one, two])
    # What was started meanwhile is no reason to start one more.
    assert day.start(11.0, [day.training, *rest], [one, two, third]) == []
    assert day.start(20.0, [day.training, *rest], [third]) == [day.training]


def test_jobs_of_other_drivers_hold_nothing_back(tmp_path: Path) -> None:
    day = Afternoon(tmp_path, wide=4)
    one, two, *rest = day.evaluations
    assert len(day.start(10.0, [day.training, two, *rest], [one])) == 3  # nobody here knows when it ends


def test_what_failed_for_good_holds_nothing_any_more(tmp_path: Path) -> None:
    day = Afternoon(tmp_path, wide=4, seconds=1000.0)
    one, two, *rest = day.evaluations
    assert day.start(0.0, [one], []) == [one]
    assert day.start(900.0, [two], [one]) == [two]
    # Were the second one at work still, what takes as long could go ahead of the wide job.
    assert day.start(900.0, [day.training, *rest], [one], failed=[two]) == []


def test_a_job_that_takes_many_times_what_was_expected_keeps_no_cores_idle(tmp_path: Path) -> None:
    day = Afternoon(tmp_path, wide=4)
    one, two, *rest = day.evaluations
    assert day.start(0.0, [one], []) == [one]
    assert day.start(39.0, [day.training, two, *rest], [one]) == []
    # Of 20 s expected it is at work for 65: 80 are taken to be its end, and at 45 what takes 20 is over before.
    assert day.start(65.0, [day.training, two, *rest], [one]) == []
    assert len(day.start(45.0, [day.training, two, *rest], [one])) == 3


def test_a_grid_that_grows_knows_of_the_jobs_that_are_at_work(tmp_path: Path) -> None:
    day = Afternoon(tmp_path, wide=4)
    one, two, *rest = day.evaluations
    store = Store.open(f"memory://{uuid.uuid4().hex}")
    engine = Engine(day.graph, store, LocalBackend(budget=day.budget), clock=day.clock)
    day.agenda = engine._agenda
    assert day.start(0.0, [one], []) == [one]
    engine.extend(build_graph(load_grid(str(tmp_path / "wide4.yaml"), overrides=["factors.seed=[0, 1, 2, 3]"])))
    day.agenda = engine._agenda
    assert day.start(10.0, [day.training, two, *rest], [one]) == []


def test_what_asks_for_all_the_memory_there_is_has_its_start_reserved() -> None:
    jobs = Backfill()
    whole = (4.0, 23.3, 0.0)
    for name, end, memory in (("a", 20.0, 5.9), ("b", 30.0, 5.9), ("c", 30.0, 5.9)):
        jobs.started(name, 0.0, end, (1.0, memory, 0.0))
    reserved = jobs.reserve((1.0, 23.3, 0.0), whole, [], 10.0)
    assert reserved == Reservation(20.0, (3.0, 0.0, 0.0)), "sums of memory are rounded"
    jobs.keep(["a"])
    assert jobs.reserve((3.0, 1.0, 0.0), whole, [], 10.0) is None
    assert jobs.reserve((4.0, 1.0, 0.0), whole, [], 10.0) == Reservation(10.0, (0.0, 23.3 - 1.0, 0.0))
