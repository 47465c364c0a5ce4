"""What somebody with a first plugin file gets wrong: told at its own line, with what to write instead."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator import registry
from orchestrator.catalog.routers import ROUTERS
from orchestrator.errors import Problem
from tests.unit.conftest import Load, Told

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


def line(problem: Problem) -> str:
    """Return the line that a problem names, of a grid whose first line is `base:`."""
    return problem.where.rpartition(":")[2]


def test_a_wrong_parameter_that_with_sets_is_told_at_its_own_line(load: Load, told: Told) -> None:
    grid = "plugins: [./noisy.py]\nfactors: {preset: [smoe, noisy]}\nwith:\n  preset:\n    noisy:\n"
    assert load(grid + "      model.moe.parameters.noise: 2\n").cells[1].cell.model.moe.parameters["noise"] == 2.0
    problem = told(grid + "      model.moe.router_init_std: 0.1\n      model.moe.parameters.noize: 2\n")
    assert problem.message.startswith("preset 'noisy' has no parameter 'noize' in cell 'preset=noisy'")
    assert line(problem) == "8"
    assert problem.hint == "did you mean 'noise'?"


def test_a_parameter_that_is_taken_for_a_factor_is_told_with_its_path(told: Told) -> None:
    problem = told("plugins: [./noisy.py]\nfactors: {preset: [noisy], noise: [1, 2]}\n")
    assert problem.message == "factor 'noise' is unknown"
    assert line(problem) == "3"
    assert "preset 'noisy' has a parameter of that name: write model.moe.parameters.noise" in problem.hint.split("; ")
    assert "finetune.schedule_parameters.decay" in told("factors: {decay: [0.1]}\n").hint


def test_an_installed_package_is_no_plugin_file(told: Told) -> None:
    problem = told("plugins: [pytest]\nfactors: {seed: [0]}\n")
    assert problem.message == "plugin 'pytest' does not exist"
    assert line(problem) == "2"
    assert problem.hint.startswith(f"pytest {pytest.__version__} is installed: a package needs no plugins:")


def test_two_files_that_declare_one_name_are_both_named(told: Told, tmp_path: Path) -> None:
    (tmp_path / "again.py").write_text(NOISY)
    problem = told("plugins: [./noisy.py, ./again.py]\nfactors: {seed: [0]}\n")
    assert problem.message.startswith("preset 'noisy' is provided twice: again.py ")
    assert line(problem) == "2"
    assert problem.hint == "give it another name in again.py or noisy.py"


@pytest.mark.parametrize("word", DRIVERS)
def test_what_the_driver_opens_without_a_grid_is_no_grids_to_bring(told: Told, tmp_path: Path, word: str) -> None:
    kind, made, group = DRIVERS[word]
    (tmp_path / "mine.py").write_text(f"from moegrid.extend import {kind}\nMINE = {kind}({made})\n")
    problem = told("plugins: [./mine.py]\nfactors: {seed: [0]}\n")
    assert problem.message.startswith(f"plugin 'mine.py' declares {word} ")
    assert line(problem) == "2"
    assert any(reason in problem.message for reason in ("without the grid", "without a grid", "before it has anything"))
    assert f"entry point moegrid.{group}" in problem.hint
    assert ("plugins: of the site" in problem.hint) == (word == "backend")
    assert not registry.REGISTRIES[group].outside
