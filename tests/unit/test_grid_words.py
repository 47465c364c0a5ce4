"""Every word that a grid got beyond its first ones: its keys, what cells that differ in it share, its page, its errors.

One table, at the level of the plan. What a word computes is tested where it is made.
"""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from orchestrator.catalog.optimizers import OPTIMIZERS
from orchestrator.catalog.schedules import SCHEDULES
from orchestrator.catalog.tasks import TASKS
from orchestrator.catalog.templates import TEMPLATES
from orchestrator.errors import GridError
from orchestrator.grid.load import Grid, load_grid
from orchestrator.plan.graph import build_graph
from orchestrator.plan.stage import CellStages
from orchestrator.spec.cell import AdapterSpec, StopSpec

DOCS = Path(__file__).parents[2] / "docs"
FREEZE = ("none->expert", "none->router")
# The phases of which cells that differ in a word have a training stage in common.
NOTHING: frozenset[str] = frozenset()
BASE = frozenset({"pretrain"})
HALF = frozenset({"pretrain", "finetune"})


@dataclass(frozen=True, slots=True)
class Word:
    """A factor whose first value is what a grid has that does not name it.

    `bad` sets a field (its key) to a value of which the message shows the last part. `names` stand on the `page`, as
    code. `needs` are fields that it is read beside, `beside` sections. `shares` are the phases that cells that differ
    in it have a training stage of in common. With `halves` every cell is there under two freeze schedules too.
    """

    factor: str
    values: tuple[str, ...]
    bad: tuple[str, str, str]
    names: tuple[str, ...]
    page: str = "grids"
    needs: Mapping[str, str] = field(default_factory=dict)
    beside: str = ""
    shares: frozenset[str] = BASE
    halves: bool = True
    base: str = "finetune"


FALLING, POINTS = "[[0, 1], [1, 0]]", "[[0, 1], [0.5, 0.1]]"


def parameter(field: str, kind: str, name: str, *values: str, bad: str, shown: str = "") -> Word:
    needs = {f"finetune.{field}": kind}
    given = (f"finetune.{field}_parameters.{name}", bad, shown or f"not {bad}")
    return Word(f"{field}_parameters.{name}", values, given, (name, kind, f"{field}_parameters"), needs=needs)


def coefficient(name: str) -> Word:
    own, key = f"{name}_schedule", f"finetune.balance.{name}_schedule"
    with_points = f"with: {{{own}: {{points: {{{own}_parameters.points: {POINTS}}}}}}}"
    return Word(
        own,
        ("constant", "linear", "wsd", "points"),
        (key, "pionts", "'pionts'"),
        (own, f"train/{name}_coef"),
        needs={f"finetune.balance.{name}_coef": "0.1"},
        beside=with_points,
    )


def coefficient_parameter(name: str) -> Word:
    own = f"{name}_schedule"
    needs = {f"finetune.balance.{name}_coef": "0.1", f"finetune.balance.{own}": "wsd"}
    bad = (f"finetune.balance.{own}_parameters.decay", "2", "not 2")
    return Word(f"{own}_parameters.decay", ("0.1", "0.3"), bad, (own, "decay"), needs=needs)


def freezing(word: str, bad: str, shown: str, name: str) -> Word:
    values = ("none->router", f"'none->{word}'")
    return Word("freeze", values, ("finetune.freeze", f"'none->{bad}'", shown), (name,), shares=HALF, halves=False)


def adapter(name: str, *values: str, bad: str, shown: str, names: tuple[str, ...] = ()) -> Word:
    needs = {"finetune.adapter.rank": "4"} if name != "rank" else {}
    given = (f"finetune.adapter.{name}", bad, shown)
    return Word(f"adapter_{name}", values, given, (f"adapter_{name}", "finetune.adapter", *names), needs=needs)


