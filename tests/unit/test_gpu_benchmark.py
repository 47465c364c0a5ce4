"""The table of `make gpu-check`: its code runs on a CPU, and without a GPU it says so."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu


def test_every_line_runs_on_a_cpu_with_small_shapes(capsys):
    try:
        assert gpu.main(["--device", "cpu", "--small"]) == 0
    finally:
        torch.use_deterministic_algorithms(False)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    judged = [line[0] for line in lines if "ok" in line]
    assert judged == ["parity", "parity", "resume", "fork", "evaluation"]
    assert {"block", "step"} <= {line[0] for line in lines}


def test_a_value_above_its_bound_is_a_failure():
    assert "FAILED" in str(gpu.Line("resume", "parameters that differ", 1, 0))
    assert gpu.Line("step", "tokens/s", 1e6).sound


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_is_skipped_with_a_reason(capsys):
    assert gpu.main([]) == 0
    assert capsys.readouterr().out.startswith("skipped: torch sees no CUDA device")
