"""Keys hash science alone, and stay what they are (tests/golden_keys.py)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import pytest

from orchestrator.catalog.engines import ENGINES
from orchestrator.catalog.judges import JUDGES
from orchestrator.catalog.losses import LOAD_VARIANTS
from orchestrator.catalog.routers import ROUTERS
from orchestrator.catalog.suites import SUITES
from orchestrator.catalog.tasks import TASKS
from orchestrator.grid.files import grid_names
from orchestrator.grid.load import load_grid
from orchestrator.plan.graph import StageGraph, build_graph
from orchestrator.spec import identity, versions
from orchestrator.spec.cell import BalanceSpec, CorpusSpec, DataSpec, EvaluateSpec, MixSpec
from orchestrator.spec.identity import canonical, digest, lineage, plain, science_key, state_key, state_keys
from orchestrator.spec.vision import VisionSpec
from orchestrator.spec.work import TaskSource, work_from_json, work_to_json
from tests.golden_keys import GOLDEN, current_keys, example_works


@pytest.fixture(scope="module")
def current() -> dict[str, Any]:
    return current_keys()


@pytest.mark.parametrize("part", list(json.loads(GOLDEN.read_text())))
def test_keys_are_the_golden_ones(part: str, current: dict[str, Any]) -> None:
    golden = json.loads(GOLDEN.read_text())[part]
    assert current[part] == golden, f"the identity of {part} changed: see tests/golden_keys.py"


def test_golden_keys_cover_everything_that_has_an_identity(current: dict[str, Any]) -> None:
    golden = json.loads(GOLDEN.read_text())
    assert set(golden) == set(current)
    assert set(golden["works"]) == set(identity.KIND_VERSIONS)
    variants = ((name, variant) for name, kind in ROUTERS.builtins.items() for variant in kind.variants)
    presets = {f"preset {name} {variant}".rstrip() for name, variant in variants}
    assert presets <= set(golden["models"])
    losses = {f.name for f in dataclasses.fields(BalanceSpec)} - {
        "aux_coef",
        "aux_variant",
        "aux_group",
        "aux_scope",
        *(f"{name}_schedule{more}" for name in ("aux", "z") for more in ("", "_parameters")),
        "losses",
    }
    assert {f"balance {name}" for name in losses} <= set(golden["conditions"])
    assert {f"balance {variant} batch global" for variant in LOAD_VARIANTS} <= set(golden["conditions"])
    assert {f"{task} acc" for task in TASKS.builtins} <= set(golden["tasks"])
    assert {suite.partition(":")[0] for suite in golden["suites"]} >= set(SUITES.builtins)
    assert {f"{judge} told" for judge in JUDGES.builtins} <= set(golden["judges"])
    assert set(golden["engines"]) == set(ENGINES.builtins)
    assert {f"{name} paper" for name in grid_names()} <= set(golden["grids"])


def test_an_engine_is_in_no_key(current: dict[str, Any]) -> None:
    assert all(keys == current["engines"]["torch"] for keys in current["engines"].values())


def test_canonical_json_is_json() -> None:
    value = {"b": [1, 2.5, None, True, 'é\n"\\'], "a": {"y": 1e-08, "x": -0.0}, "c": MixSpec("m", 3)}
    text = json.dumps(plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    assert canonical(value) == text.encode()
    assert digest(value) == hashlib.sha256(text.encode()).hexdigest()


def test_a_neutral_field_has_an_identity_only_when_it_is_used() -> None:
    plain_text = canonical(DataSpec(source="s"))
    assert b"mix" not in plain_text
    mixed = DataSpec(source="s", mix=MixSpec("file://x", rows=100))
    assert b'"mix":{' in canonical(mixed)
    assert len({digest(DataSpec(source="s", mix=MixSpec("file://x", rows=rows))) for rows in (0, 100, 500)}) == 3
    assert digest(EvaluateSpec()) != digest(EvaluateSpec(dola="low"))


def test_types_are_part_of_identity() -> None:
    assert len({digest([value]) for value in (1, 1.0, True, "1", None)}) == 5


def test_numbers_that_are_not_finite_have_no_identity() -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"finite|compliant"):
            digest([value])


@pytest.mark.parametrize("kind", list(identity.KIND_VERSIONS))
def test_a_new_version_of_a_kind_changes_its_keys(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = example_works()[kind].key()
    monkeypatch.setitem(identity.KIND_VERSIONS, kind, identity.KIND_VERSIONS[kind] + 1)
    assert example_works()[kind].key() != before


@pytest.mark.parametrize("kind", list(identity.KIND_VERSIONS))
def test_every_field_of_a_work_is_in_its_key(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A field that changes what a stage computes and is not in its key would hand out wrong results."""
    monkeypatch.setattr(versions, "raised", lambda names: {})  # made-up values have no parts
    work: Any = example_works()[kind]
    for path, value in leaves(work):
        # A state's model and tokenizer are in the key of its initial artifact; a history starts where `start` says.
        if kind == "train" and path[0] in ("model", "tokenizer", "history"):
            continue
        if path == ("sources",):
            sourced = dataclasses.replace(work, sources=(TaskSource("race", DataSpec("hub://a/b@c")),))
            assert sourced.key() != work.key()
            continue
        changed = {"corpora": (CorpusSpec("web"),), "vision": VisionSpec()}.get(path[-1], other(value))
        assert replace(work, path, changed).key() != work.key(), ".".join(path)


