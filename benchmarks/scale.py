"""How the control plane grows: plan, tick, status, table, report and a run with nothing to do, of 1k to 100k cells.

    python benchmarks/scale.py [--cells 1000 10000 100000] [--against FOLDER]

CPU seconds, peak memory and what was read of the store, each measured in a process of its own; the grid is that of
`benchmarks/control_plane.py`, half of whose cells are done. The last lines are the exponents between the smallest and
the largest grid, and `finetune` at ten thousand cells per stage. `--against` names another checkout of the
project: a tick and a plan at ten thousand cells of both are run in turns and compared.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TURNS = 3
BOTH = 10_000  # cells of what is compared with another checkout
FINETUNE = """
name: many
description: many seeds of many learning rates
base: finetune
factors: {{router_lr: {rates}, seed: {seeds}}}
"""


def measured(action: Callable[[], Any]) -> tuple[float, Any]:
    """Return the CPU seconds of this process that `action` takes, and its result."""
    began = time.process_time()
    result = action()
    return time.process_time() - began, result


def load(path: str) -> Any:
    """Return a grid's graph, with this checkout or an older one."""
    try:
        from orchestrator.grid.load import load_grid
    except ImportError:  # an older checkout
        from orchestrator.spec.grid import load_grid  # type: ignore[import-not-found,no-redef]
    from orchestrator.plan.graph import build_graph

    return build_graph(load_grid(path))


def plan(grid: str, store: str) -> dict[str, float]:
    """Plan from nothing, as `moegrid plan` does before it looks at the store."""
    import gc

    gc.disable()  # as the command line does while it plans
    from orchestrator.plan.cost import Clock
    from orchestrator.plan.plan import make_plan

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def planned() -> Any:
        graph = load(grid)
        made = make_plan(graph, set(), clock=Clock())
        try:
            from orchestrator.plan.summary import to_json
        except ImportError:  # an older checkout has no such room
            made.hours(gpu=True), made.hours(gpu=False)
        else:
            to_json(made)
        return graph

    seconds, graph = measured(planned)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "cpu": seconds,
        "stages": len(graph.stages),
        "mb": peak,
        "kb_a_stage": (peak - before) * 1024 / len(graph.stages),
    }


def tick(grid: str, store: str) -> dict[str, float]:
    """Tick while jobs work and nothing happens, and after one of them has ended."""
    from orchestrator.backends.base import ABSENT, ENDED, RUNNING, Batch, Handle, JobState
    from orchestrator.engine.loop import Engine, Options
    from orchestrator.store import Manifest, Store

    class Scheduler:
        """Eight jobs that run until they are ended."""

        name = "scheduler"

        def __init__(self) -> None:
            self.states: dict[str, JobState] = {}

        def admit(self, wanted: Sequence[Any]) -> list[bool]:
            return [index + len(self.states) < 8 for index in range(len(wanted))]

        def submit(self, batch: Batch) -> dict[str, Handle]:
            self.states.update({job.attempt: JobState(RUNNING) for job in batch.jobs})
            return self.find(batch.name)

        def poll(self, handles: Sequence[Handle]) -> dict[str, JobState]:
            return {handle.attempt: self.states.get(handle.attempt, JobState(ABSENT)) for handle in handles}

        def find(self, batch: str) -> dict[str, Handle]:
            return {a: Handle(a, batch, a) for a in self.states if a.rsplit("-", 1)[0] == batch}

        def cancel(self, handles: Sequence[Handle], *, now: bool) -> None: ...

        def forget(self, handles: Sequence[Handle]) -> None:
            for handle in handles:
                self.states.pop(handle.attempt, None)

        def log(self, handle: Handle) -> None: ...

    import gc

    graph, scheduler = load(grid), Scheduler()
    copy = Path(tempfile.mkdtemp(prefix="moegrid-tick-"))
    try:
        shutil.copytree(store, copy / "store")
        opened = Store.open(str(copy / "store"))
        engine = Engine(graph, opened, scheduler, Options(lease_seconds=600))
        engine.begin()
        gc.freeze()  # as the command line does after planning
        first, snapshot = measured(engine.tick)
        quiet = [measured(engine.tick)[0] for _ in range(TURNS)]
        after = []
        for _ in range(TURNS):
            snapshot = engine.tick()
            attempt = next(iter(snapshot.busy.values()))
            for stage in [stage for stage, other in snapshot.busy.items() if other == attempt]:
                opened.artifacts.commit(Manifest(key=stage, kind=graph.stages[stage].kind, spec={}, attempt=attempt))
            scheduler.states[attempt] = JobState(ENDED, 0)
            after.append(measured(engine.tick)[0])
        return {"cpu": min(quiet), "after_an_end": min(after), "first": first}
    finally:
        shutil.rmtree(copy)


def command(*words: str) -> Callable[[str, str], dict[str, float]]:
    """Return what runs a command on the store and counts what it reads."""

    def run(grid: str, store: str) -> dict[str, float]:
        from orchestrator import cli
        from orchestrator.store.local import LocalObjects

        reads: Counter[str] = Counter()
        for name in ("get", "read"):
            real = getattr(LocalObjects, name)

            def counted(self: Any, path: str, real: Any = real) -> Any:
                reads[path.split("/")[0]] += 1
                return real(self, path)

            setattr(LocalObjects, name, counted)
        out = os.dup(1)
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1)
        folder = tempfile.mkdtemp(prefix="moegrid-report-")
        extra = ["--output", f"{folder}/index.html"] if words[0] == "report" else []
        try:
            seconds, code = measured(
                lambda: cli.main([words[0], grid, "--store", store, "--tracking", "none", *words[1:], *extra])
            )
        finally:
            sys.stdout.flush()
            os.dup2(out, 1)
            shutil.rmtree(folder)
        assert code == 0, code
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return {"cpu": seconds, "mb": peak, "reads": sum(reads.values())}

    return run


