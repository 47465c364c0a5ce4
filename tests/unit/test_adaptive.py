"""How many seeds results ask for: the rule itself, and that the intervals it ends with mean what they say."""

from __future__ import annotations

import math
import random
import uuid
from pathlib import Path

import pytest

from orchestrator.engine.journal import Journal
from orchestrator.errors import MoegridError
from orchestrator.grid.adaptive import Adaptive
from orchestrator.grid.load import load_grid
from orchestrator.plan.graph import build_graph
from orchestrator.plan.root import root_document
from orchestrator.report.adaptive import expected_cells, grown, seeds_asked_for, told
from orchestrator.report.collect import collect
from orchestrator.report.sequential import multiplier
from orchestrator.report.statistics import compare, interval_seeds, summary
from orchestrator.report.tables import headline
from orchestrator.store import Manifest, Store
from orchestrator.store.attempts import Failure

ASKED = Adaptive("answer_bpb", 0.1, 12)


def test_a_narrow_interval_asks_for_no_more_and_a_wide_one_for_what_would_do() -> None:
    assert seeds_asked_for([1.0, 1.01, 0.99], 3, ASKED, 12) == 3
    values: list[float | None] = [1.0, 1.2, 0.9]
    assert (interval_seeds([1.0, 1.2, 0.9], 0.1, 12) or 12) > 6
    assert seeds_asked_for(values, 3, ASKED, 12) == 6  # at most twice as many: the deviation is a rough guess
    assert seeds_asked_for([*values, 1.0, 1.0, None], 3, ASKED, 12) == 6  # a seed that failed is waited for
    six = [1.0, 1.2, 0.9, 1.1, 0.9, 1.2]
    assert seeds_asked_for(six, 3, ASKED, 12) == (interval_seeds(six, 0.1, 12) or 12) == 12
    narrow = [value / 2 for value in six]
    assert seeds_asked_for(narrow, 3, ASKED, 12) == interval_seeds(narrow, 0.1, 12) == 8
    assert seeds_asked_for([*values, 1.1, 0.9, 1.2], 3, ASKED, 7) == 7


def test_two_equal_seeds_are_no_proof_and_the_rule_can_be_entered_anywhere() -> None:
    assert seeds_asked_for([1.0, 1.0], 2, ASKED, 12) == 3
    assert seeds_asked_for([1.0], 1, ASKED, 12) == 3
    chance = random.Random(0)
    values = [chance.gauss(0, 0.2) for _ in range(12)]
    final = seeds_asked_for(values, 2, ASKED, 12)
    # However many results are there already, the rounds end at the same number.
    known: list[float | None] = [None] * 12
    now = 2
    while known[now - 1] is None:
        known[:now] = values[:now]
        now = seeds_asked_for(known, 2, ASKED, 12)
    assert now == final


def test_intervals_keep_their_coverage_though_the_data_chose_the_number_of_seeds() -> None:
    chance = random.Random(3)
    covered = narrow = 0
    for _ in range(400):
        values = [chance.gauss(0, 0.12) for _ in range(12)]
        found = summary(values[: seeds_asked_for(values, 3, ASKED, 12)], 12)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 0 <= found.high
        narrow += found.high - found.mean <= 0.1
    assert covered / 400 >= 0.95
    assert narrow / 400 > 0.5


def test_a_grid_keeps_its_cells_and_holds_further_seeds_in_reserve(tmp_path: Path) -> None:
    path = tmp_path / "g.yaml"
    text = (
        "base: finetune\nfactors: {freeze: [none, router], seed: [0, 4]}\nalso: [{router_lr_ratio: [0.5], seed: 7}]\n"
    )
    path.write_text(text)
    plain = load_grid(str(path))
    path.write_text(f"{text}adaptive: {{metric: answer_bpb, halfwidth: 0.1, max_seeds: 4}}\n")
    grid = load_grid(str(path))
    assert grid.cells == plain.cells
    assert grid.digest != plain.digest
    seeds = {(item.setting, item.factors["seed"]) for item in grid.reserve}
    assert seeds == {
        *(("freeze=none", s) for s in (5, 6)),
        *(("freeze=router", s) for s in (5, 6)),
        *(("router_lr_ratio=0.5", s) for s in (8, 9, 10)),
    }
    assert {item.setting for item in load_grid(str(path), only=("freeze=none",)).reserve} >= {"freeze=none"}
    assert "freeze=none" not in {item.setting for item in load_grid(str(path), only=("seed=0",)).reserve}


