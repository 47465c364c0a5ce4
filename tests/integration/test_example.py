"""The example package, installed as a user installs it: one grid uses every name of it, and nothing is edited."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.store import Store
from tests.small_grid import made_up_text, moegrid

EXAMPLE = Path(__file__).parents[2] / "examples" / "moegrid-example"
SMALL = """
set.model={{hidden_size: 32, num_layers: 2, num_heads: 2, num_kv_heads: 2, active_width: 32}}
set.model.moe={{top_k: 2, num_experts: 4}}
set.evaluate.tasks={{arc_easy: false, arc_challenge: false, piqa: false}}
set.tokenizer.vocab_size=300
set.evaluate.val_tokens=2048
set.pretrain={{steps: 6, micro_batch: 2, sequence_length: 64}}
set.pretrain.data={{source: "file://{folder}/text.jsonl", holdout: 0.2}}
set.finetune={{steps: 8, micro_batch: 2, accumulation: 1, sequence_length: 64}}
set.finetune.data={{source: "file://{folder}/examples.jsonl", holdout: 0.2}}
"""


# What manifests name of it; backend and tracker belong to no result.
STAGES = {
    "freezing": {"lower_half"},
    "losses": {"evenness"},
    "metrics": {"sure_tokens"},
    "optimizers": {"lion"},
    "routers": {"scaled"},
    "tasks": {"riddles"},
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The package in a folder of its own on the path of this process's children."""
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--target", str(site), str(EXAMPLE)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join((str(site), os.environ.get("PYTHONPATH", ""))).strip(os.pathsep))
        yield site


def test_a_grid_runs_with_every_name_of_the_package(installed: Path, tmp_path: Path) -> None:
    folder = made_up_text(tmp_path)
    site, wall = tmp_path / "site.yaml", tmp_path / "wall"
    site.write_text((EXAMPLE / "site.yaml").read_text().replace("folder: .", f"folder: {tmp_path}"))
    words = [str(EXAMPLE / "grid.yaml"), "--store", str(tmp_path / "store"), "--site", str(site)]
    words += ["--tracking", f"lines://{wall}", *SMALL.format(folder=folder).strip().splitlines()]
    (use,) = json.loads(moegrid("plan", *words, "--json"))["plugins"]
    assert use["shown"].startswith("moegrid-example 0.1.0 (")
    assert {group: set(names) for group, names in use["names"].items()} == {
        **STAGES,
        "backends": {"processes"},
        "trackers": {"lines"},
    }
    moegrid("run", *words)

    rows = json.loads(moegrid("table", *words, "--json"))
    assert [row["state"] for row in rows] == ["done", "done"]
    assert all(row["plugins"] == "moegrid-example 0.1.0" for row in rows)
    assert all(0 <= row[name] <= 1 for row in rows for name in ("sure_tokens", "riddles/acc"))
    store = Store.peek(str(tmp_path / "store"))
    used: dict[str, set[str]] = {}
    for manifest in store.artifacts.many(store.artifacts.keys()).values():
        for told in manifest.provenance.get("plugins", []):
            for group, names in told["names"].items():
                used.setdefault(group, set()).update(names)
    assert used == STAGES
    submissions = [json.loads(path.read_text()) for path in (tmp_path / "store" / "submissions").glob("*.json")]
    assert {one["backend"] for one in submissions} == {"processes"}
    assert any("train/loss_evenness" in json.loads(path.read_text())["points"] for path in wall.glob("example.*.json"))


def test_doctor_lists_what_it_provides(installed: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "orchestrator", "doctor", "--json", "--store", str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    (check,) = [one for one in json.loads(done.stdout) if one["name"] == "plugin moegrid-example"]
    assert check["ok"]
    for names in ("losses: evenness", "metrics: sure_tokens", "optimizers: lion", "trackers: lines"):
        assert names in check["found"]
