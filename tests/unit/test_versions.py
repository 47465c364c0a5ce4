"""A preset, a loss, a suite, a metric has a version of its own: raising it renews its results and no others."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from orchestrator.catalog.benchmarks import COLUMNS
from orchestrator.catalog.judges import JUDGES
from orchestrator.catalog.losses import BY_FIELD, LOAD_VARIANTS
from orchestrator.catalog.metrics import BY_SUITE
from orchestrator.catalog.routers import ROUTERS
from orchestrator.catalog.suites import SUITES
from orchestrator.catalog.tasks import TASKS
from orchestrator.grid.load import load_grid
from orchestrator.plan.graph import StageGraph, build_graph
from orchestrator.spec import versions
from orchestrator.spec.work import DataWork, EvaluateWork, InitWork
from tests import golden_keys
from tests.golden_keys import conditions_of_training, judge_works, lowered, models, named, suite_works, task_works


def keys() -> dict[str, str]:
    """Return the keys of everything whose parts have versions."""
    return {
        **named((name, InitWork(model, "tokenizer", seed=2).key()) for name, model in models()),
        **named((name, conditions.digest()) for name, conditions in conditions_of_training()),
        **named((f"task {name}", work.key()) for name, work in task_works()),
        **named((f"suite {name}", work.key()) for name, work in suite_works()),
        **named((f"judge {name}", work.key()) for name, work in judge_works()),
    }


def renewed(monkeypatch: pytest.MonkeyPatch, part: str) -> set[str]:
    """Return the names of the keys that change with the version of `part`."""
    before = keys()
    monkeypatch.setitem(versions.VERSIONS, part, 2)
    return {name for name, key in keys().items() if key != before[name]}


def parts() -> Iterator[str]:
    """Yield everything that can have a version, as the golden examples use it."""
    for _, model in models():
        yield from versions.of_model(model)
    for _, conditions in conditions_of_training():
        yield from versions.of_training(conditions.train, conditions.collaboration_top)
    for _, data in golden_keys.data_works():
        if isinstance(data, DataWork):
            yield from versions.of_data(data.data, data.tasks)
    for _, work in (*task_works(), *suite_works()):
        if isinstance(work, EvaluateWork):
            yield from versions.of_evaluation(work.suite, (*work.tasks, *work.clean), work.benchmark)
            yield from versions.of_scoring(work.shots, work.precision, work.dola)
            yield from versions.of_removal(work.suite, work.model.moe)
    yield from (f"judge {name}" for name in JUDGES.builtins)
    yield from ("tokenizer bpe", "tokenizer pretrained", "tokens text", "tokens instruction")


def test_what_has_a_version_exists_and_is_raised_from_two_on() -> None:
    assert set(versions.VERSIONS) <= set(parts())
    assert all(version > 1 for version in versions.VERSIONS.values())


def test_every_preset_loss_task_suite_metric_and_judge_has_a_version() -> None:
    known = set(parts())
    assert {f"preset {preset}" for preset in ROUTERS.builtins} <= known
    assert {f"loss {loss}" for loss in (*LOAD_VARIANTS, *(kind.name for kind in BY_FIELD.values()))} <= known
    assert {f"task {task}" for task in TASKS.builtins} <= known
    assert {f"suite {suite}" for suite in set(SUITES.builtins) - {"safety", "over_refusal"}} <= known
    metrics = {metric for suite, of in BY_SUITE.items() if suite not in ("safety", "over_refusal") for metric in of}
    assert {f"metric {metric}" for metric in (*metrics, *COLUMNS.values())} <= known


@pytest.mark.parametrize("preset", ROUTERS.builtins)
def test_a_new_version_of_a_preset_renews_its_models_alone(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of = {name for name, model in models() if model.moe.preset == preset}
    assert renewed(monkeypatch, f"preset {preset}") == of


@pytest.mark.parametrize("loss", LOAD_VARIANTS)
def test_a_new_version_of_a_balance_loss_renews_its_training_alone(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = renewed(monkeypatch, f"loss {loss}")
    assert {name for name in found if name.startswith("balance ")} == {
        f"balance {loss} {group} {scope}"
        for group in ("batch", "sequence", "pooled")
        for scope in ("micro_batch", "global")
    }
    # The other examples train with the default loss, those that switch it off are not touched.
    others = {name for name in found if not name.startswith("balance ")}
    assert others <= {name for name, of in conditions_of_training() if of.train.balance.aux_variant == loss}


@pytest.mark.parametrize("field", BY_FIELD)
def test_a_new_version_of_another_loss_renews_what_trains_with_it(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of = {name for name, conditions in conditions_of_training() if getattr(conditions.train.balance, field)}
    assert renewed(monkeypatch, f"loss {BY_FIELD[field].name}") == of


@pytest.mark.parametrize("suite", SUITES.builtins)
def test_a_new_version_of_a_suite_renews_its_results_alone(suite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = renewed(monkeypatch, f"suite {suite}")
    for name in found:
        told = {"task": "reasoning", "judge": "safety"}.get(name.split()[0]) if " of " not in name else None
        own = told == suite if told else suite in name.replace(":", " ").split()
        assert own, name
    assert found


@pytest.mark.parametrize(
    ("part", "suites"),
    [
        ("metric load_balance", {"efficiency"}),
        ("metric router_margin", {"probe", "seeing_probe"}),
        ("metric bits_per_byte", {"lm"}),
        ("metric truthfulqa_mc2", {"hallucination"}),
        ("metric nq", {"hallucination"}),
        ("metric drop", {"adversarial", "ood"}),
        ("task hellaswag", {"reasoning", "efficiency", "probe"}),
        ("judge refusal_rate", {"safety", "over_refusal"}),
        ("judge labels", {"safety"}),
    ],
)
def test_a_new_version_of_a_metric_task_or_judge_trains_nothing_again(
    part: str, suites: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stages() -> dict[str, str]:
        cell = lowered()
        return {stage.key: stage.suite or stage.kind for stage in cell.stages}

    before = stages()
    monkeypatch.setitem(versions.VERSIONS, part, 2)
    gone = set(before) - set(stages())
    assert {before[key] for key in gone} == (suites if part != "judge labels" else set())


def test_what_removal_changed_is_renewed_where_groups_have_two_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    before = keys()
    monkeypatch.delitem(versions.VERSIONS, "removal from groups of two")
    assert {name for name, key in keys().items() if key != before[name]} == {"task efficiency with groups of two"}


def test_what_bf16_changed_is_renewed_where_it_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    before = keys()
    monkeypatch.delitem(versions.VERSIONS, "scoring bf16")
    changed = {name for name, key in keys().items() if key != before[name]}
    assert changed == {f"task shots {shots} in bf16" for shots in ("per_item", "shared")}


def test_metrics_of_one_suite_are_renewed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    found = renewed(monkeypatch, "metric nq")
    assert found == {f"suite hallucination{dola}: nq_open" for dola in ("", " dola low", " dola 0,2")}


def graph() -> StageGraph:
    return build_graph(load_grid("quickstart"))


def test_a_new_loss_renews_its_phase_and_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    before = graph().stages
    monkeypatch.setitem(versions.VERSIONS, "loss switch", 2)
    after = graph().stages
    kept = {before[key].kind for key in set(before) & set(after)}
    assert kept == {"data", "tokenizer", "tokens", "init"}
    monkeypatch.setitem(versions.VERSIONS, "loss switch", 1)
    assert set(graph().stages) == set(before), "a version of 1 is not hashed"
