"""What a plan says about a search: its estimate is that of one trial."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from orchestrator import cli

GRID = """
base: finetune
search:
  space: {router_lr: {loguniform: [1e-6, 1e-3]}}
  metric: val_loss
  trials: 8
  scheduler: SCHEDULER
evaluate: [lm]
"""


@pytest.mark.parametrize(("scheduler", "less"), [("fifo", False), ("{name: asha, grace: 0.25}", True)])
def test_a_plan_tells_the_hours_of_all_trials(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], scheduler: str, less: bool
) -> None:
    path = tmp_path / "searched.yaml"
    path.write_text(GRID.replace("SCHEDULER", scheduler))
    assert cli.main(["plan", str(path), "--store", str(tmp_path / "store")]) == 0
    said = capsys.readouterr().out
    one = float(re.findall(r"estimated: ([\d.]+) core-hours left", said)[0])
    whole = float(re.findall(r"this is one trial of 8: at most ([\d.]+) core-hours for the search", said)[0])
    assert whole == pytest.approx(8 * one, abs=8 * 0.005 + 0.005)
    assert ("which asha makes less" in said) == less
