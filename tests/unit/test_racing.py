"""The race for seeds: who stops, who goes on, and that the short simulation keeps what the long one shows."""

from __future__ import annotations

import random
from pathlib import Path

from benchmarks.adaptive import races
from orchestrator.grid.load import load_grid
from orchestrator.report import racing
from orchestrator.report.adaptive import expected_cells, grown
from orchestrator.store import Store

PAIRS = (("b", "a"), ("c", "a"), ("d", "a"))
MEANS = {"a": 0.0, "b": 8.0, "c": 0.0, "d": 1.1}


def drawn() -> dict[str, dict[int, float | None]]:
    chance = random.Random(5)
    return {name: {seed: chance.gauss(mean, 1.0) for seed in range(20)} for name, mean in MEANS.items()}


def raced(values: dict[str, dict[int, float | None]]) -> dict[str, racing.Lane]:
    return racing.race(values, dict.fromkeys(MEANS, 3), 20, PAIRS, 0.1)


def test_what_is_resolved_stops_and_seeds_go_where_they_decide() -> None:
    lanes = raced(drawn())
    assert lanes["b"].seeds < 10, "worse by eight deviations: soon known"
    assert lanes["d"].seeds > lanes["b"].seeds, "the nearest open difference gets the seeds"
    assert lanes["a"].seeds == max(lane.seeds for lane in lanes.values()), "the baseline is needed by all"
    assert {lane.state for lane in lanes.values()} <= {"decided", "limit"}


def test_every_round_is_found_again_from_its_results_alone() -> None:
    final, known = raced(drawn()), {name: dict.fromkeys(range(20)) for name in MEANS}
    values, rounds = drawn(), 0
    lanes = raced(known)
    assert all(lane == racing.Lane(3, "waiting") for lane in lanes.values())
    while any(lane.state == "waiting" for lane in lanes.values()):
        for name, lane in lanes.items():
            known[name] |= {seed: values[name][seed] for seed in range(lane.seeds)}
        lanes, rounds = raced(known), rounds + 1
    assert lanes == final
    assert rounds > 2


def test_a_setting_without_a_rival_keeps_its_seeds_and_a_missing_value_is_waited_for() -> None:
    values = drawn() | {"e": dict.fromkeys(range(20), 1.0)}
    lanes = racing.race(values, dict.fromkeys(values, 2), 20, PAIRS, 0.1)
    assert lanes["e"] == racing.Lane(2, "decided")
    values["c"][2] = None
    waiting = racing.race(values, dict.fromkeys(values, 2), 20, PAIRS, 0.1)
    assert {name: lane.seeds for name, lane in waiting.items()} == {"a": 3, "b": 3, "c": 3, "d": 3, "e": 2}


def test_a_setting_whose_seed_failed_for_good_leaves_the_race_and_holds_up_nobody() -> None:
    values = drawn()
    values["c"][2] = None
    lanes = racing.race(values, dict.fromkeys(MEANS, 3), 20, PAIRS, 0.1, {"c": {2}})
    assert lanes["c"] == racing.Lane(3, "failed")
    others = {name: own for name, own in drawn().items() if name != "c"}
    alone = racing.race(others, dict.fromkeys(others, 3), 20, [pair for pair in PAIRS if "c" not in pair], 0.1)
    assert {name: lane for name, lane in lanes.items() if name != "c"} == alone
    assert racing.expected(values, dict.fromkeys(MEANS, 3), 20, PAIRS, 0.1, {"c": {2}}) == sum(
        lane.seeds for lane in lanes.values()
    )
    values["a"][4] = None  # the baseline of all: its seed of a later round
    ended = racing.race(values, dict.fromkeys(MEANS, 3), 20, PAIRS, 0.1, {"c": {2}, "a": {4}})
    assert ended["a"].state == "failed"
    assert 5 <= ended["a"].seeds < 20
    assert {ended["b"].state, ended["d"].state} <= {"decided", "waiting"}
    assert raced(values)["a"].state == "waiting", "what may still come is waited for"


def test_twelve_settings_are_decided_as_by_twenty_seeds_in_half_of_the_hours() -> None:
    found = races(60, "pairs", 0.0)
    assert found.hours <= 0.5
    assert found.agreeing >= 0.95
    assert found.false <= found.false_fixed + 0.02


def test_a_grid_that_races_tells_what_it_may_take(tmp_path: Path) -> None:
    path = tmp_path / "g.yaml"
    text = "base: finetune\nfactors: {freeze: [none, router, expert], seed: [0, 1]}\nbaseline: {freeze: none}\n"
    path.write_text(f"{text}evaluate: [lm]\nat: [1.0]\nadaptive: {{metric: val_loss, race: baseline, max_seeds: 20}}\n")
    grid, store = load_grid(str(path)), Store.open("memory://race")
    full, states = grown(grid, store)
    assert [(s.now, s.state) for s in states] == [(3, "waiting")] * 3
    assert len(full.cells) == 9
    cells = expected_cells(grid, store)
    assert cells is not None
    assert 9 < cells < 60
