"""Every mistake in a grid file is reported with its place and its remedy, before anything runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.errors import GridError
from orchestrator.spec.grid import load_grid

CASES = yaml.safe_load((Path(__file__).parents[1] / "golden" / "bad_grids.yaml").read_text())


def test_the_table_is_large_and_its_cases_differ() -> None:
    assert len(CASES) >= 100
    assert len({case["name"] for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_a_mistake_is_reported_exactly(case: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(case["grid"])
    with pytest.raises(GridError) as raised:
        load_grid(str(path), **case.get("arguments", {}))
    said = str(raised.value).replace(f"{tmp_path}/", "")
    # The lines of the recipes and scales that come with the project may move.
    assert re.sub(r"(grids/\S+\.yaml):\d+", r"\1:N", said) == case["errors"].rstrip("\n")


def test_a_missing_grid_names_the_nearest() -> None:
    with pytest.raises(GridError, match="did you mean 'quickstart'"):
        load_grid("quikstart")
    with pytest.raises(GridError, match=r"grid file .nowhere/x\.yaml. does not exist"):
        load_grid("nowhere/x.yaml")


def test_an_include_cycle_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: finetune\ninclude: b.yaml\n")
    (tmp_path / "b.yaml").write_text("include: a.yaml\nfactors: {freeze: [none]}\n")
    with pytest.raises(GridError, match=r"include 'a\.yaml' includes itself \(.*b\.yaml:1\)"):
        load_grid(str(tmp_path / "a.yaml"))


def test_a_mistake_in_an_included_file_names_that_file(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: finetune\ninclude: b.yaml\n")
    (tmp_path / "b.yaml").write_text("factors:\n  frezee: [none]\n")
    with pytest.raises(GridError) as raised:
        load_grid(str(tmp_path / "a.yaml"))
    assert raised.value.problems[0].where.endswith("b.yaml:2")
    assert raised.value.problems[0].key == "frezee"


def test_an_invalid_grid_exits_with_2() -> None:
    assert GridError([]).exit_code == 2
