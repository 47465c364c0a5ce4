"""Real grids of real jobs through the command line, on made-up text: equal bits whatever way they were made."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

GRID = """
name: small
description: two schedules on a very small model
base: finetune
factors: {{freeze: [none, none->router]}}
baseline: {{freeze: none}}
evaluate: [lm]
at: {at}
set:
  model: {{hidden_size: 32, num_layers: 2, num_heads: 2, num_kv_heads: 2, active_width: 32}}
  model.moe: {{top_k: 2, num_experts: 4}}
  tokenizer.vocab_size: 300
  evaluate.val_tokens: 2048
  pretrain: {{steps: 6, micro_batch: 2, sequence_length: 64}}
  pretrain.data: {{source: "file://{folder}/text.jsonl", holdout: 0.2}}
  finetune: {{steps: 8, micro_batch: 2, accumulation: 1, sequence_length: 64}}
  finetune.data: {{source: "file://{folder}/examples.jsonl", holdout: 0.2}}
  execution.checkpoint_steps: 1
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of made-up text."""
    made = tmp_path_factory.mktemp("data")
    chance = random.Random(0)
    words = [f"{a}{b}{c}" for a in "bdfgklm" for b in "aeiou" for c in "nrst"]

    def sentence() -> str:
        return " ".join(chance.choices(words, k=12)) + "."

    text = [{"text": " ".join(sentence() for _ in range(12))} for _ in range(60)]
    examples = [{"prompt": sentence(), "response": sentence()} for _ in range(120)]
    (made / "text.jsonl").write_text("\n".join(map(json.dumps, text)))
    (made / "examples.jsonl").write_text("\n".join(map(json.dumps, examples)))
    return made


def moegrid(*arguments: str, code: int = 0) -> str:
    """Run a command, check its exit code, return stdout."""
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", *arguments], capture_output=True, text=True, timeout=400
    )
    assert done.returncode == code, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def weights(grid: Path, store: Path) -> dict[str, Any]:
    """Return cell name -> (digest of the final weights, metrics)."""
    cells = json.loads(moegrid("status", str(grid), "--store", str(store), "--json"))["cells"]
    assert all(cell["state"] == "done" for cell in cells)
    return {cell["name"]: (cell["weights_sha256"], cell["metrics"]) for cell in cells}


@pytest.fixture(scope="module")
def shared(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """The grid run once, undisturbed."""
    grid = folder / "small.yaml"
    grid.write_text(GRID.format(at="[1.0]", folder=folder))
    store = tmp_path_factory.mktemp("shared") / "store"
    moegrid("run", str(grid), "--store", str(store), "--tracking", "none")
    return grid, store, weights(grid, store)


def test_no_sharing_ends_with_the_same_bits(shared: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> None:
    grid, _, expected = shared
    store = tmp_path / "store"
    moegrid("run", str(grid), "--store", str(store), "--tracking", "none", "--no-share", "--no-report")
    found = json.loads(moegrid("status", str(grid), "--store", str(store), "--no-share", "--json"))["cells"]
    assert {cell["name"]: (cell["weights_sha256"], cell["metrics"]) for cell in found} == expected


def test_more_fractions_and_kills_end_with_the_same_bits(
    shared: tuple[Path, Path, dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    _, _, expected = shared
    grid = folder / "small_at.yaml"
    grid.write_text(GRID.format(at="[0.25, 0.5, 1.0]", folder=folder))
    store = tmp_path / "store"
    command = [sys.executable, "-m", "orchestrator", "run", str(grid), "--store", str(store), "--tracking", "none"]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    wait_for_training(store, driver)
    driver.kill()
    driver.wait()
    for pid in jobs_of(store):
        os.kill(pid, signal.SIGKILL)
    moegrid("resume", str(grid), "--store", str(store), "--tracking", "none", "--no-report")
    assert {name: digest for name, (digest, _) in weights(grid, store).items()} == {
        name: digest for name, (digest, _) in expected.items()
    }


def test_a_second_run_starts_nothing(shared: tuple[Path, Path, dict[str, Any]]) -> None:
    grid, store, _ = shared
    before = sorted(path.name for path in (store / "submissions").iterdir())
    said = moegrid("plan", str(grid), "--store", str(store), "--json", "--exit-code")
    assert json.loads(said)["actions"]["run"] == 0
    moegrid("run", str(grid), "--store", str(store), "--tracking", "none")
    assert sorted(path.name for path in (store / "submissions").iterdir()) == before


def test_a_changed_factor_runs_only_what_depends_on_it(shared: tuple[Path, Path, dict[str, Any]]) -> None:
    grid, store, _ = shared
    arguments = [str(grid), "factors.freeze=[none,router]", "--store", str(store), "--json"]
    phases = {row["phase"]: row["actions"] for row in json.loads(moegrid("plan", *arguments))["phases"]}
    assert phases["prepare"]["run"] == phases["pretrain"]["run"] == 0
    assert (phases["finetune"]["run"], phases["evaluate"]["run"]) == (1, 1)


def jobs_of(store: Path) -> list[int]:
    """Return the pids of the jobs that work on `store`."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            line = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
        except OSError:
            continue
        if b"jobs.run" in line and str(store).encode() in line:
            found.append(int(entry.name))
    return found


def wait_for_training(store: Path, driver: subprocess.Popen[bytes]) -> None:
    """Return when a fine-tuning job has begun to take steps."""
    for _ in range(2400):
        for path in store.glob("attempts/*/heartbeat.json"):
            beat = json.loads(path.read_text() or "{}")
            if beat.get("step", 0) >= 1 and str(beat.get("label", "")).startswith("finetune"):
                return
        assert driver.poll() is None, "the run ended before it could be killed"
        time.sleep(0.05)
    pytest.fail("no fine-tuning began")
