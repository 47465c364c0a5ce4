"""A grid may name the columns that its evaluations make, and no others."""

from __future__ import annotations

import pytest

from jobs.evaluate.harness import load_config
from jobs.evaluate.suites.disturbed import DROPS, TEMPERATURES
from orchestrator.catalog.metrics import DISTURBED
from orchestrator.catalog.tasks import TASKS
from orchestrator.errors import GridError
from orchestrator.grid.columns import columns_of, every_column, unknown_column
from orchestrator.grid.files import grid_names
from orchestrator.grid.load import load_grid
from tests.unit.conftest import Load, Told

LM = "factors: {freeze: [none, router], seed: [0, 1]}\nevaluate: [lm]\n"
SEARCH = "search: {space: {lr: {uniform: [0.001, 0.002]}}, metric: %s, scheduler: %s}\n"


def test_accuracy_by_characters_is_known_where_the_harness_reports_it() -> None:
    reported = {
        name for name in TASKS.builtins if any(one["metric"] == "acc_norm" for one in load_config(name)["metric_list"])
    }
    assert reported == {kind.name for kind in TASKS.builtins.values() if kind.normalised}


def test_the_columns_of_a_disturbed_router_are_those_of_the_probe() -> None:
    assert set(DISTURBED) == {*DROPS, "temperature_1", *(f"temperature_{tau:g}" for tau in TEMPERATURES)}


@pytest.mark.parametrize("name", grid_names())
def test_the_primary_columns_of_a_grid_are_made(name: str) -> None:
    grid = load_grid(name)
    made = frozenset().union(*(columns_of(item.cell) for item in grid.cells))
    assert set(grid.primary) <= made


def test_efficiency_is_measured_at_the_end_of_models_with_experts(load: Load) -> None:
    grid = load("factors: {preset: [smoe, dense]}\nevaluate: [lm, efficiency]\nat: [0.5, 1.0]\n")
    moe, dense = (item.cell for item in grid.cells)
    assert "load_balance" in columns_of(moe)
    assert "load_balance" not in columns_of(moe, 0.5)
    assert "load_balance" not in columns_of(dense)
    assert unknown_column("load_balance", [dense]) is not None
    assert unknown_column("load_balance", [dense, moe]) is None


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("primary: [val_los]\n", "primary names 'val_los', which no", "did you mean 'val_loss'?"),
        ("primary: [val_loss, answer_bpb]\n", "primary names 'answer_bpb'", "the suite 'reasoning' makes it"),
        ("primary: [arc_easy/acc]\n", "primary names 'arc_easy/acc'", "'reasoning' with the task arc_easy"),
        ("primary: colour\n", "primary names 'colour'", "columns: bits_per_byte, val_loss"),
        (SEARCH % ("bits_per_bite", "fifo"), "search.metric 'bits_per_bite'", "did you mean 'bits_per_byte'?"),
        (SEARCH % ("nll", "fifo"), "search.metric 'nll' is made by no", "columns: bits_per_byte, val_loss"),
        ("adaptive: {metric: vall_loss, halfwidth: 0.1}\n", "adaptive.metric 'vall_loss'", "did you mean 'val_loss'?"),
    ],
)
def test_a_column_that_nothing_makes_is_refused_before_anything_runs(
    told: Told, text: str, message: str, hint: str
) -> None:
    problem = told(LM + text)
    assert message in problem.message
    assert hint in problem.hint
    assert problem.where.endswith("grid.yaml:4")


def test_a_trial_is_judged_by_what_is_measured_at_every_rung(load: Load) -> None:
    text = LM.replace("[lm]", "[efficiency]")
    assert load(text + SEARCH % ("load_balance", "fifo")).search is not None
    with pytest.raises(GridError, match=r"'load_balance' is made by no evaluation of this grid at 0\.25 of its steps"):
        load(text + SEARCH % ("load_balance", "{name: asha}"))
    with pytest.raises(GridError, match=r"search\.scheduler\.grace must be above 0"):
        load(LM + SEARCH % ("val_loss", "{name: asha, grace: 0}"))


def test_fewer_suites_on_the_command_line_keep_the_primary_columns_of_the_file(load: Load) -> None:
    text = LM.replace("[lm]", "[lm, reasoning]") + "primary: [answer_bpb]\n"
    assert load(text, overrides=["evaluate=[lm]"]).primary == ("answer_bpb",)
    with pytest.raises(GridError, match="did you mean 'answer_bpb'"):
        load(text.replace("answer_bpb", "answer_bpd"), overrides=["set.finetune.lr=1e-4"])


def test_columns_of_a_benchmark_without_a_source_may_be_primary_but_not_searched(load: Load) -> None:
    text = LM.replace("[lm]", "[lm, over_refusal]")
    assert load(text + "primary: [xstest_safe_refusal]\n").primary
    with pytest.raises(GridError, match="'xstest_safe_refusal' is made by no evaluation"):
        load(text + SEARCH % ("xstest_safe_refusal", "fifo"))


def test_every_column_is_known_by_one_name() -> None:
    assert {"val_loss", "answer_bpb", "piqa/acc_norm", "nq", "safety_reward", "anli_r1/drop"} <= every_column()
    assert "winogrande/acc_norm" not in every_column()
