"""The control plane against public tools, in one run: expansion, plan and no-op of ten thousand cells.

    make bench            # or: .venv/bin/python benchmarks/control_plane.py [--cells 10000]

Peers (exca, seml, snakemake) live in an environment of their own, `.venv-bench`, which the first call makes. Every line
is a ratio of two figures of this run; peers that are slow run on fewer cells and are compared per cell.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / ".venv-bench"
FREEZE = ["none", "expert", "none->router", "router->none"]
RATIOS = [round(0.01 * i, 2) for i in range(1, 26)]

EXCA = """
import itertools, json, sys, time
import exca, pydantic
base, axes = json.load(sys.stdin)
def model(name, fields):
    made = {}
    for key, value in fields.items():
        if isinstance(value, dict):
            sub = model(name + key.title(), value)
            made[key] = (sub, sub())
        else:
            made[key] = (type(value) if value is not None else object, value)
    config = pydantic.ConfigDict(extra="forbid", arbitrary_types_allowed=True)
    return pydantic.create_model(name, __config__=config, **made)
Base = model("Cell", base)
class Experiment(Base):
    infra: exca.TaskInfra = exca.TaskInfra()
    @infra.apply
    def run(self) -> int:
        return 0
start = time.perf_counter()
first = Experiment()
uids = set()
for values in itertools.product(*axes.values()):
    uids.add(first.infra.clone_obj(dict(zip(axes, values))).infra.uid())
print(json.dumps([time.perf_counter() - start, len(uids)]))
"""

SEML = """
import json, sys, time
from seml.experiment.config import generate_configs
base, axes = json.load(sys.stdin)
start = time.perf_counter()
grid = {name: {"type": "choice", "options": values} for name, values in axes.items()}
config = {"fixed": {k: v for k, v in base.items() if v != {}}, "grid": grid}
made = generate_configs(config)
print(json.dumps([time.perf_counter() - start, len(made)]))
"""

SNAKEFILE = """
CELLS = range({cells})
rule all:
    input: expand("out/{{i}}.result", i=CELLS)
rule train:
    output: "out/{{i}}.state"
    shell: "touch {{output}}"
rule evaluate:
    input: "out/{{i}}.state"
    output: "out/{{i}}.result"
    shell: "touch {{output}}"
