"""The command line: what it accepts, how it fails, and that it starts fast."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator import cli
from orchestrator.commands.context import grid_of
from orchestrator.errors import EXIT_PENDING, EXIT_UNREACHABLE, EXIT_USAGE
from orchestrator.grid.load import load_grid
from orchestrator.plan.graph import build_graph
from orchestrator.plan.root import root_digest, root_document
from orchestrator.store import Store

ROOT = Path(cli.__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every command inside the test's folder."""
    monkeypatch.setenv("MOEGRID_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("MOEGRID_TRACKING", "none")
    monkeypatch.setenv("MOEGRID_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Run a command; return its exit code, stdout and stderr."""
    code = cli.main(words)
    out, err = capsys.readouterr()
    return code, out, err


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    code = "import sys; from orchestrator import cli; cli.build_parser().format_help(); print(*sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    loaded = set(said.split())
    assert not loaded & {"torch", "mlflow", "rich", "omegaconf", "obstore", "numpy", "yaml", "orchestrator.store"}


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["pla", "quickstart"], ["unknown command 'pla'", "did you mean 'plan'?"]),
        (["plan", "quickstrt"], ["quickstrt", "did you mean 'quickstart'?"]),
        (["plan", "quickstart", "--sclae", "tiny"], ["unknown argument '--sclae'", "did you mean '--scale'?"]),
        (["plan"], ["GRID", "hint: moegrid plan --help"]),
        (["plan", "quickstart", "--seeds", "0,x"], ["'0,x' is not a list of numbers"]),
        (["plan", "quickstart", "--scale", "tinny"], ["tinny", "tiny"]),
        (["plan", "quickstart", "--only", "freeze=rooter"], ["rooter"]),
        (["plan", "quickstart", "factors.frieze=[none]"], ["frieze", "freeze"]),
        (["plan", "quickstart", "set.finetune.lrr=1"], ["lrr"]),
        (["plan", "quickstart", "--site", "lokal"], ["unknown site 'lokal'", "did you mean 'local'?"]),
        (["run", "quickstart", "--site", "lokal"], ["unknown site 'lokal'", "did you mean 'local'?"]),
        *(
            ([command, "quickstart", "--site", "lokal"], ["unknown site 'lokal'", "did you mean 'local'?"])
            for command in ("status", "logs", "table", "report", "cancel", "explain", "simulate")
        ),
        (["explain", "quickstart:freeze=nnoe"], ["has no cell 'freeze=nnoe'", "did you mean 'freeze=none'?"]),
        (["logs", "quickstart"], ["there is no attempt", "moegrid run quickstart"]),
        (["run", "quickstart", "--max-gpu-hours", "x"], ["'x' is not a number of 0 or more"]),
        (["run", "quickstart", "--max-jobs", "-3"], ["--max-jobs", "'-3' is not a whole number"]),
        (["plan", "quickstart:freeze=none"], ["'quickstart:freeze=none' does not exist"]),
    ],
)
def test_mistakes_get_an_error_and_a_hint_but_no_traceback(
    capsys: pytest.CaptureFixture[str], words: list[str], parts: list[str]
) -> None:
    code, out, err = answer(capsys, *words)
    assert code == EXIT_USAGE
    assert out == ""
    for part in parts:
        assert part in err
    assert "Traceback" not in err


