"""A key made from a form is the key of the work: the same text, written in another way."""

from __future__ import annotations

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.grid.load import load_grid
from orchestrator.plan.graph import build_graph
from orchestrator.spec.cell import TrainSpec
from orchestrator.spec.forms import OpenConditions
from orchestrator.spec.identity import KIND_VERSIONS, state_keys
from orchestrator.spec.work import Conditions, work_from_json, work_to_json
from tests.golden_keys import TEXT

KEYS = st.text("0123456789abcdef", min_size=1, max_size=64)


@pytest.mark.parametrize("grid", ["quickstart", "safety_freeze", "rbench_robustness", "finetune_c2r"])
def test_every_stage_has_the_key_and_the_parents_of_its_work(grid: str) -> None:
    for key, stage in build_graph(load_grid(grid)).stages.items():
        there = work_from_json(json.loads(json.dumps(work_to_json(stage.work))))
        assert there.key() == key, stage.label
        assert set(stage.parents) == set(there.parents.values()), stage.label
        assert stage.form.kind == stage.kind == there.kind


@given(seed=st.integers(-(2**40), 2**40), tokens=KEYS, limit=st.sampled_from([0, 1, 4]))
def test_open_conditions_have_the_digest_of_filled_ones(seed: int, tokens: str, limit: int) -> None:
    filled = Conditions("finetune", TrainSpec(TEXT), tokens, seed, limit)
    opened = OpenConditions(Conditions("finetune", TrainSpec(TEXT), tokens, 7, limit))
    assert opened.digest(seed) == filled.digest()
    assert opened.filled(seed) == filled


@given(
    init=st.text(max_size=8),
    conditions=st.text(max_size=8),
    start=st.integers(0, 9),
    history=st.lists(st.tuples(KEYS, st.integers(0, 3), st.integers(4, 9)), max_size=3),
)
def test_the_key_of_a_state_is_that_of_its_canonical_json(
    init: str, conditions: str, start: int, history: list[tuple[str, int, int]]
) -> None:
    distinct = [span for index, span in enumerate(history) if not index or span[0] != history[index - 1][0]]
    fields = {
        "kind": "train",
        "version": KIND_VERSIONS["train"],
        "init": init,
        "history": distinct,
        "conditions": conditions,
        "from": start,
    }
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    line = hashlib.sha256(text.encode()).hexdigest()
    expected = hashlib.sha256(f"{line}@5".encode()).hexdigest()
    assert state_keys(init, distinct, conditions, start, [5]) == [expected]
