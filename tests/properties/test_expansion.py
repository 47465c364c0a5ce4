"""A grid's cells are the product of its axes, whatever the order in which they are written."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.grid.load import Grid, load_grid

Axes = dict[str, list[object]]
VALUES: dict[str, tuple[object, ...]] = {
    "lr": (1e-4, 2e-4, 5e-4),
    "freeze": ("none", "router", "none->router", "expert"),
    "z_coef": (0.0, 0.001, 0.01),
    "seed": (0, 1, 2, 7),
}


@st.composite
def axes_of_grids(draw: st.DrawFn) -> Axes:
    """Some factors, each with some of its values, in any order."""
    names = draw(st.permutations(sorted(VALUES)))[: draw(st.integers(1, len(VALUES)))]
    return {name: draw(st.lists(st.sampled_from(VALUES[name]), min_size=1, max_size=3, unique=True)) for name in names}


def load(folder: Path, axes: Axes, more: str = "") -> Grid:
    path = folder / "grid.yaml"
    path.write_text(f"name: product\nbase: finetune\nfactors: {json.dumps(axes)}\nevaluate: [lm]\n{more}")
    return load_grid(str(path))


def combinations(axes: Axes) -> list[dict[str, object]]:
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("grids")


@settings(max_examples=12)
@given(axes=axes_of_grids(), order=st.randoms(use_true_random=False))
def test_cells_are_the_product_and_their_ids_do_not_depend_on_the_order(
    folder: Path, axes: Axes, order: random.Random
) -> None:
    grid = load(folder, axes)
    assert [dict(item.factors) for item in grid.cells] == combinations(axes)
    ids = {item.id: dict(item.factors) for item in grid.cells}
    assert len(ids) == len(grid.cells), "what differs in science has another id"
    shuffled = {name: order.sample(values, len(values)) for name, values in order.sample(list(axes.items()), len(axes))}
    assert {item.id: dict(item.factors) for item in load(folder, shuffled).cells} == ids


@settings(max_examples=12)
@given(axes=axes_of_grids(), data=st.data())
def test_what_exclude_names_is_missing_and_nothing_else(folder: Path, axes: Axes, data: st.DataObject) -> None:
    whole = load(folder, axes)
    named = data.draw(st.lists(st.sampled_from(sorted(axes)), min_size=1, unique=True))
    condition = {name: data.draw(st.sampled_from(axes[name])) for name in named}
    left = [item.id for item in whole.cells if any(item.factors[name] != condition[name] for name in named)]
    if left:
        assert [item.id for item in load(folder, axes, f"exclude: [{json.dumps(condition)}]\n").cells] == left


@settings(max_examples=12)
@given(axes=axes_of_grids(), data=st.data())
def test_a_grid_is_the_union_of_its_parts(folder: Path, axes: Axes, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(axes)))
    place = data.draw(st.integers(0, len(axes[name])))
    parts = [{**axes, name: values} for values in (axes[name][:place], axes[name][place:]) if values]
    found = [item.id for part in parts for item in load(folder, part).cells]
    assert sorted(found) == sorted(item.id for item in load(folder, axes).cells)
