"""Grids that a store holds while their file is elsewhere, tables on a terminal, and what mistyped words answer."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from orchestrator import cli
from orchestrator.errors import EXIT_DONE, EXIT_FAILED, EXIT_USAGE
from orchestrator.report.collect import collect
from orchestrator.store import Store
from tests.grid_store import GridStore


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store with a finished grid `elsewhere`, of which no file is at hand."""
    monkeypatch.setenv("MOEGRID_STORE", str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)
    made = Store.open(str(tmp_path / "store"))
    GridStore(made, name="elsewhere", seeds=(0, 1)).commit_all()
    return made


def test_results_are_read_without_the_file_of_the_grid(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["table", "elsewhere", "--format", "csv"]) == EXIT_DONE
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    cells = collect("elsewhere", store).cells
    assert [(row["freeze"], row["seed"], row["answer_bpb"]) for row in rows] == [
        (cell.factors["freeze"], str(cell.seed), str(cell.metrics["answer_bpb"])) for cell in cells
    ]
    assert cli.main(["report", "elsewhere", "--output", "page/index.html"]) == EXIT_DONE
    assert "none-&gt;router" in Path("page/index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "words",
    [["status"], ["plan"], ["explain"], ["logs"], ["table", "--only", "freeze=none"], ["table", "--seeds", "0"]],
)
def test_what_needs_the_file_says_that_the_store_holds_results(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([words[0], "elsewhere", *words[1:]]) == EXIT_USAGE
    said = capsys.readouterr().err
    assert "the file of grid 'elsewhere' is not at hand" in said
    assert "table, report, compare and effects" in said


def test_a_grid_that_nobody_knows_is_unknown_as_before(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["table", "elsewhen"]) == EXIT_USAGE
    assert "grid 'elsewhen' does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("width", [48, 80, 200])
def test_the_table_fits_a_terminal_and_keeps_every_value(
    width: int, store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert cli.main(["table", "elsewhere", "--format", "terminal"]) == EXIT_DONE
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= width
    results = collect("elsewhere", store)
    words = text.split()
    for cell in results.cells:
        assert all(f"{cell.metrics[metric]:.4f}" in words for metric in results.metrics)
    assert set(results.metrics) <= set(words)


def test_cells_without_results_are_counted_by_their_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["table", "quickstart", "--format", "terminal"]) == EXIT_DONE
    assert "3 of 3 cells: not run yet" in capsys.readouterr().out
    assert cli.main(["report", "quickstart", "--output", "empty.html"]) == EXIT_DONE
    assert "nothing of it is measured yet: moegrid run quickstart" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plan", "quickstart", "factors.seed"], "a value is replaced by factors.seed=VALUE"),
        (["status", "quickstart", "--cell", "x"], "did you mean '--scale'?"),
        (["status", "quickstart", "--zzz"], "moegrid status --help explains"),
        (["plan", "quickstart", "--only", ""], "--only '': no cell has this id"),
        (["data", "list", "file:///some.jsonl"], "moegrid data show file:///some.jsonl shows one"),
        (["plan", "folder.yaml"], "grid file 'folder.yaml' is no file"),
    ],
)
def test_a_mistyped_word_is_answered_by_what_is_meant(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("folder.yaml").mkdir()
    assert cli.main(words) == EXIT_USAGE
    assert said in capsys.readouterr().err


def test_a_report_is_told_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["report", "elsewhere"]) == EXIT_DONE
    assert "report: store/reports/elsewhere/index.html\n" in capsys.readouterr().out
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    assert cli.main(["report", "elsewhere"]) == EXIT_DONE
    assert f"report: {tmp_path / 'store'}/reports/elsewhere/index.html\n" in capsys.readouterr().out


def test_a_page_that_cannot_be_written_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    Path("taken").write_text("a file\n")
    assert cli.main(["report", "elsewhere", "--output", "taken/page/index.html"]) == EXIT_FAILED
    said = capsys.readouterr().err
    assert "error: taken" in said
    assert "check this path" in said
    assert "moegrid itself failed" not in said


def test_errors_fit_the_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert cli.main(["plan", "no_grid_of_this_project"]) == EXIT_USAGE
    lines = capsys.readouterr().err.splitlines()
    assert max(map(len, lines)) <= 60
    assert "quickstart" in " ".join(lines)
