"""A thousand trivial stages through SLURM: what a submission and a tick of the engine cost.

    python benchmarks/slurm.py [--stages 1000] [--to-the-end]

Starts the lab of infra/slurm (root and its packages needed) and submits the stages through the real engine, as one
driver would, beside a bare `sbatch --array` of equally many tasks. Prints the ratio of the two, and how often the
scheduler was asked in a tick while the jobs wait, while they run (`--to-the-end`: they run as processes that commit
to a store), and after they ended.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import gc
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
LAB = ROOT / "infra/slurm/lab.sh"
GRID = """
name: thousand
description: equal stages that need nothing
base: finetune
factors: {{rows: [{rows}]}}
evaluate: [lm]
set:
  finetune.data.source: "file://{folder}/examples.jsonl"
  pretrain.data.source: "file://{folder}/examples.jsonl"
"""
ROUNDS = 5
RAW = "#!/bin/bash\n#SBATCH --array=0-{last} --mem=128M --time=5 --hold --output=/dev/null\nexec true\n"


def main() -> None:
    """Bring the lab up, measure, bring it down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", type=int, default=1000)
    parser.add_argument("--to-the-end", action="store_true", help="let the jobs run")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="moegrid-slurm-"))
    folder.chmod(0o755)
    os.environ["MOEGRID_LAB"] = str(folder)
    os.environ["SLURM_CONF"] = str(folder / "slurm/slurm.conf")
    try:
        answer = subprocess.run([str(LAB), "up"], capture_output=True, text=True, check=False)
        if answer.returncode:
            print(f"skipped: {answer.stderr.strip()}")
            return
        measure(folder, options.stages, run=options.to_the_end)
    finally:
        subprocess.run([str(LAB), "down", "--wipe"], capture_output=True, check=False)
        shutil.rmtree(folder, ignore_errors=True)


def measure(folder: Path, count: int, *, run: bool) -> None:
    """Print submission against sbatch, and calls per tick."""
    from orchestrator.backends import slurm_records
    from orchestrator.backends.slurm import SlurmBackend
    from orchestrator.backends.slurm_script import SlurmSite
    from orchestrator.engine.loop import Engine, Options
    from orchestrator.grid.load import load_grid
    from orchestrator.plan.graph import build_graph
    from orchestrator.plan.stage import CellStages
    from orchestrator.store import Store

    calls: collections.Counter[str] = collections.Counter()
    real = slurm_records.call

    def counted(command: Sequence[str], **arguments: Any) -> str:
        calls[command[0]] += 1
        return real(command, **arguments)

    slurm_records.call = counted
    (folder / "examples.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    grid = folder / "thousand.yaml"
    grid.write_text(GRID.format(rows=", ".join(map(str, range(1, count + 1))), folder=folder))
    whole = build_graph(load_grid(str(grid)))
    roots = {key: stage for key, stage in whole.stages.items() if not stage.parents}
    cells = {
        name: CellStages(own, own[-1].key, ())
        for name, cell in whole.cells.items()
        if (own := tuple(stage for stage in cell.stages if stage.key in roots))
    }
    graph = dataclasses.replace(whole, stages=roots, cells=cells, _children={})
    gc.freeze()  # as the command line does after planning
    raw = folder / "raw.sh"
    raw.write_text(RAW.format(last=count - 1))
    program = (sys.executable, str(ROOT / "tests/faults/fake_job.py"))

    def timed(action: Callable[[], object]) -> float:
        begin = time.perf_counter()
        action()
        return time.perf_counter() - begin

    bare: list[float] = []
    submitted: list[float] = []
    ticks: list[float] = []
    for index in range(ROUNDS):
        bare.append(timed(lambda: subprocess.run(["sbatch", str(raw)], check=True, capture_output=True)))
        backend = SlurmBackend(SlurmSite(options={"hold": True}), log_directory=folder / "logs", program=program)
        backend.submit = partial(_timed_into, submitted, backend.submit)  # type: ignore[method-assign]
        engine = Engine(graph, Store.open(str(folder / f"store-{index}")), backend, Options(lease_seconds=600))
        engine.begin()
        calls.clear()
        ticks.append(timed(engine.tick))
        first = dict(calls)
    print(f"stages                      {len(roots)}, in one tick: {first}")
    print(f"sbatch --array, bare        {1e3 * min(bare):8.0f} ms   (the best of {ROUNDS})")
    print(f"submission of the backend   {1e3 * min(submitted):8.0f} ms")
    print(f"submission / bare           {min(submitted) / min(bare):8.2f}")
    print(f"the whole tick              {1e3 * min(ticks):8.0f} ms, with claims, records and handles in the store")
    calls.clear()
    waiting = timed(engine.tick)
    print(f"a tick while they wait      {1e3 * waiting:8.0f} ms, {dict(calls)}")
    if not run:
        return
    subprocess.run(["scontrol", "release", *_held()], check=True, capture_output=True)
    begin, most, done = time.perf_counter(), collections.Counter[str](), 0
    while done < len(roots):
        calls.clear()
        snapshot = engine.tick()
        most |= calls
        done = len(snapshot.plan.keys("done"))
        time.sleep(1.0)
    print(f"all {done} stages done after  {time.perf_counter() - begin:8.0f} s; most calls of a tick: {dict(most)}")


def _timed_into(seconds: list[float], action: Callable[[Any], Any], argument: Any) -> Any:
    begin = time.perf_counter()
    result = action(argument)
    seconds.append(time.perf_counter() - begin)
    return result


def _held() -> list[str]:
    """Return the ids of the newest array: the others stay held."""
    lines = subprocess.run(["squeue", "-h", "-o", "%F"], capture_output=True, text=True, check=True).stdout.split()
    return [max(set(lines), key=int)]


if __name__ == "__main__":
    main()
