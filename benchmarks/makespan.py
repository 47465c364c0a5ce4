"""The cells of `quickstart` by `moegrid run` against a script by hand: CPU seconds, and wall time against the bound.

    python benchmarks/makespan.py [--rounds 1] [--threads 1] [--against FOLDER] [--grid quickstart] [--no-script]
        [KEY=VALUE ...]

The script (`benchmarks/lib/by_hand.py`) is transformers' Trainer and stock lm-eval in one process: the base trained
once, and trained from scratch for each cell. Data lie on disk as plain files for it: ours runs once on an empty store,
where it reads and cleans the corpora itself, and once on a store that has them, which is what the script is compared
with. Either time ours publishes to MLflow and writes its report. The script's threads are those of `--threads`, ours
what the grid says.
CPU seconds are those of every process that a side started. Wall times count only where the machine was quiet, which is
measured and told. `--against` names a checkout of an earlier version with an environment of its own (`.venv`), which
runs the same grid in turns. KEY=VALUE are overrides of the grid, for a part of a larger one.
The bound is max(work / cores, longest chain) of what the stages took.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.lib.quiet import Measured, Meter, adopt
from orchestrator.backends.local import Budget
from orchestrator.engine.forecast import Forecast, forecast
from orchestrator.grid.load import load_grid
from orchestrator.plan.cost import Clock
from orchestrator.plan.graph import StageGraph, build_graph
from orchestrator.plan.plan import make_plan
from orchestrator.spec.work import DataWork
from orchestrator.store import Store

ROOT = Path(__file__).resolve().parent.parent
PREPARED = "the same, data there"


def measure(command: list[str], folder: Path, **environment: str) -> Measured:
    """Run a command to its end, with all that it starts; return what it used."""
    meter = Meter()
    with (folder / "log").open("ab") as log:
        code = subprocess.run(
            command, cwd=folder, stdout=log, stderr=log, env={**os.environ, **environment}, check=False
        ).returncode
    if code:
        sys.exit(f"{(folder / 'log').read_text()[-4000:]}\n{command} ended with exit code {code}")
    return meter.read()


def ours(root: Path, words: list[str], store: Path) -> Measured:
    """Run the grid that the words name with a checkout of the project."""
    python = root / ".venv" / "bin" / "python"
    command = [str(python if python.exists() else sys.executable), "-m", "orchestrator", "run", *words]
    records = store.parent / "records"
    records.mkdir(exist_ok=True)
    return measure([*command, "--store", str(store)], store.parent, PYTHONPATH=str(root), MOEGRID_RUN_DIR=str(records))


def by_hand(data: Path, out: Path, threads: int, *, from_scratch: bool) -> Measured:
    """Run the script."""
    out.mkdir()
    command = [sys.executable, str(ROOT / "benchmarks" / "lib" / "by_hand.py"), str(data), str(out)]
    command += ["--threads", str(threads), *(["--from-scratch"] if from_scratch else [])]
    return measure(command, out, OMP_NUM_THREADS=str(threads))


def lay_out(store: Store, graph: StageGraph, folder: Path) -> None:
    """Write the data of a finished run as the plain files that the script reads."""
    names = {"text": {"train": "text", "heldout": "held_out"}, "instruction": {"train": "instructions"}}
    for key, stage in graph.stages.items():
        if not isinstance(stage.work, DataWork):
            continue
        manifest = store.artifacts.get(key)
        assert manifest is not None
        target = folder / stage.work.data.format
        for blob in manifest.blobs:
            store.artifacts.fetch(manifest, blob.name, target)
        if stage.work.data.format == "items":
            shutil.move(target, folder / "items")
        else:
            for split, name in names[stage.work.data.format].items():
                shutil.move(target / f"{split}.parquet", folder / f"{name}.parquet")


def keep_data(store: Store, graph: StageGraph, other: Store) -> None:
    """Copy the corpora and items of a finished run into an empty store."""
    for key, stage in graph.stages.items():
        if isinstance(stage.work, DataWork):
            manifest = store.artifacts.get(key)
            assert manifest is not None
            blobs = [other.artifacts.write_blob("prepared", b.name, store.artifacts.read(b)) for b in manifest.blobs]
            other.artifacts.commit(replace(manifest, blobs=tuple(blobs)))


def bound_of(store: Store, graph: StageGraph, cores: int) -> Forecast:
    """Return bound and end of the grid on so many cores where each stage takes what it took."""
    manifests = store.artifacts.many(list(graph.stages))
    clock = Clock.from_finished((graph.stages[key], graph.resources(key), m.info) for key, m in manifests.items())
    return forecast(make_plan(graph, (), clock=clock), Budget.of_machine(cores=cores))


def main() -> None:
    """Print what each side used and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="threads of the script by hand")
    parser.add_argument("--grid", default="quickstart", help="another grid has no script by hand")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="a checkout of an earlier version")
    parser.add_argument("--no-script", action="store_true", help="leave the script by hand out")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for the grid; without the script by hand")
    options = parser.parse_args()
    words = [options.grid, *options.overrides]
    adopt()
    graph = build_graph(load_grid(options.grid, overrides=options.overrides))
    found: dict[str, list[Measured]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(options.rounds):
            own = folder / f"ours-{number}"
            own.mkdir()
            note(found, f"moegrid run {options.grid}", ours(ROOT, words, own / "runs"))
            told = bound_of(Store.peek(str(own / "runs")), graph, 0)
            last = found[f"moegrid run {options.grid}"][-1]
            each = f"work {told.work / told.cores:.1f} s a core, longest chain {told.path:.1f} s"
            print(
                f"  bound {told.bound:.1f} s ({each}); schedule {told.makespan / told.bound:.2f}x, "
                f"wall {last.wall / told.bound:.2f}x of it"
            )
            if options.against is not None:
                earlier = folder / f"earlier-{number}"
                earlier.mkdir()
                note(found, "the earlier version", ours(options.against.resolve(), words, earlier / "runs"))
            if words == ["quickstart"] and not options.no_script:
                data = folder / f"data-{number}"
                data.mkdir()
                lay_out(Store.peek(str(own / "runs")), graph, data)
                there = folder / f"prepared-{number}"
                there.mkdir()
                keep_data(Store.peek(str(own / "runs")), graph, Store.open(str(there / "runs")))
                note(found, PREPARED, ours(ROOT, words, there / "runs"))
                for title, scratch in (("by hand, base once", False), ("by hand, from scratch", True)):
                    out = folder / f"hand-{scratch}-{number}"
                    note(found, title, by_hand(data, out, options.threads, from_scratch=scratch))
                    print("  " + json.dumps(json.loads((out / "table.json").read_text())))
    first = next(iter(found))
    for title in found:
        peer = PREPARED if title.startswith("by hand") else first
        if title in (first, PREPARED):
            continue
        cpu = statistics.median(a.cpu / b.cpu for a, b in zip(found[title], found[peer], strict=True))
        pairs = [(a, b) for a, b in zip(found[title], found[peer], strict=True) if a.quiet and b.quiet]
        wall = f", {statistics.median(a.wall / b.wall for a, b in pairs):.2f}x its wall time" if pairs else ""
        print(f"{title}: {cpu:.2f}x the CPU seconds of {peer}{wall}")
    print(f"threads: by hand {options.threads}; ours {_threads(graph)}; {os.cpu_count()} cores")


def note(found: dict[str, list[Measured]], title: str, measured: Measured) -> None:
    """Keep a measurement and print it."""
    found.setdefault(title, []).append(measured)
    print(f"{title:26s}{measured.told()}", flush=True)


def _threads(graph: StageGraph) -> str:
    phases: dict[str, Any] = {stage.phase: graph.resources(key) for key, stage in graph.stages.items()}
    return ", ".join(f"{phase} {asked.cores}" for phase, asked in phases.items())


if __name__ == "__main__":
    main()
