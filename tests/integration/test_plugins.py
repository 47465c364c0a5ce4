"""A grid with a plugin file, run as a user runs it: its content is in the keys, its text on the node."""

from __future__ import annotations

import json
from pathlib import Path

from orchestrator.store import Store
from tests.small_grid import GRID, made_up_text, moegrid

# A kind of its own, whose name every model of the grid uses.
PLUGIN = """
from dataclasses import dataclass
from orchestrator.registry import REGISTRIES, Registry

@dataclass(frozen=True)
class Shape:
    name: str

SHAPES = REGISTRIES.get("shapes") or Registry("shapes", "backbone", Shape, {})
KIND = SHAPES.kind
OLMOE = KIND("olmoe")
"""


def test_a_grid_with_a_plugin_file_runs_on_nodes_that_have_only_its_submission(tmp_path: Path) -> None:
    made_up_text(tmp_path)
    grid, store = tmp_path / "small.yaml", tmp_path / "store"
    grid.write_text(GRID.format(at="[1.0]", folder=tmp_path))
    words = ("--store", str(store), "--tracking", "none", "factors.freeze=[none]")
    plain = json.loads(moegrid("plan", str(grid), *words, "--json"))
    assert plain["plugins"] == []

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "shapes.py").write_text(PLUGIN)
    grid.write_text(f"plugins: [mine/shapes.py]\n{grid.read_text()}")
    shown = "".join(use["shown"] for use in json.loads(moegrid("plan", str(grid), *words, "--json"))["plugins"])
    assert shown.startswith("shapes.py ")
    assert "(shapes: olmoe)" in shown
    moegrid("run", str(grid), *words)

    opened = Store.peek(str(store))
    manifests = opened.artifacts.many(opened.artifacts.keys())
    use = {"init", "train", "evaluate"}
    for manifest in manifests.values():
        told = manifest.provenance.get("plugins", [])
        assert [one["provider"] for one in told] == (["shapes.py"] if manifest.kind in use else [])
    assert json.loads(moegrid("plan", str(grid), *words, "--json"))["actions"]["run"] == 0

    (tmp_path / "mine" / "shapes.py").write_text(PLUGIN + "# another version\n")
    again = json.loads(moegrid("plan", str(grid), *words, "--json"))
    prepared = sum(manifest.kind not in use for manifest in manifests.values())
    stages = sum(plain["actions"].values())
    assert again["actions"] == {"run": stages - prepared, "resume": 0, "done": prepared, "blocked": 0}

    (tmp_path / "mine" / "shapes.py").unlink()
    moegrid("plan", str(grid), *words, code=2)