def stop(name: str, *values: str, bad: str, shown: str) -> Word:
    needs = {"finetune.stop.metric": "lm_loss", "finetune.stop.patience": "2"}
    needs.pop(f"finetune.stop.{name}", None)
    names = (f"stop_{name}", "finetune.stop", "stopped_at")
    return Word(f"stop_{name}", values, (f"finetune.stop.{name}", bad, shown), names, needs=needs)


TASK = """task: my_arith
dataset_path: json
dataset_kwargs: {data_files: items.jsonl}
output_type: multiple_choice
test_split: train
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
CHAT = {"finetune.data": '{source: "file://chat.jsonl", format: chat, holdout: 0.2}'}
WORDS = {
    "schedule": Word(
        "schedule",
        ("linear", "wsd", "inverse_sqrt", "points"),
        ("finetune.schedule", "wds", "'wds'"),
        ("wsd", "inverse_sqrt", "points", "schedule_parameters"),
        beside=f"with: {{schedule: {{points: {{schedule_parameters.points: {POINTS}}}}}}}",
    ),
    "wsd decay": parameter("schedule", "wsd", "decay", "0.1", "0.2", bad="2"),
    "wsd shape": parameter("schedule", "wsd", "shape", "linear", "cosine", "1-sqrt", bad="round", shown="not 'round'"),
    "inverse_sqrt timescale": parameter("schedule", "inverse_sqrt", "timescale", "0", "30", bad="-1"),
    "points points": parameter(
        "schedule", "points", "points", "[[0, 1], [1, 0]]", POINTS, bad="[[0, -1]]", shown="not -1"
    ),
    "aux_schedule": coefficient("aux"),
    "z_schedule": coefficient("z"),
    "aux_schedule decay": coefficient_parameter("aux"),
    "z_schedule decay": coefficient_parameter("z"),
    "optimizer": Word(
        "optimizer",
        ("adamw", "muon"),
        ("finetune.optimizer", "moun", "'moun'"),
        ("adamw", "muon", "optimizer_parameters"),
    ),
    "muon momentum": parameter("optimizer", "muon", "momentum", "0.95", "0.9", bad="1"),
    "muon nesterov": parameter("optimizer", "muon", "nesterov", "true", "false", bad="often", shown="'often'"),
    "muon newton_schulz_steps": parameter("optimizer", "muon", "newton_schulz_steps", "5", "6", bad="0"),
    "muon adjust": parameter("optimizer", "muon", "adjust", "rms", "original", bad="rsm", shown="not 'rsm'"),
    "muon adamw_lr_ratio": parameter("optimizer", "muon", "adamw_lr_ratio", "1.0", "0.1", bad="0"),
    "freeze layers": freezing("layers(0-1)", "layers(0-9)", "layer 9", "layers(-1)"),
    "freeze a role by layer": freezing("router(-1)+attention", "ruter(0)", "'ruter'", "router(0-3)"),
    "freeze by pattern": freezing("name(*q_proj*)", "name()", "'name()'", "name(*.q_proj.*)"),
    "adapter.rank": adapter("rank", "0", "8", bad="-1", shown="not -1"),
    "adapter.alpha": adapter("alpha", "16.0", "8.0", bad="0", shown="not 0"),
    "adapter.targets": adapter(
        "targets",
        "attention",
        "routed_expert",
        "attention+expert",
        bad="attenton",
        shown="'attenton'",
        names=("shared_expert", "routed_expert"),
    ),
    "adapter.router": adapter("router", "frozen", "trained", bad="both", shown="'both'", names=("trained",)),
    "stop.metric": stop("metric", "''", "lm_loss", "loss", bad="lm_los", shown="'lm_los'"),
    "stop.every": stop("every", "10", "5", bad="0", shown="not 0"),
    "stop.patience": dataclasses.replace(
        stop("patience", "0", "3", bad="-1", shown="not -1"),
        needs={"finetune.stop.metric": "lm_loss", "finetune.stop.below": "1.0"},
    ),
    "stop.improvement": stop("improvement", "0.0", "0.01", bad="-1", shown="not -1"),
    "stop.below": stop("below", "0.0", "2.0", bad="-1", shown="not -1"),
    "weights": Word(
        "weights.web",
        ("1", "3"),
        ("pretrain.data.weights.wep", "1", "'wep'"),
        ("data.corpora", "weights.code"),
        "data",
        {"pretrain.data.corpora": '{web: {source: "file://web.jsonl"}, code: {source: "file://code.jsonl"}}'},
        shares=NOTHING,
        base="pretrain",
    ),
    "template": Word(
        "template",
        ("plain", "chatml", "alpaca", "tulu"),
        ("finetune.data.template", "chatlm", "'chatlm'"),
        ("template", "plain", "chatml", "alpaca", "tulu", "messages", "conversations", "input"),
        "data",
        CHAT,
    ),
    "turns_field": Word(
        "finetune.data.turns_field",
        ("''", "turns"),
        ("finetune.data.turns_field", "trns", "'trns'"),
        ("data.turns_field",),
        "data",
        CHAT,
    ),
    "trained": Word(
        "trained",
        ("true", "false"),
        ("finetune.trained", "never", "'never'"),
        ("finetune.trained", "trained"),
        halves=False,
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the data that grids name."""
    folder = tmp_path_factory.mktemp("words")
    chats = [[{"role": role, "content": f"{role} {i}"} for role in ("user", "assistant")] for i in range(20)]
    data: dict[str, list[Any]] = {
        "web": [{"text": f"text {i}"} for i in range(20)],
        "code": [{"text": f"code {i}"} for i in range(20)],
        "chat": [{"messages": turns, "turns": turns} for turns in chats],
        "items": [{"question": f"{i}?", "choices": ["a", "b"], "gold": 0} for i in range(9)],
    }
    for name, rows in data.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "my_arith.yaml").write_text(TASK)
    return folder


