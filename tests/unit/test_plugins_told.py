"""What tables, tracker and doctor say of packages and plugin files: which version, several at once, what is broken."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import pytest

from orchestrator import cli, registry
from orchestrator.commands.installed import packages
from orchestrator.registry import Origin
from orchestrator.report import facts, html, tables
from orchestrator.report.collect import Results, collect
from orchestrator.spec.providers import Use
from orchestrator.store import Store, records
from orchestrator.tracking.tracker import project
from tests.grid_store import GridStore
from tests.unit.test_registry import site  # noqa: F401 (a fixture)


def made_with(*versions: str) -> Results:
    """Return a grid whose cells were made with these versions of a package, "" for none; its base with none."""
    grid = GridStore(Store.open(f"memory://{uuid.uuid4().hex}"), settings=("none", "router"), seeds=(0,))
    grid.commit(grid.base)
    for cell, version in zip(grid.cells, versions, strict=True):
        use = Use(Origin("noisy-routers", version), {"routers": ("noisy",)}).to_json()
        for stage in cell["stages"][1:]:
            grid.commit(stage, plugins=[use] if version else [])
    return collect(grid.name, grid.store)


def test_a_table_of_our_own_parts_says_nothing_of_plugins() -> None:
    results = made_with("", "")
    assert all("plugins" not in row for row in tables.long_rows(results))
    assert "plugins" not in " ".join(tables.headline(results).notes)
    assert "plugins" not in facts.provenance(results)


def test_a_table_says_which_plugin_and_version_made_each_row() -> None:
    results = made_with("1.2", "")
    assert [row["plugins"] for row in tables.long_rows(results)] == ["noisy-routers 1.2", ""]
    notes = tables.headline(results).notes
    assert "plugins: noisy-routers 1.2 (routers: noisy)" in notes
    assert not [note for note in notes if "mixes" in note]
    assert "<dt>plugins</dt><dd>noisy-routers 1.2 (routers: noisy)</dd>" in html.page(results)


def test_rows_of_several_versions_are_told() -> None:
    results = made_with("1.2", "1.3")
    said = (
        "this table mixes versions: noisy-routers 1.2 in freeze=none seed=0 | noisy-routers 1.3 in freeze=router seed=0"
    )
    assert said in tables.headline(results).notes
    assert said in facts.provenance(results)


def test_the_tracker_shows_the_plugins_of_a_run() -> None:
    results = made_with("1.2", "")
    documents = records.documents(results.store, results.name)
    runs = project(documents, results.manifests, [], {})
    shown = {run.tags.get("plugins", "") for run in runs}
    assert shown == {"", "noisy-routers 1.2"}


LOSSES = """
from orchestrator.catalog.losses import LossKind
GOOD = LossKind("mean_logit", code="paints:loss")
AWAY = LossKind("away", code="paints:no_such")
OURS = LossKind("z", code="paints:loss")
def loss(routing): return routing.logits.mean()
"""


def install(folder: Path, name: str, version: str, entry_points: str) -> None:
    information = folder / f"{name}-{version}.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (information / "entry_points.txt").write_text(entry_points)


def test_doctor_lists_what_installed_packages_provide_and_what_is_broken(
    site: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(registry.REGISTRIES["losses"], "outside", {})
    losses = "mean_logit = paints:GOOD\naway = paints:AWAY\nz = paints:OURS\nlost = paints:NO\n"
    install(site, "paints", "1.2", f"[moegrid.losses]\n{losses}[moegrid.los]\nx = paints:GOOD\n")
    install(site, "other-paints", "3", "[moegrid.losses]\nx = no_such_module:X\n")
    (site / "paints.py").write_text(LOSSES)
    found = {package.name: package for package in packages() if package.name.endswith("paints")}
    assert str(found["paints"]) == "1.2 (losses: mean_logit)"
    said = " | ".join(f"{wrong} -> {remedy}" for wrong, remedy in found["paints"].broken)
    assert "entry points moegrid.los mean nothing -> did you mean 'losses'?" in said
    assert "the code of loss 'away' is paints:no_such: paints has no no_such" in said
    assert "loss 'z' is never used: moegrid has one of that name" in said
    assert "loss 'lost' cannot be loaded from paints 1.2" in said
    assert str(found["other-paints"]) == "3 (nothing that works)"
    cli.main(["doctor", "--json", "--store", str(tmp_path / "store"), "--tracking", "none"])
    checks = [check for check in json.loads(capsys.readouterr().out) if check["name"] == "plugin paints"]
    assert [check["ok"] for check in checks] == [True, False, False, False, False]
    assert all(check["remedy"] for check in checks[1:])
