"""What a start, a checkpoint and a freeze switch cost beside a training step: `python benchmarks/memory.py`.

    python benchmarks/memory.py [--engines fsdp deepspeed:3] [--ranks 4] [--width 512] [--precision fp32]

Each engine trains a model of about 100 million parameters on gloo ranks, freezes its routers, writes a state, and goes
on from it in fresh processes. On gloo the model lies in host memory and stands for the device's. Anonymous memory is
sampled while each moment lasts; what it held before the model was built is not counted. Printed per engine, the worst
rank's:

- `switch`: peak of a freeze switch over the peak of a step;
- `device`: peak of a checkpoint without its host copy over the peak of a step;
- `host`: what a checkpoint adds over 1.2 x the rank's share of what is written + one parameter;
- `start`, `resume`: what building and reading hold beyond what stays, over the same bound.

A ratio of 1.1 (switch, device) and of 1.0 (the others) is the bound; the exit code is 1 when one is passed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

ENGINES = ["fsdp", "deepspeed:1", "deepspeed:2", "deepspeed:3"]
VOCABULARY, LENGTH, BATCH = 8192, 128, 1
SAMPLE_SECONDS = 0.002


def anonymous() -> int:
    """Return this process's anonymous memory in bytes: mapped files are the page cache's."""
    with open("/proc/self/status") as lines:
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssShmem")))


def peak(action: Callable[[], Any]) -> tuple[int, Any]:
    """Return (the most memory that was held while `action` ran, its result)."""
    most, done = anonymous(), threading.Event()

    def sample() -> None:
        nonlocal most
        while not done.wait(SAMPLE_SECONDS):
            most = max(most, anonymous())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        result = action()
    finally:
        most = max(most, anonymous())
        done.set()
        thread.join()
    return max(most, anonymous()), result


def model_spec(width: int) -> Any:
    """Return a model of about 100 million parameters at width 512."""
    from orchestrator.spec.model import ModelSpec, MoESpec

    moe = MoESpec(top_k=2, num_experts=16, expert_width=width)
    return ModelSpec(hidden_size=width, num_layers=8, num_heads=8, num_kv_heads=8, context=LENGTH, moe=moe)


def rank_main(options: argparse.Namespace) -> None:
    """Measure one rank's moments and print them as JSON."""
    import torch

    from jobs.models.building import empty_model
    from jobs.models.shards import Shards, rows_digest, shard_name, write_pieces
    from jobs.node.ranks import join
    from jobs.node.world import world_from
    from jobs.train.checkpoint import HostCopies
    from jobs.train.engines.building import build_engine
    from jobs.train.freeze import frozen_digest
    from orchestrator.spec.cell import DataSpec, Execution, TrainSpec

    torch.set_num_threads(1)
    world = world_from(os.environ)
    assert world is not None
    join(world, Execution(), ["benchmark"])
    folder, engine_name = Path(options.folder), options.engines[0]
    train = TrainSpec(DataSpec("benchmark://"), steps=100, accumulation=world.size, precision=options.precision)
    begun = anonymous()
    files = sorted(folder.glob("state/weights*" if options.resume else "weights*"))

    def build() -> Any:
        model = empty_model(model_spec(options.width), VOCABULARY)
        engine = build_engine(engine_name, model, train, world.rank, world.size, Shards(files), "cpu")
        if options.resume:
            engine.load_optimizer(Shards(sorted(folder.glob("state/optimizer*"))))
        return engine

    start, engine = peak(build)
    gc.collect()
    told: dict[str, int] = {"start": start - begun, "built": anonymous() - begun}

    def step() -> None:
        torch.manual_seed(world.rank)
        ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH))
        engine.set_lr(1e-3, 1e-3)
        output = engine.model(ids, labels=ids)
        engine.backward(output.loss / LENGTH)
        engine.gradient_norm()
        engine.step(1.0)

    def steps() -> None:
        for _ in range(2):
            step()

    def switch() -> str:
        engine.freeze("router")
        return frozen_digest(engine, "router")

    engine.freeze("")
    told["step"] = peak(steps)[0] - begun
    told["switch"] = peak(switch)[0] - begun
    told["step_frozen"] = peak(steps)[0] - begun
    gc.collect()
    before = anonymous()
    target = folder / "state"
    target.mkdir(exist_ok=True)

    def checkpoint() -> int:
        copies = HostCopies()
        weights = copies.fill(engine.weights(), "weights/")
        optimizer = copies.fill(engine.optimizer_tensors().items(), "optimizer/")
        rows_digest(weights)
        for kind, rows in (("weights", weights), ("optimizer", optimizer)):
            write_pieces(rows, target / shard_name(kind, world.rank, world.size))
        return sum(piece.tensor.nbytes for rows in (weights, optimizer) for piece in rows.values())

    most, told["share"] = peak(checkpoint)
    told["checkpoint"], told["before"] = most - begun, before - begun
    print("MEASURED " + json.dumps(told), flush=True)


