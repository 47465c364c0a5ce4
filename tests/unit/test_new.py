"""`moegrid new`: a plugin with a test that passes as it stands, which a grid can use; nothing is overwritten."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import moegrid.extend
import pytest

from orchestrator import catalog, cli
from orchestrator.commands.new import KINDS, TEMPLATES
from orchestrator.registry import REGISTRIES
from tests.small_grid import moegrid as command

# How a grid uses what was written.
USED = {
    "router": "plugins: [./mine]\nset: {model.moe.preset: mine, model.moe.parameters: {scale: 2}}",
    "task": "plugins: [./mine]\nset: {evaluate.tasks: {mine: {}}}",
    "suite": "plugins: [./mine.py]\nset: {evaluate.suite_parameters: {mine: {power: 1}}}",
    "metric": "plugins: [./mine.py]\nset: {evaluate.metrics: {mine: {threshold: 0.9}}}",
    "loss": "plugins: [./mine.py]\nset: {finetune.balance.losses: {mine: {coef: 0.01, power: 3}}}",
}


def test_every_kind_has_a_template_and_what_packages_import_is_named() -> None:
    catalog.load_all()
    assert {path.name for path in TEMPLATES.iterdir()} == set(KINDS) == set(USED)
    assert set(KINDS.values()) <= set(REGISTRIES)
    for name, module in {**moegrid.extend.KINDS, **moegrid.extend.CODE}.items():
        found = getattr(moegrid.extend, name)
        assert getattr(found, "__module__", module).split(".")[0] == module.split(".")[0]
    kinds = {one.kind.__name__ for one in REGISTRIES.values() if one.kind.__module__.startswith("orchestrator.")}
    assert kinds == set(moegrid.extend.KINDS)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        moegrid.extend.Nothing  # noqa: B018


def test_what_declarations_import_brings_no_torch() -> None:
    code = "import sys; from moegrid.extend import LossKind; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_passes_its_test_and_is_used_by_a_grid(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["new", kind, "mine", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert f"next: python -m pytest {tmp_path}/test_mine.py" in said
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    suites = ", ".join(["lm", "probe", "reasoning", *(["mine"] if kind == "suite" else [])])
    grid = f"base: finetune\nfactors: {{seed: [0]}}\nevaluate: [{suites}]\n{USED[kind]}\n"
    (tmp_path / "grid.yaml").write_text(grid)
    plan = json.loads(command("plan", str(tmp_path / "grid.yaml"), "--store", str(tmp_path / "store"), "--json"))
    (use,) = plan["plugins"]
    assert use["names"] == {KINDS[kind]: ["mine"]}


def test_nothing_is_overwritten_and_names_are_checked_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test_mine.py").write_text("mine")
    for words, said in (
        (("loss", "mine"), "test_mine.py exists already"),
        (("loss", "z"), "there is a loss 'z' already"),
        (("loss", "no-name"), "'no-name' cannot be the name of a loss"),
        (("loss", "class"), "'class' cannot be the name of a loss"),
        (("loos", "mine"), "did you mean 'loss'?"),
    ):
        assert cli.main(["new", *words, str(tmp_path)]) == 2
        assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["test_mine.py"]
