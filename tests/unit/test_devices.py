"""GPUs that this machine does not have are said by the plan, and refused before anything is written down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator import cli
from orchestrator.errors import EXIT_DONE, EXIT_USAGE

CUDA = "set.execution.device=cuda"
GPU = [f"set.execution.resources.{phase}.gpus=1" for phase in ("pretrain", "finetune", "evaluate")]
SLURM = Path(__file__).parents[1] / "faults" / "slurm.yaml"


@pytest.fixture(autouse=True)
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEGRID_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("MOEGRID_TRACKING", "none")
    monkeypatch.setenv("MOEGRID_RUN_DIR", str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("gpus", "words", "error"),
    [
        (0, [CUDA], "execution.device is 'cuda', and this machine has no GPU"),
        (0, [CUDA, *GPU], "this machine has 0 GPUs, and the grid asks for 1"),
        (0, GPU, "this machine has 0 GPUs, and the grid asks for 1"),
        (1, [CUDA, *GPU, GPU[1].replace("=1", "=2")], "this machine has 1 GPUs, and the grid asks for 2"),
        (1, [CUDA, *GPU[:2]], "execution.device is 'cuda', and evaluate asks for no GPU"),
    ],
)
def test_a_gpu_that_is_not_there_is_said(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    gpus: int,
    words: list[str],
    error: str,
) -> None:
    monkeypatch.setenv("MOEGRID_GPUS", str(gpus))
    assert cli.main(["plan", "quickstart", *words]) == EXIT_DONE
    assert f"! {error}" in capsys.readouterr().out
    for command in ("run", "tick"):
        assert cli.main([command, "quickstart", *words]) == EXIT_USAGE
        assert f"error: {error}\ncause: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert cli.main(["plan", "quickstart", "--json", *words]) == EXIT_DONE
    assert [one["error"] for one in json.loads(capsys.readouterr().out)["lacking"]] == [error]


@pytest.mark.parametrize(("gpus", "site"), [(1, "local"), (0, str(SLURM))])
def test_nothing_is_said_where_the_gpus_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], gpus: int, site: str
) -> None:
    monkeypatch.setenv("MOEGRID_GPUS", str(gpus))
    assert cli.main(["plan", "quickstart", "--json", "--site", site, CUDA, *GPU]) == EXIT_DONE
    assert json.loads(capsys.readouterr().out)["lacking"] == []
