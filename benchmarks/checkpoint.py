"""What a checkpoint costs the training thread, and how fast it reaches the store.

    python benchmarks/checkpoint.py [--megabytes 500] [--rounds 5]

Prints the stall of one checkpoint over the time of one host memcpy of the same bytes, and the rate from submission to
commit over that of the bare store client for the same files.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> None:
    """Train one step of a model whose state has the wanted size, then write it `--rounds` times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=500, help="size of weights and optimizer state")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    import torch

    from jobs.models.building import build_model
    from jobs.node.context import StageContext
    from jobs.train.checkpoint import CheckpointWriter
    from jobs.train.engines.torch import TorchEngine
    from orchestrator.spec.cell import DataSpec, TrainSpec
    from orchestrator.spec.model import ModelSpec, MoESpec
    from tests import training as bench

    torch.set_num_threads(options.threads)
    hidden, layers, width = 256, 4, 512
    per_expert = 3 * hidden * width * layers
    experts = max(4, round(options.megabytes * 1e6 / 12 / per_expert))
    model_spec = ModelSpec(
        hidden_size=hidden,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=4,
        moe=MoESpec(top_k=2, num_experts=experts, expert_width=width),
    )
    train = TrainSpec(DataSpec("benchmark://"), steps=1000)
    model = build_model(model_spec, 1024)
    engine = TorchEngine(model, train)
    engine.freeze("")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    engine.step(1.0)
    tensors = [*model.state_dict().values(), *(piece.tensor for piece in engine.optimizer_tensors().values())]
    size = sum(t.numel() * t.element_size() for t in tensors)
    copies = [torch.empty_like(t) for t in tensors]
    with tempfile.TemporaryDirectory() as folder:
        store = bench.prepare(folder)
        work = bench.segments([("", 0, 1000)], train, model=model_spec)[0]
        bench.run_chain(store, [bench.init_work(model_spec)], "init")
        job = bench.make_job(store, [work])
        context = StageContext(job, work.key(), "benchmark")
        writer = CheckpointWriter()
        stalls, memcpys, rates, raw = [], [], [], []
        for step in range(1, options.rounds + 2):
            began = time.perf_counter()
            for copy, tensor in zip(copies, tensors, strict=True):
                copy.copy_(tensor)
            memcpys.append(time.perf_counter() - began)
            began = time.perf_counter()
            writer.submit(context, work, engine, step, {}, (), info={"step": step}, metrics={}, last=False)
            stalls.append(time.perf_counter() - began)
            writer.wait()
            rates.append(size / (time.perf_counter() - began))
            manifest = store.artifacts.get(work.key_at(step))
            assert manifest is not None
            blobs = [store.objects.local_path(blob.path) for blob in manifest.blobs]
            began = time.perf_counter()
            for index, path in enumerate(blobs):
                assert path is not None
                store.objects.upload(f"blobs/raw/{step}/{index}", path)
            raw.append(size / (time.perf_counter() - began))
    memcpy = statistics.median(memcpys)
    print(f"state            {size / 1e6:8.0f} MB")
    print(f"host memcpy      {memcpy * 1e3:8.1f} ms")
    print(f"first stalls     {stalls[0] * 1e3:8.1f} ms, {stalls[1] * 1e3:.1f} ms (fresh buffers)")
    print(f"stall            {statistics.median(stalls[2:]) * 1e3:8.1f} ms")
    print(f"stall / memcpy   {statistics.median(stalls[2:]) / memcpy:8.2f}")
    print(
        f"to the store     {statistics.median(rates) / 1e6:8.0f} MB/s, bare client {statistics.median(raw) / 1e6:.0f}"
    )


if __name__ == "__main__":
    main()
