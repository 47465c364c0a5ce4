"""Experts dealt to ranks: outputs, losses and gradients are those of experts that every rank holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.expert_ranks import RANKS, cases, steps
from tests.processes import ROOT

Reports = list[dict[str, dict[str, float]]]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """What each of four processes saw, in groups of one, two and four."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.expert_ranks", str(rank), str(folder)],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(RANKS)
    ]  # fmt: skip
    try:
        said = [rank.communicate(timeout=400)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * RANKS, "\n".join(said)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("case", cases())
def test_dealt_experts_compute_what_whole_ones_do(case: str, reports: Reports) -> None:
    bound = 1e-2 if case == "mixed" else 1e-6
    for report in reports:
        assert max(report[case].values()) <= bound, report[case]


@pytest.mark.parametrize("case", steps())
def test_a_step_under_a_mesh_has_the_gradients_of_whole_models(case: str, reports: Reports) -> None:
    for report in reports:
        assert max(map(abs, report[case].values())) <= 1e-6, report[case]
