"""An adaptive number of seeds through the real driver: cells are added where results ask for them, and only there."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.grid.load import load_grid
from orchestrator.report.adaptive import grown, seeds_asked_for
from tests.faults.harness import Lab

# The fake evaluation scores lie evenly between 0 and 1, so that some intervals are soon narrow and others are not.
GRID = """
base: finetune
factors: {freeze: [none, router], seed: [0, 1]}
baseline: {freeze: none}
evaluate: [lm]
at: [1.0]
primary: [val_loss]
adaptive: {metric: val_loss, halfwidth: 0.45, max_seeds: 6}
"""


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path)
    (tmp_path / "seeds.yaml").write_text(GRID)
    yield made
    made.close()


def drive(lab: Lab, *words: str, **environment: str) -> tuple[int, str]:
    return lab.drive(*words, grid="seeds.yaml", only=(), **environment)


def test_seeds_are_added_until_every_interval_is_narrow_or_the_limit_is_reached(lab: Lab) -> None:
    code, planned = drive(lab, "plan")
    assert code == 0, planned
    assert "2 waiting for results; 0 cells added, up to 8 more may be" in planned
    count = lab.folder / "count"
    code, said = drive(lab, FAULT_COUNT=str(count))
    assert code == 0, said
    grid = load_grid(str(lab.folder / "seeds.yaml"))
    assert grid.adaptive is not None
    full, states = grown(grid, lab.store())
    taken = Counter(item.setting for item in full.cells)
    assert len(set(taken.values())) > 1, "the settings of this test need different numbers of seeds"
    code, text = drive(lab, "status", "--json")
    values: dict[str, list[float]] = {}
    for cell in json.loads(text)["cells"]:
        assert cell["state"] == "done"
        values.setdefault(f"freeze={cell['factors']['freeze']}", []).append(cell["metrics"]["val_loss"])
    assert {setting: len(found) for setting, found in values.items()} == taken
    for state in states:
        found = values[state.setting]
        assert len(found) == seeds_asked_for(found, 2, grid.adaptive, 6)
        assert state.state == ("enough" if state.halfwidth is not None and state.halfwidth <= 0.45 else "limit")
    shown = " ".join(said.split())  # notes are wrapped
    assert "adaptive: seeds are added until the 95 % interval of val_loss is ±0.45 or narrower" in shown

    # A driver that dies in a later round leaves nothing that the next one does not find again.
    again = Lab(lab.folder / "again")
    again.folder.mkdir()
    (again.folder / "seeds.yaml").write_text(GRID)
    late = int(len(count.read_text().splitlines()) * 0.8)
    code, _ = drive(again, FAULT=f"kill:{late}:after")
    assert code == -9
    code, said = drive(again, "resume")
    assert code == 0, said
    assert again.store().artifacts.keys() == lab.store().artifacts.keys()
    stages = [line["stage"] for line in again.executions()]
    assert len(stages) == len(set(stages))
    again.close()


def test_a_race_ends_with_the_seeds_that_its_results_ask_for_and_a_second_run_finds_nothing_to_do(lab: Lab) -> None:
    raced = GRID.replace("halfwidth: 0.45", "race: baseline").replace("[none, router]", "[none, router, expert]")
    (lab.folder / "seeds.yaml").write_text(raced)
    code, planned = drive(lab, "plan", "--json")
    assert code == 0, planned
    cost = json.loads(planned)["adaptive_cost"]
    assert cost["cells"]["now"] == 9
    assert 9 < cost["cells"]["expected"] <= cost["cells"]["most"] == 18
    assert cost["hours"]["now"] < cost["hours"]["expected"] <= cost["hours"]["most"]
    code, said = drive(lab)
    assert code == 0, said
    full, states = grown(load_grid(str(lab.folder / "seeds.yaml")), lab.store())
    assert {state.state for state in states} <= {"enough", "limit"}
    code, text = drive(lab, "status", "--json")
    assert [cell["state"] for cell in json.loads(text)["cells"]] == ["done"] * len(full.cells)
    assert "seeds go where they decide val_loss (baseline), at most 6" in " ".join(said.split())
    code, said = drive(lab)
    assert code == 0
    assert "nothing to do" in said
