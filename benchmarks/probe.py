"""What probing costs: `python benchmarks/probe.py [--rounds 7]`.

A probe's pass over a set of tokens against a plain forward pass of the same model over the same tokens, in turn in one
process, by CPU time; expert-output similarity is left out (it runs all experts, on at most 2,048 tokens). Then the
counters alone at 64 experts in 32 layers, and how their memory grows with the number of tokens: not at all.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jobs.models.backbones import CausalLM
from jobs.models.building import build_model
from jobs.probe.accumulate import RoutingTotals
from jobs.probe.collect import probe
from jobs.probe.sets import TokenBatch, routings_of, text_batches
from orchestrator.spec.model import ModelSpec, MoESpec

# hidden size, layers, experts, top-k, expert width
SHAPES = ((128, 4, 16, 2, 128), (128, 4, 64, 8, 32))
VOCABULARY, LENGTH, TOKENS = 4096, 256, 8192
EXPERTS, LAYERS, TOP_K, BATCH, ALL_TOKENS = 64, 32, 8, 4096, 10_000_000


def model_of(hidden: int, layers: int, experts: int, top_k: int, width: int) -> CausalLM:
    """Return a model with random weights."""
    torch.manual_seed(0)
    moe = MoESpec(num_experts=experts, top_k=top_k, expert_width=width)
    heads = hidden // 32
    spec = ModelSpec(hidden_size=hidden, num_layers=layers, num_heads=heads, num_kv_heads=heads, moe=moe)
    return build_model(spec, VOCABULARY).eval()


def cpu_seconds(action: Callable[[], object]) -> float:
    """Return the CPU time of a call."""
    began = time.process_time()
    action()
    return time.process_time() - began


def plain(model: CausalLM, batches: list[TokenBatch]) -> None:
    """Run the forward pass that a probe runs, and throw its records away."""
    with torch.inference_mode():
        for batch in batches:
            routings_of(model, batch)


def ratios(model: CausalLM, batches: list[TokenBatch], rounds: int) -> list[float]:
    """Return probe / plain of every round, after one of each to warm up."""
    plain(model, batches)
    probe(model, {"heldout": batches})
    return [
        cpu_seconds(lambda: probe(model, {"heldout": batches})) / cpu_seconds(lambda: plain(model, batches))
        for _ in range(rounds)
    ]


def count(totals: RoutingTotals, tokens: int) -> None:
    """Stream random routing of all layers through the counters."""
    rng = np.random.default_rng(0)
    indices = np.argsort(rng.random((BATCH, EXPERTS)), axis=-1)[:, :TOP_K]
    weights, scores = np.full((BATCH, TOP_K), 1 / TOP_K, np.float32), rng.random((BATCH, EXPERTS)).astype(np.float32)
    for _ in range(max(1, tokens // BATCH)):
        for layer in range(LAYERS):
            totals.update(layer, indices, weights_Tk=weights, scores_TN=scores)


def peak_mb(tokens: int) -> float:
    """Return the peak of the memory that counting `tokens` tokens takes, in MB."""
    tracemalloc.start()
    count(RoutingTotals(LAYERS, EXPERTS), tokens)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 1e6


def main() -> None:
    """Print one line a shape, then time and memory of the counters."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for shape in SHAPES:
        stream = np.random.default_rng(0).integers(0, VOCABULARY, TOKENS)
        batches = list(text_batches(stream, LENGTH, 0, 0, None, "cpu"))
        found = ratios(model_of(*shape), batches, arguments.rounds)
        hidden, layers, experts, top_k, _ = shape
        name = f"hidden {hidden}, {layers} layers, {top_k} of {experts} experts"
        print(f"probe / plain forward, {name}: {statistics.median(found):.3f} (least {min(found):.3f})", flush=True)
    totals, some = RoutingTotals(LAYERS, EXPERTS), 4 * BATCH
    took = cpu_seconds(lambda: count(totals, some))
    whole = took / some * ALL_TOKENS / 3600
    each = f"{took / some * 1e6:.0f} us a token"
    print(f"counters, {EXPERTS} experts x {LAYERS} layers: {each}, {whole:.1f} h for 10 M tokens")
    print(f"peak memory: {peak_mb(BATCH):.1f} MB for {BATCH} tokens, {peak_mb(some):.1f} MB for {some}")


if __name__ == "__main__":
    main()
