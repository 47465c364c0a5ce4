"""Ticks of the engine against a store in memory and a scheduler that does what the test says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from orchestrator.backends.base import ABSENT, ENDED, RUNNING, Batch, Handle, JobState, SchedulerUnreachable
from orchestrator.backends.local import Budget
from orchestrator.engine.journal import code_digest
from orchestrator.engine.loop import Engine, Options
from orchestrator.engine.retry import RULES
from orchestrator.grid.load import load_grid
from orchestrator.plan.graph import StageGraph, build_graph
from orchestrator.plan.plan import make_plan
from orchestrator.spec.cell import Resources
from orchestrator.store import Manifest, Store
from orchestrator.store.attempts import Failure


class Scheduler:
    """Accepts everything; jobs run until the test ends them."""

    name = "scheduler"

    def __init__(self, room: int = 100) -> None:
        self.room = room
        self.batches: list[Batch] = []
        self.states: dict[str, JobState] = {}
        self.lies = False

    def admit(self, wanted: Sequence[Resources]) -> list[bool]:
        return [index < self.room for index in range(len(wanted))]

    def submit(self, batch: Batch) -> dict[str, Handle]:
        self.batches.append(batch)
        for job in batch.jobs:
            self.states[job.attempt] = JobState(RUNNING)
        if self.lies:
            raise SchedulerUnreachable("no answer")
        return self.find(batch.name)

    def poll(self, handles: Sequence[Handle]) -> dict[str, JobState]:
        return {handle.attempt: self.states.get(handle.attempt, JobState(ABSENT)) for handle in handles}

    def find(self, batch: str) -> dict[str, Handle]:
        return {a: Handle(a, batch, a) for a in self.states if a.rsplit("-", 1)[0] == batch}

    def cancel(self, handles: Sequence[Handle], *, now: bool) -> None:
        for handle in handles:
            self.states[handle.attempt] = JobState(ENDED, 75)

    def forget(self, handles: Sequence[Handle]) -> None:
        for handle in handles:
            self.states.pop(handle.attempt, None)

    def log(self, handle: Handle) -> Path | None:
        return None


@pytest.fixture(scope="module")
def graph() -> StageGraph:
    return build_graph(load_grid("quickstart"))


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Store:
    monkeypatch.setenv("MOEGRID_RUN_DIR", str(tmp_path))
    return Store.open(f"memory://{tmp_path.name}")


def commit(store: Store, graph: StageGraph, *keys: str) -> None:
    """Commit bare manifests."""
    for key in keys:
        store.artifacts.commit(Manifest(key=key, kind=graph.stages[key].kind, spec={}, attempt="test"))


def keys(graph: StageGraph, phase: str) -> list[str]:
    return [key for key, stage in graph.stages.items() if stage.phase == phase]


def engine(graph: StageGraph, store: Store, scheduler: Scheduler, **options: object) -> Engine:
    made = Engine(graph, store, scheduler, Options(**options))  # type: ignore[arg-type]
    made.begin()
    return made


def submitted(store: Store, scheduler: Scheduler) -> list[list[str]]:
    """Return the stages of each job that was submitted."""
    jobs = []
    for batch in scheduler.batches:
        document = store.get_json(f"submissions/{batch.name}.json")
        assert document is not None
        jobs += [[stage["key"] for stage in job["stages"]] for job in document["jobs"]]
    return jobs


def test_a_second_tick_submits_nothing_twice(graph: StageGraph, store: Store) -> None:
    scheduler = Scheduler()
    drive = engine(graph, store, scheduler)
    assert drive.tick().submitted
    assert not drive.tick().submitted
    stages = [key for job in submitted(store, scheduler) for key in job]
    assert len(stages) == len(set(stages))


def test_a_later_driver_finds_the_jobs_of_a_dead_one(graph: StageGraph, store: Store) -> None:
    scheduler = Scheduler()
    engine(graph, store, scheduler).tick()
    later = engine(graph, store, scheduler).tick()
    assert not later.submitted
    assert set(later.busy.values()) == {job.attempt for job in scheduler.batches[0].jobs}


def test_evaluations_of_committed_states_go_before_training(graph: StageGraph, store: Store) -> None:
    scheduler = Scheduler(room=1)
    done = next(iter(graph.cells.values())).final
    chain = [key for key in next(iter(graph.cells.values())).keys if graph.stages[key].phase == "finetune"]
    commit(store, graph, *keys(graph, "prepare"), *keys(graph, "pretrain"), *chain)
    engine(graph, store, scheduler).tick()
    (job,) = submitted(store, scheduler)
    assert {graph.stages[key].state for key in job} == {done}
    assert len(job) == 3, "the evaluations of one state go together"


class Machine(Scheduler):
    """A scheduler that knows its cores, so that its driver sees how near the end is."""

    budget = Budget(2, 64.0, 0)


def test_training_goes_before_evaluations_where_the_end_is_near(graph: StageGraph, store: Store) -> None:
    scheduler = Machine(room=1)
    chain = [key for key in next(iter(graph.cells.values())).keys if graph.stages[key].phase == "finetune"]
    commit(store, graph, *keys(graph, "prepare"), *keys(graph, "pretrain"), *chain)
    engine(graph, store, scheduler).tick()
    (job,) = submitted(store, scheduler)
    assert {graph.stages[key].phase for key in job} == {"finetune"}


def test_what_stages_take_is_learnt_from_those_that_finish(graph: StageGraph, store: Store) -> None:
    drive = engine(graph, store, Scheduler(room=1))
    drive.tick()
    first, *others = [graph.stages[key] for key in keys(graph, "finetune")]
    info = {"train_seconds": 300.0, "steps_run": 3, "seconds": 1.0}
    store.artifacts.commit(Manifest(key=first.key, kind="train", spec={}, attempt="test", info=info))
    plan = drive.tick().plan
    alike = (first, *others)
    assert [plan.seconds(stage.key) for stage in alike] == [100.0 * stage.steps for stage in alike]


def test_an_answer_that_was_lost_does_not_start_a_job_twice(graph: StageGraph, store: Store) -> None:
    scheduler = Scheduler()
    scheduler.lies = True
    drive = engine(graph, store, scheduler)
    with pytest.raises(SchedulerUnreachable):
        drive.tick()
    scheduler.lies = False
    drive.tick()
    assert len(scheduler.batches) == 1


def test_out_of_memory_comes_back_with_more_memory_and_the_same_threads(graph: StageGraph, store: Store) -> None:
    scheduler = Scheduler()
    drive = engine(graph, store, scheduler)
    drive.tick()
    first = scheduler.batches[0].jobs[0]
    scheduler.states[first.attempt] = JobState(ENDED, None, 9, "OUT_OF_MEMORY")
    drive.tick()
    again = scheduler.batches[1].jobs[0]
    assert again.label == first.label
    assert again.resources.memory_gb == 2 * first.resources.memory_gb
    assert again.resources.cores == first.resources.cores


def test_a_dead_end_blocks_what_needs_it_and_nothing_else(graph: StageGraph, store: Store) -> None:
    scheduler = Scheduler()
    commit(store, graph, *keys(graph, "prepare"), *keys(graph, "pretrain"))
    drive = engine(graph, store, scheduler)
    drive.tick()
    job = scheduler.batches[0].jobs[0]
    report = {"stage": submitted(store, scheduler)[0][0], "kind": "nan", "message": "the loss is not finite"}
    store.put_json(f"attempts/{job.attempt}/failure.json", report)
    scheduler.states[job.attempt] = JobState(ENDED, 1)
    snapshot = drive.tick()
    assert [failure.kind for failure in snapshot.failed] == ["nan"]
    blocked = snapshot.plan.keys("blocked")
    assert report["stage"] in blocked
    assert len(blocked) < len(snapshot.plan.actions)
    assert all("nan" in snapshot.plan.actions[key].reason for key in blocked)
    assert not any(f.kind == "nan" for f in drive.tick().failed), "told once"


def test_stopping_asks_jobs_once_and_forgives_them(graph: StageGraph, store: Store) -> None:
    scheduler = Scheduler()
    drive = engine(graph, store, scheduler, tick_seconds=0.01)
    drive.tick()
    drive.stop()
    snapshot = drive.run(lambda snapshot: None, lambda error: None)
    assert snapshot.plan.pending
    assert not drive.journal.failures(frozenset(graph.stages)), "a person's wish uses no budget"
    assert engine(graph, store, scheduler).tick().submitted


def test_a_new_run_pardons_outside_reasons_only(graph: StageGraph, store: Store) -> None:
    scheduler = Scheduler(room=0)
    drive = engine(graph, store, scheduler)
    first, second = keys(graph, "prepare")[:2]
    for stage, kind in ((first, "disk_full"), (second, "assertion")):
        drive.journal.record_failure(Failure(stage, "a-0-0", kind, "m", code=code_digest()), "")
    assert set(drive.tick().plan.keys("blocked")) >= {first, second}
    blocked = engine(graph, store, scheduler).tick().plan.keys("blocked")
    assert first not in blocked
    assert second in blocked
    assert second not in engine(graph, store, scheduler, retry="all").tick().plan.keys("blocked")
    assert RULES["disk_full"].outside


def test_what_ended_before_a_new_run_uses_none_of_its_budget(graph: StageGraph, store: Store) -> None:
    """The last job of the driver before was killed with it, and nobody had seen that until the new run looked."""
    scheduler = Scheduler()
    drive = engine(graph, store, scheduler, max_jobs=1)
    drive.tick()
    stage = submitted(store, scheduler)[0][0]
    for number in range(RULES["killed"].retries):
        drive.journal.record_failure(Failure(stage, f"a-0-{number}", "killed", "m", code=code_digest()), "")
    again = engine(graph, store, scheduler)
    attempt = drive.journal.claims({stage})[stage].attempt
    scheduler.states[attempt] = JobState(ENDED, signal=9)
    snapshot = again.tick()
    assert stage not in snapshot.plan.keys("blocked")
    again.tick()
    assert sum(stage in job for job in submitted(store, scheduler)) == 2
    # Of the new run's own attempts the budget is spent as ever.
    for number in range(RULES["killed"].retries + 1):
        again.journal.record_failure(Failure(stage, f"b-0-{number}", "killed", "m", code=code_digest()), "")
    assert stage in again.tick().plan.keys("blocked")


def test_max_jobs_is_kept(graph: StageGraph, store: Store) -> None:
    scheduler = Scheduler()
    engine(graph, store, scheduler, max_jobs=1).tick()
    assert len(scheduler.batches[0].jobs) == 1


def test_what_the_grid_wants_first_is_submitted_first(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    text = "base: finetune\nfactors: {seed.init: [0, 1, 2]}\n"
    file.write_text(text)
    plain = load_grid(str(file))
    file.write_text(text + "priority: [{seed.init: 2}, {seed.init: [0]}]\n")
    grid = load_grid(str(file))
    assert grid.digest == plain.digest
    graph = build_graph(grid)
    for key, stage in graph.stages.items():
        if stage.phase == "prepare" and stage.kind != "init":
            store.artifacts.commit(Manifest(key=key, kind=stage.kind, spec={}))
    backend = Scheduler(room=1)
    Engine(graph, store, backend).tick()
    Engine(graph, store, backend).tick()
    assert [batch.jobs[0].label for batch in backend.batches] == ["init seed 2", "init seed 0"]


@pytest.mark.parametrize("gpus", [0, 1])
@pytest.mark.parametrize("last", ["data instructions", "tokens of instructions", "evaluation items"])
def test_nothing_trains_before_all_that_is_cheap_and_can_fail(store: Store, last: str, gpus: int) -> None:
    """A data set that cannot be read is found before time is spent on training for it."""
    setting = f"set.execution.resources.pretrain.gpus={gpus}"
    found = build_graph(load_grid("quickstart", overrides=[setting, "factors.freeze=[none,router]"]))
    scheduler = Scheduler()
    (missing,) = (key for key in keys(found, "prepare") if found.stages[key].label == last)
    ready = {key for key in keys(found, "prepare") if missing not in (key, *found.stages[key].parents)}
    commit(store, found, *ready)
    driver = engine(found, store, scheduler)
    driver.tick()
    assert {found.stages[key].phase for job in submitted(store, scheduler) for key in job} == {"prepare"}
    commit(store, found, *keys(found, "prepare"))
    driver.tick()
    assert "pretrain" in {found.stages[key].phase for job in submitted(store, scheduler) for key in job}


@pytest.mark.parametrize("bad", ["data instructions", "tokens of instructions", "evaluation items"])
def test_what_cannot_be_prepared_blocks_the_training_for_it(bad: str) -> None:
    found = build_graph(load_grid("quickstart", overrides=["factors.freeze=[none,router]"]))
    prepared = set(keys(found, "prepare"))
    (items,) = (key for key in prepared if found.stages[key].label == bad)
    prepared -= {items, *found.children(items)}
    actions = make_plan(found, prepared, failed={items: "row 1 has no 'question'"}).actions
    (pretrain,) = keys(found, "pretrain")
    assert actions[pretrain].name == "blocked"
    assert actions[pretrain].reason == f"blocked by {bad}: row 1 has no 'question'"
    # Results that exist need no items, and training for them goes on.
    done = prepared | set(keys(found, "evaluate"))
    assert make_plan(found, done).actions[pretrain].name == "run"


def test_shared_pretraining_goes_on_for_the_cells_whose_data_can_be_read(tmp_path: Path) -> None:
    for name in ("bad", "good"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"prompt": "{name}", "response": "b"}}\n' * 3)
    file = tmp_path / "own.yaml"
    file.write_text(
        "base: finetune\nfactors: {finetune.data.source: ['file://bad.jsonl', 'file://good.jsonl']}\n"
        "set: {finetune.data.holdout: 0.0}\n"
    )
    found = build_graph(load_grid(str(file)))
    prepared = keys(found, "prepare")
    bad, good = (next(k for k in prepared if found.stages[k].label == f"data {n}.jsonl") for n in ("bad", "good"))
    (pretrain,) = {key for key in keys(found, "pretrain") if found.stages[key].steps}
    others = set(prepared) - {key for key in prepared if {bad, good} & {key, *found.stages[key].parents}}
    waiting = make_plan(found, others, failed={bad: "not JSON"})
    assert waiting.actions[pretrain].name == "run"
    assert waiting.guarded(pretrain), "the other cell's data are not there yet"
    ready = make_plan(found, set(prepared) - {bad}, failed={bad: "not JSON"})
    assert not ready.guarded(pretrain)
    neither = make_plan(found, others, failed={bad: "not JSON", good: "not text"})
    assert neither.actions[pretrain].reason == "blocked by data bad.jsonl: not JSON"
    assert neither.settled or pretrain not in neither.pending


@pytest.mark.parametrize(("last", "more"), [("evaluate", False), ("finetune", True)])
def test_a_backend_is_told_whether_others_follow_its_jobs(
    graph: StageGraph, store: Store, last: str, more: bool
) -> None:
    """The evaluations of one cell are a job without others; its training comes before them. A tick alone stays not."""
    cell = list(graph.cells.values())[-1]
    left = {key for key in cell.keys if graph.stages[key].phase == "evaluate"}
    left |= {cell.final} if last == "finetune" else set()
    commit(store, graph, *(key for key in graph.stages if key not in left))
    for drives, told in ((False, False), (True, more)):
        scheduler = Scheduler()
        drive = engine(graph, store, scheduler)
        if drives:
            drive.run(lambda snapshot, drive=drive: drive.stop(leave_jobs=True), lambda error: None)  # type: ignore[misc]
        else:
            drive.tick()
        assert [batch.more for batch in scheduler.batches] == [told]
        scheduler.states.clear()
        for job in scheduler.batches[0].jobs:
            for key in left:
                drive.journal.evict(key, job.attempt)


class Holder(Scheduler):
    """A scheduler whose jobs hold their resources until they are forgotten, as Ray's actors do."""

    polls = 0

    def held(self) -> dict[str, Handle]:
        return {attempt: Handle(attempt, attempt.rsplit("-", 1)[0], attempt) for attempt in self.states}

    def poll(self, handles: Sequence[Handle]) -> dict[str, JobState]:
        self.polls += 1
        return super().poll(handles)


def test_what_ended_while_no_driver_lived_is_forgotten_once_it_is_committed(graph: StageGraph, store: Store) -> None:
    """Else its cores are taken for as long as the cluster lives; a job of another store is not ours to forget."""
    scheduler = Holder()
    engine(graph, store, scheduler).tick()
    ended, late = (job.attempt for job in scheduler.batches[0].jobs[:2])
    for chain in submitted(store, scheduler)[:2]:
        commit(store, graph, *chain)
    scheduler.states |= {ended: JobState(ENDED, 0), late: JobState(RUNNING), "elsewhere-0-0": JobState(ENDED, 0)}
    later = engine(graph, store, scheduler)
    for state, left in ((RUNNING, {late, "elsewhere-0-0"}), (ENDED, {"elsewhere-0-0"})):
        scheduler.polls, scheduler.states[late] = 0, JobState(state)
        later.tick()
        assert {ended, late, "elsewhere-0-0"} & scheduler.states.keys() == left
        assert scheduler.polls == 1, "they are asked for with all others"
