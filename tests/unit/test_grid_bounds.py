"""What is too large or too deep to be meant is refused before it is read whole, and the bound can be raised."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.errors import GridError, MoegridError
from orchestrator.grid.load import load_grid
from tests.unit.conftest import Load

MILLION = 1_000_000


@pytest.mark.parametrize("text", ["[" * MILLION, "{a: " * MILLION, "- " * MILLION, "? " * MILLION])
def test_a_million_levels_are_refused(load: Load, text: str) -> None:
    with pytest.raises(GridError, match="nested too deeply or too large"):
        load(f"description:\n  {text}\n")
    with pytest.raises(GridError, match="nested too deeply or too large"):
        load("factors: {freeze: [none]}\n", overrides=[f"set.finetune.lr={text}"])


def test_a_long_list_is_refused_until_its_bound_is_raised(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"factors: {{freeze: [none], seed: {list(range(1500))}}}\n"
    monkeypatch.setenv("MOEGRID_MAX_NODES", "1000")
    with pytest.raises(GridError, match="MOEGRID_MAX_NODES"):
        load(text)
    monkeypatch.setenv("MOEGRID_MAX_NODES", "5000")
    assert len(load(text).cells) == 1500
    monkeypatch.setenv("MOEGRID_MAX_NODES", "many")
    with pytest.raises(MoegridError, match="is not a whole number"):
        load(text)


def test_a_product_of_hundreds_of_millions_is_refused_until_its_bound_is_raised(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = list(range(58))
    axes = "".join(f"  {name}: {seeds}\n" for name in ("seed", "seed.init", "seed.data", "seed.pretrain", "seed.eval"))
    with pytest.raises(GridError) as caught:
        load(f"factors:\n{axes}")
    (problem,) = caught.value.problems
    assert f"{58**5:,} combinations, more than 100,000: 58 seed x 58 seed.init" in problem.message
    assert problem.hint == f"if it is meant: export MOEGRID_MAX_CELLS={58**5}"
    small = "factors: {freeze: [none, router], seed: [0, 1]}\nalso: [{freeze: [expert], seed: [0, 1]}]\n"
    monkeypatch.setenv("MOEGRID_MAX_CELLS", "5")
    with pytest.raises(GridError, match="6 combinations, more than 5"):
        load(small)
    monkeypatch.setenv("MOEGRID_MAX_CELLS", "6")
    assert len(load(small).cells) == 6


def test_a_search_that_enumerates_hundreds_of_millions_is_refused(load: Load) -> None:
    values = json.dumps([i / 1000 for i in range(1, 701)])
    space = f"lr: {{grid: {values}}}, weight_decay: {{grid: {values}}}, eps: {{grid: {values}}}"
    with pytest.raises(GridError, match="343,000,000 trials, more than 100,000"):
        load(f"factors: {{freeze: [none]}}\nsearch: {{metric: val_loss, space: {{{space}}}}}\n")


def test_includes_that_multiply_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(30):
        (tmp_path / f"a{i}.yaml").write_text(f"base: finetune\ninclude: [a{i + 1}.yaml, a{i + 1}.yaml]\n")
    (tmp_path / "a30.yaml").write_text("base: finetune\nfactors: {freeze: [none]}\n")
    monkeypatch.setenv("MOEGRID_MAX_INCLUDES", "50")
    with pytest.raises(GridError, match="more than 50 files are included"):
        load_grid(str(tmp_path / "a0.yaml"))


def test_half_a_character_is_refused_wherever_it_is_written(load: Load) -> None:
    for text in ('description: "\\uD83D"\n', 'set: {finetune.data.split: "\\udc00x"}\n', 'factors: {"\\ud800": [1]}\n'):
        with pytest.raises(GridError, match="half of a surrogate pair"):
            load(text)
    with pytest.raises(GridError, match="not UTF-8"):
        load("factors: {freeze: [none]}\n", overrides=["description=caf\udce9"])
    assert (
        load('description: "\\U0001F600 \U0001f600"\nfactors: {freeze: [none]}\n').description
        == "\U0001f600 \U0001f600"
    )