def ranks(options: argparse.Namespace, folder: Path, engine: str, resume: bool) -> list[dict[str, int]]:
    """Run the ranks of one engine and return what each measured."""
    from jobs.node.world import free_port

    environment = {**os.environ, "WORLD_SIZE": str(options.ranks), "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    words = [sys.executable, __file__, "--engines", engine, "--width", str(options.width), "--folder", str(folder)]
    words += ["--precision", options.precision, *(["--resume"] if resume else [])]
    children = []
    for rank in range(options.ranks):
        placed = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        children.append(subprocess.Popen(words, env=placed, stdout=subprocess.PIPE, text=True))
    found = []
    for child in children:
        output, _ = child.communicate()
        lines = [line for line in output.splitlines() if line.startswith("MEASURED ")]
        if child.returncode or not lines:
            raise SystemExit(f"engine {engine}: a rank failed\n{output}")
        found.append(json.loads(lines[0].removeprefix("MEASURED ")))
    return found


def main() -> int:
    """Measure every engine and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=ENGINES)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        rank_main(options)
        return 0
    import torch

    from jobs.models.building import build_model
    from jobs.models.shards import write_tensors
    from jobs.models.weights import canonical_state

    passed = False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        model = build_model(model_spec(options.width), VOCABULARY)
        count = sum(parameter.numel() for parameter in model.parameters())
        largest = 4 * max(parameter.numel() for parameter in model.parameters())
        write_tensors(canonical_state(model), folder / "weights.safetensors")
        del model
        what = f"{options.ranks} ranks, {options.precision}; the largest parameter has {largest / 1e6:.0f} MB"
        print(f"{count / 1e6:.0f} M parameters, {what}")
        columns = ("switch", "device", "host", "start", "resume")
        print(f"{'engine':12} {'step MB':>8} {'share MB':>9} " + " ".join(f"{column:>7}" for column in columns))
        for engine in options.engines:
            straight = ranks(options, folder, engine, resume=False)
            resumed = ranks(options, folder, engine, resume=True)
            worst: dict[str, float] = {}
            for one, again in zip(straight, resumed, strict=True):
                step, bound = max(one["step"], one["step_frozen"]), 1.2 * one["share"] + largest
                ratios = {
                    "switch": one["switch"] / step,
                    "device": (one["checkpoint"] - one["share"]) / step,
                    "host": (one["checkpoint"] - one["before"]) / bound,
                    "start": (one["start"] - one["built"]) / bound,
                    "resume": (again["start"] - again["built"]) / bound,
                }
                worst = {key: max(worst.get(key, 0.0), value) for key, value in ratios.items()}
            held, written = (max(one[key] for one in straight) / 1e6 for key in ("step", "share"))
            shown = " ".join(f"{worst[column]:7.2f}" for column in columns)
            print(f"{engine:12} {held:8.0f} {written:9.0f} {shown}", flush=True)
            passed |= any(value > (1.1 if key in ("switch", "device") else 1.0) for key, value in worst.items())
    return int(passed)


if __name__ == "__main__":
    sys.exit(main())
