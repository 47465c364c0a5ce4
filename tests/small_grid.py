"""A real grid of a very small model on made-up text, the command line that runs it, and the freeze schedules."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.backends import host
from tests.lab_slurm import eventually

# The published freeze schedules, in the papers' order.
SCHEDULES = (
    "none",
    "expert",
    "router",
    "expert->router",
    "router->expert",
    "expert->none",
    "router->none",
    "none->expert",
    "none->router",
)

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


def made_up_text(folder: Path) -> Path:
    """Write text.jsonl and examples.jsonl into `folder` and return it."""
    chance = random.Random(0)
    words = [f"{a}{b}{c}" for a in "bdfgklm" for b in "aeiou" for c in "nrst"]

    def sentence() -> str:
        return " ".join(chance.choices(words, k=12)) + "."

    text = [{"text": " ".join(sentence() for _ in range(12))} for _ in range(60)]
    examples = [{"prompt": sentence(), "response": sentence()} for _ in range(120)]
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, text)))
    (folder / "examples.jsonl").write_text("\n".join(map(json.dumps, examples)))
    return folder


def moegrid(*arguments: str, code: int = 0) -> str:
    """Run a command, check its exit code, return stdout."""
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", *arguments], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == code, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def weights(grid: Path, store: Path, *words: str) -> dict[str, Any]:
    """Return cell name -> (digest of the final weights, metrics)."""
    cells = json.loads(moegrid("status", str(grid), "--store", str(store), "--json", *words))["cells"]
    assert all(cell["state"] == "done" for cell in cells)
    return {cell["name"]: (cell["weights_sha256"], cell["metrics"]) for cell in cells}


def jobs_of(store: Path) -> list[int]:
    """Return the pids of the jobs that work on `store` here, and of what they started.

    By their records: a job that a warm process forked bears that process' command line.
    """
    found = []
    for path in (host.run_directory(make=False) / "jobs").glob("*.json"):
        try:
            if json.loads(path.read_text())["store"] != str(store):
                continue
            stat = path.with_suffix(".pid").read_text()
            job = psutil.Process(int(stat.split(maxsplit=1)[0]))
            if host.alive(job.pid, stat.rpartition(")")[2].split()[19]) and not host.is_zombie(job.pid):
                found += [job.pid, *(child.pid for child in job.children(recursive=True))]
        except (OSError, IndexError, psutil.NoSuchProcess):
            continue  # it has ended meanwhile
    return found


def wait_for_training(store: Path, driver: subprocess.Popen[bytes]) -> None:
    """Return when a fine-tuning job has begun to take steps."""
    end = time.monotonic() + 900
    while time.monotonic() < end:
        for path in store.glob("attempts/*/heartbeat.json"):
            beat = json.loads(path.read_text() or "{}")
            if beat.get("step", 0) >= 1 and str(beat.get("label", "")).startswith("finetune"):
                return
        assert driver.poll() is None, "the run ended before it could be killed"
        time.sleep(0.05)
    pytest.fail("no fine-tuning began")


def states(store: Path, phase: str) -> list[int]:
    """Return the steps of a phase's committed states."""
    manifests = [json.loads(path.read_text()) for path in store.glob("artifacts/*.json")]
    return [m["info"]["step"] for m in manifests if m["info"].get("phase") == phase]


def lose_power(grid: Path, store: Path, phase: str, steps: int, *words: str, later: float = 0.0) -> None:
    """Run the grid here until `phase` has a state and `later` seconds more, lose driver and jobs before `steps`."""
    command = [sys.executable, "-m", "orchestrator", "run", str(grid), "--store", str(store), "--tracking", "none"]
    driver = subprocess.Popen([*command, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        eventually(lambda: states(store, phase) or driver.poll() is not None, 900, pause=0.02)
        time.sleep(later)
    finally:
        driver.kill()
        driver.wait()
        while pids := jobs_of(store):  # one may have been forked a moment ago
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    assert steps not in states(store, phase)
