"""A race for seeds whose driver is killed at any of its calls, again and again, ends as one that was left alone."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestrator.grid.load import load_grid
from orchestrator.report.adaptive import Seeds, grown
from tests.faults.harness import Lab

GRID = """
base: finetune
factors: {freeze: [none, router, expert], seed: [0, 1]}
baseline: {freeze: none}
evaluate: [lm]
at: [1.0]
primary: [val_loss]
adaptive: {metric: val_loss, race: baseline, max_seeds: 6}
"""
# In standard deviations of a seed (scores lie evenly between 0 and 1): one is resolved, one may be, one is not.
EFFECTS = {"router": 12.0, "expert": 3.0}
ENVIRONMENT = {"FAKE_EFFECTS": json.dumps({name: effect / 12**0.5 for name, effect in EFFECTS.items()})}


@dataclass(frozen=True)
class End:
    """What a race came to: seeds and verdict of each setting, every artifact with its metrics, and its calls."""

    states: tuple[Seeds, ...]
    artifacts: dict[str, tuple[str, tuple[tuple[str, float], ...]]]
    calls: int


def lab_in(folder: Path) -> Lab:
    folder.mkdir(exist_ok=True)
    (folder / "race.yaml").write_text(GRID)
    return Lab(folder)


def drive(lab: Lab, *words: str, **environment: str) -> int:
    code, said = lab.drive(*words, grid="race.yaml", only=(), **ENVIRONMENT, **environment)
    assert code in (0, -9), said
    return code


def end_of(lab: Lab, calls: int = 0) -> End:
    store = lab.store()
    _, states = grown(load_grid(str(lab.folder / "race.yaml")), store)
    manifests = store.artifacts.many(store.artifacts.keys())
    return End(states, {key: (m.digest, tuple(m.metrics.items())) for key, m in manifests.items()}, calls)


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> End:
    """The end of a race that nobody disturbs."""
    lab = lab_in(tmp_path_factory.mktemp("race") / "lab")
    count = lab.folder / "count"
    assert drive(lab, FAULT_COUNT=str(count)) == 0
    end = end_of(lab, len(count.read_text().splitlines()))
    lab.close()
    return end


def check(lab: Lab, alone: End, chance: random.Random) -> None:
    """Kill the driver at random calls until one of them gets to the end: nothing lost, doubled or decided otherwise."""
    deaths = 0
    while True:
        point = chance.randint(1, max(alone.calls // 2, 1))
        if drive(lab, "resume", FAULT=f"kill:{point}:{chance.choice(('before', 'after'))}") == 0:
            break
        deaths += 1
        assert deaths < 40
    assert deaths
    assert drive(lab, "resume") == 0
    ended = end_of(lab)
    assert ended.states == alone.states
    assert ended.artifacts == alone.artifacts
    stages = [line["stage"] for line in lab.executions()]
    assert len(stages) == len(set(stages)), "a stage was executed twice"


def test_the_race_of_this_test_gives_settings_different_numbers_of_seeds(alone: End) -> None:
    seeds = {state.setting: state.now for state in alone.states}
    assert seeds["freeze=router"] < seeds["freeze=none"]
    assert {state.state for state in alone.states} <= {"enough", "limit"}


def test_a_race_killed_at_random_calls_comes_to_the_same_verdicts(tmp_path: Path, alone: End) -> None:
    lab = lab_in(tmp_path / "lab")
    try:
        check(lab, alone, random.Random(0))
    finally:
        lab.close()


@pytest.mark.faults
@pytest.mark.parametrize("draw", range(1, 13))
def test_a_race_killed_at_any_calls_comes_to_the_same_verdicts(tmp_path: Path, alone: End, draw: int) -> None:
    lab = lab_in(tmp_path / "lab")
    try:
        check(lab, alone, random.Random(draw))
    finally:
        lab.close()