def test_results_in_the_store_decide_and_a_metric_that_they_lack_is_told(tmp_path: Path) -> None:
    path = tmp_path / "g.yaml"
    text = "base: finetune\nfactors: {freeze: [none, router], seed: [0, 1, 2]}\nevaluate: [lm]\nat: [1.0]\n"
    path.write_text(f"{text}adaptive: {{metric: val_loss, halfwidth: 0.1, max_seeds: 9}}\n")
    grid = load_grid(str(path))
    store = Store.open(f"memory://{uuid.uuid4().hex}")
    assert [s.state for s in grown(grid, store)[1]] == ["waiting", "waiting"]
    graph = build_graph(grid)
    for item in grid.cells:
        spread = 0.01 if item.factors["freeze"] == "none" else 0.2
        result = graph.cells[item.id].results[0].key
        metrics = {"val_loss": 6.0 + spread * item.factors["seed"]}
        store.artifacts.commit(Manifest(result, "evaluate", {}, attempt="a-0", metrics=metrics))
    full, states = grown(grid, store)
    assert [(s.now, s.state) for s in states] == [(3, "enough"), (6, "waiting")]
    assert [item.name for item in full.cells[6:]] == [f"freeze=router seed={seed}" for seed in (3, 4, 5)]
    path.write_text(f"{text}adaptive: {{metric: bits_per_byte, halfwidth: 0.1, max_seeds: 9}}\n")
    with pytest.raises(MoegridError, match="no metric of this grid's results"):
        grown(load_grid(str(path)), store)
    assert load_grid(str(path), seeds=[0]).reserve == ()  # seeds named on the command line are all there are


@pytest.mark.parametrize("end", ["race: baseline", "halfwidth: 0.1"])
def test_a_seed_that_failed_for_good_ends_its_setting_alone_and_the_table_says_so(tmp_path: Path, end: str) -> None:
    path = tmp_path / "g.yaml"
    text = "base: finetune\nfactors: {freeze: [none, router, expert], seed: [0, 1, 2]}\nevaluate: [lm]\nat: [1.0]\n"
    text += f"baseline: {{freeze: none}}\nadaptive: {{metric: val_loss, {end}, max_seeds: 9}}\n"
    path.write_text(text)
    grid, store = load_grid(str(path)), Store.open(f"memory://{uuid.uuid4().hex}")
    graph = build_graph(grid)
    noise = [0.0, 0.3, 0.1]
    for item in grid.cells:
        seed, freeze = item.factors["seed"], item.factors["freeze"]
        if (freeze, seed) == ("router", 1):
            failure = Failure(graph.cells[item.id].final, "a-1", "diverged", "the loss is nan")
            continue
        metrics = {"val_loss": 6.0 + noise[seed] * (2 if freeze == "none" else -1)}
        manifest = Manifest(graph.cells[item.id].results[0].key, "evaluate", {}, attempt="a-0", metrics=metrics)
        store.artifacts.commit(manifest)
    assert {s.setting: s.state for s in grown(grid, store)[1]}["freeze=router"] == "waiting"
    Journal(store).record_failure(failure, "")
    full, states = grown(grid, store)
    of = {s.setting: s for s in states}
    assert grid.adaptive is not None
    assert (of["freeze=router"].state, of["freeze=router"].now) == ("failed", 3)
    assert of["freeze=none"].now > 3
    assert (
        "1 left the race: a seed failed" in (line := told(states, grid.adaptive))
        or "1 got no more: a seed failed" in line
    )
    assert expected_cells(grid, store) is not None
    table = headline(collect(root_document(build_graph(full)), store), ["val_loss"])
    assert any("a seed failed: freeze=router" in note for note in table.notes)


@pytest.mark.parametrize("halfwidth", [0.05, 0.3])
def test_the_number_that_would_do_would_do(halfwidth: float) -> None:
    values = [0.1, 0.3, 0.2, 0.25]
    needed = interval_seeds(values, halfwidth, 40)
    assert needed is not None
    deviation = 2 * (summary(values).stderr or 0.0)
    assert multiplier(needed, 40) * deviation / math.sqrt(needed) <= halfwidth
    assert needed == 4 or multiplier(needed - 1, 40) * deviation / math.sqrt(needed - 1) > halfwidth
    assert interval_seeds([0.0, 100.0, 50.0], 1e-3, 40) is None


def test_a_store_with_more_seeds_than_a_sequence_goes_to_is_read_all_the_same() -> None:
    ours = {seed: float(seed % 7) for seed in range(150)}
    found = summary(list(ours.values()), 500)
    assert found.low is not None
    assert found.low < found.mean < (found.high or 0.0)
    assert compare(ours, dict.fromkeys(ours, 0.0), most=500) is not None
