"""Answers go to stdout and fit the terminal; the dashboard answers its own address alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator import cli
from orchestrator.commands import simulate
from orchestrator.commands.dashboard import open_server
from orchestrator.commands.examples import EXAMPLES
from orchestrator.errors import MoegridError
from orchestrator.plan.answers import Answer, Held
from orchestrator.report import formats, html, tables
from orchestrator.report.collect import collect
from orchestrator.store import Store
from orchestrator.ui.console import columns, table, wrapped
from tests.grid_store import GridStore


@pytest.fixture(autouse=True)
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEGRID_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("MOEGRID_TRACKING", "none")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "words", [("plan", "quickstart"), ("status", "quickstart"), ("explain", "quickstart"), ("gc",), ("doctor",)]
)
def test_what_a_reading_command_says_is_its_output(capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> None:
    cli.main(list(words))
    out, err = capsys.readouterr()
    assert out.strip()
    assert not err.strip() or err.startswith("there is no store")


def test_json_stays_alone_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["plan", "quickstart", "--json"])
    assert capsys.readouterr().out.lstrip().startswith("{")


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    command = f"{sys.executable} -m orchestrator plan quickstart | head -n 1"
    root = Path(cli.__file__).resolve().parents[1]
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=root,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert done.stdout.startswith("quickstart at scale tiny")
    assert done.stderr == ""
    assert done.returncode == 0


@pytest.mark.parametrize("width", [80, 120, 200])
def test_tables_fit_the_terminal_and_keep_every_value(width: int) -> None:
    store = Store.open(f"memory://{uuid.uuid4().hex}")
    GridStore(store, settings=("none", "a_schedule_" * 9), tasks=[f"task_{i}" for i in range(12)]).commit_all()
    table = tables.headline(collect("demo", store))
    text = formats.terminal(table, width)
    assert max(map(len, text.splitlines())) <= width
    whole = formats.terminal(table)
    assert max(map(len, whole.splitlines())) > 200
    assert all(entry.text in text for _, entries in table.rows for entry in entries)
    assert all(column in text for column in table.columns)


@pytest.mark.parametrize("width", [0, 20, 80, 120])
def test_a_sentence_is_broken_at_spaces_and_loses_nothing(width: int) -> None:
    text = "  \033[33m!\033[0m model.moe.z_after_temperature: true  changes nothing: " + "a few words " * 20
    lines = wrapped(text, width)
    assert " ".join(" ".join(lines).split()) == " ".join(text.split())
    bare = [re.sub("\033\\[[0-9]*m", "", line) for line in lines]
    assert all(len(line) <= width or len(line.split()) == 1 for line in bare) or not width
    assert lines[0].startswith("  \033[33m!")
    assert all(line.startswith("      ") for line in lines[1:])
    assert len(lines) == 1 or width
    assert wrapped("", width) == [""]


def test_a_number_is_not_parted_from_its_unit() -> None:
    assert wrapped("  the longest chain takes 7 min 20 s of it", 34) == [
        "  the longest chain takes",
        "      7 min 20 s of it",
    ]


@pytest.mark.parametrize("width", [80, 120, 200])
@pytest.mark.parametrize(
    "words",
    [
        "plan libmoe_algorithms",
        "status pretrain_regularisation",
        "status upcycle_recipes",
        "explain quickstart",
        "diff quickstart libmoe_shared_start",
        "data list",
        "paper",
    ],
)
def test_what_is_read_fits_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert cli.main(words.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    # A word that is longer than the line stays whole, and so does a command that is to be copied.
    assert [line for line in lines if len(line) > width and len(line.split()) > 1 and "moegrid run" not in line] == []


def test_a_row_that_is_wider_than_the_terminal_goes_on_below_and_loses_nothing() -> None:
    red = "\033[31mfailed\033[0m"
    why = "the loss is not finite at all, in no cell"
    rows = [["cell", "state", "tries", "why"], ["granularity=2/8 seed=0", red, "12", why]]
    head, row = table(rows, right=(2,), width=36)
    assert head == ["cell                    state", "    tries  why"]
    assert row[0] == f"granularity=2/8 seed=0  {red}"
    assert row[1:] == ["       12  the loss is not finite at", "           all, in no cell"]
    assert table(rows, right=(2,)) == [
        ["cell                    state   tries  why"],
        [f"granularity=2/8 seed=0  {red}     12  {why}"],
    ]
    assert columns([["", "a"], [red, "b"]]) == ["        a", f"{red}  b"]
    assert columns([]) == []


@pytest.mark.parametrize("width", [80, 120, 200])
def test_a_simulation_fits_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int
) -> None:
    held = {"step": Held(90 * 10**9, dict.fromkeys(("weights", "gradients", "activations", "logits"), 9 * 10**9))}
    known = Answer(6919 * 10**6, held, 200 * 10**9, ((10**13, 10**9, "torch.bfloat16", 1),), (("sum", 10**9, 3),))
    monkeypatch.setattr(simulate, "known_answer", lambda question: known)
    monkeypatch.setattr("orchestrator.plan.simulation.remedy", lambda *asked: ("set.execution.engine=fsdp",))
    monkeypatch.setenv("COLUMNS", str(width))
    assert cli.main(["simulate", "finetune_freeze", "--scale", "paper"]) == 1
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= width
    assert "deepseek_moe 6/64+2 finetune (6.92G)" in out
    assert "GPU-hours" in " ".join(out.split())


def test_two_grids_without_a_common_cell_are_compared_by_their_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["diff", "quickstart", "finetune_freeze"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("no cell is in both")
    assert "model.hidden_size: 96 -> 128" in out
    assert "only in" not in out


def test_every_command_has_examples_and_shows_how_values_are_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    parser = cli.build_parser()
    commands = next(a.choices for a in parser._actions if a.dest == "command")
    assert commands is not None
    for name in commands:
        with pytest.raises(SystemExit):
            cli.main([name, "--help"])
        text = capsys.readouterr().out
        assert "examples:\n  moegrid" in text, name
        assert all(example.startswith(f"moegrid {name}") for example in EXAMPLES[name])
        assert ("GRID" not in text.splitlines()[0]) or "KEY=VALUE" in text or name in ("diff", "compare", "effects"), (
            name
        )


def test_a_budget_of_core_hours_refuses_a_plan_that_needs_more(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "quickstart", "--max-core-hours", "0.0001"]) == 2
    assert "core-hours, more than --max-core-hours 0.0001" in capsys.readouterr().err


def test_an_empty_grid_file_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.yaml").write_text("")
    assert cli.main(["plan", str(tmp_path / "empty.yaml")]) == 2
    err = capsys.readouterr().err
    assert "the file is empty" in err
    assert "moegrid init" in err


@pytest.fixture
def served() -> Iterator[tuple[str, list[int]]]:
    made: list[int] = []

    def page() -> str:
        made.append(1)
        return "<p>page</p>"

    server = open_server(page, "secret", 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", made
    server.shutdown()
    server.server_close()


def code_of(address: str, host: str = "") -> tuple[int, str]:
    request = urllib.request.Request(address, headers={"Host": host} if host else {})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_the_dashboard_answers_its_token_and_name_alone(served: tuple[str, list[int]]) -> None:
    address, made = served
    assert code_of(f"{address}/?token=secret") == (200, "<p>page</p>")
    assert code_of(f"{address}/?token=secret")[0] == 200
    assert len(made) == 1, "looking twice makes it once"
    assert code_of(f"{address}/")[0] == 403
    assert code_of(f"{address}/?token=other")[0] == 403
    assert code_of(f"{address}/?token=secret", host="evil.example:80")[0] == 403
    assert code_of(f"{address}/etc/passwd?token=secret")[0] == 404
    with pytest.raises(MoegridError, match="cannot be used"):
        open_server(lambda: "", "t", int(address.rpartition(":")[2]))


def test_a_live_page_loads_itself_again_until_all_is_done() -> None:
    store = Store.open(f"memory://{uuid.uuid4().hex}")
    grid = GridStore(store, seeds=(0,))
    grid.commit(grid.base)
    assert 'http-equiv="refresh"' in html.page(collect("demo", store), live=True)
    grid.commit_all()
    assert 'http-equiv="refresh"' not in html.page(collect("demo", store), live=True)


def test_comparing_a_grid_that_nobody_ran_names_those_that_were(capsys: pytest.CaptureFixture[str]) -> None:
    GridStore(Store.open(os.environ["MOEGRID_STORE"])).commit_all()
    assert cli.main(["compare", "demo", "deno"]) == 2
    assert "did you mean 'demo'?" in capsys.readouterr().err
    assert cli.main(["compare", "demo", "something_else"]) == 2
    err = capsys.readouterr().err
    assert "moegrid run" not in err
    assert "grids that were run" in err
    Path("grids").mkdir()
    Path("grids/my_own.yaml").write_text("base: finetune\n")
    assert cli.main(["compare", "demo", "my_own"]) == 2
    assert "hint: run it first: moegrid run my_own" in capsys.readouterr().err