"""


def grid_text(cells: int) -> str:
    """Return a grid of `cells` cells on one shared base model."""
    seeds = list(range(cells // (len(FREEZE) * len(RATIOS))))
    return (
        "name: control_plane\ndescription: a large grid on one base model\nbase: finetune\nfactors:\n"
        f"  freeze: [{', '.join(FREEZE)}]\n  router_lr_ratio: {RATIOS}\n  seed: {seeds}\n"
        "baseline: {freeze: none}\nevaluate: [lm]\nat: [1.0]\n"
    )


def timed(action: Callable[[], Any], repeat: int = 3) -> tuple[float, Any]:
    """Return the least wall time of `repeat` calls in seconds, and the last result."""
    best, result = float("inf"), None
    for _ in range(repeat):
        start = time.perf_counter()
        result = action()
        best = min(best, time.perf_counter() - start)
    return best, result


def peer(code: str, base: Any, axes: Mapping[str, list[Any]]) -> tuple[float, int]:
    """Run a peer's expansion in its own environment; return (seconds, cells)."""
    done = subprocess.run(
        [PEERS / "bin" / "python", "-c", code],
        input=json.dumps([base, axes]),
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, cells = json.loads(done.stdout.strip().splitlines()[-1])
    return seconds, cells


def install_peers() -> None:
    """Make the peers' environment once."""
    if (PEERS / ".ready").exists():
        return
    print("installing the peers into .venv-bench ...", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", PEERS], check=True)
    packages = ["exca==0.6.0", "seml==0.5.7", "snakemake==9.27.1"]
    subprocess.run([PEERS / "bin" / "pip", "install", "-q", *packages], check=True)
    (PEERS / ".ready").touch()


def floor(base: dict[str, Any], axes: Mapping[str, list[Any]]) -> int:
    """Expand with itertools, write canonical JSON of the same fields, hash: the least any tool must do."""
    keys = set()
    for values in itertools.product(*axes.values()):
        cell = {**base, **dict(zip(axes, values, strict=True))}
        keys.add(hashlib.sha256(json.dumps(cell, sort_keys=True, separators=(",", ":")).encode()).hexdigest())
    return len(keys)


def fill(store_url: str, grid_path: Path) -> int:
    """Commit an empty artifact for every stage of the grid; return how many."""
    from orchestrator.grid.load import load_grid
    from orchestrator.plan.graph import build_graph
    from orchestrator.store import Manifest, Store

    store = Store.open(store_url)
    graph = build_graph(load_grid(str(grid_path)))
    for key, stage in graph.stages.items():
        store.artifacts.commit(Manifest(key=key, kind=stage.kind, spec={}, created=1.0))
    return len(graph.stages)


def moegrid(*arguments: str) -> float:
    """Return the wall seconds of one `moegrid` command."""
    command = [str(Path(sys.executable).parent / "moegrid"), *arguments]
    environment = {**os.environ, "MOEGRID_TRACKING": "none"}
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env=environment, cwd=ROOT)
    return time.perf_counter() - start


def no_op_of_snakemake(folder: Path, cells: int) -> float:
    """Return the wall seconds of snakemake when all of `cells` x 2 outputs are there."""
    (folder / "out").mkdir(parents=True)
    (folder / "Snakefile").write_text(SNAKEFILE.format(cells=cells))
    command = [str(PEERS / "bin" / "snakemake"), "-c1", "--quiet", "all"]
    environment = {**os.environ, "PATH": f"{PEERS / 'bin'}:{os.environ['PATH']}"}
    for kind in ("state", "result"):
        for i in range(cells):
            (folder / "out" / f"{i}.{kind}").touch()
    # Writes snakemake's own records for outputs that are there already.
    subprocess.run([*command, "--touch"], cwd=folder, env=environment, check=True, capture_output=True)
    start = time.perf_counter()
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    return time.perf_counter() - start


def show_peer(name: str, seconds: float, cells: int, ratio: float) -> None:
    """Print one peer's line."""
    print(f"  {name}, {cells} cells: {1e3 * seconds / cells:.3f} ms a cell = {ratio:.1f}x ours")


def main() -> int:
    """Run every comparison and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=10_000, help="cells of the grid (a multiple of 100)")
    parser.add_argument("--store", default="", help="store for the no-op (default: a temporary folder)")
    options = parser.parse_args()
    install_peers()

    from orchestrator.grid.load import load_grid
    from orchestrator.plan.cost import Clock
    from orchestrator.plan.graph import build_graph
    from orchestrator.plan.plan import make_plan
    from orchestrator.plan.summary import to_json
    from orchestrator.spec.identity import plain

    folder = Path(tempfile.mkdtemp(prefix="moegrid-bench-"))
    try:
        path = folder / "control_plane.yaml"
        path.write_text(grid_text(options.cells))
        seconds, grid = timed(lambda: load_grid(str(path)))
        cells = len(grid.cells)
        fields = {k: v for k, v in plain(grid.cells[0].cell).items() if k != "execution"}
        flat = {f"{s}.{k}": v for s, section in fields.items() if section for k, v in section.items()}
        axes: dict[str, list[Any]] = {
            "finetune.freeze": FREEZE,
            "finetune.router_lr_ratio": RATIOS,
            "seed.finetune": list(range(cells // 100)),
        }
        floor_seconds, count = timed(lambda: floor(flat, axes))
        assert count == cells
        line = f"expansion, validation and keys of {cells} cells: {seconds:.2f} s"
        print(f"{line} = {seconds / floor_seconds:.2f}x the floor")
        print(f"  (itertools.product + canonical JSON + sha256 of the same {len(flat)} fields: {floor_seconds:.2f} s)")

        few = {**axes, "seed.finetune": [0, 1, 2, 3]}
        nested = {k: v for k, v in fields.items() if v}
        exca_seconds, exca_cells = peer(EXCA, nested, few)
        ratio = (exca_seconds / exca_cells) / (seconds / cells)
        show_peer("exca (uid per clone)", exca_seconds, exca_cells, ratio)
        seml_seconds, seml_cells = peer(SEML, {k: v for k, v in flat.items() if k not in axes}, axes)
        ratio = (seml_seconds / seml_cells) / (seconds / cells)
        show_peer("seml (generate_configs)", seml_seconds, seml_cells, ratio)

        def plan() -> Any:
            graph = build_graph(load_grid(str(path)))
            made = make_plan(graph, set(), clock=Clock())
            to_json(made)
            return graph

        seconds, graph = timed(plan, 1)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"plan of {cells} cells = {len(graph.stages)} artifacts: {seconds:.2f} s, peak {peak:.0f} MB")

        store = options.store or str(folder / "store")
        artifacts = fill(store, path)
        moegrid("run", str(path), "--store", store)
        seconds = min(moegrid("run", str(path), "--store", store) for _ in range(3))
        print(f"no-op run of {cells} cells ({artifacts} artifacts), process start included: {seconds:.2f} s")
        snake = 500
        snake_seconds = no_op_of_snakemake(folder / "snake", snake)
        ratio = (snake_seconds / snake) / (seconds / cells)
        show_peer("snakemake no-op (2 rules a cell)", snake_seconds, snake, ratio)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