def load(folder: Path, word: Word, factors: Mapping[str, tuple[str, ...]], **more: str) -> Grid:
    named = ", ".join(f"{name}: [{', '.join(values)}]" for name, values in factors.items())
    fields = ", ".join(f"{key}: {value}" for key, value in {**word.needs, **more}.items())
    text = f"name: g\nbase: {word.base}\nevaluate: [lm]\nat: [1.0]\nfactors: {{{named}}}\nset: {{{fields}}}\n"
    (folder / "grid.yaml").write_text(text + (word.beside if word.factor in factors else ""))
    return load_grid(str(folder / "grid.yaml"))


def results(cell: CellStages) -> set[str]:
    return {result.key for result in cell.results}


def training(cell: CellStages) -> dict[str, str]:
    return {stage.key: stage.phase for stage in cell.stages if stage.kind == "train"}


@cache
def code(page: str) -> str:
    """Return what of a page of the documentation is code."""
    return " ".join(re.findall(r"```.*?```|`[^`\n]+`", (DOCS / f"{page}.md").read_text(), re.DOTALL))


@pytest.mark.parametrize("name", WORDS)
def test_cells_that_differ_in_it_have_keys_of_their_own_and_share_what_comes_before(folder: Path, name: str) -> None:
    word = WORDS[name]
    freeze: dict[str, tuple[str, ...]] = {"freeze": FREEZE} if word.halves else {}
    usual = freeze or ({"freeze": word.values[:1]} if word.factor == "freeze" else {"seed": ("0",)})
    grid, before = load(folder, word, {word.factor: word.values, **freeze}), load(folder, word, usual)
    graph, plain = build_graph(grid), build_graph(before)
    count = len(word.values)
    cells = [graph.cells[item.id] for item in grid.cells]
    assert len({item.id for item in grid.cells}) == len(cells) == count * len(freeze.get("freeze", "1"))
    by_value = [cells[n * len(cells) // count : (n + 1) * len(cells) // count] for n in range(count)]
    # Others keep theirs: to name the usual value is to say nothing.
    assert [item.id for item in grid.cells][: len(by_value[0])] == [item.id for item in before.cells]
    assert [cell.keys for cell in by_value[0]] == [plain.cells[item.id].keys for item in before.cells]
    # No result of one is a result of another.
    assert sum(len(results(cell)) for cell in cells) == len(set.union(*map(results, cells)))
    first = [training(alike[0]) for alike in by_value]
    common = set.intersection(*map(set, first))
    assert {first[0][key] for key in common} == word.shares
    if word.halves:
        for one, other in by_value:
            shared = training(one).keys() & training(other).keys()
            assert len(shared) == len(training(one)) - 1, "all but the second half"
    if word.base == "pretrain":
        prepared = [{stage.key for stage in cell.stages if stage.kind in ("data", "tokens")} for cell in cells]
        assert all(one == prepared[0] for one in prepared), "the data are prepared once"


def test_a_task_of_ones_own_changes_what_is_measured_by_tasks_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks are no factor: two grids."""
    monkeypatch.setattr(TASKS, "outside", dict(TASKS.outside))

    def cell(tasks: str) -> CellStages:
        head = "base: finetune\nevaluate: [lm, reasoning]\nat: [1.0]\nfactors: {seed: [0]}\nset:\n"
        (folder / "grid.yaml").write_text(f"{head}  evaluate.tasks: {tasks}\n")
        grid = load_grid(str(folder / "grid.yaml"))
        return build_graph(grid).cells[grid.cells[0].id]

    usual, own = cell("{piqa: {limit: 9}}"), cell("{piqa: {limit: 9}, my_arith: {limit: 5}}")
    assert training(own) == training(usual)
    same = {result.suite for result in own.results if result.key in results(usual)}
    assert ({result.suite for result in own.results}, same) == ({"lm", "reasoning"}, {"lm"})
    with pytest.raises(GridError) as caught:
        cell("{my_arth: {limit: 5}}")
    (problem,) = caught.value.problems
    assert re.fullmatch(r".*grid\.yaml:6", problem.where), problem
    assert problem.key.startswith("evaluate.tasks"), problem
    assert "'my_arth'" in problem.message, problem
    assert problem.hint, problem
    assert {"my_arith.yaml", "dataset_kwargs.data_files", "output_type"} <= set(re.findall(r"[\w.]+", code("data")))


@pytest.mark.parametrize("name", WORDS)
def test_a_bad_value_is_told_with_file_key_value_and_remedy(folder: Path, name: str) -> None:
    word = WORDS[name]
    key, value, shown = word.bad
    with pytest.raises(GridError) as caught:
        load(folder, word, {"seed": ("0",)}, **{key: value})
    (problem,) = caught.value.problems
    assert re.fullmatch(r".*grid\.yaml:6", problem.where), problem
    assert key.startswith(problem.key) or key.removeprefix("finetune.") in problem.hint, problem
    assert shown in problem.message, problem
    assert problem.hint or " must be " in problem.message, problem


@pytest.mark.parametrize("name", WORDS)
def test_its_page_names_it(name: str) -> None:
    shown = code(WORDS[name].page)
    assert not [said for said in WORDS[name].names if not re.search(rf"(?<!\w){re.escape(said)}(?!\w)", shown)]


def test_the_table_has_every_schedule_optimizer_template_and_field() -> None:
    known = {name: set(word.values) for name, word in WORDS.items()}
    assert known["schedule"] | {"cosine", "constant"} == set(SCHEDULES.builtins)
    assert known["optimizer"] == set(OPTIMIZERS.builtins)
    assert known["template"] == set(TEMPLATES.builtins)
    owners: list[tuple[str, type | None]] = [(kind.name, kind.parameters) for kind in SCHEDULES.builtins.values()]
    owners += [(kind.name, kind.parameters) for kind in OPTIMIZERS.builtins.values()]
    own = {f"{kind} {name}" for kind, owner in owners if owner for name in typing.get_type_hints(owner)}
    own |= {f"adapter.{one.name}" for one in dataclasses.fields(AdapterSpec)}
    own |= {f"stop.{one.name}" for one in dataclasses.fields(StopSpec)}
    assert own <= set(WORDS)
