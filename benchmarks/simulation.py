"""What simulations say of memory and communication over what is measured: `python benchmarks/simulation.py`.

    python benchmarks/simulation.py [--sizes tiny 100M] [--engines torch fsdp] [--ranks 1 2 4] [--precisions fp32 bf16]

Each engine starts and takes two steps on gloo ranks, on a CPU and on the paths of a GPU (grouped products, large chunks
of logits). Memory is what torch's own allocator records (its profiler), but for what gloo takes inside its collectives:
it has no reduce-scatter and copies the buffer for each rank, where NCCL has buffers of a fixed size. That is printed
beside it. What a thread of gloo is the last to let go of is recorded as taken and never as freed: it is left out if in
the end it is no living tensor's. Bytes sent are the kernel's counts of the rank's sockets. Both are set against the
simulation of the shape.
Printed per shape: megabytes of the simulation over those measured, of the start and of a step, the worst rank;
megabytes of gloo's own; and megabytes sent in one step.

The exit code is 1 when a peak is off by more than 10 % or a number of bytes sent by more than 5 %.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from torch._C._profiler import _ExtraFields_Allocation, _ProfilerEvent
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jobs.data.packing import Batch
from jobs.simulate.training import Training, local
from orchestrator.spec.data import DataSpec
from orchestrator.spec.model import ModelSpec, MoESpec
from orchestrator.spec.resolve import resolve_model
from orchestrator.spec.training import TrainSpec

# hidden size, layers, experts, width, vocabulary, length
SIZES = {"mini": (64, 2, 4, 64, 512, 64), "tiny": (128, 4, 16, 128, 4096, 256), "100M": (512, 8, 16, 512, 8192, 128)}
MICRO_BATCH = 2
MEMORY, SENT = 0.10, 0.05


@dataclass(frozen=True, slots=True)
class Text:
    """Random ids without padding."""

    vocabulary: int
    length: int

    def micro_batch(self, step: int, index: int, size: int) -> Batch:
        """Return a micro-batch of `size` sequences."""
        ids = torch.randint(0, self.vocabulary, (size, self.length))
        ones, spans = torch.ones_like(ids), torch.zeros_like(ids)
        return Batch(ids, ids.clone(), ones, spans, spans.clone())


def shape(size: str, engine: str, ranks: int, precision: str) -> Training:
    """Return the training of one line of the table: two micro-batches a rank."""
    hidden, layers, experts, width, vocabulary, length = SIZES[size]
    moe = MoESpec(top_k=2, num_experts=experts, expert_width=width)
    model = ModelSpec(
        hidden_size=hidden,
        num_layers=layers,
        num_heads=hidden // 64,
        num_kv_heads=hidden // 64,
        context=length,
        moe=moe,
    )
    train = TrainSpec(
        DataSpec("", format="text"),
        steps=100,
        micro_batch=MICRO_BATCH,
        accumulation=2 * ranks,
        sequence_length=length,
        precision=precision,
    )
    return Training(resolve_model(model), vocabulary, "pretrain", train, engine, ranks)


def sent() -> int:
    """Return the bytes that this process has sent over its TCP sockets."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as one:
                # tcpi_bytes_acked of the kernel's struct tcp_info, plus what is not acknowledged yet is left out.
                total += struct.unpack_from("Q", one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192), 120)[0]
        except OSError:
            continue
    return total


def living() -> set[int]:
    """Return the addresses of the memory of all tensors that live."""
    found: set[int] = set()
    for one in gc.get_objects():
        if isinstance(one, torch.Tensor) and one.layout is torch.strided:
            grad = one.grad if one.is_leaf else None
            found |= {local(tensor).untyped_storage().data_ptr() for tensor in (one, grad) if tensor is not None}
    return found


Change = tuple[int, int, int, bool]  # time, address, change, inside a collective


def unseen(changes: Sequence[Change], alive: set[int]) -> set[int]:
    """Return the places of allocations whose end nobody recorded: their address is taken again, or no tensor's."""
    taken: dict[int, int] = {}
    found: set[int] = set()
    for place, (_, address, change, inside) in enumerate(changes):
        before = taken.pop(address, None)
        if change > 0 and before is not None:
            found.add(before)
        if change > 0 and not inside:
            taken[address] = place
    return found | {place for address, place in taken.items() if address not in alive}


def peak_of(profiler: profile, held: int, alive: set[int]) -> tuple[int, int, int]:
    """Return the most bytes that were held, what was held in the end, and the most that collectives had of their own.

    `held` are the bytes of before, `alive` the addresses of the tensors that live in the end.
    """
    found: list[Change] = []

    def walk(events: Sequence[_ProfilerEvent], inside: bool) -> None:
        for event in events:
            fields = event.typed[1]
            if isinstance(fields, _ExtraFields_Allocation):
                found.append((event.start_time_ns, fields.ptr, fields.alloc_size, inside))
            walk(event.children, inside or event.name.startswith(("c10d::", "gloo:")))

    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    walk(profiler.profiler.kineto_results.experimental_event_tree(), False)
    most, now, most_own = held, held, 0
    own: dict[int, int] = {}
    found.sort(key=lambda one: one[0])
    left_out = unseen(found, alive)
    for place, (_, address, change, inside) in enumerate(found):
        if place in left_out:
            continue
        if change > 0:
            own.pop(address, None)  # freed by a thread of gloo, which nobody saw
        if change > 0 and inside:
            own[address] = change
            most_own = max(most_own, sum(own.values()))
        elif change > 0 or own.pop(address, None) is None:
            now += change
            most = max(most, now)
    return most, now, most_own