def test_a_store_that_cannot_be_written_is_exit_code_3(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    code, _, err = answer(capsys, "plan", "quickstart", "--store", str(file / "store"))
    assert code == EXIT_UNREACHABLE
    assert err.startswith("error: ")
    assert "hint: " in err


def test_plan_json_keeps_its_contract(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = answer(capsys, "plan", "finetune_freeze", "--json")
    plan: dict[str, Any] = json.loads(out)
    assert code == 0
    assert plan["grid"] == "finetune_freeze"
    assert set(plan["stages"]) == set(plan["train_steps"]) == {"shared", "unshared"}
    assert set(plan["actions"]) == {"run", "resume", "done", "blocked"}
    assert plan["stages"]["shared"] < plan["stages"]["unshared"]
    assert isinstance(plan["gpu_hours"], float)


def test_plan_exit_code_says_that_something_is_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(capsys, "plan", "quickstart", "--exit-code")[0] == EXIT_PENDING
    assert answer(capsys, "plan", "quickstart")[0] == 0


def test_overrides_may_stand_anywhere(capsys: pytest.CaptureFixture[str]) -> None:
    plans = [
        answer(capsys, "plan", "quickstart", "factors.seed=[0,1]", "--json")[1],
        answer(capsys, "plan", "quickstart", "--json", "factors.seed=[0,1]")[1],
        answer(capsys, "plan", "quickstart", "--json", "--set", "factors.seed=[0,1]")[1],
        answer(capsys, "plan", "quickstart", "--json", "--seeds", "0,1")[1],
    ]
    assert json.loads(plans[0])["cells"] == 6
    assert len(set(plans)) == 1


def test_status_json_keeps_its_contract(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = answer(capsys, "status", "quickstart", "--json")
    cells = json.loads(out)["cells"]
    assert code == 0
    assert len(cells) == 3
    wanted = {"id", "name", "factors", "state", "weights_sha256", "metrics", "attempts", "reason"}
    assert all(wanted <= cell.keys() for cell in cells)
    assert {cell["state"] for cell in cells} == {"pending"}


def test_a_scale_that_cannot_run_here_plans_but_does_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(capsys, "plan", "finetune_freeze", "--scale", "paper")[0] == 0
    code, _, err = answer(capsys, "run", "finetune_freeze", "--scale", "paper")
    assert code == EXIT_USAGE
    assert "cannot run at scale 'paper'" in err
    assert "hint: " in err


def test_export_wants_one_cell_that_is_done(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = answer(capsys, "export", "quickstart", str(tmp_path / "out"))
    assert (code, err.splitlines()[0][:24]) == (EXIT_USAGE, "error: 3 cells are meant")
    code, _, err = answer(capsys, "export", "quickstart:freeze=router", str(tmp_path / "out"))
    assert code == EXIT_USAGE
    assert "has no final state" in err
    assert "hint: moegrid run quickstart" in err


def test_explain_names_the_field_that_changed(capsys: pytest.CaptureFixture[str]) -> None:
    graph = build_graph(load_grid("quickstart"))
    Store.open(os.environ["MOEGRID_STORE"]).write_root("quickstart", root_digest(graph), root_document(graph))
    code, out, _ = answer(capsys, "explain", "quickstart:freeze=none", "--json", "set.finetune.lr=1e-5")
    assert code == 0
    (cell,) = json.loads(out)["cells"]
    assert [change["field"] for change in cell["changes"]] == ["finetune.lr"]
    assert cell["changes"][0]["new"] == 1e-5
    kept = {stage["label"]: stage["existed_before"] for stage in cell["stages"]}
    assert kept["pretrain 0-200 seed 0"]
    assert not kept["lm at 1"]


def test_diff_shows_changed_fields_alone(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = answer(capsys, "diff", "quickstart:freeze=none", "quickstart:freeze=router", "--json")
    assert code == 0
    assert [change["field"] for change in json.loads(out)] == ["finetune.freeze"]


def test_diff_of_grids_compares_cells_of_one_name_and_names_the_others(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    own = tmp_path / "own.yaml"
    own.write_text((ROOT / "grids/quickstart.yaml").read_text().replace("freeze: [none, router,", "freeze: [none,"))
    code, out, _ = answer(capsys, "diff", "quickstart", str(own), "--json")
    assert code == 0
    assert json.loads(out) == [{"cell": "freeze=router", "only_in": "quickstart"}]
    assert answer(capsys, "diff", "quickstart", "quickstart:freeze=none")[0] == EXIT_USAGE


def test_doctor_names_a_remedy_for_each_failure(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = answer(capsys, "doctor", "--json")
    checks = {check["name"]: check for check in json.loads(out)}
    assert checks["store"]["ok"]
    assert checks["python"]["ok"]
    (tmp_path / "file").write_text("")
    code, out, _ = answer(capsys, "doctor", "--json", "--store", str(tmp_path / "file"))
    broken = [check for check in json.loads(out) if not check["ok"]]
    assert code == EXIT_UNREACHABLE
    assert broken
    assert all(check["remedy"] for check in broken)


def test_gc_is_dry_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    answer(capsys, "plan", "quickstart")
    code, out, _ = answer(capsys, "gc")
    assert code == 0
    assert "nothing was changed" in out


def test_no_colour_where_nobody_sees_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert "\033" not in answer(capsys, "plan", "quickstart")[1]


def test_what_nobody_foresaw_is_no_traceback_either(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str) -> None:
        raise ZeroDivisionError("surprise")

    monkeypatch.setattr(cli, "command_function", broken)
    code, _, err = answer(capsys, "plan", "quickstart")
    assert code == 1
    assert "surprise" in err
    assert "Traceback" not in err
    with pytest.raises(ZeroDivisionError):
        cli.main(["plan", "quickstart", "--debug"])


PHASES = ("pretrain", "finetune", "evaluate")


@pytest.mark.parametrize("target", ["grid", "plan", "resume", "status", "report"])
def test_every_make_target_passes_options_that_its_command_takes(target: str) -> None:
    root = Path(__file__).resolve().parents[2]
    # Under `make test ARGS=...` make hands its own variables down.
    own = ("MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "ARGS")
    environment = {name: value for name, value in os.environ.items() if name not in own}
    made = subprocess.run(
        ["make", "-n", "-o", ".venv/.ready", target, "GRID=quickstart", "SEEDS=0,1", "NODES=2", "PROCESSES=4"],
        cwd=root, capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    command = next(line for line in made.stdout.splitlines() if "bin/moegrid" in line)
    arguments = cli.parse(command.split("bin/moegrid", 1)[1].split())
    assert (arguments.grid, arguments.site, arguments.seeds) == ("quickstart", "local", [0, 1])
    resources = grid_of(arguments).cells[0].cell.execution.resources
    assert [(resources[phase].nodes, resources[phase].processes) for phase in PHASES] == [(2, 4), (2, 4), (1, 1)]
