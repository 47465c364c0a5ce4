"""What somebody with a first plugin file gets wrong: told at its own line, with what to write instead."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator import registry
from orchestrator.catalog.routers import ROUTERS
from orchestrator.errors import GridError
from tests.unit.conftest import Load

NOISY = """
from dataclasses import dataclass

from orchestrator.catalog.routers import RouterKind


@dataclass(frozen=True)
class Noise:
    noise: float = 1.0


NOISY = RouterKind("noisy", parameters=Noise)
"""
DRIVERS = {
    "tracker": ("TrackerKind", '"lines", "lines:connect"', "trackers"),
    "backend": ("BackendKind", '"crowd", "crowd:Site", "crowd:open_site"', "backends"),
    "store": ("StoreKind", '"tape", "tape:open"', "stores"),
}


@pytest.fixture(autouse=True)
def noisy(tmp_path: Path) -> Iterator[None]:
    (tmp_path / "noisy.py").write_text(NOISY)
    yield
    ROUTERS.outside.pop("noisy", None)


def problem(load: Load, text: str) -> tuple[str, str]:
    """Return "line message" and hint of the one problem of a grid, whose lines are counted from its `base:`."""
    with pytest.raises(GridError) as raised:
        load("base: finetune\n" + text)
    (found,) = raised.value.problems
    return f"{found.where.rpartition(':')[2]} {found.message}", found.hint


def test_a_wrong_parameter_that_with_sets_is_told_at_its_own_line(load: Load) -> None:
    grid = "plugins: [./noisy.py]\nfactors: {preset: [smoe, noisy]}\nwith:\n  preset:\n    noisy:\n"
    assert load(grid + "      model.moe.parameters.noise: 2\n").cells[1].cell.model.moe.parameters["noise"] == 2.0
    said, hint = problem(load, grid + "      model.moe.router_init_std: 0.1\n      model.moe.parameters.noize: 2\n")
    assert said.startswith("8 preset 'noisy' has no parameter 'noize' in cell 'preset=noisy'")
    assert hint == "did you mean 'noise'?"


def test_a_parameter_that_is_taken_for_a_factor_is_told_with_its_path(load: Load) -> None:
    said, hint = problem(load, "plugins: [./noisy.py]\nfactors: {preset: [noisy], noise: [1, 2]}\n")
    assert said == "3 factor 'noise' is unknown"
    assert hint == "preset 'noisy' has a parameter of that name: write model.moe.parameters.noise"
    assert "finetune.schedule_parameters.decay" in problem(load, "factors: {decay: [0.1]}\n")[1]


def test_an_installed_package_is_no_plugin_file(load: Load) -> None:
    said, hint = problem(load, "plugins: [pytest]\nfactors: {seed: [0]}\n")
    assert said == "2 plugin 'pytest' does not exist"
    assert hint.startswith(f"pytest {pytest.__version__} is installed: a package needs no plugins:")


def test_two_files_that_declare_one_name_are_both_named(load: Load, tmp_path: Path) -> None:
    (tmp_path / "again.py").write_text(NOISY)
    said, hint = problem(load, "plugins: [./noisy.py, ./again.py]\nfactors: {seed: [0]}\n")
    assert said.startswith("2 preset 'noisy' is provided twice: again.py ")
    assert hint == "give it another name in again.py or noisy.py"


@pytest.mark.parametrize("word", DRIVERS)
def test_what_the_driver_opens_without_a_grid_is_no_grids_to_bring(load: Load, tmp_path: Path, word: str) -> None:
    kind, made, group = DRIVERS[word]
    (tmp_path / "mine.py").write_text(f"from moegrid.extend import {kind}\nMINE = {kind}({made})\n")
    said, hint = problem(load, "plugins: [./mine.py]\nfactors: {seed: [0]}\n")
    assert said.startswith(f"2 plugin 'mine.py' declares {word} ")
    assert "without the grid" in said or "without a grid" in said or "before it has anything" in said
    assert f"entry point moegrid.{group}" in hint
    assert ("plugins: of the site" in hint) == (word == "backend")
    assert not registry.REGISTRIES[group].outside