def fill(share: float, grid: str, store: str) -> dict[str, float]:
    """Write the artifacts of a part of the grid's cells into a store, as their runs would have."""
    from orchestrator.store import Manifest, Store

    graph = load(grid)
    opened = Store.open(store)
    folder = Path(store) / "artifacts"
    folder.mkdir(exist_ok=True)
    numerics, provenance = {"threads": 2, "device": "cpu", "world_size": 1}, {"git": "a" * 40, "host": "node"}
    cells = list(graph.cells.values())
    for cell in cells[: round(len(cells) * share)]:
        for stage in cell.stages:
            metrics = {"bits_per_byte": 1 + int(stage.key[:4], 16) / 2**16} if stage.kind == "evaluate" else {}
            made = Manifest(
                key=stage.key,
                kind=stage.kind,
                spec={},
                numerics=numerics,
                provenance=provenance,
                attempt=f"b-0-{stage.key[:6]}",
                metrics=metrics,
                info={"seconds": 2.0, "weights_sha256": stage.key},
                created=1.0,
            )
            target = folder / f"{stage.key}.json"
            if not target.exists():
                target.write_bytes(made.to_bytes())
    old = time.time() - 3600
    for entry in os.scandir(folder):
        os.utime(entry.path, (old, old))
    opened.index.rebuild(graph.stages.keys(), len(graph.stages))  # as a run does
    return {}


MEASURES: dict[str, Callable[[str, str], dict[str, float]]] = {
    "plan": plan,
    "tick": tick,
    "moegrid plan": command("plan"),
    "moegrid status": command("status", "--json"),
    "moegrid table": command("table", "--format", "csv"),
    "moegrid report": command("report"),
    "moegrid run": command("run", "--no-report"),
}
# A process that starts another one leaves it the mark of its own peak, so this one never holds a grid.
FILLS: dict[str, Callable[[str, str], dict[str, float]]] = {"fill": partial(fill, 1.0), "fill half": partial(fill, 0.5)}


def in_a_process(what: str, grid: Path, store: Path, checkout: Path = ROOT) -> dict[str, float]:
    """Measure in a process of its own, with the code of `checkout`."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "MOEGRID_MAX_CELLS": "200000"}
    run_directory = tempfile.mkdtemp(prefix="moegrid-run-")
    environment["MOEGRID_RUN_DIR"] = run_directory
    words = [sys.executable, "-P", __file__, "--measure", what, str(grid), str(store)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=checkout, check=False)
    finally:
        shutil.rmtree(run_directory)
    if done.returncode:
        raise SystemExit(f"{what}: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def compare(folder: Path, against: Path) -> None:
    """Run this checkout and another one in turns, and print the ratios of their least CPU seconds."""
    grid, store = folder / f"grid-{BOTH}.yaml", folder / f"half-{BOTH}"
    for what, field in (("tick", "cpu"), ("tick", "after_an_end"), ("plan", "cpu")):
        ours, theirs = [], []
        for _ in range(2):
            theirs.append(in_a_process(what, grid, store, against)[field])
            ours.append(in_a_process(what, grid, store)[field])
        name = f"{what}{' after a job ended' if field == 'after_an_end' else ''}, {BOTH} cells"
        print(f"{name}: {min(ours):.3f} s, there {min(theirs):.3f} s = {min(ours) / min(theirs):.3f}x", flush=True)


def main() -> None:
    """Measure every grid size, print one line each, then the exponents."""
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps({**MEASURES, **FILLS}[sys.argv[2]](*sys.argv[3:5])))
        return
    sys.path.insert(0, str(ROOT))
    from benchmarks.control_plane import grid_text

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="multiples of 100")
    parser.add_argument("--against", type=Path, help="another checkout, for the ratios")
    options = parser.parse_args()
    os.environ["MOEGRID_MAX_CELLS"] = "200000"
    folder = Path(tempfile.mkdtemp(prefix="moegrid-scale-"))
    told: dict[str, dict[int, float]] = {}
    try:
        for cells in sorted(options.cells):
            grid, half = folder / f"grid-{cells}.yaml", folder / f"half-{cells}"
            grid.write_text(grid_text(cells))
            in_a_process("fill half", grid, half)
            for what in MEASURES:
                store = half
                if what == "moegrid run":
                    store = folder / f"whole-{cells}"
                    in_a_process("fill", grid, store)
                    in_a_process(what, grid, store)  # writes the version of the grid, and the index
                found = in_a_process(what, grid, store)
                told.setdefault(what, {})[cells] = found["cpu"]
                figures = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
                print(f"{cells:>7} cells  {what:<15} {figures}", flush=True)
                if what == "moegrid run":
                    shutil.rmtree(store)
            if options.against and cells == BOTH:
                compare(folder, options.against)
            shutil.rmtree(half)
        least, most = min(options.cells), max(options.cells)
        for what, seconds in told.items() if most > least else ():
            exponent = math.log(seconds[most] / seconds[least]) / math.log(most / least)
            print(f"exponent of {what} between {least} and {most} cells: {exponent:.2f}")
        rates = [round(1e-5 * number, 7) for number in range(1, 26)]
        grid = folder / "finetune.yaml"
        grid.write_text(FINETUNE.format(rates=rates, seeds=list(range(BOTH // 25))))
        found = in_a_process("plan", grid, folder)
        a_stage = 1e3 * found["cpu"] / found["stages"]
        print(
            f"plan of {BOTH} cells of finetune = {found['stages']:.0f} stages: "
            f"{a_stage:.4f} ms and {found['kb_a_stage']:.2f} KB a stage"
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