def rank_main(size: str, engine_name: str, precision: str, folder: Path) -> None:
    """Measure one rank's start and steps and print them as JSON."""
    from jobs.models.building import empty_model
    from jobs.models.shards import Shards
    from jobs.moe.host import hidden
    from jobs.node.ranks import join
    from jobs.node.world import world_from
    from jobs.train.engines.building import build_engine
    from jobs.train.loop import Trainer
    from orchestrator.spec.cell import Execution
    from orchestrator.spec.work import Conditions

    torch.set_num_threads(1)
    world = world_from(os.environ)
    ranks = int(os.environ["WORLD_SIZE"])
    if world is not None and ranks > 1:
        join(world, Execution(), ["benchmark"])
    rank = int(os.environ["RANK"])
    asked = shape(size, engine_name, ranks, precision)
    model = empty_model(asked.model, asked.vocab_size)
    held = sum(buffer.nbytes for buffer in model.buffers())
    weights = Shards([folder / "weights.safetensors"])

    def measured() -> Iterator[int]:
        """Yield the bytes sent in the second step, when all is done."""
        engine = build_engine(asked.engine, model, asked.train, rank, ranks, weights, "cpu")
        yield 0
        engine.freeze("")
        engine.model.train()
        source = Text(asked.vocab_size, asked.train.sequence_length)
        trainer = Trainer(engine, Conditions("pretrain", dataclasses.replace(asked.train, freeze=""), "", 0), source)
        trainer.train_step()
        before = sent()
        trainer.train_step()
        yield sent() - before

    told: dict[str, int] = {}
    run = measured()
    for moment in ("start", "step"):
        with hidden(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            told["sent"] = next(run)
        told[moment], held, own = peak_of(profiler, held, living())
        told["gloo"] = max(told.get("gloo", 0), own)
    print("MEASURED " + json.dumps(told), flush=True)


def measured(size: str, engine: str, ranks: int, precision: str, folder: Path) -> dict[str, int]:
    """Run the ranks of one shape and return the largest of what each measured."""
    from jobs.node.world import free_port

    environment = {**os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    environment["MASTER_PORT"] = str(free_port())
    words = [sys.executable, __file__, "--sizes", size, "--engines", engine, "--precisions", precision]
    children = []
    for rank in range(ranks):
        placed = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [*words, "--folder", str(folder)]
        children.append(subprocess.Popen(command, env=placed, stdout=subprocess.PIPE, text=True))
    found: list[dict[str, int]] = []
    for child in children:
        output, _ = child.communicate()
        lines = [line for line in output.splitlines() if line.startswith("MEASURED ")]
        if child.returncode or not lines:
            raise SystemExit(f"engine {engine}: a rank failed\n{output}")
        found.append(json.loads(lines[0].removeprefix("MEASURED ")))
    return {name: max(one[name] for one in found) for name in found[0]}


def compared(size: str, engine: str, ranks: int, precision: str, folder: Path) -> bool:
    """Measure and simulate one shape, print its line, and return whether it is within the bounds."""
    from jobs.simulate.training import simulate_training
    from orchestrator.catalog.gpus import bytes_sent

    seen = measured(size, engine, ranks, precision, folder)
    with get_context("spawn").Pool(1) as apart:  # DeepSpeed keeps the groups of its first world
        answer = apart.apply(simulate_training, (shape(size, engine, ranks, precision),))
    expected = sum(n * bytes_sent(name, held, ranks, "gloo") for (name, held), n in answer.collectives.items())
    ratios = [answer.moments[moment].total / seen[moment] for moment in ("start", "step")]
    transfer = expected / seen["sent"] if ranks > 1 else 1.0
    shown = "  ".join(
        f"{answer.moments[moment].total / 1e6:8.1f}/{seen[moment] / 1e6:8.1f} = {ratio:5.3f}"
        for moment, ratio in zip(("start", "step"), ratios, strict=True)
    )
    traffic = f"{expected / 1e6:8.2f}/{seen['sent'] / 1e6:8.2f} = {transfer:5.3f}"
    print(f"{size:5} {engine:12} {ranks:5} {precision:6} {shown} {seen['gloo'] / 1e6:8.1f}  {traffic}", flush=True)
    return all(abs(ratio - 1) <= MEMORY for ratio in ratios) and abs(transfer - 1) <= SENT


def main() -> int:
    """Compare every shape and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--engines", nargs="+", default=["torch", "fsdp"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16", "mixed"])
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        rank_main(options.sizes[0], options.engines[0], options.precisions[0], Path(options.folder))
        return 0
    from jobs.models.building import build_model
    from jobs.models.shards import write_tensors
    from jobs.models.weights import canonical_state
    from orchestrator.catalog.engines import ENGINES

    print(
        f"{'size':5} {'engine':12} {'ranks':>5} {'type':6} {'start MB':>25} {'step MB':>27} {'gloo':>8} {'sent MB':>26}"
    )
    sound = True
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            torch.manual_seed(0)
            model = build_model(shape(size, "torch", 1, "fp32").model, SIZES[size][4])
            write_tensors(canonical_state(model), folder / "weights.safetensors")
            del model
            for engine in options.engines:
                for ranks in (count for count in options.ranks if count >= ENGINES.get(engine).least_processes):
                    for precision in options.precisions:
                        sound &= compared(size, engine, ranks, precision, folder)
    return int(not sound)


if __name__ == "__main__":
    sys.exit(main())
