"""The JSON Schema for editors accepts the project's grids and refuses what the loader refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.files.problems import Problems
from orchestrator.files.yaml_positions import parse_yaml
from orchestrator.grid.files import GRIDS, grid_names
from orchestrator.grid.schema import grid_schema

jsonschema = pytest.importorskip("jsonschema")


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = grid_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def read(text: str) -> Any:
    return parse_yaml(text, "grid.yaml", Problems()).data


@pytest.mark.parametrize("name", grid_names())
def test_it_accepts_the_grids_of_the_project(validator: Any, name: str) -> None:
    errors = [error.message for error in validator.iter_errors(read(Path(GRIDS / f"{name}.yaml").read_text()))]
    assert errors == []


@pytest.mark.parametrize(
    "text",
    [
        "base: finetun\n",
        "base: finetune\nfactor: {}\n",
        "base: finetune\nfactors: {frezee: [none]}\n",
        "base: finetune\nfactors: {freeze: []}\n",
        "base: finetune\nfactors: {seed: [x]}\n",
        "base: finetune\nfactors: {granularity: [2-8]}\n",
        "base: finetune\nfactors: {score: [softmx]}\n",
        "base: finetune\nat: [1.5]\n",
        "base: finetune\nevaluate: [reasonning]\n",
        "base: finetune\nset: {finetune: {lrr: 1}}\n",
        "base: finetune\nset: {finetune.micro_batch: eight}\n",
        "base: finetune\nset: {evaluate: {tasks: {arc_esy: {}}}}\n",
        "base: finetune\nsearch: {metric: x, space: {lr: {logunifrom: [1, 2]}}}\n",
        "name: ../x\nbase: finetune\n",
        "factors: {freeze: [none]}\n",
    ],
)
def test_it_refuses_mistakes(validator: Any, text: str) -> None:
    assert not validator.is_valid(read(text))


@pytest.mark.parametrize(
    "text",
    [
        "base: finetune\nfactors: {freeze: none, [lr, seed]: [[1e-4, 0]], finetune.clip: [1], steps: [3M tokens]}\n",
        "base: finetune\nalso: [{granularity: 1/7+1}]\nexclude: [{freeze: [none]}]\nwhen: {lr: {freeze: none}}\n",
        "base: finetune\nset: {finetune.lr: 1e-4, evaluate: {tasks: {piqa: {limit: 3}, mmlu: false}}}\n",
        "base: finetune\nscales: {tiny: {set: {finetune.steps: 3 epochs}, at: [1.0]}}\n",
    ],
)
def test_it_accepts_the_whole_language(validator: Any, text: str) -> None:
    assert [error.message for error in validator.iter_errors(read(text))] == []
