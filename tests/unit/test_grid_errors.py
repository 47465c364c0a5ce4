"""Every mistake in a grid file is reported with its place and its remedy, before anything runs.

`python tests/unit/test_grid_errors.py` writes the table's messages again, as when a preset was added: read its diff.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.errors import GridError
from orchestrator.grid.load import load_grid

TABLE = Path(__file__).parents[1] / "golden" / "bad_grids.yaml"
CASES = yaml.safe_load(TABLE.read_text())


def test_the_table_is_large_and_its_cases_differ() -> None:
    assert len(CASES) >= 100
    assert len({case["name"] for case in CASES}) == len(CASES)


def said_about(case: dict[str, Any], folder: Path) -> str:
    path = folder / "grid.yaml"
    path.write_text(case["grid"])
    with pytest.raises(GridError) as raised:
        load_grid(str(path), **case.get("arguments", {}))
    said = str(raised.value).replace(f"{folder}/", "")
    # The lines of the recipes and scales that come with the project may move.
    return re.sub(r"(grids/\S+\.yaml):\d+", r"\1:N", said) + "\n"


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_a_mistake_is_reported_exactly(case: dict[str, Any], tmp_path: Path) -> None:
    assert said_about(case, tmp_path) == case["errors"]


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


def test_aliases_that_multiply_or_recur_are_refused(tmp_path: Path) -> None:
    bomb = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    (tmp_path / "bomb.yaml").write_text(f"base: finetune\n{bomb}")
    (tmp_path / "loop.yaml").write_text("base: finetune\nfactors: &a {freeze: [*a]}\n")
    for name in ("bomb", "loop"):
        with pytest.raises(GridError, match="nested too deeply or too large"):
            load_grid(str(tmp_path / f"{name}.yaml"))


def test_an_invalid_grid_exits_with_2() -> None:
    assert GridError([]).exit_code == 2


def rewrite() -> None:
    """Write the table again with what is said now."""

    class Block(str):
        __slots__ = ()

    def block(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|")

    yaml.add_representer(Block, block, Dumper=yaml.SafeDumper)
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            case["errors"] = Block(said_about(case, Path(folder)))
        case["grid"] = Block(case["grid"]) if case["grid"] else ""
    head = TABLE.read_text().partition("\n")[0]
    TABLE.write_text(f"{head}\n{yaml.safe_dump(CASES, sort_keys=False, width=1000, allow_unicode=True)}")


if __name__ == "__main__":
    rewrite()