def leaves(value: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    if not dataclasses.is_dataclass(value):
        return [(path, value)]
    fields = [field for field in dataclasses.fields(value) if not field.metadata.get("derived")]
    return [leaf for field in fields for leaf in leaves(getattr(value, field.name), (*path, field.name))]


def replace(value: Any, path: tuple[str, ...], new: Any) -> Any:
    if not path:
        return new
    return dataclasses.replace(value, **{path[0]: replace(getattr(value, path[0]), path[1:], new)})


def other(value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, tuple):
        return value[:-1] if value else (("x", 0, 1),)
    return f"{value}x"


@pytest.mark.parametrize("name", grid_names())
def test_a_work_is_the_same_on_the_node(name: str) -> None:
    for key, stage in build_graph(load_grid(name)).stages.items():
        there = work_from_json(json.loads(json.dumps(work_to_json(stage.work))))
        assert there == stage.work
        assert there.key() == key


def test_where_a_run_is_cut_leaves_no_trace() -> None:
    whole = [("a", 0, 100), ("b", 100, 200)]
    cut = [("a", 0, 30), ("a", 30, 30), ("a", 30, 100), ("b", 100, 130), ("b", 130, 200)]
    assert lineage(whole) == lineage(cut)
    assert state_key("init", whole) == state_key("init", cut)
    assert state_key("init", []) == "init"
    assert state_keys("init", cut[:3], "b", 100, [130, 200]) == [state_key("init", cut[:4]), state_key("init", cut)]


def test_order_and_conditions_of_a_history_matter() -> None:
    keys = {
        state_key("init", spans)
        for spans in (
            [("a", 0, 50), ("b", 50, 100)],
            [("b", 0, 50), ("a", 50, 100)],
            [("a", 0, 100)],
            [("a", 0, 49), ("b", 49, 100)],
        )
    }
    assert len(keys | {state_key("other", [("a", 0, 100)])}) == 5


def test_parents_are_part_of_a_key() -> None:
    assert science_key("data", {"a": 1}, ["x"]) != science_key("data", {"a": 1}, ["y"])


def graph_of(*overrides: str) -> StageGraph:
    return build_graph(load_grid("finetune_freeze", overrides=overrides))


def finals(*overrides: str) -> list[str]:
    graph = graph_of(*overrides)
    return [graph.cells[item.id].final for item in graph.grid.cells]


@pytest.mark.parametrize(
    "override",
    [
        "at=[0.25,0.5,1.0]",
        "at=[1.0]",
        "evaluate=[lm]",
        "set.evaluate.max_length=400",
        "set.execution.checkpoint_steps=7",
        "set.execution.checkpoint_seconds=1",
        "set.execution.resources.finetune.cores=2",
        "set.execution.log_every=3",
        "set.seed.eval=5",
    ],
)
def test_what_is_measured_and_how_it_runs_retrains_nothing(override: str) -> None:
    assert finals(override) == finals()


@pytest.mark.parametrize(
    "override",
    [
        "set.pretrain.micro_batch=4",
        "set.finetune.micro_batch=4",
        "set.finetune.balance.aux_coef=0.01",
        "set.model.norm_eps=1e-6",
        "set.finetune.data.rows=100",
        "set.tokenizer.vocab_size=4000",
        "set.seed.data=1",
        "set.seed.init=1",
        "set.seed.pretrain=1",
        "factors.seed=[5,6]",
    ],
)
def test_what_decides_the_weights_changes_every_final_state(override: str) -> None:
    assert not set(finals(override)) & set(finals())


def test_nine_schedules_are_twelve_half_runs() -> None:
    graph = graph_of("also=[]", "factors.seed=[0]")
    assert len(graph.grid.cells) == 9
    assert sum(stage.phase == "finetune" for stage in graph.stages.values()) == 12
