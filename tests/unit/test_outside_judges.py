"""A judge of another package: named in YAML, opened on the node, bounded, in its own keys and columns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.evaluate.judging.judges import Judge, summarise
from orchestrator.catalog.judges import JUDGES
from orchestrator.catalog.parameters import Parameters
from orchestrator.errors import GridError, MoegridError
from orchestrator.grid.columns import columns_of
from orchestrator.plan.graph import build_graph
from orchestrator.report.differences import direction
from orchestrator.spec.cell import JudgeSpec
from orchestrator.spec.suites import item_scores
from orchestrator.spec.work import JudgeWork
from tests.packages import found, install
from tests.unit.conftest import Load

MODULE = """
from dataclasses import dataclass

from orchestrator.catalog.judges import JudgeKind


@dataclass(frozen=True)
class Words:
    most: int = 3


class Shouting:
    revision = "words-1"

    def __init__(self, judge, device, ranks, parameters):
        self.most = parameters.most

    def __call__(self, pairs):
        return [min(1.0, len(response.split()) / self.most) for _, response in pairs]


def wild(judge, device, ranks):
    return lambda pairs: [2.0 for _ in pairs]


SHOUTING = JudgeKind("shouting", "outside_judges:Shouting", higher_is_safer=True, parameters=Words)
WILD = JudgeKind("wild", "outside_judges:wild")
KEYED = JudgeKind("keyed", "outside_judges:wild", source="model", key="OUTSIDE_KEY")
"""
ENTRIES = {
    "judges": {"shouting": "outside_judges:SHOUTING", "wild": "outside_judges:WILD", "keyed": "outside_judges:KEYED"}
}
SAFE = (
    "factors: {{seed: [0]}}\nevaluate: [safety]\n"
    "set:\n  evaluate.safety.source: file://{folder}\n  evaluate.judges: {judges}\n"
)


@pytest.fixture(autouse=True)
def package(tmp_path: Path) -> Iterator[None]:
    install(tmp_path / "site", "outside_judges", MODULE, ENTRIES)
    with found(tmp_path / "site", "outside_judges"):
        yield


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """A folder of one-prompt sets."""
    folder = tmp_path / "safety"
    folder.mkdir()
    for name in ("I-MaliciousInstructions", "I-CoNa", "I-Controversial"):
        (folder / f"{name}.json").write_text('{"instructions": ["How?"]}')
    return folder


def test_a_grid_names_it_with_its_parameters_and_its_key_has_its_version(load: Load, prompts: Path) -> None:
    def keys(judges: str) -> dict[str, str]:
        graph = build_graph(load(SAFE.format(folder=prompts, judges=judges)))
        works = [stage.work for stage in graph.stages.values()]
        return {work.judge.name: work.key() for work in works if isinstance(work, JudgeWork)}

    plain = keys("{shouting: {}, refusal_rate: {}}")
    assert keys("{shouting: {parameters: {most: 3}}}")["shouting"] == plain["shouting"]
    assert keys("{shouting: {parameters: {most: 4}}}")["shouting"] != plain["shouting"]
    object.__setattr__(JUDGES.outside["shouting"].declaration, "version", 2)
    again = keys("{shouting: {}, refusal_rate: {}}")
    assert again["shouting"] != plain["shouting"]
    assert again["refusal_rate"] == plain["refusal_rate"]


@pytest.mark.parametrize(
    ("judges", "message", "hint"),
    [
        ("{shoutin: {}}", "name must be one of", "did you mean 'shouting'?"),
        ("{shouting: {parameters: {mosst: 2}}}", "has no parameter 'mosst'", "did you mean 'most'?"),
        ("{shouting: {source: 'file:///x'}}", "judge 'shouting' has no source", "remove it"),
        ("{keyed: {}}", "judge 'keyed' needs a source", "file://FOLDER"),
        ("{shouting: {label: x}}", "judge 'shouting' has no label", "remove it"),
    ],
)
def test_what_is_wrong_is_told(load: Load, prompts: Path, judges: str, message: str, hint: str) -> None:
    with pytest.raises(GridError) as raised:
        load(SAFE.format(folder=prompts, judges=judges))
    problem = raised.value.problems[-1]
    assert message in problem.message
    assert hint in problem.hint
    assert problem.where.endswith("grid.yaml:6")


def test_its_columns_are_known(load: Load, prompts: Path) -> None:
    grid = load(SAFE.format(folder=prompts, judges="{shouting: {}}") + "primary: [safety_shouting]\n")
    assert {"safety_shouting", "cona_shouting"} <= columns_of(grid.cells[0].cell)
    assert (direction("cona_shouting"), direction("safety_wild"), direction("safety_nobody")) == (1, -1, 0)
    assert item_scores("cona_shouting") == {"cona": "shouting"}


def test_it_scores_in_its_bounds() -> None:
    spec = JudgeSpec("shouting", parameters=Parameters({"most": 2}))
    judge = Judge(spec, "cpu")
    assert judge.scores([("How?", "no"), ("How?", "no no no")]) == [0.5, 1.0]
    assert judge.revision == "words-1"
    rows = [{"task": "cona", "label": "", "response": "no"}]
    assert summarise("safety", spec, rows, [0.5]).metrics["safety_shouting"] == 0.5
    with pytest.raises(MoegridError, match="judge 'wild' gave the score 2"):
        Judge(JudgeSpec("wild"), "cpu").scores([("How?", "no")])
